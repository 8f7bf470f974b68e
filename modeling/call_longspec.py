"""Call: what all rounds of one call of `generate` have in common, and the roots that move on from round to round.

`make_cache` makes room; `read_prompt` reads the prompt as plain `generate` does, writes the first token and returns
the roots of the first round.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from .cache_longspec import SpeculativeCache
from .candidate_generator_longspec import LongSpecCandidateGenerator
from .engine_longspec import Backend, Engine
from .interface_longspec import CACHE, prefill, step_inputs
from .output_longspec import PhaseClock
from .rope_switch_longspec import RopeSwitch
from .sampling_longspec import Sampler
from .target_longspec import catching, check_cached
from .text_longspec import Text
from .tree_longspec import Level, TokenTree
from .verification_longspec import emit

HEADROOM = 512  # tokens that a call makes room for beyond its prompt before the cache has to grow


class Roots(NamedTuple):
    """The newest token of each row: on the device, kept up to date in place.

    stump: the roots alone as trees; positions: (B,), where the roots stand; axes: (axes, B), how far each axis of a
    target's positions (mrope) is from the last axis: behind a prompt that ends in an image, or where time is no whole
    number, the axes differ for ever; None with one axis. stopped: (B,) bool, whether the row has stopped; hidden:
    (B, hidden), the target's last hidden state at the token before the root, None for drafts that do not read it.
    """

    stump: TokenTree
    positions: Tensor
    axes: Tensor | None
    stopped: Tensor
    hidden: Tensor | None

    @classmethod
    def of(cls, text: Text, positions: Tensor, hidden: Tensor | None) -> Roots:
        """Make the roots of the first round, which stand at `positions` (B,) or (axes, B)."""
        device, alone = positions.device, positions.dim() == 1
        last = (positions if alone else positions[-1]).long().clone()  # one family has them in float
        stump = TokenTree(*Level.of_root(torch.tensor(text.newest, device=device)), levels=0)
        stopped = torch.tensor(text.stopped, device=device)
        return cls(stump, last, None if alone else positions - last, stopped, hidden)

    @property
    def tokens(self) -> Tensor:
        """The tokens (B,) of the roots, a view."""
        return self.stump.tokens[:, 0]

    def follow(self, text: Text) -> None:
        """Take over from the host the newest tokens and which rows have stopped; the host does not know positions."""
        self.tokens.copy_(torch.tensor(text.newest))
        self.stopped.copy_(torch.tensor(text.stopped))


class Call(NamedTuple):
    """What all rounds of a call have in common.

    roots: moved on in place by each round; extras: unusual inputs of every forward of the target, see `step_inputs`.
    """

    target: PreTrainedModel
    text: Text
    sampler: Sampler
    cache: SpeculativeCache
    generator: LongSpecCandidateGenerator
    backend: Backend
    engine: Engine
    rope_switch: RopeSwitch
    clock: PhaseClock
    roots: Roots
    extras: dict[str, Any]


def make_cache(
    target: PreTrainedModel,
    draft: Any,
    text: Text,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    device: torch.device,
) -> SpeculativeCache:
    """Make an empty cache with room for the prompt, the first `HEADROOM` tokens of the answer and a tree.

    device: where most layers lie.
    """
    past: DynamicCache = model_kwargs[CACHE]
    embeds, mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
    prompt = past.get_seq_length() + (text.prompt if embeds is None else embeds.shape[1])
    answer = max(generation_config.max_length - text.prompt, 0)
    tree_size = 1 + sum(draft.config.tree_on(device))
    text_config = target.config.get_text_config(decoder=True)
    reserve = prompt + min(answer, HEADROOM) + tree_size
    longest = prompt + answer + tree_size
    rows = {"batch": text.batch, "lead": 0 if text.together else text.lead}
    cache = SpeculativeCache(text_config, past, reserve, tree_size, longest, **rows)
    if mask is not None:
        cache.hide_padding(mask.to(device))
    return cache


def read_prompt(
    target: PreTrainedModel,
    text: Text,
    sampler: Sampler,
    cache: SpeculativeCache,
    generator: LongSpecCandidateGenerator,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> tuple[Roots, dict[str, Any]]:
    """Read the prompt, write the first token, fill the draft's window. Returns the roots and `Call.extras`."""
    draft, bound = generator.draft, generator.target
    prompt = text.sequences
    reads_hidden = bool(generator.shape) and draft.config.target_hidden_state
    with catching(target, reads_hidden) as caught:
        outputs = prefill(target, prompt, cache, generation_config, model_kwargs)
    if (other := getattr(outputs, CACHE)) is not cache:
        # phi3 drops the cache it is given when a prompt reaches beyond its rope switch
        cache.restart(other)
        cache.take_over()
    check_cached(cache.layers[bound.layer], draft.config)
    emit(text, sampler, list(range(text.batch)), outputs.logits[:, -1], outputs.hidden_states)
    positions, extras = step_inputs(target, text.sequences, outputs, model_kwargs)
    starts = torch.tensor(cache.starts, device=bound.device)
    if positions is None:  # a target that counts for itself counts what the cache holds, padding too
        positions = torch.full_like(starts, cache.length)
    positions = positions.to(bound.device)
    hidden = None if caught is None else caught.of_last_token().to(bound.device)
    roots = Roots.of(text, positions.expand(*positions.shape[:-1], text.batch), hidden)
    window = slice(-draft.config.window, None)
    if (embeds := model_kwargs.get("inputs_embeds")) is not None:
        embeds = bound.scale(embeds[:, window]).to(bound.device)
    else:
        ids, vocab = prompt[:, window].to(bound.device), draft.config.vocab_size
        embeds = bound.embed(ids.masked_fill(ids >= vocab, 0))  # some targets have no embedding for an image's tokens
    index = torch.arange(cache.length - embeds.shape[1], cache.length, device=bound.device)
    generator.fill_window(embeds, roots.positions - 1, index >= starts[:, None])
    return roots, extras
