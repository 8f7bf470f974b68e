"""PhaseClock: every run of a phase, in order, and nothing where nobody asked."""

import time

import pytest
import torch

from hf_longspec.modeling.output_longspec import PhaseClock


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
