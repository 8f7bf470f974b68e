"""Whole runs on a tiny target: the loss falls, a cut run goes on to the same losses, settings are checked."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import tiny_draft, tiny_target

from hf_longspec.training.agreement import measure_agreement
from hf_longspec.training.batches import Batches
from hf_longspec.training.checkpoint import Checkpoint
from hf_longspec.training.config import Stage, TrainingConfig
from hf_longspec.training.trainer import Trainer, learning_rate_factor

TOKENS = np.random.default_rng(0).integers(0, 13, 3000).astype(np.uint16)


def small_config(steps=6, **fields):
    stages = (Stage(steps - 2, 32, 4, max_position=200), Stage(2, 64, 2))
    return TrainingConfig(**({"stages": stages, "autocast": None, "log_steps": 1, "loss_chunk": 50} | fields))


def make_trainer(folder, config, tokens=TOKENS):
    target = tiny_target("llama")
    return Trainer(target, tiny_draft(target, window=8), tokens, config, folder)


def logged_losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit(tmp_path):
    whole = make_trainer(tmp_path / "whole", small_config())
    assert whole.train()
    for _ in range(6):  # max_seconds=0 ends every part after one step
        parts = make_trainer(tmp_path / "parts", small_config(max_seconds=0.0))
        complete = parts.train()
    assert complete and parts.step == 6
    assert logged_losses(tmp_path / "parts") == logged_losses(tmp_path / "whole")
    for ours, theirs in zip(parts.draft.parameters(), whole.draft.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_training_lowers_the_loss_and_leaves_the_target_alone(tmp_path):
    pattern = np.tile(np.arange(13, dtype=np.uint16), 300)
    config = TrainingConfig(stages=(Stage(60, 32, 8, max_position=200),), autocast=None, learning_rate=1e-2)
    trainer = make_trainer(tmp_path, config, pattern)
    before = {name: value.clone() for name, value in trainer.target.state_dict().items()}
    agreement = measure_agreement(trainer.target, trainer.draft, pattern, 64, 4, [1, 2])[0]["first"]
    trainer.train()
    losses = logged_losses(tmp_path)
    assert losses[-1] < 0.5 * losses[0]
    assert measure_agreement(trainer.target, trainer.draft, pattern, 64, 4, [1, 2])[0]["first"] > agreement
    assert all(torch.equal(value, before[name]) for name, value in trainer.target.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.target.parameters())


def test_bfloat16_autocast_keeps_float32_parameters(tmp_path):
    trainer = make_trainer(tmp_path, small_config(autocast="bfloat16"))
    trainer.train()
    assert all(math.isfinite(loss) for loss in logged_losses(tmp_path))
    assert {parameter.dtype for parameter in trainer.draft.parameters()} == {torch.float32}


def test_the_log_says_what_happened(tmp_path):
    make_trainer(tmp_path, small_config(log_steps=4)).train()
    first, last = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert (first["step"], last["step"]) == (4, 6)
    assert set(first) >= {
        "loss",
        "kl",
        "cross_entropy",
        "agreement",
        "grad_norm",
        "tokens_per_second",
        "learning_rate",
    }
    assert first["loss"] == pytest.approx(first["kl"] + 0.1 * first["cross_entropy"], rel=1e-5)
    assert set(first["agreement_by_lag"]) <= set("12345")


def test_another_runs_checkpoint_is_refused(tmp_path):
    make_trainer(tmp_path, small_config(max_seconds=0.0)).train()
    with pytest.raises(ValueError, match="checkpoint of another run: learning_rate differ"):
        make_trainer(tmp_path, small_config(learning_rate=1e-3))


def test_a_draft_for_another_target_is_refused_before_anything_is_written(tmp_path):
    draft = tiny_draft(tiny_target("llama", hidden_size=64))
    with pytest.raises(ValueError, match="hidden_size: draft has 64, target has 32"):
        Trainer(tiny_target("llama"), draft, TOKENS, small_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_kill_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    old = Checkpoint(3, {}, {}, {})
    old.save(tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Checkpoint(4, {}, {}, {}).save(tmp_path)
    assert Checkpoint.load(tmp_path) == old


def test_a_batch_depends_on_its_step_alone():
    batches, again = Batches(TOKENS, small_config(steps=40)), Batches(TOKENS, small_config(steps=40))
    for step in (39, 0, 37, 5):
        ours, theirs = batches[step], again[step]
        assert all(torch.equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True)) and ours.lag == theirs.lag
        assert torch.equal(ours.ids[:, 1:], ours.labels[:, :-1])
    assert batches[0].ids.shape == (4, 32) and batches[39].ids.shape == (2, 64)
    assert torch.equal(batches[39].positions[0], torch.arange(64))
    assert {batches[step].lag for step in range(40)} == {1, 2, 3, 4, 5}


def test_an_epoch_shows_every_window_once():
    config = TrainingConfig(stages=(Stage(steps=46, length=32, batch_size=4),))
    batches = Batches(np.arange(3000, dtype=np.uint16), config)  # 93 windows: 23 batches and one window an epoch
    starts = [start // 32 for step in range(46) for start in batches[step].ids[:, 0].tolist()]
    assert sorted(starts[:93]) == list(range(93))
    assert starts[:91] != starts[93:]


def test_schedule():
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert factors[10] == 1 and factors[55] == pytest.approx(0.5)
    assert all(later < earlier for earlier, later in zip(factors[10:], factors[11:], strict=False))


def test_settings_are_checked_and_survive_json():
    config = small_config(max_seconds=5.0)
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match=r"TrainingConfig has no field \['learning_rat'\]"):
        TrainingConfig.from_dict({"stages": [{"steps": 1}], "learning_rat": 1})
    with pytest.raises(ValueError, match=r"Stage has no field \['lenght'\]"):
        TrainingConfig.from_dict({"stages": [{"steps": 1, "lenght": 5}]})
    with pytest.raises(ValueError, match="`stages` must hold at least one stage"):
        TrainingConfig(stages=())
    with pytest.raises(ValueError, match="`max_position` must be at least `length`=1024, got 1000"):
        Stage(steps=1, max_position=1000)
    with pytest.raises(ValueError, match="samples of 4 tokens are too short"):
        TrainingConfig(stages=(Stage(steps=1, length=4),))
    with pytest.raises(ValueError, match="`autocast` must be one of"):
        small_config(autocast="float8")
