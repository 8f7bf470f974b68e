"""A tiny target, a text with a pattern and a recipe of a few steps as files, and processes that run the recipe."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from tiny_folders import tiny_folders

from hf_longspec.training.checkpoints import last_complete
from hf_longspec.training.learning_curve import read_log


def tiny_recipe(folder: Path, **settings: Any) -> Path:
    """Write a recipe file into `folder`; `settings` are its keys, two underscores for a dot: signal__length=32."""
    if not (folder / "target").exists():
        tiny_folders(folder)
        write_text(folder / "text")
    recipe: dict[str, Any] = {
        "target": {"name": str(folder / "target"), "dtype": "float32"},
        "draft": {"config": {"window": 16, "tree_shape": [2, 4, 4]}},
        "data": {
            "sources": [{"path": str(folder / "text"), "format": "text", "suffixes": [".txt"]}],
            "held_out": {"share": 0.2},
            "cache": str(folder / "cache"),
            "separator": "Ā",
        },
        "signal": {"length": 64, "max_lag": 3, "max_position": 400, "loss_chunk": 100},
        "evaluation": {"contexts": [16, 48], "prompts": 2, "max_new_tokens": 8, "loss_samples": 1},
        "trainer": {
            "output_dir": str(folder / "run"),
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "save_steps": 2,
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }
    for key, value in settings.items():
        *parents, last = key.split("__")
        place = recipe
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    return path


def write_text(folder: Path, files: int = 60) -> None:
    """Write files, each of which repeats a short string of its own."""
    folder.mkdir()
    letters = random.Random(0)
    for number in range(files):
        pattern = "".join(letters.choice("abcdefgh") for _ in range(17))
        (folder / f"{number:02}.txt").write_text(pattern * letters.randint(3, 40))


def losses(run: Path) -> dict[int, float]:
    """Return the losses of a run by step, up to its last whole checkpoint."""
    return {record["step"]: record["loss"] for record in read_log(last_complete(run)) if "loss" in record}


def on_processes(count: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Run torchrun with a script, or with -m and a module, and its arguments."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, *command], capture_output=True, text=True, timeout=300, env=environment)
