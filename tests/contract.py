"""The contract as a table: `python tests/contract.py` computes it and prints Markdown.

"equal": text, outputs, caches, what streamers, processors and criteria were told, and the random generator are as
after plain `generate`. "refused": a `ValueError`. "other …": what came out differs from plain `generate`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import transformers
from contract_cell import Row, run, verdict
from contract_rows import installed_rows

HEAD = ("", "`generate`", "LongSpec, batch 1", "batch 4", "another LM as assistant, batch 1", "batch 4")


def lines(rows: list[Row]) -> Iterator[str]:
    """The table, row by row as it is computed."""
    yield "| " + " | ".join(HEAD) + " |"
    yield "|---" * len(HEAD) + "|"
    last = ""
    for row in rows:
        ours, stock = [], []
        for batch in (1, 4):
            cell = run(row, batch, stock=True) if batch in row.batches else None
            ours.append("–" if cell is None else verdict(cell.plain, cell.ours))
            stock.append("–" if cell is None else verdict(cell.plain, cell.stock, row.draws))
        yield "| " + " | ".join([row.group if row.group != last else "", row.name, *ours, *stock]) + " |"
        last = row.group


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for line in lines(installed_rows()):
        print(line, flush=True)
