"""The published LongSpec drafts and the format of their checkpoints (github.com/sail-sg/LongSpec).

A checkpoint is one decoder layer with the names of our own parameters, saved under the config of its *target*. Knows
names, shapes and configs; reads no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..modeling.configuration_longspec import LongSpecConfig

Shape = tuple[int, ...]


class PublishedDraft(NamedTuple):
    """A published draft; repo_id, target: Hub ids; folder: name of the draft's folder in `hub_configs/`."""

    repo_id: str
    target: str
    folder: str


PUBLISHED = tuple(
    PublishedDraft(f"sail/longspec-{name}", f"{owner}/{name}", name.lower())
    for owner, name in (
        ("lmsys", "vicuna-7b-v1.5-16k"),
        ("lmsys", "vicuna-13b-v1.5-16k"),
        ("lmsys", "longchat-7b-v1.5-32k"),
        ("lmsys", "longchat-13b-16k"),
        ("gradientai", "Llama-3-8B-Instruct-262k"),
        ("Qwen", "QwQ-32B-Preview"),
    )
)
WINDOW = 513  # keys: the reference's left edge of 512 tokens counts, and the token itself
# The model types that the format was written for.
FAMILIES = ("llama", "qwen2")
# The reference's cross-attention has the projections of a self-attention, but takes the target's keys and values.
# Older releases of transformers also save the constants of a rotary embedding.
UNUSED = frozenset(
    [f"cross_attn.{name}_proj.{kind}" for name in ("k", "v") for kind in ("weight", "bias")]
    + [f"{attention}.rotary_emb.inv_freq" for attention in ("self_attn", "cross_attn")]
)
# The fields in which the config beside a checkpoint must equal the target's config: all that the layer's shape and
# equations depend on.
SHARED = (
    "target_model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "hidden_act",
    "mlp_bias",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_parameters",
    "target_num_hidden_layers",
)
_LISTED = 24  # lines; an ordinary model's checkpoint has hundreds of names that a draft does not know


def published_draft(repo_id: str) -> PublishedDraft | None:
    """Return the published draft with this Hub id; None if it is none of the six."""
    return next((draft for draft in PUBLISHED if draft.repo_id == repo_id), None)


def draft_config(target_config: Any) -> LongSpecConfig:
    """Return the config of a published draft for a target with this config.

    The reference reads the target's last layer, attends to a token and the 512 before it, has no final norm and
    guesses a tree of 4 · 16 · 16 · 16 · 16, our default but for a CPU. Raises `ValueError` for model types without a
    published draft.
    """
    text = target_config.get_text_config(decoder=True)
    if text.model_type not in FAMILIES:
        raise ValueError(
            f"published drafts are for {' and '.join(FAMILIES)} models, got model type {text.model_type!r}"
        )
    return LongSpecConfig.from_target(
        target_config,
        target_layer=text.num_hidden_layers - 1,
        window=WINDOW,
        final_norm=False,
    )


def config_mismatches(published: LongSpecConfig, ours: LongSpecConfig) -> list[str]:
    """Return where the config beside a checkpoint differs from the target's, a line each.

    published, ours: the two configs as `draft_config` makes them.
    """
    pairs = [(name, _comparable(published, name), _comparable(ours, name)) for name in SHARED]
    return [f"{name}: draft has {theirs}, target has {own}" for name, theirs, own in pairs if theirs != own]


def weight_mismatches(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> list[str]:
    """Return what a checkpoint with these names and shapes lacks, or has beyond our layer, a line each.

    A name that is neither ours nor known to be unused would change what the layer computes, so it counts.
    """
    lines = [f"{name}: missing" for name in expected if name not in found]
    lines += [
        f"{name}: expected {expected[name]}, got {shape}"
        for name, shape in found.items()
        if name in expected and shape != expected[name]
    ]
    lines += [f"{name}: not known" for name in found if name not in expected and name not in UNUSED]
    rest = len(lines) - _LISTED
    return lines if rest <= 0 else [*lines[:_LISTED], f"and {rest} more"]


def _comparable(config: LongSpecConfig, name: str) -> Any:
    value = getattr(config, name)
    # "type" is the old name of "rope_type", and only some files have both
    return value if name != "rope_parameters" else {key: part for key, part in value.items() if key != "type"}
