"""Settings of every test: one thread, so that tiny models are fast and a run repeats to the bit."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
