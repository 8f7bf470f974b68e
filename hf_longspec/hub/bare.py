"""A report as it may be published: only the last part of an absolute path stays, which tells nothing of a machine."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any


def without_folders(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report without folders in its command and in the names of target and draft."""
    made = report["provenance"]
    command = shlex.join(_bare(word) for word in shlex.split(made["command"]))
    named = {role: report[role] | {"name": _bare(report[role]["name"])} for role in ("target", "draft")}
    return {**report, **named, "provenance": made | {"command": command}}


def _bare(word: str) -> str:
    """Return a word without the folders of an absolute path: /a/b -> b, text=/a/b -> text=b."""
    before, equals, path = word.rpartition("=")
    return before + equals + PurePath(path).name if path.startswith(("/", "~")) else word
