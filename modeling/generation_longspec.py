"""The decoding loop: what `target.generate(assistant_model=draft)` runs.

A round: grow a tree, verify it in one target forward, accept a path, commit it. Knows the draft by its methods only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import logging

from .attention_longspec import Backend, resolve_backend
from .cache_longspec import SpeculativeCache
from .candidate_generator_longspec import LongSpecCandidateGenerator
from .checks_longspec import check_inputs, ended_on_error
from .clock_longspec import PhaseClock
from .interface_longspec import Round, attending, switched
from .prefill_longspec import make_cache, prefill
from .rope_switch_longspec import RopeSwitch
from .target_longspec import BoundTarget
from .tree_longspec import TokenTree, ancestor_mask, node_depths
from .verification_longspec import Text, accept

logger = logging.get_logger(__name__)


@dataclass
class LongSpecOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with `return_dict_in_generate`, and besides:

    accept_lengths: for each row, the number of tokens each round emitted; the prefill's own token is in none of them.
    phase_seconds: seconds spent in prefill, grow, verify, accept and commit, if `draft.config.profile` is set.
    """

    accept_lengths: list[list[int]] | None = None
    phase_seconds: dict[str, float] | None = None


class Call(NamedTuple):
    """What all rounds of a call have in common; `extras`: what each forward of the target gets besides its tokens."""

    target: PreTrainedModel
    text: Text
    cache: SpeculativeCache
    generator: LongSpecCandidateGenerator
    backend: Backend
    rope_switch: RopeSwitch
    clock: PhaseClock
    extras: dict[str, Any]


@torch.no_grad()
def assisted_decoding(
    draft: Any,
    target: PreTrainedModel,
    input_ids: Tensor,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    streamer: Any = None,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> LongSpecOutput | Tensor:
    """Write what `target` alone would write, several tokens per forward; `generate` calls this for LongSpec drafts.

    input_ids: (1, L) prompt. Returns (1, L + new) ids, or a `LongSpecOutput` with `return_dict_in_generate`.
    Raises `ValueError` for what speculation cannot serve, before any work is done.
    """
    with ended_on_error(streamer):
        check_inputs(input_ids, generation_config, model_kwargs)
        bound = draft.bind(target)
        backend = choose_backend(draft, target, bound)
        with torch.inference_mode(False):  # or a caller's inference mode would leave the draft unfit for training
            draft.to(device=bound.device, dtype=bound.dtype)
        clock = PhaseClock(draft.config.profile, bound.device)
        text = Text(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
        past = model_kwargs["past_key_values"]
        cache = make_cache(target, draft, past, input_ids, generation_config, model_kwargs, bound.device)
        generator = LongSpecCandidateGenerator(draft, bound, backend, batch=1)
        accept_lengths: list[int] = []
        try:
            with clock("prefill"):
                cache.adopt(past)
                root_position, extras = prefill(target, text, cache, generator, generation_config, model_kwargs)
            call = Call(target, text, cache, generator, backend, RopeSwitch(target, model_kwargs), clock, extras)
            with switched(target), target._optimize_model_for_decode():
                while target._has_unfinished_sequences(text.finished, synced_gpus, device=text.ids.device):
                    if text.finished:
                        idle_round(call, root_position)
                        continue
                    accept_lengths.append(decode_round(call, root_position))
                    root_position = root_position + accept_lengths[-1]
        finally:
            cache.abandon()
            cache.hand_back(cache.past)
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return text.ids
    return LongSpecOutput(
        sequences=text.ids,
        scores=text.scores,
        logits=text.logits,
        past_key_values=cache.past,
        accept_lengths=[accept_lengths],
        phase_seconds=dict(clock.seconds) if draft.config.profile else None,
    )


def decode_round(call: Call, root_position: Tensor) -> int:
    """Grow, verify, accept, commit. Returns the number of tokens emitted, at least one.

    root_position: (1,), where the newest token of the text stands.
    """
    text, cache, generator, rope_switch, clock = call.text, call.cache, call.generator, call.rope_switch, call.clock
    if rope_switch.drops_cache(text.ids, cache):
        text.emit(rope_switch.rebuild(text.ids, cache))
        generator.advance(text.ids[:, -2:-1], root_position[:, None])
        return 1
    with clock("grow"):
        tree = generator.grow(text.last_token, root_position, cache, rope_switch.levels(root_position, cache))
    with clock("verify"):
        logits = verify(call, tree, root_position)
    path = [0]
    try:
        with clock("accept"):
            accept(tree, logits, text, path)
    finally:  # also when a user's processor, criterion or streamer raises: the cache keeps up with the text
        with clock("commit"):
            commit(call, tree, path, root_position)
    return len(path)


def idle_round(call: Call, root_position: Tensor) -> None:
    """The forwards of a round, for the sake of other ranks that still decode (`synced_gpus`); nothing is kept."""
    tree = call.generator.grow(call.text.last_token, root_position, call.cache)
    verify(call, tree, root_position)
    call.cache.abandon()
    call.generator.advance(tree.tokens[:, :1], root_position[:, None])


def verify(call: Call, tree: TokenTree, root_position: Tensor) -> Tensor:
    """One target forward over the tree: logits (1, T, vocab) of every node. The cache is left inside the round."""
    target, cache = call.target, call.cache
    nodes = tree.tokens.shape[1]
    extras = {name: value.expand(-1, nodes) if "token_type" in name else value for name, value in call.extras.items()}
    ancestors = ancestor_mask(tree.parents, tree.levels)
    depths = node_depths(ancestors)
    cache.begin_round(depths)
    state = Round(cache, ancestors, call.backend, seen=set())
    with attending(state):
        outputs = target(
            input_ids=tree.tokens,
            position_ids=root_position[:, None] + depths,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **extras,
        )
    expected = {index for index, layer in enumerate(cache.layers) if layer in cache.owners}
    if state.seen != expected:
        raise ValueError(
            f"{type(target).__name__} does not follow transformers' attention interface: expected it to attend "
            f"through it in layers {sorted(expected)}, it did in {sorted(state.seen)}"
        )
    return outputs.logits


def commit(call: Call, tree: TokenTree, path: list[int], root_position: Tensor) -> None:
    """Keep the accepted path in both caches."""
    steps = tree.levels + 1
    padded = torch.tensor([path + [0] * (steps - len(path))], device=tree.tokens.device)
    counts = torch.tensor([len(path)], device=tree.tokens.device)
    call.cache.commit(padded, counts, len(path))
    step = torch.arange(steps, device=tree.tokens.device)
    call.generator.advance(tree.tokens.gather(1, padded), root_position[:, None] + step, step < counts[:, None])


def choose_backend(draft: Any, target: PreTrainedModel, bound: BoundTarget) -> Backend:
    softcap = getattr(target.config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    backend = resolve_backend(draft.config.attention_backend, bound.device, draft.config.head_dim, softcap)
    logger.info(f"LongSpec verifies with the {backend.name!r} attention backend")
    return backend
