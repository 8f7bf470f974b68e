"""The contract as a table: `python tests/contract.py` computes docs/CONTRACT.md, and from it a part of docs/LIMITS.md.

`contract_rows.py` has the rows. Every package that a row needs must be installed: the table is whole or not written.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from contract_cell import Row, run, verdict
from contract_rows import all_rows

from hf_longspec.provenance import versions

ROOT = Path(__file__).parent.parent
PAGE, LIMITS = ROOT / "docs" / "CONTRACT.md", ROOT / "docs" / "LIMITS.md"
MARKERS = "<!-- contract: made by python tests/contract.py -->\n", "<!-- end of contract -->\n"
HEAD = """# What `generate` does with a draft

Each option of `generate` on a tiny random model in float32: one sequence, and a batch of four prompts of different
lengths whose rows end at different times; beside them transformers' own assisted decoding, its assistant another model
that agrees with the target about most tokens (transformers refuses every batch there). Made by

    python tests/contract.py

with {versions}. `tests/test_contract.py` holds LongSpec to every row, at both ends of the
range of transformers.

- **equal**: text, outputs, caches, what streamers, processors and criteria were told, and the state of the random
  generator are those of plain `generate`.
- **refused**: a `ValueError` before any work is done.
- **other …**: no error, but this differs from plain `generate`. "Other random draws": sampled rightly, as far as this
  table tells, but not what plain `generate` draws under the same seed.
- **raises …**: another error. **… like plain**: so does plain `generate`. **–**: does not apply.

"""


class Line(NamedTuple):
    """A row of the table: verdicts on LongSpec at batch 1 and 4, and on stock assisted decoding at batch 1."""

    group: str
    name: str
    one: str
    four: str
    stock: str


COLUMNS = Line("", "`generate`", "LongSpec, batch 1", "batch 4", "another LM as assistant, batch 1")


def lines(rows: list[Row]) -> Iterator[Line]:
    """Compute the table, and yield each row as soon as it is known."""
    for row in rows:
        cell = run(row, 1, stock=True)
        stock = verdict(cell.plain, cell.stock, row.draws)
        four = "–"
        if 4 in row.batches:
            batch = run(row, 4)
            four = verdict(batch.plain, batch.ours)
        yield Line(row.group, row.name, verdict(cell.plain, cell.ours), four, stock)


def table(made: list[Line]) -> str:
    text, last = _row(COLUMNS) + "|---" * len(COLUMNS) + "|\n", ""
    for line in made:
        text += _row(line._replace(group=line.group if line.group != last else ""))
        last = line.group
    return text


def read_table(page: str) -> list[Line]:
    """Read the rows of a page that holds a `table`."""
    found: list[Line] = []
    for text in [text for text in page.splitlines() if text.startswith("| ")][1:]:
        line = Line(*(cell.strip() for cell in text.strip("|").split(" | ")))
        found.append(line if line.group else line._replace(group=found[-1].group))
    return found


def summary(made: list[Line]) -> str:
    """Summarize each group in a line: counts, and the names of options that stock assisted decoding gets wrong.

    Wrong: neither refused nor as plain `generate` has it. Other random draws are counted only: they are rightly
    distributed, and many.
    """
    text = "| options | LongSpec, batch 1 and 4 | another LM, batch 1 | which of them |\n|---|---|---|---|\n"
    for group in dict.fromkeys(line.group for line in made):
        of_group = [line for line in made if line.group == group]
        ours = _counts([cell for line in of_group for cell in (line.one, line.four) if cell != "–"])
        named: dict[str, list[str]] = {}
        for line in of_group:
            if line.stock.startswith(("other", "raises")) and line.stock != "other random draws":
                named.setdefault(line.stock, []).append(line.name)
        others = "; ".join(f"{said}: {_some(names)}" for said, names in named.items())
        text += _row((group, ours, _counts([line.stock for line in of_group]), others))
    return text


def put(page: str, made: list[Line]) -> str:
    """Return the page with the summary between its markers."""
    before, rest = page.split(MARKERS[0])
    return before + MARKERS[0] + summary(made) + MARKERS[1] + rest.split(MARKERS[1])[1]


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _counts(verdicts: list[str]) -> str:
    """Count verdicts, as in "9 equal, 2 refused, 3 other"."""
    short = ("fail like plain" if said.endswith("like plain") else said.split()[0] for said in verdicts)
    return ", ".join(f"{count} {said}" for said, count in Counter(short).most_common())


def _some(names: list[str], most: int = 3) -> str:
    more = len(names) - most
    return " · ".join(names[:most]) + (f" · {more} more" if more > 0 else "")


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = all_rows()
    missing = sorted({row.module for row in rows if row.module and not importlib.util.find_spec(row.module)})
    if missing:
        sys.exit(f"rows of the contract need the packages {', '.join(missing)}")
    made = []
    for line in lines(rows):
        made.append(line)
        print(_row(line), end="", flush=True)
    named = ", ".join(f"{name} {version}" for name, version in versions().items())
    PAGE.write_text(HEAD.format(versions=named) + table(made), encoding="utf-8")
    LIMITS.write_text(put(LIMITS.read_text(encoding="utf-8"), made), encoding="utf-8")


if __name__ == "__main__":
    main()
