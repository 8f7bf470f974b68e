"""Drafts whose weights and optimizer are spread over processes (FSDP2, ZeRO): the numbers of one process alone.

Each run is two processes on the CPU. DeepSpeed's are skipped where it is not installed.
"""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from recipes import losses, on_processes, tiny_recipe
from safetensors.torch import load_file
from typer.testing import CliRunner

from hf_longspec import LongSpecForCausalLM, cli
from hf_longspec.training.checkpoints import last_complete
from hf_longspec.training.learning_curve import read_log

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FSDP = {"trainer__fsdp": True, "trainer__fsdp_config": {"version": 2}}
STEPS = {"trainer__max_steps": 4, "trainer__eval_strategy": "steps", "trainer__eval_steps": 2}
LORA = {"draft__lora": {"r": 4, "target_modules": ["q_proj", "o_proj"]}, "draft__config": {}}
deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def zero(stage, **options):
    auto = dict.fromkeys(
        ["train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"], "auto"
    )
    return {
        "trainer__deepspeed": {"zero_optimization": {"stage": stage, **options}, "bf16": {"enabled": "auto"}, **auto}
    }


ZERO3 = zero(3, stage3_gather_16bit_weights_on_model_save=True)
SHARDED = [
    pytest.param(FSDP, id="FSDP2"),
    pytest.param(
        FSDP | {"trainer__fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}},
        id="FSDP2, sharded checkpoints",
        marks=pytest.mark.slow,
    ),
    pytest.param(zero(2), id="ZeRO-2", marks=deepspeed),
    pytest.param(ZERO3, id="ZeRO-3", marks=deepspeed),
]


def on_one(folder, **settings):
    """The run's folder, of one process that reads four samples a step."""
    path = tiny_recipe(folder, **STEPS, **settings)
    result = CliRunner().invoke(cli.app, ["train", str(path), "--output-dir", str(folder / "alone")])
    assert result.exit_code == 0, result.output
    return folder / "alone"


def on_two(folder, processes=2, **settings):
    """The result of the command, with two processes, or so many, that read two samples a step each."""
    settings = STEPS | {"trainer__per_device_train_batch_size": 2, "trainer__use_cpu": False} | settings
    path = tiny_recipe(folder, **settings)
    return on_processes(processes, str(Path(__file__).with_name("sharded_train.py")), "train", str(path))


def evaluations(run):
    return [record for record in read_log(last_complete(run)) if "eval_accept_length" in record]


class Shared(NamedTuple):
    """Two processes that shared a draft: where, how, and the run of one process alone."""

    folder: Path
    settings: dict[str, Any]
    alone: Path

    @property
    def run(self):
        return self.folder / "run"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return on_one(tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory, alone, request):
    folder = tmp_path_factory.mktemp("shared")
    result = on_two(folder, **request.param)
    assert result.returncode == 0, result.stderr
    return Shared(folder, request.param, alone)


@pytest.mark.parametrize("shared", SHARDED, indirect=True)
def test_two_processes_that_share_a_draft_are_as_one(shared):
    assert losses(shared.run) == pytest.approx(losses(shared.alone), rel=1e-4)
    for ours, theirs in zip(evaluations(shared.run), evaluations(shared.alone), strict=True):
        assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-4)
        assert ours["eval_accept_length"] == theirs["eval_accept_length"]
    torch.testing.assert_close(
        load_file(shared.run / "draft" / "model.safetensors"),
        load_file(shared.alone / "draft" / "model.safetensors"),
        rtol=0,
        atol=2e-3,  # Adam's first steps turn rounding of small gradients into steps
    )


@pytest.mark.parametrize("shared", [SHARDED[0], SHARDED[-1]], indirect=True)
def test_a_checkpoint_is_a_draft_with_its_own_code(shared):
    checkpoint, draft = shared.run / "checkpoint-4", shared.run / "draft"
    code = {path.name for path in draft.glob("*.py")}
    assert "modeling_longspec.py" in code <= {path.name for path in checkpoint.glob("*.py")}
    maps = [json.loads((folder / "config.json").read_text())["auto_map"] for folder in (checkpoint, draft)]
    assert maps[0] == maps[1]
    ours, theirs = (LongSpecForCausalLM.from_pretrained(folder).state_dict() for folder in (checkpoint, draft))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("shared", SHARDED, indirect=True)
def test_a_cut_run_goes_on(shared):
    """From checkpoint-2 on; what is taken away here is written anew."""
    expected = losses(shared.run)
    for name in ("draft", "checkpoint-4"):
        shutil.rmtree(shared.run / name)
    result = on_two(shared.folder, **shared.settings)
    assert result.returncode == 0, result.stderr
    assert losses(shared.run) == pytest.approx(expected, rel=1e-6)
    assert (shared.run / "draft" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 100])
@pytest.mark.parametrize("sharded", SHARDED)
def test_a_run_that_diverges_ends_in_every_process(tmp_path, sharded, every):
    """By its log, or by the weights that a checkpoint would hold."""
    result = on_two(tmp_path, trainer__learning_rate=1e30, trainer__logging_steps=every, **sharded)
    assert result.returncode != 0 and '"complete"' not in result.stdout
    assert result.stderr.count("hf-longspec: training diverged by step 2: ") >= 1, result.stderr
    assert not (tmp_path / "run" / "draft").exists() and last_complete(tmp_path / "run") is None


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [SHARDED[0], SHARDED[-1]])
def test_adapters(tmp_path, alone, sharded):
    settings = LORA | {"draft__init": str(alone / "draft")}
    alone = on_one(tmp_path, **settings)
    result = on_two(tmp_path, **settings, **sharded)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-4)
    assert not (tmp_path / "run" / "draft" / "model.safetensors").exists(), "the adapter only"


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [SHARDED[0], SHARDED[-1]])
def test_a_draft_that_reads_the_last_hidden_state(tmp_path, sharded):
    reads = {"draft__config": {"window": 16, "tree_shape": [2, 4, 4], "target_hidden_state": True}}
    alone, result = on_one(tmp_path, **reads), on_two(tmp_path, **reads, **sharded)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-4)
    ours, theirs = (load_file(run / "draft" / "model.safetensors") for run in (tmp_path / "run", alone))
    assert "hidden_proj.weight" in ours
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [SHARDED[0], SHARDED[-1]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drafts_in_half_precision(tmp_path, sharded, dtype):
    """What is logged is not rounded to bfloat16, and the target may have another format."""
    settings = {"trainer__bf16": True, "target__dtype": dtype}
    result = on_two(tmp_path, **settings, **sharded)
    assert result.returncode == 0, result.stderr
    ours = losses(tmp_path / "run")
    assert ours == pytest.approx(losses(on_one(tmp_path, **settings)), rel=5e-3)
    assert any(torch.tensor(loss).bfloat16().item() != loss for loss in ours.values())


@pytest.mark.slow
@deepspeed
def test_zero_3_has_to_gather_the_draft(tmp_path):
    result = on_two(tmp_path, **zero(3))
    assert result.returncode != 0
    expected = "trainer.deepspeed: expected zero_optimization.stage3_gather_16bit_weights_on_model_save: true"
    assert expected in result.stderr and not (tmp_path / "run").exists()


@pytest.mark.slow
@deepspeed
def test_zero_goes_on_with_as_many_processes_only(tmp_path):
    assert on_two(tmp_path, **ZERO3, trainer__max_steps=2).returncode == 0
    result = on_two(tmp_path, processes=1, **ZERO3, trainer__max_steps=2)
    assert result.returncode != 0
    expected = "checkpoint-2 is of another number of processes than 1, with which ZeRO cannot go on"
    assert expected in result.stderr and "ZeRORuntimeException" not in result.stderr
