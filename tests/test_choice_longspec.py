"""Which form of trees is chosen, in made-up worlds: what rounds cost and how often guesses are right is known here."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch

from hf_longspec import LongSpecConfig
from hf_longspec.modeling.choice_longspec import LOOK, TRIES, Chooser, Outcome, Times, ladder_of
from hf_longspec.modeling.copies_longspec import AGREEMENT, Report
from hf_longspec.modeling.tree_longspec import TreeForm

LADDER = ladder_of(LongSpecConfig(), torch.device("cuda"))
NONE, DEEPEST = LADDER[0], LADDER[-1]


class World(NamedTuple):
    """How often a guess of the draft is right, how often a copy is, and how many tokens agree before each round."""

    drafted: float
    copied: float
    same: int = 1

    def seconds(self, form: TreeForm) -> float:
        return 1.0 + 0.1 * (form.nodes > 1) + 0.3 * len(form.shape)

    def round(self, form: TreeForm, dice: random.Random) -> tuple[int, int]:
        """Return how many tokens of the copy are right, at most as many as are written, and how many are written."""
        right = drafted = 0
        while right < 24 and dice.random() < self.copied:
            right += 1
        while drafted < len(form.shape) and dice.random() < self.drafted:
            drafted += 1
        wrote = 1 + max(min(right, form.copies), drafted)
        return min(right, wrote), wrote

    def best(self) -> float:
        """Return the tokens a second of the best form, on an average over many rounds."""
        dice = random.Random(5)
        return max(sum(self.round(form, dice)[1] for _ in range(2000)) / 2000 / self.seconds(form) for form in LADDER)


def play(world: World, rounds: int, times: Times, batch: int = 1, fresh: bool = True, seed: int = 0):
    """Return the tokens a second of each row, and the forms."""
    dice, chooser = random.Random(seed), Chooser(LADDER, (0.7, 0.65), times, batch, fresh)
    forms, tokens, seconds = [], 0, 0.0
    for _ in range(rounds):
        form, reports = chooser.form, []
        for _ in range(batch):
            agreed, wrote = world.round(form, dice)
            tokens += wrote
            reports.append(Report(LADDER.index(form), world.same, agreed, wrote, world.same))
        cost = world.seconds(form) * (1 + 0.02 * dice.random())
        seconds += cost
        forms.append(form)
        chooser.learn(Outcome([report.wrote for report in reports], form, reports), [False] * batch, cost)
    return tokens / batch / seconds, forms


WORLDS = {
    "nothing is right": (World(0.02, 0.0), NONE),
    "the draft is right now and then": (World(0.35, 0.02), None),
    "the draft is good": (World(0.97, 0.02), DEEPEST),
    "copies are right": (World(0.3, 0.93, same=8), LADDER[1]),
    "both": (World(0.8, 0.6, same=4), None),
}


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", WORLDS)
def test_the_best_form_is_found_and_kept(name, batch, fresh):
    world, best = WORLDS[name]
    times = Times()
    play(world, 60, times, batch, fresh)
    rate, forms = play(world, 400, times, batch, fresh, seed=1)
    assert rate > 0.95 * world.best()
    if best is not None:
        assert forms.count(best) > 0.85 * len(forms)


def test_the_first_rounds_measure_the_ends_of_the_ladder():
    _, forms = play(World(0.02, 0.0), 2 * TRIES, Times())
    assert forms == [DEEPEST] * TRIES + [NONE] * TRIES


def test_it_looks_again_less_and_less_often():
    times = Times()
    play(World(0.02, 0.0), 40, times)
    _, forms = play(World(0.02, 0.0), 10 * LOOK, times, seed=1)
    looks = [index for index, form in enumerate(forms) if form == DEEPEST and index > 8]
    assert 2 <= len(looks) <= 4 and looks == sorted(looks)
    gaps = [after - before for before, after in zip(looks, looks[1:], strict=False)]
    assert gaps and all(gap > LOOK for gap in gaps) and gaps == sorted(gaps)


def test_a_text_that_changes_is_followed():
    times = Times()
    play(World(0.02, 0.0), 60, times)
    chooser = Chooser(LADDER, (0.7, 0.65), times, 1)
    dice = random.Random(1)
    changes = (World(0.02, 0.0), {0}, 60), (World(0.97, 0.0), {3, 5}, 100), (World(0.02, 0.0), {0}, 40)
    for world, levels, rounds in changes:
        for _ in range(rounds):
            form = chooser.form
            agreed, wrote = world.round(form, dice)
            report = Report(LADDER.index(form), 1, agreed, wrote, 1)
            chooser.learn(Outcome([wrote], form, [report]), [False], world.seconds(form))
        assert len(chooser.form.shape) in levels


def test_a_capture_does_not_count():
    """The first round of a form waits for its graph; that does not keep the form from being chosen."""
    times, world = Times(), World(0.3, 0.93, same=8)
    for form in LADDER:
        times.add(form, 100.0)
    play(world, 60, times)
    assert play(world, 100, times, seed=1)[0] > 0.9 * world.best()


def test_rows_that_have_stopped_do_not_count():
    times = Times()
    play(World(0.02, 0.0), 60, times, batch=2)
    chooser = Chooser(LADDER, (0.02, 0.02), times, 2)
    copying, other = Report(1, 8, 24, 25, 8), Report(1, 0, 0, 1, 0)
    for _ in range(20):
        chooser.learn(Outcome([25, 1], LADDER[1], [copying, other]), [True, False], 1.1)
    assert chooser.form == NONE


def test_one_form_is_always_chosen():
    form = TreeForm((2, 3), 5, 7)
    chooser = Chooser([form], (0.7,), Times(), 1)
    for _ in range(5):
        chooser.learn(Outcome([1], form, []), [False], 1.0)
        assert chooser.form == form and not chooser.times.seconds


def test_ladders():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for device in (cpu, gpu):
        ladder = ladder_of(LongSpecConfig(), device)
        assert ladder[0] == TreeForm(()) and all(form.copies == 24 and form.verified == 32 for form in ladder[1:])
        assert all((form.least > 0) is (device == cpu) for form in ladder[1:])
        assert [len(form.shape) for form in ladder] == sorted(len(form.shape) for form in ladder)
        assert ladder_of(LongSpecConfig(), device, together=True) == [ladder[-1]._replace(least=0.0)]
    assert ladder_of(LongSpecConfig(tree_shape=(2, 3)), gpu) == [TreeForm((2, 3))]
    own = LongSpecConfig(tree_shape=(2, 3), copy_tokens=5, verify_tokens=4)
    assert ladder_of(own, cpu) == [TreeForm((2, 3), 5, 4)]
    assert {form.copies for form in ladder_of(LongSpecConfig(copy_tokens=0), gpu)} == {0}
    assert [form.shape for form in ladder_of(LongSpecConfig(num_hidden_layers=0), gpu)] == [(), ()]


def test_forms():
    form = TreeForm((4, 8), 6, 10)
    assert (form.levels, form.nodes, form.steps) == (8, 10, 9)
    assert form._replace(verified=None).nodes == 19 and TreeForm(()).steps == 1
    assert form.within(8) == form and form.within(7) == TreeForm((4, 8), 0, 10) and form.within(1).shape == (4,)
    assert len(AGREEMENT) == 9 and sorted(AGREEMENT) == list(AGREEMENT)
