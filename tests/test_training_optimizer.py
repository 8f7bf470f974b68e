"""Muon and AdamW as one optimizer."""

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

from hf_longspec.training.optimizer import MuonAdamW, make_muon


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3, bias=False))


def step(module, optimizers, schedules):
    module.zero_grad()
    module(torch.linspace(-1, 1, 12).view(2, 6)).square().sum().backward()
    for one in (*optimizers, *schedules):
        one.step()


def halving(optimizer):
    return LambdaLR(optimizer, lambda number: 0.5**number)


def test_it_is_both_under_one_schedule():
    ours, theirs = model(), model()
    both = MuonAdamW(ours.parameters(), 0.02, 0.1, (0.9, 0.95), 1e-8)
    muon = Muon(
        [x for x in theirs.parameters() if x.dim() == 2], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    rest = [x for x in theirs.parameters() if x.dim() == 1]
    adamw = AdamW(rest, lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    schedule, schedules = halving(both), [halving(muon), halving(adamw)]
    for _ in range(4):
        step(ours, [both], [schedule])
        step(theirs, [muon, adamw], schedules)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert {group["lr"] for group in both.param_groups} == {0.02 / 16}


def test_it_goes_on_from_its_state():
    whole, part = model(), model()
    first, second = (MuonAdamW(x.parameters(), 0.02, 0.1, (0.9, 0.95), 1e-8) for x in (whole, part))
    for _ in range(2):
        step(whole, [first], [])
        step(part, [second], [])
    again = MuonAdamW(part.parameters(), 0.5, 0.0, (0.9, 0.95), 1e-8)
    again.load_state_dict(second.state_dict())
    schedule = halving(again)
    step(whole, [first], [])
    step(part, [again], [schedule])
    assert all(torch.equal(x, y) for x, y in zip(whole.parameters(), part.parameters(), strict=True))
    assert {group["lr"] for part in again.parts for group in part.param_groups} == {0.01}


@pytest.mark.parametrize("name, options", [("polynomial", {"lr_end": 1e-3}), ("cosine_with_min_lr", {"min_lr": 1e-3})])
def test_schedules_that_ask_for_the_first_learning_rate(name, options):
    """They go as under AdamW, which has one too."""
    rates = []
    for make in (lambda x: MuonAdamW(x, 0.02, 0.1, (0.9, 0.95), 1e-8), lambda x: AdamW(x, lr=0.02)):
        module = model()
        optimizer = make(module.parameters())
        schedule = get_scheduler(name, optimizer, 1, 5, scheduler_specific_kwargs=options)
        rates.append([])
        for _ in range(5):
            step(module, [optimizer], [schedule])
            rates[-1].append({group["lr"] for group in optimizer.param_groups})
    assert rates[0] == rates[1] and rates[0][-1] == {1e-3}


def test_sharded_matrices_are_refused(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert make_muon(model(), args, sharded=False).param_groups
    with pytest.raises(ValueError, match="muon needs whole matrices, which DeepSpeed and FSDP shard"):
        make_muon(model(), args, sharded=True)
