"""Training on a CUDA device: compiled as uncompiled, documents apart by every way, resume."""

import subprocess
import sys

import pytest
import torch
from recipes import tiny_recipe

from hf_longspec.training import documents, run
from hf_longspec.training.checkpoints import last_complete
from hf_longspec.training.learning_curve import read_log
from hf_longspec.training.recipe import Recipe
from hf_longspec.training.run import train

pytestmark = pytest.mark.gpu
SHORT = {"trainer__use_cpu": False, "trainer__max_steps": 6, "signal__max_lag": 2}


def losses(folder, name="run", **settings):
    path = tiny_recipe(folder, **(SHORT | {"trainer__output_dir": str(folder / name)} | settings))
    assert train(Recipe.load(path)).complete
    return [record["loss"] for record in read_log(last_complete(folder / name)) if "loss" in record]


@pytest.fixture(autouse=True)
def one_device():
    if torch.cuda.device_count() > 1:
        pytest.skip("a process trains on one device, and pytest is one process")


def test_compiled_and_recomputed_losses_are_the_plain_ones(tmp_path):
    plain = losses(tmp_path, "plain")
    for setting in ("trainer__torch_compile", "trainer__gradient_checkpointing"):
        assert losses(tmp_path, setting, **{setting: True}) == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("settings", [{}, {"target__dtype": "bfloat16", "trainer__bf16": True}], ids=["f32", "bf16"])
def test_documents_apart_by_masks_spans_and_pieces(tmp_path, monkeypatch, settings):
    tolerance = 1e-3 if not settings else 3e-2
    masks = losses(tmp_path, "masks", **settings)
    assert losses(tmp_path, "pieces", target__piece=24, **settings) == pytest.approx(masks, rel=tolerance)
    for module in ("batch", "forward", "distillation"):
        monkeypatch.setattr(f"hf_longspec.training.{module}.LONGEST_MASKED", 16)
    assert documents.LONGEST_MASKED > 16
    assert losses(tmp_path, "spans", **settings) == pytest.approx(masks, rel=tolerance)


def test_a_resumed_run_repeats_the_losses(tmp_path):
    settings = {"trainer__eval_strategy": "steps", "trainer__eval_steps": 2}
    whole = losses(tmp_path, "whole", **settings)
    path = tiny_recipe(tmp_path, **(SHORT | settings | {"trainer__output_dir": str(tmp_path / "parts")}))
    while not train(Recipe.load(path), 0.0).complete:
        pass
    parts = [record["loss"] for record in read_log(last_complete(tmp_path / "parts")) if "loss" in record]
    assert parts == pytest.approx(whole, rel=1e-3)


def test_positions_are_exact(tmp_path, monkeypatch):
    """Also under the TF32 that comes with torch.compile: frequencies of 11 bits would show at these positions."""
    seen = []

    def watched(*args):
        target = load_target(*args)
        target.model.rotary_emb.register_forward_hook(see, with_kwargs=True)
        return target

    def see(module, arguments, keywords, angles):
        seen.append((keywords.get("position_ids", arguments[-1]), angles))

    load_target = run.load_target
    monkeypatch.setattr(run, "load_target", watched)
    compiled = {"trainer__torch_compile": True, "trainer__bf16": True}
    losses(tmp_path, signal__max_position=500, trainer__eval_strategy="steps", trainer__eval_steps=3, **compiled)
    positions, (cos, _) = max(seen, key=lambda found: int(found[0].max()))
    assert positions.max() > 300
    config = load_target(Recipe.load(tmp_path / "recipe.yaml").target, torch.device("cuda")).config
    exponents = torch.arange(0, config.head_dim, 2, device="cuda").double() / config.head_dim
    angles = positions[..., None] / config.rope_parameters["rope_theta"] ** exponents
    torch.testing.assert_close(cos.double(), torch.cat([angles.cos()] * 2, dim=-1), rtol=0, atol=1e-3)


def test_the_command_uses_the_device(tmp_path):
    path = tiny_recipe(tmp_path, **SHORT)
    command = [sys.executable, "-m", "hf_longspec.cli", "train", str(path), "--set", "trainer.bf16=true"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and '"complete": true' in result.stdout, result.stderr
