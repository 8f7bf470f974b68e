"""The cost of each step of decoding behind a filled cache: of plain `generate`, and of a round and its phases.

The timed call is `generate` itself, on a prompt of which the cache holds all tokens but the last. Weights, keys and
values are random, so next to nothing is accepted: nothing here says how fast a text is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, StaticCache
from transformers.utils import is_flash_attn_2_available

from ..evaluation.side_by_side import Stopwatch
from ..modeling.interface_longspec import CACHE
from ..modeling.modeling_longspec import LongSpecForCausalLM
from . import shapes
from .engines import attending_by
from .sampling import GREEDY, in_effect
from .timing import Replay, Speed, noting_replays

# Steps before the timed ones: the first one launches its kernels, then graphs are captured or the model is compiled.
WARM_UP = 4


@dataclass(frozen=True)
class Step:
    """One kind of step, with its median and mean milliseconds over `count` steps.

    floor: milliseconds that it takes to read the memory of one step.

    phases: median milliseconds of each phase of a round. host: milliseconds of a round outside of the replays of CUDA
    graphs; None if there are no replays. accept_length: τ of the rounds, which should be near to 1.
    """

    name: str
    milliseconds: float
    mean: float
    count: int
    floor: float
    phases: dict[str, float]
    host: float | None = None
    accept_length: float = 1.0


@dataclass(frozen=True)
class Latency:
    """The steps behind a prefix of `context` tokens, and the bytes of their memory.

    sampling: the settings that tokens were picked by, as `sampling.in_effect` returns them.
    draft_state_bytes: of the draft's state; cache_bytes: of the target's cache; peak_bytes: the most that LongSpec's
    calls allocated at any time, weights and cache included; 0 where the device does not tell.
    """

    context: int
    sampling: dict[str, Any]
    steps: list[Step]
    draft_state_bytes: int
    cache_bytes: int
    peak_bytes: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Prompt(NamedTuple):
    """A prompt and the cache that holds all of it but its last token."""

    ids: Tensor
    cache: Cache

    @property
    def held(self) -> int:
        return self.ids.shape[1] - 1


class Rounds(NamedTuple):
    """The rounds of one call, its first `WARM_UP` rounds left out; without a draft each token is a round.

    seconds: from the end of each round to the next end; ends: when each round ended; phases: seconds of each phase;
    replays: the replays of CUDA graphs in the call.
    """

    seconds: list[float]
    ends: list[float]
    phases: dict[str, list[float]]
    accept_length: float
    replays: list[Replay]

    def step(self, name: str, floor: float, **fields: Any) -> Step:
        phases = {phase: 1000 * median(seconds) for phase, seconds in self.phases.items()}
        spans = (1000 * median(self.seconds), 1000 * fmean(self.seconds), len(self.seconds))
        return Step(name, *spans, floor, phases, accept_length=self.accept_length, **fields)

    def replayed(self) -> float | None:
        """Return the median milliseconds that a round spends in replays of CUDA graphs; None without replays."""
        if not self.replays:
            return None
        of_rounds = [
            sum(replay.begin.elapsed_time(replay.end) for replay in self.replays if begin < replay.at <= end)
            for begin, end in pairwise(self.ends)
        ]
        return median(of_rounds)


def call(
    target: PreTrainedModel,
    prompt: Prompt,
    draft: LongSpecForCausalLM | None,
    rounds: int,
    sampling: dict[str, Any] = GREEDY,
) -> Rounds:
    """Call `generate` for `WARM_UP` + `rounds` rounds, or tokens without a draft, and leave the cache as it was.

    sampling: options of `generate` that say how tokens are picked.
    """
    tokens = WARM_UP + rounds + 1  # and the one token of the prefill
    while True:
        watch = Stopwatch()
        with noting_replays(draft is not None and draft.config.profile) as replays:
            output = target.generate(
                prompt.ids,
                attention_mask=torch.ones_like(prompt.ids),
                assistant_model=draft,
                max_new_tokens=tokens,
                streamer=watch,
                return_dict_in_generate=True,
                **sampling,
                **{CACHE: prompt.cache},
            )
        shapes.cut(prompt.cache, prompt.held)
        lengths = [1] * (tokens - 1) if draft is None else output.accept_lengths[0]
        if len(lengths) >= WARM_UP + rounds:
            break
        tokens *= 2  # guesses were accepted, so that the rounds were too few
    ends = [watch.times[token] for token in accumulate(lengths, initial=0)][WARM_UP:]
    phases = (draft is not None and output.phase_seconds) or {}
    return Rounds(
        seconds=[end - begin for begin, end in pairwise(ends)],
        ends=ends,
        phases={phase: seconds[WARM_UP:] for phase, seconds in phases.items() if phase != "prefill"},
        accept_length=fmean(lengths),
        replays=replays,
    )


class Bench:
    """The latency benchmark of a pair with random weights. The round grows the draft's own tree."""

    def __init__(
        self,
        target: PreTrainedModel,
        draft: LongSpecForCausalLM,
        speed: Speed,
        rounds: int,
        sampling: dict[str, Any] = GREEDY,
    ):
        """Prepare to time `rounds` rounds of each call, whose tokens are picked by the options `sampling`."""
        self.target, self.draft, self.speed, self.rounds, self.sampling = target, draft, speed, rounds, sampling
        self.settings = in_effect(target, sampling)

    def measure(self, context: int, verify_tokens: Sequence[int], static: bool) -> Latency:
        """Time all steps behind `context` tokens.

        verify_tokens: sizes of the verified tree; the whole round has the largest of them.
        static: whether to time plain `generate` over a static cache too, which transformers compiles on a GPU.
        """
        target, draft = self.target, self.draft
        tree = draft.config.tree_on(target.device)
        ids = torch.randint(1, target.config.vocab_size, (1, context + 1), device=target.device)
        prompt = Prompt(ids, shapes.filled(target, context))
        steps = list(self._plain(prompt))
        one_token, idle = self._round("one token", prompt, (), None, self._verify_floor(context))
        self._forget_peak()
        whole, full = self._round("round", prompt, tree, max(verify_tokens), self._round_floor(context, len(tree)))
        state_bytes, peak = draft.state_bytes, self._peak()
        steps += [one_token, *self._verifications(prompt, tree, verify_tokens, full)]
        steps += [*self._levels(prompt, tree, idle, full), whole]
        del prompt
        if static:
            steps.insert(1, self._static(ids))
        return Latency(context, self.settings, steps, state_bytes, self._cache_bytes(context), peak)

    def _plain(self, prompt: Prompt) -> Iterator[Step]:
        floor = self._verify_floor(prompt.held)
        yield self._plainly(prompt).step("generate", floor)
        if self.target.device.type == "cuda" and is_flash_attn_2_available():
            with attending_by(self.target, "flash_attention_2"):
                yield self._plainly(prompt).step("generate, flash_attention_2", floor)

    def _plainly(self, prompt: Prompt) -> Rounds:
        return call(self.target, prompt, None, self.rounds, self.sampling)

    def _static(self, ids: Tensor) -> Step:
        torch.compiler.reset()  # otherwise the code compiled for another length would have to serve this one too
        held = ids.shape[1] - 1
        cache = StaticCache(config=self.target.config, max_cache_len=held + WARM_UP + self.rounds + 2)
        shapes.fill(cache, self.target, held)
        rounds = self._plainly(Prompt(ids, cache))
        return rounds.step("generate, static cache", self._verify_floor(held))

    def _call(self, prompt: Prompt, tree: tuple[int, ...], verify_tokens: int | None, profile: bool) -> Rounds:
        config = self.draft.config
        own = config.tree_shape, config.verify_tokens, config.profile
        config.tree_shape, config.verify_tokens, config.profile = tree, verify_tokens, profile
        try:
            return call(self.target, prompt, self.draft, self.rounds, self.sampling)
        finally:
            config.tree_shape, config.verify_tokens, config.profile = own

    def _round(
        self, name: str, prompt: Prompt, tree: tuple[int, ...], verify_tokens: int | None, floor: float
    ) -> tuple[Step, Rounds]:
        """Time whole rounds without a profile, and profile a second call; return the step and the profiled rounds."""
        blind = self._call(prompt, tree, verify_tokens, profile=False)
        profiled = self._call(prompt, tree, verify_tokens, profile=True)
        replayed = profiled.replayed()
        step = blind._replace(phases=profiled.phases).step(
            name, floor, host=None if replayed is None else 1000 * median(blind.seconds) - replayed
        )
        return step, profiled

    def _verifications(
        self, prompt: Prompt, tree: tuple[int, ...], verify_tokens: Sequence[int], full: Rounds
    ) -> Iterator[Step]:
        """Time forwards of the target over each number of nodes; full: the profiled rounds with the largest number."""
        for nodes in sorted(verify_tokens):
            rounds = full if nodes == max(verify_tokens) else self._call(prompt, tree, nodes, profile=True)
            yield _phase_step(f"verify {nodes}", rounds.phases["verify"], self._verify_floor(prompt.held))

    def _levels(self, prompt: Prompt, tree: tuple[int, ...], idle: Rounds, full: Rounds) -> Iterator[Step]:
        """Time each level of the tree: growth down to this level, less growth down to the level above.

        idle: the profiled rounds without a tree; full: the profiled rounds with the whole tree.
        """
        before = idle.phases["grow"]
        for level, width in enumerate(tree, start=1):
            rounds = full if level == len(tree) else self._call(prompt, tree[:level], None, profile=True)
            grown = rounds.phases["grow"]
            step = _phase_step(f"level {level}, {width} nodes", grown, self._level_floor(prompt.held))
            less = 1000 * median(before), 1000 * fmean(before)
            yield replace(step, milliseconds=step.milliseconds - less[0], mean=step.mean - less[1])
            before = grown

    def _cache_bytes(self, context: int) -> int:
        return self.target.config.num_hidden_layers * shapes.kv_bytes(self.target, context)

    def _verify_floor(self, context: int) -> float:
        return self.speed.floor(shapes.read_bytes(self.target) + self._cache_bytes(context))

    def _level_floor(self, context: int) -> float:
        parameters = self.draft.named_parameters()
        draft = sum(x.nbytes for name, x in parameters if not name.startswith("hidden_"))  # read once a round
        head = self.target.get_output_embeddings().weight.nbytes
        if self.draft.config.draft_vocab_size is not None:
            head = head * self.draft.config.draft_vocab_size // self.target.config.vocab_size
        return self.speed.floor(draft + head + shapes.kv_bytes(self.target, context))

    def _round_floor(self, context: int, levels: int) -> float:
        return self._verify_floor(context) + levels * self._level_floor(context)

    def _forget_peak(self) -> None:
        if self.target.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.target.device)

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.target.device) if self.target.device.type == "cuda" else 0


def _phase_step(name: str, seconds: list[float], floor: float) -> Step:
    return Step(name, 1000 * median(seconds), 1000 * fmean(seconds), len(seconds), floor, {})
