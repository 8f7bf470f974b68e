"""Counts of what a source gave and what it did not, and bad rows by name. Nothing is left out without a count here."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

SHOWN = 5  # bad rows named in messages and summaries
FEWEST_ROWS = 1000  # before the end of a source, the share of bad rows is judged over at least so many


@dataclass
class SourceReport:
    """Counts of one source while it is read.

    bad: number of rows that cannot be used as they are.
    left_out: number of good rows that are not wanted, for each reason.
    """

    path: str
    max_bad_share: float
    rows: int = 0
    documents: int = 0
    tokens: int = 0
    bad: int = 0
    bad_rows: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def bad_row(self, name: str, reason: str) -> None:
        """Count a bad row, which `rows` holds already. Raises `ValueError` where bad rows become too many."""
        self.bad += 1
        if len(self.bad_rows) < SHOWN:
            self.bad_rows.append(f"{name}: {reason}")
        self._judge(max(self.rows, FEWEST_ROWS))

    def held_out(self, tokens: int) -> None:
        """Count a document as held out instead of as read."""
        self.documents -= 1
        self.tokens -= tokens
        self.left_out["held out"] += 1

    def finish(self) -> None:
        """Judge the source at its end. Raises `ValueError` if it held too many bad rows, or no rows at all."""
        if not self.rows:
            raise ValueError(f"{self.path}: expected rows, got none")
        self._judge(self.rows)

    def _judge(self, rows: int) -> None:
        if self.bad > self.max_bad_share * rows:
            more = ", …" if self.bad > len(self.bad_rows) else ""
            raise ValueError(
                f"{self.path}: {self.bad} bad rows of {self.rows} are more than `max_bad_share` "
                f"({self.max_bad_share:g}): {'; '.join(self.bad_rows)}{more}"
            )

    def as_dict(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("rows", "documents", "tokens", "bad", "bad_rows")}
        return {"path": self.path} | counts | {"left_out": dict(self.left_out)}
