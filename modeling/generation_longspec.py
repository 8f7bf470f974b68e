"""The decoding loop: what `target.generate(assistant_model=draft)` runs.

A round: grow a tree, verify it in one target forward, accept a path, commit it. Knows the draft by its methods only.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import logging

from .attention_longspec import Backend, resolve_backend
from .cache_longspec import SpeculativeCache
from .candidate_generator_longspec import LongSpecCandidateGenerator
from .checks_longspec import check_inputs, check_prefix
from .interface_longspec import Round, attending, switched
from .rope_switch_longspec import RopeSwitch
from .target_longspec import BoundTarget
from .tree_longspec import TokenTree, ancestor_mask, node_depths
from .verification_longspec import Text, accept

logger = logging.get_logger(__name__)

HEADROOM = 512  # tokens a call makes room for beyond its prompt before the cache has to grow


@dataclass
class LongSpecOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with `return_dict_in_generate`, and besides:

    accept_lengths: for each row, the number of tokens each round emitted; the prefill's own token is in none of them.
    phase_seconds: seconds spent in prefill, grow, verify, accept and commit, if `draft.config.profile` is set.
    """

    accept_lengths: list[list[int]] | None = None
    phase_seconds: dict[str, float] | None = None


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
    check_inputs(input_ids, generation_config, synced_gpus, model_kwargs)
    bound = draft.bind(target)
    backend = choose_backend(draft, target, bound)
    with torch.inference_mode(False):  # or a caller's inference mode would leave the draft unfit for training
        draft.to(device=bound.device, dtype=bound.dtype)
    clock = PhaseClock(draft.config.profile, bound.device)
    text = Text(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
    past = model_kwargs["past_key_values"]
    cache = make_cache(target, draft, past, input_ids, generation_config, model_kwargs)
    generator = LongSpecCandidateGenerator(draft, bound, backend, batch=1)
    rope_switch = RopeSwitch(target, model_kwargs)
    accept_lengths: list[int] = []
    try:
        with clock("prefill"):
            cache.adopt(past)
            root_position, extras = prefill(target, text, cache, generator, generation_config, model_kwargs)
        with switched(target), target._optimize_model_for_decode():
            while not text.finished:
                accepted = decode_round(
                    target, text, root_position, cache, generator, backend, rope_switch, clock, extras
                )
                root_position = root_position + accepted
                accept_lengths.append(accepted)
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


def decode_round(
    target: PreTrainedModel,
    text: Text,
    root_position: Tensor,
    cache: SpeculativeCache,
    generator: LongSpecCandidateGenerator,
    backend: Backend,
    rope_switch: RopeSwitch,
    clock: PhaseClock,
    extras: dict[str, Any],
) -> int:
    """Grow, verify, accept, commit. Returns the number of tokens emitted, at least one.

    root_position: (1,), where the newest token of `text` stands; extras: see `step_extras`.
    """
    if rope_switch.drops_cache(text.ids, cache):
        text.emit(rope_switch.rebuild(text.ids, cache))
        generator.advance(text.ids[:, -2:-1], root_position[:, None])
        return 1
    with clock("grow"):
        tree = generator.grow(text.last_token, root_position, cache, rope_switch.levels(root_position, cache))
    with clock("verify"):
        logits = verify(target, tree, root_position, cache, backend, extras)
    path = [0]
    try:
        with clock("accept"):
            accept(tree, logits, text, path)
    finally:  # also when a user's processor, criterion or streamer raises: the cache keeps up with the text
        with clock("commit"):
            commit(tree, path, root_position, cache, generator)
    return len(path)


def prefill(
    target: PreTrainedModel,
    text: Text,
    cache: SpeculativeCache,
    generator: LongSpecCandidateGenerator,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> tuple[Tensor, dict[str, Any]]:
    """Read the prompt as plain `generate` does, emit its first token, fill the draft's window.

    Returns the position (1,) of that token, the first root, and what every step passes on (see `step_extras`).
    """
    model_kwargs["past_key_values"] = cache
    outputs = target._prefill(
        text.ids, generation_config, model_kwargs, is_first_iteration=not generation_config.is_assistant
    )
    if outputs.past_key_values is not cache:
        # phi3 drops the cache it is given when a prompt reaches beyond its rope switch
        cache.drop(outputs.past_key_values)
        cache.adopt(outputs.past_key_values)
    bound = generator.target
    check_prefix(cache.layers[bound.layer], generator.draft.config)
    positions = model_kwargs.get("position_ids")
    last = cache.length - cache.start - 1 if positions is None else int(positions[0, -1])
    window = slice(-min(generator.draft.config.window, cache.length - cache.start), None)
    if (embeds := model_kwargs.get("inputs_embeds")) is not None:
        embeds = bound.scale(embeds[:, window])
    else:
        embeds = bound.embed(text.ids[:, window].to(bound.device))
    generator.prefill(embeds, last)
    text.emit(outputs.logits[:, -1])
    return torch.full((1,), last + 1, device=bound.device), step_extras(target, text.ids, outputs, model_kwargs)


def step_extras(target: PreTrainedModel, ids: Tensor, outputs: Any, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """What plain `generate` passes to every forward of one token beside the token, its place and the cache.

    That is what a user passed for the target's own `forward`, and token types, which go on as the prompt's last.
    """
    cache = model_kwargs["past_key_values"]
    model_kwargs = target._update_model_kwargs_for_generation(outputs, dict(model_kwargs)) | {"past_key_values": cache}
    inputs = target.prepare_inputs_for_generation(ids, next_sequence_length=1, **model_kwargs)
    own = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "past_key_values"}
    own |= {"use_cache", "logits_to_keep", "return_dict"}
    return {name: value for name, value in inputs.items() if name not in own}


def verify(
    target: PreTrainedModel,
    tree: TokenTree,
    root_position: Tensor,
    cache: SpeculativeCache,
    backend: Backend,
    extras: dict[str, Any],
) -> Tensor:
    """One target forward over the tree: logits (1, T, vocab) of every node. The cache is left inside the round."""
    nodes = tree.tokens.shape[1]
    extras = {name: value.expand(-1, nodes) if "token_type" in name else value for name, value in extras.items()}
    ancestors = ancestor_mask(tree.parents, tree.levels)
    depths = node_depths(ancestors)
    cache.begin_round(depths)
    state = Round(cache, ancestors, backend, seen=set())
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


def commit(
    tree: TokenTree,
    path: list[int],
    root_position: Tensor,
    cache: SpeculativeCache,
    generator: LongSpecCandidateGenerator,
) -> None:
    """Keep the accepted path in both caches."""
    steps = tree.levels + 1
    padded = torch.tensor([path + [0] * (steps - len(path))], device=tree.tokens.device)
    counts = torch.tensor([len(path)], device=tree.tokens.device)
    cache.commit(padded, counts, len(path))
    step = torch.arange(steps, device=tree.tokens.device)
    generator.advance(tree.tokens.gather(1, padded), root_position[:, None] + step, step < counts[:, None])


class PhaseClock:
    """Seconds per phase of a call, if asked for: each phase then waits for the device at both ends."""

    def __init__(self, enabled: bool, device: torch.device):
        self.enabled, self.device = enabled, device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = self._now()
        try:
            yield
        finally:
            self.seconds[phase] += self._now() - began

    def _now(self) -> float:
        if self.enabled and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def choose_backend(draft: Any, target: PreTrainedModel, bound: BoundTarget) -> Backend:
    softcap = getattr(target.config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    backend = resolve_backend(draft.config.attention_backend, bound.device, draft.config.head_dim, softcap)
    logger.info(f"LongSpec verifies with the {backend.name!r} attention backend")
    return backend


def make_cache(
    target: PreTrainedModel,
    draft: Any,
    past: DynamicCache,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> SpeculativeCache:
    """An empty cache with room for the prompt, the first `HEADROOM` tokens of the answer and a tree."""
    embeds, mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
    prompt = past.get_seq_length() + (input_ids.shape[1] if embeds is None else embeds.shape[1])
    answer = max(generation_config.max_length - input_ids.shape[1], 0)
    tree_size = 1 + sum(draft.config.tree_shape)
    text_config: PreTrainedConfig = target.config.get_text_config(decoder=True)
    reserve = prompt + min(answer, HEADROOM) + tree_size
    cache = SpeculativeCache(text_config, past, reserve, tree_size, longest=prompt + answer + tree_size)
    if mask is not None:
        cache.hide_padding(mask)
    return cache
