"""The decoding loop: what `target.generate(assistant_model=draft)` runs.

A round: grow a tree, verify it in one target forward, accept a path, commit it. Knows the draft by its methods only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from .backends_longspec import Backend, Demand, resolve_backend
from .call_longspec import Call, Roots, settle
from .candidate_generator_longspec import LongSpecCandidateGenerator
from .checks_longspec import check_inputs, ended_on_error
from .clock_longspec import PhaseClock
from .compiled_longspec import compiled_layers
from .graphs_longspec import Graphs, may_capture
from .hidden_state_longspec import catching
from .interface_longspec import Round, attending, switched
from .prefill_longspec import PER_TOKEN, make_cache, prefill
from .records_longspec import LongSpecOutput
from .rope_switch_longspec import RopeSwitch
from .sampling_longspec import IMPOSSIBLE
from .target_longspec import BoundTarget
from .text_longspec import Text
from .tree_longspec import TokenTree, ancestor_mask, node_depths
from .verification_longspec import Steps, Verified, Walk, accept, accept_step_by_step, walk
from .workspace_longspec import Workspace

logger = logging.get_logger(__name__)


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
        captures = may_capture(draft.config.cuda_graphs, target, bound.device, synced_gpus)
        with torch.inference_mode(False):  # or a caller's inference mode would leave the draft unfit for training
            draft.to(device=bound.device, dtype=bound.dtype)
        clock = PhaseClock(draft.config.profile, bound.device)
        rope_switch = RopeSwitch(target, model_kwargs)
        if synced_gpus and rope_switch.last_short is not None:
            raise ValueError("LongSpec needs ranks that read alike, got synced_gpus with a target of longrope")
        past = model_kwargs["past_key_values"]
        cache_is_returned = generation_config.return_dict_in_generate or getattr(past, "_is_user_defined", False)
        text = Text(
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            streamer,
            nodes=1 + sum(draft.config.tree_shape),
            vocab=target.config.get_text_config(decoder=True).vocab_size,
            keeps_cache=cache_is_returned,
            together=rope_switch.last_short is not None,
        )
        workspace = draft.workspaces.take(bound.device)
        workspace.graphs.captures = captures
        cache = make_cache(target, draft, past, text, generation_config, model_kwargs, bound.device)
        cache.borrow(workspace.lend())
        generator = LongSpecCandidateGenerator(draft, bound, backend, text.batch)
        try:
            with clock("prefill"):
                cache.adopt(past)
                start = prefill(target, text, cache, generator, generation_config, model_kwargs)
            roots, extras = settle(workspace, Roots.of(text, start), start.extras, cache, generator)
            call = Call(target, text, cache, generator, backend, rope_switch, clock, roots, extras)
            with switched(target), target._optimize_model_for_decode():
                accept_lengths = decode(call, workspace, synced_gpus)
        finally:
            text.rewind_noise()
            cache.abandon()
            if cache_is_returned:
                cache.hand_back(cache.past)
        if not cache_is_returned:  # nor has anything failed
            workspace.memory = cache.memory
            draft.workspaces.keep(workspace)
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return text.sequences
    return LongSpecOutput(
        sequences=text.sequences,
        **text.records.as_dict(),
        past_key_values=cache.past,
        accept_lengths=accept_lengths,
        phase_seconds=clock.seconds() if draft.config.profile else None,
    )


def decode(call: Call, workspace: Workspace, synced_gpus: bool) -> list[list[int]]:
    """Rounds until every row is finished. Returns the number of tokens that each round wrote of each row's text."""
    target, text, cache, graphs = call.target, call.text, call.cache, workspace.graphs
    cache.on_device = graphs.captures
    accept_lengths: list[list[int]] = [[] for _ in range(text.batch)]
    workspace.expect(call.mark if graphs.captures else None)
    # under synced_gpus a rank that has finished goes on with rounds that write nothing
    while target._has_unfinished_sequences(text.finished, synced_gpus, device=text.device):
        if cache.make_room() and graphs.captures:
            workspace.expect(call.mark)
        stopped = text.stopped
        counts = rebuild(call) if call.rope_switch.drops_cache(text, cache) else decode_round(call, graphs)
        if text.stopped != stopped:
            call.roots.update(text)
        for lengths, count, padding in zip(accept_lengths, counts, stopped, strict=True):
            if count and not padding:
                lengths.append(count)
    return accept_lengths


def decode_round(call: Call, graphs: Graphs) -> list[int]:
    """Grow, verify, accept, commit. Returns the number of tokens that each row wrote; a row may rest."""
    text, cache, clock = call.text, call.cache, call.clock
    with clock("grow"):
        tree = graphs.run(grow, call) if call.generator.shape else call.roots.stump
    with clock("verify"):
        verified = graphs.run(verify, call, tree)
    paths = [[0] if room else [] for room in text.room()]
    found, known = None, None
    try:
        if text.by_tree:
            with clock("accept"):
                picks = None if text.by_argmax else text.pick_tree(verified.logits, verified.depths, tree.levels)
                chosen = () if picks is None else (picks.tokens,)
                found = graphs.run(find_paths if chosen else find_greedy_paths, call, tree, verified, *chosen)
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
            graphs.run(commit, call, tree, steps, verified.hidden)
            cache.committed(counts)
    return counts


def rebuild(call: Call) -> list[int]:
    """A step of plain `generate` that reads all of the text anew; see `RopeSwitch`."""
    text, roots = call.text, call.roots
    with catching(call.target, roots.hidden is not None) as caught:
        outputs = call.rope_switch.rebuild(text, call.cache)
    read = text.sequences[:, -1:]
    text.emit(list(range(text.batch)), outputs.logits[:, -1], outputs.hidden_states)
    call.generator.advance(read, roots.positions[:, None])
    if caught is not None and roots.hidden is not None:
        roots.hidden.copy_(caught.of_last_token())
    roots.positions.add_(1)
    roots.update(text)
    return [1] * text.batch


def grow(call: Call) -> TokenTree:
    """A tree below each root; of padding in the rows that have stopped, if padding follows there."""
    roots = call.roots
    levels = call.rope_switch.levels(roots.positions, call.cache)
    tree = call.generator.grow(roots.tokens, roots.positions, call.cache, levels, roots.hidden)
    return tree if call.text.padding is None else tree.forced(roots.stopped, call.text.padding)


def verify(call: Call, tree: TokenTree) -> Verified:
    """One target forward over the trees. The cache is left inside the round."""
    target, cache = call.target, call.cache
    ancestors = ancestor_mask(tree.parents, tree.levels)
    depths = node_depths(ancestors)
    nodes = tree.tokens.shape[1]
    axes = call.roots.axes
    extras = {name: value.expand(-1, nodes) if name in PER_TOKEN else value for name, value in call.extras.items()}
    positions = call.roots.positions[:, None] + depths
    cache.begin_round(depths)
    state = Round(cache, ancestors, call.backend, seen=set())
    compiled = compiled_layers(target, call.generator.draft.config.compile_target)
    with attending(state), compiled, catching(target, call.roots.hidden is not None) as caught:
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
    hidden = None if caught is None else caught.every().to(call.roots.positions.device)
    return Verified(ancestors, depths, outputs.logits, outputs.hidden_states, hidden)


def find_greedy_paths(call: Call, tree: TokenTree, verified: Verified) -> Walk:
    return find_paths(call, tree, verified, verified.logits.argmax(dim=-1))


def find_paths(call: Call, tree: TokenTree, verified: Verified, picks: Tensor) -> Walk:
    """How far each tree agrees with what is picked (B, T) behind its nodes."""
    picks = picks.to(tree.parents.device)
    if call.text.padding is not None:
        picks = picks.masked_fill(call.roots.stopped[:, None] & (picks != IMPOSSIBLE), call.text.padding)
    return walk(tree, verified.ancestors, verified.depths, picks)


def commit(call: Call, tree: TokenTree, steps: Steps, hidden: Tensor | None) -> None:
    """Keep what a round accepted in both caches, and move the roots on; hidden: `Verified.hidden`."""
    path, counts, newest = steps
    roots = call.roots
    if hidden is not None and roots.hidden is not None:
        last = path.gather(1, (counts - 1).clamp(min=0)[:, None])
        states = hidden.gather(1, last[:, :, None].expand(-1, -1, hidden.shape[2]))[:, 0]
        roots.hidden.copy_(torch.where(counts[:, None] > 0, states, roots.hidden))
    if call.generator.shape:
        step = torch.arange(path.shape[1], device=path.device)
        call.generator.advance(tree.tokens.gather(1, path), roots.positions[:, None] + step, step < counts[:, None])
    roots.tokens.copy_(newest)
    roots.positions.add_(counts)
    # last: once a ring has moved on, nothing may fail before it is `committed`
    call.cache.commit(path, counts, call.backend.move)


def choose_backend(draft: Any, target: PreTrainedModel, bound: BoundTarget) -> Backend:
    softcap = getattr(target.config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    demand = Demand(bound.device, bound.dtype, draft.config.head_dim, softcap)
    backend = resolve_backend(draft.config.attention_backend, demand)
    logger.info(f"LongSpec verifies with the {backend.name!r} attention backend")
    return backend
