"""Option combinations nobody thought of: a draft changes nothing that can be seen, or the call is refused.

Each commit takes steps of its own. `LONGSPEC_WALK=1000:500 pytest -m slow tests/test_random_walk.py` takes 500 steps
from seed 1000 on.
"""

import os
import random
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import CACHE, VOCAB, tiny_draft, tiny_target
from observation import TOLERANCE
from transformers import DynamicCache
from walk import beyond_plain, check, refusal_of, simplest, with_draft
from walk_steps import FAMILIES, FULL_TREES, Step, draw

FIRST, COUNT = (int(number) for number in os.environ.get("LONGSPEC_WALK", "0:1000").split(":"))
STEPS_A_CASE = 25
QUICK = 150  # steps


def seed_of_commit() -> int:
    """The first seed of the steps that each commit takes anew; 1000 where there is no repository."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(git, capture_output=True, text=True)
    except OSError:  # no git
        return 1000
    return 1000 + int(done.stdout[:7], 16) % 1_000_000 if done.returncode == 0 else 1000


def take(first: int, count: int) -> None:
    """A difference is told with its seed and with a call that repeats it."""
    for seed in range(first, first + count):
        if not beyond_plain(step := draw(seed)):
            check(step)


OF_COMMIT = seed_of_commit()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("first", range(0, QUICK, STEPS_A_CASE))
def test_no_step_of_the_commit_differs(first):
    take(OF_COMMIT + first, STEPS_A_CASE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("first", range(FIRST, FIRST + COUNT, STEPS_A_CASE))
def test_no_step_differs(first):
    take(first, min(STEPS_A_CASE, FIRST + COUNT - first))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_long_paths_are_accepted():
    """Or the walk would prove nothing: of the steps that could show it, many accept three tokens in some round."""
    steps = [step for seed in range(300) if (step := draw(seed)).tree in FULL_TREES and step.new_tokens >= 14]
    steps = [step for step in steps if refusal_of(step) is None and "dict" in step.outputs]
    longest = [max((max(row, default=0) for row in with_draft(step).accept_lengths), default=0) for step in steps]
    assert len(steps) >= 20 and sum(length >= 3 for length in longest) > len(longest) / 3, longest


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_copies_are_accepted():
    """In some steps more tokens than the draft's own levels could give."""
    steps = [step for seed in range(600) if (step := draw(seed)).copy_tokens and step.tree != "auto"]
    steps = [step for step in steps if refusal_of(step) is None and "dict" in step.outputs and step.new_tokens >= 14]
    longest = [max((max(row, default=0) for row in with_draft(step).accept_lengths), default=0) for step in steps]
    beyond = sum(length > len(step.tree) + 1 for step, length in zip(steps, longest, strict=True))
    assert len(steps) >= 40 and beyond > len(steps) / 10, (beyond, len(steps))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("seed", range(2))
def test_random_chats(family, seed):
    """One cache goes from turn to turn; turns differ in all their options, and some are cut off by their streamer."""
    target = tiny_target(family)
    drafts = [tiny_draft(target, seed=seed, tree_shape=shape) for shape in ((1, 1, 1), (4, 8, 8))]
    chats = []
    for assisted in (False, True):
        dice = random.Random(seed)
        torch.manual_seed(seed)
        cache, ids, told = DynamicCache(config=target.config), torch.empty(1, 0, dtype=torch.long), []
        for turn in range(6):
            said = [dice.randrange(2, VOCAB) for _ in range(dice.randrange(1, 9))]
            ids = torch.cat([ids, torch.tensor([said])], dim=1)
            options = {"max_new_tokens": dice.randrange(1, 20), "do_sample": dice.random() < 0.5, "pad_token_id": 0}
            options |= {"eos_token_id": dice.randrange(VOCAB), "top_k": dice.choice([0, 3, 50])}
            streamer = CutOff(dice.choice([3, 99]))
            own = {"assistant_model": drafts[turn % 2]} if assisted else {}
            try:
                ids = target.generate(ids, streamer=streamer, **{CACHE: cache}, **options, **own)
            except KeyboardInterrupt:
                ids = torch.cat([ids, torch.tensor([streamer.tokens])], dim=1)[:, : cache.get_seq_length() + 1]
            told.append((ids.tolist(), cache.get_seq_length()))
        chats.append((told, [(layer.keys, layer.values) for layer in cache.layers]))
    assert chats[0][0] == chats[1][0]
    torch.testing.assert_close(chats[1][1], chats[0][1], **TOLERANCE)


class CutOff:
    """A streamer that is interrupted at its `at`-th token."""

    def __init__(self, at):
        self.at, self.tokens, self.prompt = at, [], True

    def put(self, value):
        if self.prompt:
            self.prompt = False
            return
        self.tokens += value.tolist()
        if len(self.tokens) == self.at:
            raise KeyboardInterrupt

    def end(self):
        pass


def test_the_walk_comes_everywhere():
    steps = [draw(seed) for seed in range(1000)]
    served = [step for step in steps if refusal_of(step) is None and not beyond_plain(step)]
    assert len(served) >= 300
    assert {step.family for step in served} == set(FAMILIES)
    assert {len(step.lengths) for step in steps} == {1, 2, 3, 4}
    assert {step.cache for step in served} == {"none", "passed", "without config", "prefix"}
    assert {step.prompt for step in served} == {"ids", "embeds", "ids and embeds"}
    assert sum(bool(step.asked) for step in steps) >= 30
    assert sum(step.tree == "auto" for step in served) >= 50 and sum(bool(step.copy_tokens) for step in served) >= 80


def test_a_difference_is_reported_as_a_call_that_repeats_it(monkeypatch):
    """A draft that writes one token too few: found, made simple, and printed."""
    import walk

    monkeypatch.setattr(walk, "with_draft", lambda step: walk.look(walk.replace(step, new_tokens=step.new_tokens - 1)))
    step = Step(seed=3, family="qwen3", lengths=(5,), window=3, sampler="top_k", streamer=True, new_tokens=7)
    assert str(simplest(step)) == "Step(seed=3)"
    with pytest.raises(AssertionError, match=r"from walk import Step, check; check\(Step\(seed=3\)\)"):
        check(step)
