"""A report as Markdown: for people, and for the cards of drafts. Knows the report alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .summary import ALL

PICTURE = "report.png"
EXPLANATION = """\
τ is the mean of tokens that one forward of the target brings, with the lowest and highest of a single prompt; plain
decoding has 1. Speeds are of decoding, prefill apart. Texts in 16-bit formats may part where the target's two best
tokens tie within rounding: the last column counts texts that are equal, that part at such a tie, and that differ (of
sampled texts, where rounding may move a draw, only whether they are equal is known)."""


WITH_PREFILL = """\
τ with prefill is the τ of LongSpec's authors: the prefill of each prompt counts as one more forward, which brings one
token."""
PAPER = "paper/"  # how the names of their tasks begin


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the first column holds words, the other columns hold figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def speed_table(report: Mapping[str, Any]) -> str:
    """Return a table with a row for each task and context, and peaks of memory where they were measured."""
    buckets = report["buckets"]
    theirs = counts_prefill(report)
    head = ["task", "context", "prompts", "τ", *(["with prefill"] if theirs else []), "of a prompt"]
    head += ["plain, tokens/s", "with the draft", "speed-up", "= / ~ / ≠"]
    on_gpu = any(bucket["peak_bytes"] for bucket in buckets)
    rows = []
    for bucket in buckets:
        cells = ["**all**" if bucket["task"] == ALL else bucket["task"]]
        cells += [f"{bucket['context']:,}", str(bucket["prompts"]), f"{bucket['accept_length']:.2f}"]
        cells += [f"{bucket['with_prefill']:.2f}"] if theirs else []
        cells += [f"{bucket['lowest']:.1f} – {bucket['highest']:.1f}"]
        speeds = bucket["plain_tokens_per_second"], bucket["tokens_per_second"]
        cells += [f"{speed:.1f}" if speed else "" for speed in speeds]
        cells += [f"{bucket['speed_up']:.2f}×" if bucket["speed_up"] else ""]
        cells += [f"{bucket['equal']} / {bucket['ties']} / {bucket['different']}"]
        if on_gpu:
            cells += [f"{bucket[name] / 2**30:.2f}" for name in ("plain_peak_bytes", "peak_bytes")]
        rows.append(cells)
    return table(head + (["peak, GiB", "with the draft"] if on_gpu else []), rows)


def counts_prefill(report: Mapping[str, Any]) -> bool:
    return any(bucket["task"].startswith(PAPER) for bucket in report["buckets"])


def explanation(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return what the columns of the speed tables of these reports mean."""
    return f"{EXPLANATION} {WITH_PREFILL}" if any(map(counts_prefill, reports)) else EXPLANATION


def level_table(report: Mapping[str, Any]) -> str:
    """Return a table of the share of accepted guesses by level of the tree, all tasks together.

    The share is over the rounds that came to the level: in how many of them a guess of the level was accepted.
    """
    widths = report["draft"]["tree"]
    rows = []
    for bucket in report["buckets"]:
        if bucket["task"] == ALL:
            shares = ("" if share is None else f"{share:.0%}" for share in bucket["acceptance_by_level"])
            rows.append([f"{bucket['context']:,}", *shares])
    return table(["context", *(f"level {level} ({width})" for level, width in enumerate(widths, start=1))], rows)


def prefill_table(report: Mapping[str, Any]) -> str:
    rows = [
        [f"{bucket['context']:,}", f"{bucket['plain_prefill_seconds']:.2f}", f"{bucket['prefill_seconds']:.2f}"]
        for bucket in report["buckets"]
        if bucket["task"] == ALL
    ]
    return table(["context", "plain, s", "with the draft, s"], rows)


def setting_sentence(report: Mapping[str, Any]) -> str:
    """Return one sentence that says what ran where, and how."""
    target, draft, setting, made = (report[name] for name in ("target", "draft", "setting", "provenance"))
    how = f"sampled at temperature {setting['temperature']}" if setting["temperature"] else "greedy"
    tree = " · ".join(map(str, draft["tree"])) or "none"
    pair = f"{target['name']}, {target['dtype']}, {made['device']}; tree {tree}, attention backend {draft['backend']}"
    return f"{pair}; {how}, one prompt at a time."


def made_by(report: Mapping[str, Any]) -> str:
    made = report["provenance"]
    commit = f" (commit {made['commit'][:12]})" if made["commit"] else ""
    versions = ", ".join(f"{name} {made[name]}" for name in ("torch", "transformers", "python"))
    told = f"hf-longspec {made['hf-longspec'] or 'from a checkout'}{commit}, {versions}. {load_sentence(report)}"
    return f"```\n{made['command']}\n```\n\n{told.rstrip()}"


def load_sentence(report: Mapping[str, Any]) -> str:
    """Return a sentence on how busy the machine was, which says whether speeds can be trusted."""
    machine = report["machine"]
    if machine["load_average"] is None:
        return ""
    told = f"Load average while it was measured: {machine['load_average']:.1f} on {machine['cores']} cores"
    busy = "; **other programs disturbed the speeds**" if machine["load_average"] > machine["cores"] + 0.5 else ""
    return f"{told}{busy}."


def page(report: Mapping[str, Any], picture: bool) -> str:
    """Return the whole report as Markdown; picture: whether a picture lies beside the report."""
    draft = report["draft"]
    parts = [
        f"# {draft['name']}, evaluated",
        setting_sentence(report),
        speed_table(report),
        explanation([report]),
        *([f"![τ, speed-up and acceptance by level]({PICTURE})"] if picture else []),
        "## Acceptance by level of the tree",
        "Of the rounds that came to a level, the share in which one of its guesses was accepted:",
        level_table(report),
        "## Prefill and memory",
        prefill_table(report),
        f"The draft has {draft['parameters']:,} parameters ({draft['weights_bytes']:,} bytes); its state takes "
        f"{draft['state_bytes']:,} bytes at any context.",
        "## What was measured",
        *(f"- {task} was left out: {reason}" for task, reason in report["left_out"].items()),
        table(["task", "source", "version", "SHA-256 of the text"], map(source_row, report["sources"])),
        "## How",
        made_by(report),
    ]
    return "\n\n".join(parts) + "\n"


def source_row(source: Mapping[str, Any]) -> list[str]:
    checksum = f"`{source['sha256'][:16]}…`" if "sha256" in source else ""
    return [source["task"], source["name"], source.get("version", ""), checksum]
