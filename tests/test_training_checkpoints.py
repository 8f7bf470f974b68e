"""Which folders count as checkpoints; what runs with some say side by side."""

import json
import os

import pytest
import typer
from typer.testing import CliRunner

from hf_longspec.training import ablation
from hf_longspec.training.checkpoints import (
    COMPLETE,
    is_complete,
    last_complete,
    mark_complete,
    mark_unfinished,
)


def write(run, steps, complete=True):
    folder = run / f"checkpoint-{steps}"
    (folder / "shards").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights" * steps)
    (folder / "shards" / "rank0.pt").write_bytes(b"state")
    if complete:
        mark_complete(folder)
    return folder


def test_the_last_whole_one_counts_by_its_steps(tmp_path):
    assert last_complete(tmp_path) is None and last_complete(tmp_path / "nowhere") is None
    write(tmp_path, 90)
    newest = write(tmp_path, 100)
    write(tmp_path, 8)
    write(tmp_path, 110, complete=False)
    assert last_complete(tmp_path) == newest


@pytest.mark.parametrize("file", ["model.safetensors", "shards/rank0.pt"])
def test_a_file_that_is_cut_or_missing_makes_no_checkpoint(tmp_path, file):
    folder = write(tmp_path, 10)
    assert is_complete(folder)
    with open(folder / file, "r+b") as opened:
        opened.truncate(2)
    assert not is_complete(folder)
    (folder / file).unlink()
    assert not is_complete(folder) and last_complete(tmp_path) is None


def test_a_folder_that_is_written_again_is_unfinished_until_the_end(tmp_path):
    folder = write(tmp_path, 10)
    mark_unfinished(folder)
    assert not is_complete(folder)
    mark_unfinished(folder)
    mark_complete(folder)
    assert is_complete(folder)


def test_a_kill_before_the_list_is_in_place_leaves_no_checkpoint(tmp_path, monkeypatch):
    folder = write(tmp_path, 10, complete=False)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        mark_complete(folder)
    assert not is_complete(folder) and not (folder / COMPLETE).exists()


def test_runs_side_by_side(tmp_path):
    """By hand: the second run has the first one's last KL, 0.5, at its first evaluation."""
    app = typer.Typer()
    app.command()(ablation.main)
    for name, kls in {"first": [0.9, 0.5], "second": [0.4, 0.3], "third": [0.8, 0.7]}.items():
        folder = tmp_path / name / "checkpoint-20"
        folder.mkdir(parents=True)
        log = [
            {"step": 10 * step, "eval_kl": kl, "eval_accept_length": 2.0, "eval_accept_length_64": 2.0}
            for step, kl in enumerate(kls, start=1)
        ]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
        mark_complete(folder)
    runs = [str(tmp_path / name) for name in ("first", "second", "third")]
    result = CliRunner().invoke(app, [*runs, "--output", str(tmp_path / "all.png")])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "first: KL 0.5000 after 20 steps; τ 2.00 at 64",
        "second: KL 0.5000 after 10 steps; τ 2.00 at 64",
        "third: KL 0.5000 after no steps; τ 2.00 at 64",
    ]
    assert (tmp_path / "all.png").exists()
    result = CliRunner().invoke(app, [str(tmp_path / "nowhere")])
    assert result.exit_code == 2 and "with a checkpoint" in result.stderr
