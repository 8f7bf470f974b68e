"""Records filled row by row, in any order of the rows, against records filled a step at a time; the phase clock.

PhaseClock tells every run of a phase, in order, and nothing where nobody asked.
"""

import random
import time

import pytest
import torch
from transformers import GenerationConfig

from hf_longspec.modeling.output_longspec import PhaseClock, Records, StepTensors

# --- records ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_steps_in_whatever_order_rows_reach_them(batch, seed):
    """Rows go at their own pace; what lies there in the end is a table of (step, row), as plain `generate` has it."""
    rng, count = random.Random(seed), 12
    table = torch.randn(count, batch, 3, 2)
    steps, at = StepTensors(batch), [0] * batch
    while min(at) < count:
        behind = [row for row in range(batch) if at[row] < count]
        rows = behind if rng.random() < 0.3 else sorted(rng.sample(behind, rng.randrange(1, len(behind) + 1)))
        steps.put(rows, [at[row] for row in rows], torch.stack([table[at[row], row] for row in rows]))
        for row in rows:
            at[row] += 1
        assert len(steps.values) == max(at)
    assert isinstance(steps.values, tuple)
    assert torch.equal(torch.stack(steps.values), table)


def test_a_step_of_all_rows_is_kept_as_it_is():
    """Nothing is copied where plain `generate` copies nothing."""
    steps, values = StepTensors(2), torch.randn(2, 5)
    steps.put([0, 1], [0, 0], values)
    assert steps.values[0] is values


def test_a_row_that_has_not_come_so_far_is_zero():
    steps = StepTensors(3)
    steps.put([1], [2], torch.tensor([[7.0]]))
    assert [values.tolist() for values in steps.values] == [[[0], [0], [0]], [[0], [0], [0]], [[0], [7], [0]]]


@pytest.mark.parametrize("name", ["scores", "logits", "hidden_states"])
@pytest.mark.parametrize("returns_dict", [False, True])
def test_only_what_is_asked_for_is_recorded(name, returns_dict):
    config = GenerationConfig(**{f"output_{name}": True}, return_dict_in_generate=returns_dict)
    records = Records(2, config)
    assert records.empty is not returns_dict
    for other in ("scores", "logits", "hidden_states"):
        assert (getattr(records, other) is None) is not (returns_dict and other == name)
    assert Records(2, GenerationConfig(return_dict_in_generate=True)).empty
    nothing = Records(2, GenerationConfig())
    nothing.put_hidden_states([0], [0], (torch.zeros(1, 1, 4),))
    assert nothing.as_dict() == {"scores": None, "logits": None, "hidden_states": None}


@pytest.mark.parametrize("lead", [(), (3,)])
def test_hidden_states_by_step_and_layer(lead):
    """The first step has those of the whole prompt, the others of one token; a layer's width is its own.

    lead: a dimension ahead of the rows: gemma3n keeps several hidden states of each token.
    """
    records = Records(2, GenerationConfig(output_hidden_states=True, return_dict_in_generate=True))
    prompt = tuple(torch.randn(*lead, 2, 7, width) for width in (4, 4, 6))
    records.put_hidden_states([0, 1], [0, 0], prompt)
    steps = [[tuple(torch.randn(*lead, 1, 1, width) for width in (4, 4, 6)) for _ in range(2)] for _ in range(3)]
    for row, step in ((0, 1), (0, 2), (1, 1), (0, 3), (1, 2), (1, 3)):
        records.put_hidden_states([row], [step], steps[step - 1][row])
    found = records.as_dict()["hidden_states"]
    assert len(found) == 4 and all(len(layers) == 3 for layers in found)
    assert all(mine is theirs for mine, theirs in zip(found[0], prompt, strict=True))
    for layers, rows in zip(found[1:], steps, strict=True):
        for layer, states in enumerate(layers):
            assert torch.equal(states, torch.cat([rows[0][layer], rows[1][layer]], dim=-3))


# --- phase clock -----------------------------------------------------------------------------------------------------


def test_every_run_of_a_phase_is_told():
    clock = PhaseClock(True, torch.device("cpu"))
    for pause in (0.0, 0.02):
        with clock("verify"):
            time.sleep(pause)
        with clock("accept"):
            pass
    seconds = clock.seconds()
    assert list(seconds) == ["verify", "accept"] and [len(spans) for spans in seconds.values()] == [2, 2]
    assert 0 < seconds["verify"][0] < 0.02 <= seconds["verify"][1]


def test_a_phase_that_fails_is_told_too():
    clock = PhaseClock(True, torch.device("cpu"))
    with pytest.raises(KeyError, match="any"), clock("grow"):
        raise KeyError("any")
    assert len(clock.seconds()["grow"]) == 1


def test_nothing_is_noted_if_nobody_asked():
    clock = PhaseClock(False, torch.device("cpu"))
    with clock("grow"):
        pass
    assert clock.seconds() == {}


@pytest.mark.gpu
def test_on_a_gpu_phases_are_work_of_the_device():
    """The host is far ahead: what it waits for is told to the phase that launched it, not to the next."""
    clock = PhaseClock(True, torch.device("cuda"))
    torch.cuda._sleep(1)
    with clock("long"):
        torch.cuda._sleep(100_000_000)
    with clock("short"):
        torch.cuda._sleep(1000)
    seconds = clock.seconds()
    assert seconds["long"][0] > 10 * seconds["short"][0]
