"""`hf-longspec train` in processes of its own: killed in the middle of a checkpoint, and told of mistakes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from recipes import losses, on_processes, tiny_recipe
from typer.testing import CliRunner

from hf_longspec import cli
from hf_longspec.training.checkpoints import COMPLETE, last_complete

runner = CliRunner()


def command(path, *options):
    return [sys.executable, "-m", "hf_longspec.cli", "train", str(path), *options]


def kill_while_writing(path, run):
    """SIGKILL as soon as a checkpoint folder is there that is not whole; the steps of that one."""
    process = subprocess.Popen(command(path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    old = set(run.glob("checkpoint-*"))
    while process.poll() is None:
        begun = [folder for folder in set(run.glob("checkpoint-*")) - old if not (folder / COMPLETE).exists()]
        if begun and last_complete(run) not in (None, *old):
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.0005)
    assert process.returncode == 0, "the run ended by itself before it could be killed"


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_losses(tmp_path):
    settings = {"trainer__max_steps": 12, "trainer__save_steps": 1, "trainer__gradient_accumulation_steps": 2}
    path = tiny_recipe(tmp_path, **settings)
    kill_while_writing(path, tmp_path / "run")
    interrupted = last_complete(tmp_path / "run")
    result = runner.invoke(cli.app, ["train", str(path)])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["complete"]
    assert 1 <= int(interrupted.name.removeprefix("checkpoint-")) < 12
    whole = runner.invoke(cli.app, ["train", str(path), "--output-dir", str(tmp_path / "whole")])
    assert whole.exit_code == 0, whole.output
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_flags_and_settings(tmp_path):
    path = tiny_recipe(tmp_path, target__name="./nowhere")
    options = ["--target", str(tmp_path / "target"), "--output-dir", str(tmp_path / "other"), "--max-seconds", "0"]
    result = runner.invoke(cli.app, ["train", str(path), *options, "--set", "signal.max_lag=1"])
    assert result.exit_code == 0, result.output
    outcome = json.loads(result.stdout.splitlines()[-1])
    assert (outcome["complete"], outcome["step"], outcome["steps"], outcome["draft"]) == (False, 1, 6, None)
    assert "max_lag: 1" in (tmp_path / "other" / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    "settings, message",
    [
        (["signal.lenght=3"], "recipe.signal: unknown key 'lenght', did you mean 'length'"),
        (["trainer.learning_rat=3"], "recipe.trainer: unknown key 'learning_rat', did you mean 'learning_rate'"),
        (["target.name=./nowhere"], "./nowhere"),
        (["draft.init=./stranger"], "./stranger"),
        (["data.sources.0.path=./nowhere"], "nowhere: no such file or folder"),
        (["data.min_tokens=100000"], "nothing to train on in samples of 64 tokens"),
        (["trainer.accelerator_config.dispatch_batches=true"], "expected dispatch_batches: false"),
        (["trainer.save_strategy=never"], "never is not a valid SaveStrategy"),
        (["trainer.lr_scheduler_kwargs.cycles=2"], "unexpected keyword argument 'cycles'"),
    ],
)
def test_mistakes_are_one_line(tmp_path, settings, message):
    path = tiny_recipe(tmp_path)
    options = [option for setting in settings for option in ("--set", setting)]
    result = runner.invoke(cli.app, ["train", str(path), *options])
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    last = [line for line in result.stderr.splitlines() if line.startswith("hf-longspec: ")]
    assert len(last) == 1 and message in last[0], result.stderr


def test_more_than_fits(tmp_path):
    path = tiny_recipe(tmp_path, draft__config={"intermediate_size": 10**13})
    result = runner.invoke(cli.app, ["train", str(path)])
    assert result.exit_code == 1
    last = [line for line in result.stderr.splitlines() if line.startswith("hf-longspec: ")]
    assert len(last) == 1 and last[0].startswith("hf-longspec: out of memory"), result.stderr
    assert "trainer.per_device_train_batch_size" in last[0]


def test_a_draft_that_does_not_fit(tmp_path):
    path = tiny_recipe(tmp_path, draft__init=str(tmp_path / "stranger"), draft__config={})
    result = runner.invoke(cli.app, ["train", str(path)])
    assert result.exit_code == 2 and "hidden_size: draft has 64, target has 32" in result.stderr


COUNTS_THREADS = """
from pathlib import Path

from hf_longspec.cli import main

try:
    main()
finally:
    left = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in left if "gloo" in name], left
"""


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="on disk", marks=pytest.mark.slow),
        pytest.param(
            {"data__streaming": True, "trainer__accelerator_config": {"split_batches": False}},
            id="a stream, and another of accelerate's settings",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_processes_are_as_one(tmp_path, settings):
    """Data-parallel over gloo: the same samples in all, so the same losses to rounding.

    No thread of gloo outlives the command: one that still frees a tensor when Python ends aborts the process. Where
    there is no /proc, none is found.
    """
    settings = settings | {"trainer__max_steps": 3, "trainer__save_steps": 2}
    path = tiny_recipe(tmp_path, **settings, trainer__eval_strategy="steps", trainer__eval_steps=3)
    alone = runner.invoke(cli.app, ["train", str(path), "--output-dir", str(tmp_path / "alone")])
    assert alone.exit_code == 0, alone.output
    (tmp_path / "counts.py").write_text(COUNTS_THREADS)
    arguments = [str(tmp_path / "counts.py"), "train", str(path), "--set", "trainer.per_device_train_batch_size=2"]
    result = on_processes(2, *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('{"complete": true') == 1, "one process speaks"
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)


CLOCKS = """
import os
from hf_longspec.cli import main
from hf_longspec.training.run import WallClock

begin = WallClock.__init__
WallClock.__init__ = lambda self, seconds: begin(self, seconds + 1000 * int(os.environ["RANK"]))
main()
"""


@pytest.mark.slow
def test_processes_stop_together(tmp_path):
    """The second one's clock would let it go on."""
    (tmp_path / "clocks.py").write_text(CLOCKS)
    arguments = [str(tmp_path / "clocks.py"), "train", str(tiny_recipe(tmp_path)), "--max-seconds", "0"]
    result = on_processes(2, *arguments)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["step"] == 1
    assert last_complete(tmp_path / "run").name == "checkpoint-1"


FAILS_TO_END = """
import os
import time

from accelerate import PartialState

from hf_longspec.cli import main
from hf_longspec.training.trainer import DraftTrainer

snapshot = DraftTrainer.snapshot
slow = lambda self: (snapshot(self), time.sleep(3))[0]
if os.environ["RANK"] == "0":
    DraftTrainer.snapshot = slow
else:
    PartialState.destroy_process_group = lambda self: os._exit(1)
main()
"""


@pytest.mark.slow
def test_a_process_that_fails_to_end_costs_no_draft(tmp_path):
    """The launcher ends the first process when the second one fails; it has written the draft by then."""
    (tmp_path / "fails.py").write_text(FAILS_TO_END)
    arguments = [str(tmp_path / "fails.py"), "train", str(tiny_recipe(tmp_path, trainer__max_steps=1))]
    assert on_processes(2, *arguments).returncode != 0
    assert (tmp_path / "run" / "draft" / "model.safetensors").exists()


def test_a_file_with_the_name_of_the_draft(tmp_path):
    path = tiny_recipe(tmp_path, trainer__max_steps=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "draft").write_text("mine")
    result = runner.invoke(cli.app, ["train", str(path)])
    assert result.exit_code == 2 and "draft cannot be written: File exists" in result.stderr
