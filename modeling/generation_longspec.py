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
from .graphs_longspec import Graphs, Phase, resolve_graphs
from .interface_longspec import Round, attending, switched
from .prefill_longspec import PER_TOKEN, Start, make_cache, prefill
from .rope_switch_longspec import RopeSwitch
from .sampling_longspec import IMPOSSIBLE
from .target_longspec import BoundTarget
from .text_longspec import Text
from .tree_longspec import TokenTree, ancestor_mask, node_depths
from .verification_longspec import Steps, Verified, Walk, accept, accept_step_by_step, walk

logger = logging.get_logger(__name__)


@dataclass
class LongSpecOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with `return_dict_in_generate`, and besides:

    accept_lengths: for each row, the number of tokens each round emitted; the prefill's own token is in none of them.
    phase_seconds: seconds spent in prefill, grow, verify, accept and commit, and by the host between the phases of
        rounds, if `draft.config.profile` is set.
    """

    accept_lengths: list[list[int]] | None = None
    phase_seconds: dict[str, float] | None = None


class Roots(NamedTuple):
    """The newest token of each row (B,), its position, and whether the row has stopped: on the device, kept up to date
    in place."""

    tokens: Tensor
    positions: Tensor
    stopped: Tensor

    @classmethod
    def of(cls, text: Text, positions: Tensor) -> Roots:
        newest, stopped = (torch.tensor(values, device=positions.device) for values in (text.newest, text.stopped))
        return cls(newest, positions.clone(), stopped)

    def update(self, text: Text) -> None:
        """To what the host knows of the text; it does not know positions."""
        self.tokens.copy_(torch.tensor(text.newest))
        self.stopped.copy_(torch.tensor(text.stopped))


class Call(NamedTuple):
    """What all rounds of a call have in common.

    stump: the trees of a draft that guesses nothing; None if it does.
    """

    target: PreTrainedModel
    text: Text
    cache: SpeculativeCache
    generator: LongSpecCandidateGenerator
    backend: Backend
    rope_switch: RopeSwitch
    clock: PhaseClock
    start: Start
    roots: Roots
    stump: TokenTree | None


class Phases(NamedTuple):
    """The phases of a round that are work of the device alone, as the functions of these names below."""

    grow: Phase
    verify: Phase
    find_paths: Phase
    commit: Phase


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
    inputs_tensor: Tensor | None = None,
    assistant_model: Any = None,
    assistant_tokenizer: Any = None,
    tokenizer: Any = None,
    **model_kwargs: Any,
) -> LongSpecOutput | Tensor:
    """Write what `target` alone would write, several tokens per forward; `generate` calls this for LongSpec drafts.

    input_ids: (B, L) prompts. Returns (B, L + new) ids, or a `LongSpecOutput` with `return_dict_in_generate`.
    The four behind `synced_gpus` come from `generate` and are of no use here; they are named since `model_kwargs` is
    what the target's forward gets, and accelerate's hooks move all of that, a draft too, to the device of each layer.
    Raises `ValueError` for what speculation cannot serve, before any work is done.
    """
    with ended_on_error(streamer):
        check_inputs(input_ids, generation_config, model_kwargs)
        bound = draft.bind(target)
        backend = choose_backend(draft, target, bound)
        graphs = resolve_graphs(draft.config.cuda_graphs, target, bound.device, synced_gpus)
        with torch.inference_mode(False):  # or a caller's inference mode would leave the draft unfit for training
            draft.to(device=bound.device, dtype=bound.dtype)
        clock = PhaseClock(draft.config.profile, bound.device)
        rope_switch = RopeSwitch(target, model_kwargs)
        if synced_gpus and rope_switch.last_short is not None:
            raise ValueError("LongSpec needs ranks that read alike, got synced_gpus with a target of longrope")
        past = model_kwargs["past_key_values"]
        text = Text(
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            streamer,
            nodes=1 + sum(draft.config.tree_shape),
            vocab=target.config.get_text_config(decoder=True).vocab_size,
            keeps_cache=generation_config.return_dict_in_generate or getattr(past, "_is_user_defined", False),
            together=rope_switch.last_short is not None,
        )
        cache = make_cache(target, draft, past, text, generation_config, model_kwargs, bound.device)
        generator = LongSpecCandidateGenerator(draft, bound, backend, text.batch)
        try:
            with clock("prefill"):
                cache.adopt(past)
                start = prefill(target, text, cache, generator, generation_config, model_kwargs)
            roots = Roots.of(text, start.root_positions)
            stump = None if generator.shape else TokenTree.from_root(roots.tokens)
            call = Call(target, text, cache, generator, backend, rope_switch, clock, start, roots, stump)
            with switched(target), target._optimize_model_for_decode():
                accept_lengths = decode(call, graphs, synced_gpus)
        finally:
            graphs.free()
            text.rewind_noise()
            cache.abandon()
            cache.hand_back(cache.past)
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return text.sequences
    return LongSpecOutput(
        sequences=text.sequences,
        **text.records.as_dict(),
        past_key_values=cache.past,
        accept_lengths=accept_lengths,
        phase_seconds=dict(clock.seconds) if draft.config.profile else None,
    )


def decode(call: Call, graphs: Graphs, synced_gpus: bool) -> list[list[int]]:
    """Rounds until every row is finished. Returns the number of tokens that each round wrote of each row's text."""
    target, text, cache = call.target, call.text, call.cache
    cache.on_device = graphs.captures
    phases = Phases(*(graphs.phase(run) for run in (grow, verify, find_paths, commit)))
    accept_lengths: list[list[int]] = [[] for _ in range(text.batch)]
    call.clock.restart()
    # under synced_gpus a rank that has finished goes on with rounds that write nothing
    while target._has_unfinished_sequences(text.finished, synced_gpus, device=text.device):
        if cache.make_room():
            graphs.forget()
        stopped = text.stopped
        counts = rebuild(call) if call.rope_switch.drops_cache(text, cache) else decode_round(call, phases)
        if text.stopped != stopped:
            call.roots.update(text)
        for lengths, count, padding in zip(accept_lengths, counts, stopped, strict=True):
            if count and not padding:
                lengths.append(count)
    return accept_lengths


def decode_round(call: Call, phases: Phases) -> list[int]:
    """Grow, verify, accept, commit. Returns the number of tokens that each row wrote; a row may rest."""
    text, cache, clock = call.text, call.cache, call.clock
    with clock("grow"):
        tree = phases.grow(call) if call.stump is None else call.stump
    with clock("verify"):
        verified = phases.verify(call, tree)
    paths = [[0] if room else [] for room in text.room()]
    found, known = None, None
    try:
        if text.by_tree:
            with clock("accept"):
                picks = None if text.by_argmax else text.pick_tree(verified.logits, verified.depths, tree.levels)
                found = phases.find_paths(call, tree, verified, None if picks is None else picks.tokens)
                known = found.on_host()
            accept(known, verified, picks, text, paths)
        else:
            with clock("accept"):
                accept_step_by_step(tree, verified, text, paths)
    finally:  # also when a user's processor, criterion or streamer raises: the cache keeps up with the text
        counts = [len(path) for path in paths]
        if found is not None and known is not None and counts == [row[-1] for row in known]:
            steps = found.steps  # as the device has them
        else:
            steps = Steps.of(paths, text.newest, tree.levels, tree.parents.device)
        with clock("commit"):
            phases.commit(call, tree, steps)
            cache.committed(counts)
    return counts


def rebuild(call: Call) -> list[int]:
    """A step of plain `generate` that reads all of the text anew; see `RopeSwitch`."""
    text, roots = call.text, call.roots
    outputs = call.rope_switch.rebuild(text, call.cache)
    read = text.sequences[:, -1:]
    text.emit(list(range(text.batch)), outputs.logits[:, -1], outputs.hidden_states)
    call.generator.advance(read, roots.positions[:, None])
    roots.positions.add_(1)
    roots.update(text)
    return [1] * text.batch


def grow(call: Call) -> TokenTree:
    """A tree below each root; of padding in the rows that have stopped, if padding follows there."""
    roots = call.roots
    levels = call.rope_switch.levels(roots.positions, call.cache)
    tree = call.generator.grow(roots.tokens, roots.positions, call.cache, levels)
    return tree if call.text.padding is None else tree.forced(roots.stopped, call.text.padding)


def verify(call: Call, tree: TokenTree) -> Verified:
    """One target forward over the trees. The cache is left inside the round."""
    target, cache = call.target, call.cache
    ancestors = ancestor_mask(tree.parents, tree.levels)
    depths = node_depths(ancestors)
    nodes = tree.tokens.shape[1]
    axes, extras = call.start.axes, call.start.extras
    extras = {name: value.expand(-1, nodes) if name in PER_TOKEN else value for name, value in extras.items()}
    positions = call.roots.positions[:, None] + depths
    cache.begin_round(depths)
    state = Round(cache, ancestors, call.backend, seen=set())
    with attending(state):
        outputs = target(
            input_ids=tree.tokens,
            position_ids=positions if axes is None else positions + axes[:, :, None],
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **extras,
        )
    expected = set(range(len(cache.layers)))
    if state.seen != expected:
        raise ValueError(
            f"{type(target).__name__} does not follow transformers' attention interface: expected it to attend "
            f"through it in layers {sorted(expected)}, it did in {sorted(state.seen)}"
        )
    return Verified(ancestors, depths, outputs.logits, outputs.hidden_states)


def find_paths(call: Call, tree: TokenTree, verified: Verified, picks: Tensor | None) -> Walk:
    """How far each tree agrees with what is picked (B, T) behind its nodes: the largest logits if nothing else."""
    picks = verified.logits.argmax(dim=-1) if picks is None else picks
    picks = picks.to(tree.parents.device)
    if call.text.padding is not None:
        picks = picks.masked_fill(call.roots.stopped[:, None] & (picks != IMPOSSIBLE), call.text.padding)
    return walk(tree, verified.ancestors, verified.depths, picks)


def commit(call: Call, tree: TokenTree, steps: Steps) -> None:
    """Keep what a round accepted in both caches, and move the roots on."""
    path, counts, newest = steps
    roots = call.roots
    if call.stump is None:
        step = torch.arange(path.shape[1], device=path.device)
        call.generator.advance(tree.tokens.gather(1, path), roots.positions[:, None] + step, step < counts[:, None])
    roots.tokens.copy_(newest)
    roots.positions.add_(counts)
    call.cache.commit(path, counts)  # last: once a ring has moved on, nothing may fail before it is `committed`


def choose_backend(draft: Any, target: PreTrainedModel, bound: BoundTarget) -> Backend:
    softcap = getattr(target.config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    backend = resolve_backend(draft.config.attention_backend, bound.device, draft.config.head_dim, softcap)
    logger.info(f"LongSpec verifies with the {backend.name!r} attention backend")
    return backend
