"""Choice: which of a few forms the trees of the next round have, by what rounds cost here and what they write.

A ladder of forms, from no guesses at all to the deepest tree. Seconds of a round are measured as rounds go by and kept
from call to call; the tokens that a form will write follow from how often guesses of each level were accepted lately.
Nothing is asked of the device. Knows forms, counts and seconds, no models.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch

from .configuration_longspec import COPIES, LongSpecConfig
from .copies_longspec import AGREEMENT, Report
from .tree_longspec import TreeForm

STEPS, NODES = (0, 1, 2, 3, 5), 32  # levels and verified nodes of the forms that guess
LEAST = 0.06  # of a CPU, where a node costs some hundredth parts of what the target's weights cost to read

KEPT, TRIES = 8, 3  # times of a form that are kept, and that are enough
MEMORY, LONG_MEMORY = 0.95, 0.995  # weight of what was seen before, at each row's round; from call to call
FADING = 0.97  # the same with each round, seen or not
TRUST = 3.0  # rounds that the prior counts for, at first
# Rounds after which the deepest form is looked at again: at first, and at last, twice as many each time.
LOOK, MOST_PATIENCE = 32, 128
NOTHING = 0.01  # tokens that do not count
BETTER = 1.05  # by how much another form must be better


def ladder_of(config: LongSpecConfig, device: torch.device, together: bool = False) -> list[TreeForm]:
    """Return the forms that the trees of a call on `device` may have.

    together: several ranks gather weights level by level, so that all have to grow alike: just the deepest tree.
    """
    shape, auto = config.tree_on(device), config.tree_shape == "auto"
    copies = (COPIES if auto else 0) if config.copy_tokens is None else config.copy_tokens
    if not auto:
        return [TreeForm(shape, copies, config.verify_tokens)]
    verified, least = config.verify_tokens or NODES, LEAST if device.type == "cpu" else 0.0
    if together:
        return [TreeForm(shape, copies, verified)]
    steps = [levels for levels in STEPS if levels <= len(shape)]
    return [TreeForm(())] + [TreeForm(shape[:levels], copies, verified, least) for levels in steps]


class Seen(NamedTuple):
    """A decayed average: sum and weight. What it begins with decays as well."""

    total: float
    weight: float

    @classmethod
    def of(cls, prior: float) -> Seen:
        return cls(TRUST * prior, TRUST)

    def add(self, value: float, memory: float = MEMORY) -> Seen:
        return Seen(memory * self.total + value, memory * self.weight + 1.0)

    def faded(self) -> Seen:
        """Return the average as it counts a round later: the less, the longer nothing was seen, but not nothing."""
        return Seen(FADING * self.total, FADING * self.weight) if self.weight > TRUST else self

    @property
    def mean(self) -> float:
        return self.total / self.weight


class Times:
    """What is kept from call to call of calls alike: one target, batch, way to pick and about one length.

    seconds: of the last rounds of each form. drafted: how often the draft's guesses of each level were right.
    """

    def __init__(self) -> None:
        self.seconds: dict[TreeForm, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self.drafted: dict[int, Seen] = {}

    def add(self, form: TreeForm, seconds: float) -> None:
        self.seconds[form].append(seconds)

    def known(self, form: TreeForm) -> bool:
        """Tell whether there are enough times of a form: its first rounds may wait for a compiler or for a capture."""
        return len(self.seconds.get(form, ())) >= TRIES

    def _usual(self, form: TreeForm) -> float:
        """Return the mean, but for rounds that waited for a compiler, a capture or another program."""
        times = list(self.seconds[form])
        return fmean(seconds for seconds in times if seconds <= 2 * min(times))

    def of(self, form: TreeForm) -> float | None:
        """Return the seconds of a round of this form: measured, or drawn from two others by the number of levels.

        None where fewer than two forms are known.
        """
        if self.known(form):
            return self._usual(form)
        others = [other for other in list(self.seconds) if self.known(other)]
        known = sorted((len(other.shape), self._usual(other)) for other in others)
        if len(known) < 2 or known[0][0] == known[-1][0]:
            return None
        (few, low), (many, high) = known[0], known[-1]
        return low + (high - low) * (len(form.shape) - few) / (many - few)


class Outcome(NamedTuple):
    """A round: how many tokens each row wrote, and the form of the tree; reports: of this round or the one before."""

    counts: list[int]
    form: TreeForm
    reports: Sequence[Report | None]


class Chooser:
    """Choose the form of each round of one call; `form` is the next one's."""

    def __init__(
        self, ladder: Sequence[TreeForm], prior: Sequence[float], times: Times, batch: int, fresh: bool = True
    ):
        """ladder: no guesses first, the deepest last; one form alone is always chosen. prior: of `acceptance`.

        fresh: whether reports are of the round that they come with, so that it is known how many tokens agree now.
        """
        self.ladder, self.times, self.fresh = tuple(ladder), times, fresh
        self.deepest = max(form.levels for form in ladder)  # levels
        levels = max(len(form.shape) for form in ladder)
        for level in range(levels):
            times.drafted.setdefault(level, Seen.of(prior[min(level, len(prior) - 1)]))
        # how often guesses of each level are right where a copy is not; and a copy, by the number of tokens that agree
        self.drafted = [Seen.of(times.drafted[level].mean) for level in range(levels)]
        self.copied = [Seen.of(share) for share in AGREEMENT]
        self.same = [1] * batch  # how many tokens of each row agree; −1 where it has stopped
        self.spread = [0.0] * len(AGREEMENT)  # how often so many have agreed lately
        self.form = self.ladder[-1]
        self.rounds = 0  # since the form was last another one
        self.left: TreeForm | None = None  # the form that was left to look at the deepest
        self.looked = (0.0, 0.0)  # tokens and seconds of rounds that looked
        self.patience = LOOK
        if len(self.ladder) > 1:
            self._choose()

    def learn(self, outcome: Outcome, stopped: Sequence[bool], seconds: float) -> None:
        """Take note of a round, and how long it took; then choose the form of the next one."""
        if len(self.ladder) == 1:
            return
        self.times.add(outcome.form, seconds)
        self.drafted = [seen.faded() for seen in self.drafted]
        if outcome.form == self.ladder[-1]:
            written = sum(count for count, resting in zip(outcome.counts, stopped, strict=True) if not resting)
            self.looked = self.looked[0] + written, self.looked[1] + seconds
        for row, (report, resting) in enumerate(zip(outcome.reports, stopped, strict=False)):
            if resting or report is None:
                self.same[row] = -1 if resting else self.same[row]
                continue
            self.same[row] = report.now
            self.spread = [MEMORY * share for share in self.spread]
            self.spread[min(report.now, len(AGREEMENT) - 1)] += 1.0
            if report.wrote and report.rung >= 0:
                self._accepted(report)
        self.rounds += 1
        self._choose()

    def _accepted(self, report: Report) -> None:
        """Learn from a row's round which guesses were right: the copy's as far as text was written, the draft's where
        the copy's was wrong.
        """
        for step in range(min(report.agreed + 1, report.wrote)):
            same = min(report.same + step, len(AGREEMENT) - 1)
            self.copied[same] = self.copied[same].add(float(step < report.agreed))
        levels = len(self.ladder[report.rung].shape)
        for level in range(report.agreed, min(levels, report.wrote)):
            right = float(report.wrote - 1 > level)
            self.drafted[level] = self.drafted[level].add(right)
            self.times.drafted[level] = self.times.drafted[level].add(right, LONG_MEMORY)

    def tokens(self, form: TreeForm, same: int) -> float:
        """Return how many tokens a round of this form should write of a row of which so many tokens agree."""
        expected, drafted, copied = 1.0, 1.0, float(form.copies > 0)
        for level in range(form.steps - 1):
            drafted *= self.likely[level] if level < len(form.shape) else 0.0
            copied *= self.copies[min(same + level, len(AGREEMENT) - 1)]
            further = copied + (1 - copied) * drafted
            if further < NOTHING:
                break
            expected += further
        return expected

    def rate(self, form: TreeForm) -> float:
        """Return the tokens a second of all rows that rounds of this form should write; 0 if their time is unknown."""
        if (seconds := self.times.of(form)) is None:
            return 0.0
        states: dict[int, float] = dict(Counter(same for same in self.same if same >= 0))
        if not self.fresh and any(self.spread):
            states = {same: share for same, share in enumerate(self.spread) if share > NOTHING}
        return sum(share * self.tokens(form, same) for same, share in states.items()) / seconds

    def _choose(self) -> None:
        """Keep to a form, but for a better one; look at the deepest now and then, which tells of all levels."""
        deepest, form = self.ladder[-1], self.form
        self.likely = [seen.mean for seen in self.drafted]
        self.copies = [seen.mean for seen in self.copied]
        for untried in (deepest, self.ladder[0]):
            if not self.times.known(untried):
                return self._take(untried)
        rates = {other: self.rate(other) for other in self.ladder}
        best = max(self.ladder, key=rates.__getitem__)
        if self.left is not None:
            if self.looked[0] > self.looked[1] * rates[self.left] and best == self.left:
                return  # one more round of what goes better than thought
            # whether it was worth a look
            self.patience = min(2 * self.patience, MOST_PATIENCE) if best == self.left else LOOK
            self.left = None
            self._take(best)
        elif rates[best] > BETTER * rates[form]:
            self._take(best)
        elif self.rounds >= self.patience and form != deepest:
            self.left, self.looked = form, (0.0, 0.0)
            self._take(deepest)

    def _take(self, form: TreeForm) -> None:
        if form != self.form:
            self.form, self.rounds = form, 0
