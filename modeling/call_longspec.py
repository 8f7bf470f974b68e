"""Call: what all rounds of one call of `generate` have in common, and the roots that move on from round to round.

`probe` looks whether a target can be served. `make_cache` makes room; `read_prompt` reads the prompt as plain
`generate` does, writes the first token and returns the roots of the first round; `read_tree` reads a round's trees.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel

from .cache_longspec import SpeculativeCache
from .candidate_generator_longspec import LongSpecCandidateGenerator
from .choice_longspec import Chooser
from .copies_longspec import Written
from .engine_longspec import Backend, Engine, plain_backend
from .hybrid_attention_longspec import Round
from .interface_longspec import (
    CACHE,
    attending,
    first_inputs,
    forward,
    prefill,
    step_inputs,
    switched,
    uncompiled,
)
from .output_longspec import PhaseClock
from .positions_longspec import Positions
from .sampling_longspec import Sampler
from .target_longspec import BoundTarget, catching, check_cached, foreign_hooks
from .text_longspec import Text
from .tree_longspec import Level, TokenTree, TreeForm, ancestor_mask, node_depths
from .verification_longspec import Verified, emit

HEADROOM = 512  # tokens that a call makes room for beyond its prompt before the cache has to grow


class Roots(NamedTuple):
    """The newest token of each row: on the device, kept up to date in place.

    stump: the roots alone as trees; positions: (B,), where the roots stand; axes: (axes, B), how far each axis of a
    target's positions (mrope) is from the last axis: behind a prompt that ends in an image, or where time is no whole
    number, the axes differ for ever; None with one axis. stopped: (B,) bool, whether the row has stopped; hidden:
    (B, hidden), the target's last hidden state at the token before the root, None for drafts that do not read it;
    written: the texts with the roots, None where nothing is copied from them.
    """

    stump: TokenTree
    positions: Tensor
    axes: Tensor | None
    stopped: Tensor
    hidden: Tensor | None
    written: Written | None = None

    @classmethod
    def of(
        cls, newest: Tensor, stopped: Tensor, positions: Tensor | None, length: int, hidden: Tensor | None
    ) -> Roots:
        """Make the roots of the first round: the `newest` tokens (B,), behind `length` cached ones.

        positions: (B,) or (axes, B), for all rows or one; None: the target counts what the cache holds, padding too.
        """
        positions = torch.tensor([length], device=newest.device) if positions is None else positions
        positions = positions.to(newest.device).expand(*positions.shape[:-1], len(newest))
        alone = positions.dim() == 1
        last = (positions if alone else positions[-1]).long().clone()  # one family has them in float
        stump = TokenTree(*Level.of_root(newest), levels=0)
        return cls(stump, last, None if alone else positions - last, stopped, hidden)

    @property
    def tokens(self) -> Tensor:
        """The tokens (B,) of the roots, a view."""
        return self.stump.tokens[:, 0]

    def follow(self, text: Text) -> None:
        """Take over from the host the newest tokens and which rows have stopped; the host does not know positions."""
        self.tokens.copy_(torch.tensor(text.newest, device="cpu"))
        self.stopped.copy_(torch.tensor(text.stopped, device="cpu"))


class Call(NamedTuple):
    """What all rounds of a call have in common.

    roots: moved on in place by each round; extras: unusual inputs of every forward of the target, see `step_inputs`;
    shift: the largest position of a root less the length of the cache; form: of the trees of the present round.
    """

    target: PreTrainedModel
    text: Text
    sampler: Sampler
    cache: SpeculativeCache
    generator: LongSpecCandidateGenerator
    backend: Backend
    engine: Engine
    positions: Positions
    clock: PhaseClock
    roots: Roots
    extras: dict[str, Any]
    shift: int
    chooser: Chooser
    form: TreeForm = TreeForm(())

    @property
    def rung(self) -> int:
        """The number of the form in the ladder; −1 where it was cut off."""
        return self.chooser.ladder.index(self.form) if self.form in self.chooser.ladder else -1

    def next_round(self) -> Call:
        """Return the call for a round behind what is cached. Only rows that have not stopped need their positions."""
        rows = zip(self.cache.lengths, self.text.ends, strict=True)
        position = max((length for length, end in rows if end is None), default=0) + self.shift
        form = self.chooser.form
        return self._replace(form=form.within(self.positions.levels(form.levels, position, self.cache.length)))


# Packages whose hooks treat all tokens alike, or are checked elsewhere.
_OF_LIBRARIES = ("accelerate.", "deepspeed.", "optimum.", "peft.", "torch.")
_PROBED: weakref.WeakKeyDictionary[PreTrainedModel, Any] = weakref.WeakKeyDictionary()  # see `probe`
_PROBING = threading.RLock()
_STEPS = 8  # of plain decoding that a probe looks at
_TRIES = 3  # of a forward whose attention is set anew meanwhile


def probe(draft: Any, target: PreTrainedModel, bound: BoundTarget) -> None:
    """Raise `ValueError` for a target of which only forwards tell that it cannot be served.

    Reads one token, and one or two more as in a round, into a cache of its own: once, and again when the user's hooks
    on the target have changed or it trains otherwise. So a call that is refused has not done anything.
    """
    config, hooks = draft.config, foreign_hooks(target)
    modules = {key: str(getattr(hook, "func", hook).__module__) for key, hook in hooks.items()}
    users = frozenset(key for key, module in modules.items() if not module.startswith(_OF_LIBRARIES))
    recomputes = any(part.training and getattr(part, "gradient_checkpointing", False) for part in target.modules())
    traits = config.target_layer, config.target_hidden_state, users, recomputes
    if _PROBED.get(target) == traits:
        return
    # PEFT's hooks name an adapter for each row of the call
    rows = [len(getattr(hook, "keywords", {}).get("adapter_names") or "1") for hook in hooks.values()]
    devices = [bound.device] if bound.device.type == "cuda" else []
    # a hook may draw at random; without hooks the generator, which other threads draw from, is not touched
    with _PROBING, uncompiled(), torch.random.fork_rng(devices, enabled=bool(users)):
        if _PROBED.get(target) != traits:
            try_target(draft, target, bound, max(rows, default=1), bool(users))
            _PROBED[target] = traits


def try_target(draft: Any, target: PreTrainedModel, bound: BoundTarget, batch: int, hooked: bool) -> None:
    """Run the forwards of `probe` on `batch` rows; a target that needs more than tokens tells nothing.

    hooked: whether to compare the logits of a token alone with those of the same token before another one.
    """
    text_config, longest = target.config.get_text_config(decoder=True), _STEPS + 2
    past = DynamicCache(config=text_config)
    cache = SpeculativeCache(text_config, past, longest, tree_size=2, longest=longest, batch=batch)
    ids = torch.zeros(batch, 1, dtype=torch.long, device=bound.device)
    inputs, backend = first_inputs(target, ids), plain_backend("eager")
    try:
        with catching(target, draft.config.target_hidden_state) as caught:
            outputs = prefill(target, ids, cache, GenerationConfig(), inputs)
    except torch.OutOfMemoryError:  # no rank of several may go on as if nothing were
        raise
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return  # the call will tell
    check_cached(cache.layers[bound.layer], draft.config)
    hidden = None if caught is None else caught.of_last_token()
    steps = step_inputs(target, ids, outputs, inputs)
    positions, extras = next(steps)
    roots = Roots.of(ids[:, 0], torch.zeros_like(ids[:, 0], dtype=torch.bool), positions, cache.length, hidden)
    alone = read_tree(target, roots.stump, roots, cache, backend, extras).logits[:, 0]
    if hooked:
        two = ids.expand(-1, 2)
        chain = TokenTree(two, two, two.float(), levels=1)
        followed = read_tree(target, chain, roots, cache, backend, extras).logits[:, 0]
        rounding = torch.finfo(bound.dtype).eps ** 0.5 * alone.abs().max()
        if bool((alone - followed).abs().max() > rounding):
            raise ValueError(
                "LongSpec needs forward hooks that treat all tokens of a forward alike, got some that change logits "
                "of a token with the number of tokens, as hooks on output[:, -1] do, or at random"
            )
    for step in range(1, _STEPS):
        cache.commit(ids, torch.ones_like(ids[:, 0]))
        cache.end_round([1] * batch)
        later, later_extras = next(steps)
        moved = None if positions is None else positions + step
        check_steps(target, extras | {"position_ids": moved}, later_extras | {"position_ids": later})
        cache.begin_round(ids)


def check_steps(target: PreTrainedModel, inputs: dict[str, Any], later: dict[str, Any]) -> None:
    """Raise `ValueError` unless a target goes on with the same `inputs` from step to step: a round has many steps."""

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            return torch.equal(one, other)
        if isinstance(one, (list, tuple)) and type(one) is type(other):
            return len(one) == len(other) and all(map(same, one, other))
        if isinstance(one, dict) and isinstance(other, dict):
            return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
        return one is other or bool(one == other)

    anew = [name for name in sorted(inputs.keys() | later.keys()) if not same(inputs.get(name), later.get(name))]
    if anew:
        raise ValueError(
            f"LongSpec needs a target that is given the next position and else the same inputs at each step, got "
            f"{type(target).__name__}, which prepares {', '.join(anew)} anew (see its prepare_inputs_for_generation)"
        )


def make_cache(
    target: PreTrainedModel,
    text: Text,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    tree_size: int,
    device: torch.device,
) -> SpeculativeCache:
    """Make an empty cache with room for the prompt, the first `HEADROOM` tokens of the answer and a tree.

    tree_size: nodes of the largest tree. device: where most layers lie.
    """
    past: Cache = model_kwargs[CACHE]
    embeds, mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
    prompt = past.get_seq_length() + (text.prompt if embeds is None else embeds.shape[1])
    answer = max(generation_config.max_length - text.prompt, 0)
    text_config = target.config.get_text_config(decoder=True)
    reserve = prompt + min(answer, HEADROOM) + tree_size
    longest = prompt + answer + tree_size
    rows = {"batch": text.batch, "lead": 0 if text.together else text.lead}
    cache = SpeculativeCache(text_config, past, reserve, tree_size, longest, **rows)
    if mask is not None:
        cache.hide_padding(mask.to(device))
    return cache


def read_tree(
    target: PreTrainedModel,
    tree: TokenTree,
    roots: Roots,
    cache: SpeculativeCache,
    backend: Backend,
    extras: dict[str, Any],
    layers: Callable[[], AbstractContextManager] = nullcontext,
    within: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Verified:
    """Run one target forward over the trees. The cache is left inside the round.

    layers: makes the context in which the target's layers run. within: `Positions.within`, for nodes of stopped rows.
    """
    ancestors = ancestor_mask(tree.parents, tree.levels)
    depths = node_depths(ancestors)
    positions = roots.positions[:, None] + depths
    positions = positions if within is None else within(positions, roots.stopped)
    positions = positions if roots.axes is None else positions + roots.axes[:, :, None]
    cache.begin_round(depths)
    for _ in range(_TRIES):  # another thread may set the target's attention in the middle of a forward
        state = Round(cache, ancestors, backend, seen=set())
        reads_hidden = roots.hidden is not None
        with (
            switched(target) as stands,
            attending(state.attend),
            layers(),
            catching(target, reads_hidden) as caught,
        ):
            outputs = forward(target, tree.tokens, positions, cache, extras)
            if stands():
                break
    else:
        raise ValueError(f"LongSpec needs a target that keeps its attention, got one set anew in {_TRIES} forwards")
    state.check(target)
    hidden = None if caught is None else caught.every().to(roots.positions.device)
    return Verified(ancestors, depths, outputs.logits, outputs.hidden_states, hidden)


def read_prompt(
    target: PreTrainedModel,
    text: Text,
    sampler: Sampler,
    cache: SpeculativeCache,
    generator: LongSpecCandidateGenerator,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    copies: int,
) -> tuple[Roots, dict[str, Any], int]:
    """Read the prompt, write the first token, fill the draft's window. Returns `Call`'s roots, extras and shift.

    copies: the most tokens that a round will copy from the text.
    """
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
    hidden = None if caught is None else caught.of_last_token().to(bound.device)
    (positions, extras), (_, later) = itertools.islice(step_inputs(target, prompt, outputs, model_kwargs), 2)
    check_steps(target, extras, later)
    emit(text, sampler, list(range(text.batch)), outputs.logits[:, -1], outputs.hidden_states)
    written = None
    if copies:
        written = Written.of(text.sequences, generation_config.max_length - text.prompt, copies, bound.device)
    newest, stopped, starts = torch.tensor([text.newest, text.stopped, cache.starts], device=bound.device)
    roots = Roots.of(newest, stopped.bool(), positions, cache.length, hidden)._replace(written=written)
    window = slice(-draft.config.window, None)
    if (embeds := model_kwargs.get("inputs_embeds")) is not None:
        embeds = bound.scale(embeds[:, window]).to(bound.device)
    else:
        ids, vocab = prompt[:, window].to(bound.device), draft.config.vocab_size
        embeds = bound.embed(ids.masked_fill(ids >= vocab, 0))  # some targets have no embedding for an image's tokens
    index = torch.arange(cache.length - embeds.shape[1], cache.length, device=bound.device)
    generator.fill_window(embeds, roots.positions - 1, index >= starts[:, None])
    return roots, extras, int(roots.positions.max()) - cache.length
