"""The origin of a figure: the command, the machine, the versions, the commit."""

from __future__ import annotations

import platform
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import transformers


def provenance(device: torch.device) -> dict[str, str | None]:
    """Return the origin for a command's JSON line; None stands for a package or checkout that is missing."""
    command = shlex.join(["hf-longspec", *sys.argv[1:]])
    installed = {package: _installed(package) for package in ("hf-longspec", "triton")}
    return {"command": command, "device": device_name(device), "commit": commit()} | versions() | installed


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def commit(folder: Path = Path(__file__).parents[1]) -> str | None:
    """Return the git commit of `folder`, with a + behind it if files differ from it; None outside a checkout."""
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*arguments: str) -> str:
        # git answers with an error for another user's checkout: then there is no commit to report
        # without locks, `status` only reads; with them it writes the index, and leaves a lock behind if it is killed
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    head = git("rev-parse", "--verify", "--quiet", "HEAD")
    return (head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")) or None


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
