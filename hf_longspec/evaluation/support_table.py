"""The table of served families as Markdown, from the trials of `families`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..provenance import versions
from .families import Result, Trial

WIDEST = 150  # characters of a reason that the table shows
MEANING = {
    Result.wrong: "The text differs, or the call ends in something that is no clear refusal: a defect.",
    Result.served: "`generate(assistant_model=draft)` wrote what plain `generate` writes, in every setting tried.",
    Result.refused: "One clear `ValueError`, for the reason given; plain `generate` is as it was.",
    Result.no_decoder: "Nothing that writes one token after the other.",
    Result.not_buildable: "Not tried: plain `generate` does not run on a tiny random model with a text prompt.",
}
HEAD = """# Model families

Every family that transformers loads as a causal language model, or as an image-text-to-text model (with text
prompts), tried on a tiny random model of float32 weights, greedily and sampled under one seed, on trees and on a
chain, with prompts shorter and longer than every window. The tiny model has what released ones have, even where the
defaults of the family's config have not; released models that differ from others of their family are tried beside it,
and named where one goes otherwise. A family is named by its `model_type`. Made by

    {command}

with {versions}.

{counts}
"""


def support_table(trials: Sequence[Trial], command: str) -> str:
    """Return the whole page; command: the command that made it."""
    counted = Counter(trial.result for trial in trials)
    counts = ", ".join(f"{counted[result]} {result.value}" for result in MEANING if counted[result])
    named = ", ".join(f"{name} {version}" for name, version in versions().items())
    parts = [HEAD.format(command=command, versions=named, counts=f"{len(trials)} families: {counts}.")]
    for result, meaning in MEANING.items():
        if group := sorted((trial for trial in trials if trial.result is result), key=lambda trial: trial.family):
            parts.append(f"## {result.value} ({len(group)})\n\n{meaning}\n\n{_rows(group)}\n")
    return "\n".join(parts)


def read_results(page: str) -> dict[str, Result]:
    """Return the result of each family from a page of `support_table`."""
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    return {row[1].strip(" `"): Result(row[4].strip()) for row in rows}


def _rows(trials: Sequence[Trial]) -> str:
    lines = ["| family | class | attention | result | reason |", "|---|---|---|---|---|"]
    for trial in trials:
        reason = trial.reason if len(trial.reason) <= WIDEST else trial.reason[: WIDEST - 1].rstrip() + "…"
        reason = reason.replace("|", "\\|")
        lines.append(
            f"| `{trial.family}` | {trial.model} | {trial.attention} | {trial.result.value} | {reason} |".replace(
                "  ", " "
            )
        )
    return "\n".join(lines)
