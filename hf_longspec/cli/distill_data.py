"""`hf-longspec distill-data`: the target's answers to prompts, as training data."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .one_line import in_one_line
from .options import Dtype, RemoteCode, Target, load_draft, load_model, load_tokenizer
from .options import Format as NumberFormat
from .sources import Format, FormatOption, Kind, Loss, SourceOptions, with_source_options

if TYPE_CHECKING:
    from ..training.distill import Part


@dataclass(frozen=True)
class PromptOptions(SourceOptions):
    """The options of a source of prompts: none of its tokens is learned, so no option says which tokens are."""

    format: FormatOption = Format.json
    kind: Annotated[
        Kind | None,
        typer.Option(help="What a row holds.  [default: a text where files or tokens are read, else a chat]"),
    ] = None
    answer_field: str | None = field(default=None, init=False)
    loss: Loss = field(default=Loss.all, init=False)
    longest_line: int = field(default=1000, init=False)


@with_source_options
def distill_data(
    target: Target,
    prompts: Annotated[str, typer.Option(help="File, folder, or Hub id of the prompts.")],
    out: Annotated[Path, typer.Option(help="Folder for the data; the same command goes on where it was stopped.")],
    source: PromptOptions,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Texts are cut to it, longer chats left out.")] = 1024,
    stride: Annotated[
        int | None, typer.Option(min=1, help="A prompt of a text begins at each multiple of it.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy; above 0 samples.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of sampling; 1 keeps all tokens.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Of sampling; 0 keeps all tokens.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at a time.")] = 16,
    shard_rows: Annotated[int, typer.Option(min=1, help="Prompts a file; a kill costs the file being made.")] = 512,
    shard: Annotated[str, typer.Option(metavar="I/N", help="This process is number I (from 0) of N.")] = "0/1",
    draft: Annotated[str | None, typer.Option(help="A trained draft: faster for small batches, same answers.")] = None,
    dtype: NumberFormat = Dtype.auto,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Let the target answer prompts: training data for a draft.

    Token ids are kept, as a source of `format: tokens` in a recipe. The same command goes on where it was stopped.
    """
    from transformers.utils import logging

    from ..evaluation.room import check_room
    from ..provenance import provenance
    from ..training.data.report import SourceReport
    from ..training.data.tokenized import origin
    from ..training.distill import Answering, claim, distill, settings_of, try_once, without_guesses
    from ..training.distill_prompts import prompts_sha256, read_prompts

    part = parse_shard(shard)
    logging.disable_progress_bar()
    answering = Answering(max_new_tokens, temperature, top_p, top_k, seed, batch_size, shard_rows)
    tokenizer = load_tokenizer("target", target, trust_remote_code)
    model = load_model("target", target, dtype, trust_remote_code)
    with in_one_line("a smaller --batch-size, with another --out, takes less"):
        helper = without_guesses(model) if draft is None else load_draft(draft, dtype, trust_remote_code)
        check_room(model.config, max_prompt_tokens, max_new_tokens, "--max-prompt-tokens, --max-new-tokens: ")
        section = source.section(prompts)
        report = SourceReport(prompts, source.max_bad_share)
        found = read_prompts(section, tokenizer, max_prompt_tokens, stride, report)
        about = {"target": target, "source": asdict(section.sources[0]), "prompts_sha256": prompts_sha256(found)}
        tokens_of = origin(tokenizer)
        try_once(model, found, answering, helper)
        claim(out, settings_of(answering, part, model, about | {"prompts": len(found)} | tokens_of))
        started = time.monotonic()
        counts = distill(model, found, out, answering, part, tokens_of, helper)
    seconds = time.monotonic() - started
    result: dict[str, Any] = {"out": str(out), "shard": shard} | counts
    result |= {"seconds": seconds, "tokens_per_second": counts["new_tokens"] / seconds, "prompts": report.as_dict()}
    typer.echo(json.dumps(result | provenance(model.device)))


def parse_shard(text: str) -> Part:
    """Parse `"0/4"`, the first of four parts."""
    from ..training.distill import Part

    number, slash, parts = text.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
        raise typer.BadParameter(f"expected I/N with I from 0 to N-1, such as 0/4, got {text!r}")
    return Part(int(number), int(parts))
