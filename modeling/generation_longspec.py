"""The decoding loop: what `target.generate(assistant_model=draft)` runs.

A round: grow a tree, verify it in one target forward, accept a path, commit the path. The engine runs the phases that
work on the device alone. Knows the draft by its methods only.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation import BaseStreamer
from transformers.utils import logging

from .call_longspec import Call, make_cache, read_prompt, read_tree
from .candidate_generator_longspec import LongSpecCandidateGenerator
from .checks_longspec import check_inputs, ended_on_error
from .choice_longspec import Chooser, Outcome, ladder_of
from .copies_longspec import Report
from .engine_longspec import Backend, Demand
from .interface_longspec import CACHE, decoding, has_unfinished, is_user_defined
from .output_longspec import LongSpecOutput, PhaseClock
from .positions_longspec import Positions
from .sampling_longspec import Plan, Sampler
from .target_longspec import BoundTarget, catching
from .text_longspec import Text
from .tree_longspec import TokenTree, TreeForm
from .verification_longspec import (
    Accepted,
    RowWalk,
    Verified,
    Walk,
    accept,
    along_walk,
    emit,
    step_by_step,
    walk,
)

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
    """Write what `target` alone would write, several tokens a forward; `generate` calls this for LongSpec drafts.

    input_ids: (B, L) prompts. Returns (B, L + new) ids, or a `LongSpecOutput` with `return_dict_in_generate`.
    The four arguments behind `synced_gpus` come from `generate` and are of no use here; they are named since
    `model_kwargs` goes to the target's forward, and accelerate's hooks move all of that, a draft too, to each layer's
    device. Raises `ValueError` for what speculation cannot serve, before any work is done.
    """
    with ended_on_error(streamer), ExitStack() as call_ends:
        # 1. What cannot be served is refused.
        check_inputs(input_ids, generation_config, model_kwargs)
        bound = draft.bind(target)
        backend = choose_backend(draft, target, bound)
        ladder, config = ladder_of(draft.config, bound.device, synced_gpus), generation_config
        deepest, largest = (max(getattr(form, size) for form in ladder) for size in ("levels", "nodes"))
        positions = Positions(target, model_kwargs, config.max_length + deepest)
        if synced_gpus and positions.differ:
            raise ValueError(
                "LongSpec needs ranks that read alike, got synced_gpus with a text that may cross the end or the "
                "switch of the target's positions"
            )
        if positions.rereads:
            raise ValueError("expected use_cache=True with longrope across its switch, got use_cache=False")

        # 2. Text, sampler, cache and draft are made ready.
        draft = call_ends.enter_context(draft.placed(bound.device, bound.dtype))
        engine, clock = draft.take_engine(bound.device), PhaseClock(draft.config.profile, bound.device)
        returned = model_kwargs.get(CACHE)  # as plain `generate` would return it: none, dynamic or static
        asked = generation_config.return_dict_in_generate or is_user_defined(returned)
        returns_cache = returned is not None and asked
        if not (returns_cache or isinstance(returned, DynamicCache)):
            own = DynamicCache(config=target.config.get_text_config(decoder=True))
            model_kwargs |= {CACHE: own, "use_cache": True}
        do_sample, vocab = generation_config.do_sample, draft.config.vocab_size
        together = positions.by_length or streamer is not None
        # scores of each step are the processors' own, and what is no streamer may draw random numbers between ours
        alone = not config.output_scores and (streamer is None or isinstance(streamer, BaseStreamer))
        options = {"together": together, "can_draw": alone and engine.draws(logits_processor, input_ids.device)}
        plan = Plan.of(logits_processor, stopping_criteria, do_sample, len(input_ids), **options)
        sampler = Sampler(logits_processor, do_sample, plan, len(input_ids), input_ids.device)
        sizes = {"nodes": largest, "vocab": vocab}
        text = Text(input_ids, stopping_criteria, config, streamer, plan, **sizes, keeps_cache=returns_cache)
        cache = make_cache(target, text, generation_config, model_kwargs, largest, bound.device)
        engine.give_memory(cache)
        generator = LongSpecCandidateGenerator(draft, bound, backend, text.batch, draft.config.tree_on(bound.device))

        # 3. The prompt is read, then rounds write the text.
        try:
            with clock("prefill"):
                cache.take_over()
                copies = deepest if len(ladder) > 1 or ladder[0].copies else 0
                prompt = read_prompt(target, text, sampler, cache, generator, config, model_kwargs, copies)
            times = draft.times_of(target, text.batch, cache.length, sampler.plan.by_argmax)
            fresh = bound.device.type == "cpu"
            chooser = Chooser(ladder, draft.config.acceptance, times, text.batch, fresh)
            call = Call(target, text, sampler, cache, generator, backend, engine, positions, clock, *prompt, chooser)
            with decoding(target):
                call = engine.begin(call, synced_gpus)
                rounds = decode(call, synced_gpus)
        finally:  # also after a failure all is left as plain `generate` would leave it
            sampler.rewind(text.slowest)
            if returns_cache:
                cache.hand_back()
        if returns_cache:
            cache.compact()
        else:
            engine.end(call)
            draft.keep_engine(engine)

    # 4. The text goes back to the user.
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return text.sequences
    return LongSpecOutput(
        sequences=text.sequences,
        **text.records.as_dict(whole=returned is None),
        **{CACHE: None if returned is None else cache.past},
        accept_lengths=[[count for count, _ in row] for row in rounds],
        trees=[[form for _, form in row] for row in rounds],
        phase_seconds=clock.seconds() if draft.config.profile else None,
    )


def decode(call: Call, synced_gpus: bool) -> list[list[tuple[int, TreeForm]]]:
    """Run rounds until every row is finished.

    Returns, for each row, the number of tokens that each round wrote and the form that its tree had.
    """
    text, cache, chooser = call.text, call.cache, call.chooser
    rounds: list[list[tuple[int, TreeForm]]] = [[] for _ in range(text.batch)]
    # under synced_gpus a rank that has finished goes on with rounds that write nothing
    while has_unfinished(call.target, text.finished, synced_gpus, text.device):
        if cache.make_room():
            call.engine.moved(call)
        stopped = text.stopped
        if call.positions.drops_cache(text, cache):
            counts, form, _ = read_anew(call)
            shift = int(call.roots.positions.max()) - cache.length
            call = call.engine.begin(call._replace(shift=shift), synced_gpus)
        else:
            call, began = call.next_round(), time.perf_counter()
            outcome = call.engine.round(call) or decode_round(call)
            chooser.learn(outcome, stopped, time.perf_counter() - began)
            counts, form, _ = outcome
        if text.stopped != stopped:
            call.roots.follow(text)
        for row, count, padding in zip(rounds, counts, stopped, strict=True):
            if count and not padding:
                row.append((count, form))
    return rounds


def decode_round(call: Call) -> Outcome:
    """Grow, verify, accept, commit. A row may rest."""
    text, cache, engine, clock = call.text, call.cache, call.engine, call.clock
    with clock("grow"):
        tree = engine.run(grow, call) if call.form.nodes > 1 else call.roots.stump
    with clock("verify"):
        verified = engine.run(verify, call, tree)
    paths = [[0] if room else [] for room in text.room()]
    found: Walk | None = None
    walks: list[RowWalk] = []
    try:
        with clock("accept"):
            if call.sampler.plan.by_argmax:
                found = engine.run(find_paths, call, tree, verified)
                walks = found.on_host(call.roots.written)
            elif call.sampler.plan.drawn and (drawn := engine.draw(call, tree, verified)) is not None:
                found, walks = drawn
            along = along_walk(walks, verified, text) if walks else step_by_step(tree, verified, call.sampler, text)
            accept(text, paths, along)
    finally:  # also when a user's processor, criterion or streamer raises: the cache keeps up with the text
        counts = [len(path) for path in paths]
        if found is not None and counts == [len(row.nodes) for row in walks]:
            accepted = found.accepted  # as the device has it
        else:
            accepted = Accepted.of(paths, text.newest, tree.levels, tree.parents.device)
        with clock("commit"):
            engine.run(commit, call, tree, accepted, verified.hidden)
            cache.end_round(counts)
    call.sampler.forget(text.slowest)
    written, reports = call.roots.written, [row.report for row in walks]
    if written is not None and (not walks or written.report.device.type == "cpu"):  # nothing to wait for
        reports = [Report(*row) for row in written.report.tolist()]
    return Outcome(counts, call.form, reports)


def grow(call: Call) -> TokenTree:
    """Grow a tree below each root; in rows that have stopped, a chain of padding where padding follows."""
    roots = call.roots
    with call.engine.draft_layer(call):
        tree = call.generator.grow(roots.tokens, roots.positions, call.cache, call.form, roots.hidden, roots.written)
    return tree if call.text.padding is None else tree.forced(roots.stopped, call.text.padding)


def verify(call: Call, tree: TokenTree) -> Verified:
    """Run one target forward over the trees. The cache is left inside the round."""
    layers, within = partial(call.engine.layers, call), call.positions.within
    return read_tree(call.target, tree, call.roots, call.cache, call.backend, call.extras, layers, within)


def find_paths(call: Call, tree: TokenTree, verified: Verified) -> Walk:
    """Find how far each tree agrees with the largest logits behind its nodes."""
    logits = verified.logits
    logits = logits.float() if logits.dtype == torch.float64 else logits  # the numbers that plain `generate` compares
    picks = logits.argmax(dim=-1).to(tree.parents.device)
    if call.text.padding is not None:
        picks = picks.masked_fill(call.roots.stopped[:, None], call.text.padding)
    return walk(tree, verified.ancestors, verified.depths, picks)


def commit(call: Call, tree: TokenTree, accepted: Accepted, hidden: Tensor | None) -> None:
    """Keep what a round accepted in both caches, and move the roots on; hidden: as in `Verified`."""
    path, counts, newest = accepted
    roots = call.roots
    if hidden is not None and roots.hidden is not None:
        last = path.gather(1, (counts - 1).clamp(min=0)[:, None])
        states = hidden.gather(1, last[:, :, None].expand(-1, -1, hidden.shape[2]))[:, 0]
        roots.hidden.copy_(torch.where(counts[:, None] > 0, states, roots.hidden))
    if call.generator.shape:
        step = torch.arange(path.shape[1], device=path.device)
        call.generator.advance(tree.tokens.gather(1, path), roots.positions[:, None] + step, step < counts[:, None])
    if roots.written is not None:
        call.backend.append(roots.written, tree.tokens, path, counts, newest, call.rung)
    roots.tokens.copy_(newest)
    roots.positions.add_(counts)
    # last: once a ring has moved on, nothing may fail before the round ends
    call.cache.commit(path, counts, call.backend.move)


def read_anew(call: Call) -> Outcome:
    """Write one token of each row where plain `generate` reads all of the text anew; see `Positions`."""
    text, roots = call.text, call.roots
    with catching(call.target, roots.hidden is not None) as caught:
        outputs = call.positions.read_anew(text, call.cache)
    emit(text, call.sampler, list(range(text.batch)), outputs.logits[:, -1], outputs.hidden_states)
    call.generator.advance(roots.tokens[:, None], roots.positions[:, None])
    if caught is not None and roots.hidden is not None:
        roots.hidden.copy_(caught.of_last_token())
    roots.positions.add_(1)
    roots.follow(text)
    if roots.written is not None:
        ones = torch.ones_like(roots.tokens)
        call.backend.append(roots.written, roots.stump.tokens, ones[:, None] - 1, ones, roots.tokens, call.rung)
    return Outcome([1] * text.batch, TreeForm(()), [])


def choose_backend(draft: Any, target: PreTrainedModel, bound: BoundTarget) -> Backend:
    """Return the attention backend of a call, named in a log line. Raises `ValueError` for one that cannot run."""
    softcap = getattr(target.config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    demand = Demand(bound.device, bound.dtype, draft.config.head_dim, softcap)
    backend = draft.find_backend(demand)
    logger.info(f"LongSpec verifies with the {backend.name!r} attention backend")
    return backend
