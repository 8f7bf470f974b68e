"""The records of a run so far, a line a prompt, so that an interrupted run goes on where it stopped.

The first line of the file holds the settings; a file with other settings is refused, never mixed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..writing import writing

Record = dict[str, Any]
KEYS = {True: {"settings"}, False: {"task", "context", "id"}}  # of the first line, and of all other lines


class Records:
    """The file of a run: opened with the run's settings, asked what is done, and given each record as it is made."""

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        """Create the file, or read it.

        Raises `ValueError` for other settings or a damaged file, and what `writing` raises.
        """
        self.path = path
        self.done: dict[tuple[str, int, str], Record] = {}
        settings = json.loads(json.dumps(settings))  # the form in which settings come back from the file
        if not path.exists():
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"settings": settings})
            return
        lines = self._whole_lines()
        if not lines:
            self._append({"settings": settings})
            return
        first, *records = (self._parsed(number, line) for number, line in enumerate(lines, start=1))
        self._compare(first["settings"], settings)
        self.done = {(record["task"], record["context"], record["id"]): record for record in records}

    def add(self, record: Record) -> None:
        self._append(record)
        self.done[record["task"], record["context"], record["id"]] = record

    def _append(self, line: Mapping[str, Any]) -> None:
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _whole_lines(self) -> list[str]:
        """Return all whole lines; a last line that an interrupted run left unfinished is cut off the file."""
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        return whole.decode("utf-8").splitlines()

    def _parsed(self, number: int, line: str) -> Record:
        try:
            parsed = json.loads(line)
            if not KEYS[number == 1].issubset(parsed if isinstance(parsed, dict) else ()):
                raise ValueError(f"expected an object with {', '.join(sorted(KEYS[number == 1]))}")
        except ValueError as error:  # a `JSONDecodeError` is one too
            raise ValueError(f"{self.path}, line {number} is damaged: {error}; choose another --output") from error
        return parsed

    def _compare(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        old, new = flat(old), flat(new)
        changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        if changed:
            told = "; ".join(f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in changed)
            raise ValueError(f"{self.path} is of a run with other settings ({told}); choose another --output")


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return the settings with settings inside of others named `outer.inner`."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value}
    return found
