"""Settings of every test: one thread, so that tiny models are fast and a run repeats to the bit."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is first imported

import tapes  # noqa: E402
from helpers import tiny_draft, tiny_target  # noqa: E402

# these modules hold asserts for the tests: a failure shows both sides
pytest.register_assert_rewrite("conversions", "pairs", "serials", "tables", "texts")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def llama():
    return tiny_target("llama")


@pytest.fixture
def draft(llama):
    return tiny_draft(llama, window=8)


@pytest.fixture
def captures(monkeypatch):
    """Replace CUDA graphs by tapes, and return the outcomes of all attempts to capture a phase."""
    return tapes.install(monkeypatch)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
