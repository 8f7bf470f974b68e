"""`hf-longspec bench`: the cost of decoding. Each command prints a table, and one line of JSON last."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .one_line import fail, in_one_line
from .options import (
    TYPER,
    Draft,
    Dtype,
    Format,
    Profile,
    RemoteCode,
    Target,
    Text,
    Tree,
    load_model,
    load_pair,
    numbers,
    parse_tree,
    sampling_settings,
)

if TYPE_CHECKING:
    import torch
    from rich.table import Table

app = typer.Typer(**TYPER, help="What decoding costs: a layer's attention, the steps of a round, whole texts.")

Contexts = Annotated[Any, numbers("Tokens in the cache.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw a picture too; needs matplotlib.")]
TILES = "ROWS,KEYS,WARPS,STAGES,PROGRAMS"
Backend = Annotated[str, typer.Option(help="Attention backend of verification.")]
Compile = Annotated[bool, typer.Option("--compile-target", help="Compile the target's layers for verification.")]
RandomFormat = Annotated[Dtype, typer.Option(help="Number format; auto: bfloat16 on a GPU, else float32.")]


@app.command()
def attention(
    contexts: Contexts = "1024,32768,131072",
    nodes: Annotated[Any, numbers("Nodes of the tree, root included.")] = "1,16,64",
    heads: Annotated[Any, numbers("Query heads, K/V heads, head dimension.", metavar="H,K,D")] = "32,8,128",
    backends: Annotated[str, typer.Option(metavar="NAME,...", help="Which.  [default: all that can run here]")] = "",
    tiles: Annotated[list[Any] | None, numbers("Tiles of the fused kernel to try too. Repeatable.", TILES)] = None,
    dtype: RandomFormat = Dtype.auto,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats; their median counts.")] = 20,
    plot: Plot = None,
) -> None:
    """The attention of one layer, all backends side by side.

    Over the text so far and the tree of guesses; beside what PyTorch and FlashAttention have in stock.
    """
    check_plot(plot)
    if len(heads) != 3 or heads[0] % heads[1]:
        fail(f"expected query heads, K/V heads that divide them, head dimension, got --heads {listed(heads)}")
    from ..benchmark import attention as layer
    from ..benchmark import tables, timing

    device, number_format = here(dtype)
    shape = layer.Heads(*heads)
    with in_one_line("shorter --contexts take less"):
        chosen, missing = layer.choose([name for name in backends.split(",") if name], device, number_format, shape)
        chosen += layer.tuned(tiles, device, number_format, shape) if tiles else []
        for name, reason in missing.items():
            typer.echo(f"{name} cannot run here: {reason}", err=True)
        speed = timing.measure_speed(device, number_format)
        cases = [
            layer.measure(shape, context, count, chosen, speed, device, number_format, repeats)
            for context in contexts
            for count in nodes
        ]
    result = {
        "bench": "attention",
        "heads": list(heads),
        "dtype": str(number_format),
        "speed": speed._asdict(),
        "missing_backends": missing,
        "cases": [case.as_dict() for case in cases],
    }
    show([tables.attention_table(cases)], result, device)
    if plot is not None:
        draw("attention", cases, plot)


@app.command()
def children(
    nodes: Annotated[Any, numbers("Nodes of the level above.")] = "1,4,16",
    width: Annotated[int, typer.Option(min=1, help="Nodes to choose.")] = 16,
    vocab: Annotated[Any, numbers("Tokens to choose among.")] = "49152,128256,151936",
    chunks: Annotated[Any, numbers("Tokens of a program of the Triton kernels.")] = "1024,2048,4096",
    dtype: RandomFormat = Dtype.auto,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats; their median counts.")] = 20,
) -> None:
    """The draft's choice of guesses among all tokens.

    Of one level of the tree; the LM head is not in it.
    """
    from ..benchmark import children as level
    from ..benchmark import tables, timing

    if width > min(nodes) * min(vocab):
        fail(f"expected --width of at most nodes x tokens, got {width} of {min(nodes)} x {min(vocab)}")
    device, number_format = here(dtype)
    with in_one_line("a smaller --vocab takes less"):
        speed = timing.measure_speed(device, number_format)
        choices = [
            level.measure(count, width, size, chunks, speed, device, number_format, repeats)
            for size in vocab
            for count in nodes
        ]
    result = {
        "bench": "children",
        "dtype": str(number_format),
        "speed": speed._asdict(),
        "choices": [choice.as_dict() for choice in choices],
    }
    show([tables.children_table(choices)], result, device)


@app.command()
def latency(
    shape: Annotated[str, typer.Option(help="Named shape, with random weights.")] = "llama-8b",
    contexts: Contexts = "1024,32768,131072",
    tree: Annotated[Any, typer.Option(parser=parse_tree, metavar="W1,W2,...", help="Of the round.")] = "4,16,16,16,16",
    verify_tokens: Annotated[Any, numbers("Nodes that are verified; in the round the most of them.")] = "16,64",
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of each call.")] = 24,
    static: Annotated[bool, typer.Option("--static", help="generate over a compiled static cache too: slow.")] = False,
    prefill: Annotated[bool, typer.Option("--prefill", help="Read prompts too: seconds and peak memory.")] = False,
    backend: Backend = "auto",
    compile_target: Compile = False,
    draft_vocab: Annotated[int | None, typer.Option(min=1, help="Tokens the draft guesses among.  [all]")] = None,
    sampling: Annotated[Any, sampling_settings("Sample, by these settings.  [greedy]")] = None,
    dtype: RandomFormat = Dtype.auto,
    plot: Plot = None,
) -> None:
    """What each step of decoding costs, by length of context.

    Behind a filled cache of random numbers, so it says nothing about how well a draft guesses.
    """
    check_plot(plot)
    from transformers.utils import logging

    from ..benchmark import latency as steps
    from ..benchmark import prefill as reading
    from ..benchmark import shapes, tables, timing
    from ..benchmark.sampling import EXAMPLE, GREEDY

    logging.disable_progress_bar()
    if not tree:
        fail("expected level widths such as 4,16,16, got an empty --tree")
    if sampling == {}:
        fail(f"expected settings such as {EXAMPLE}, got --sampling own: random weights come without a config")
    device, number_format = here(dtype)
    options: dict[str, Any] = {"tree_shape": tree, "attention_backend": backend, "compile_target": compile_target}
    options["verify_tokens"] = max(verify_tokens)  # for the calls that read prompts
    measured = []
    with in_one_line("shorter --contexts, or a smaller --shape, take less"):
        speed = timing.measure_speed(device, number_format)
        target, draft = shapes.random_pair(shape, device, number_format, 2 * max(contexts), **options)
        draft.set_draft_vocab(None if draft_vocab is None else range(draft_vocab))
        pair = steps.Bench(target, draft, speed, rounds, sampling or GREEDY)
        for context in contexts:
            measured.append(pair.measure(context, verify_tokens, static))
            typer.echo(f"context {context:,}: {measured[-1].steps[-1].milliseconds:.2f} ms a round")
        read = [row for context in contexts for row in reading.measure(target, draft, context)] if prefill else []
    result = {
        "bench": "latency",
        "shape": shape,
        "tree": list(tree),
        "verify_tokens": list(verify_tokens),
        "dtype": str(number_format),
        "backend": backend,
        "compile_target": compile_target,
        "draft_vocab": draft_vocab,
        "speed": speed._asdict(),
        "weights_bytes": shapes.read_bytes(target),
        "contexts": [each.as_dict() for each in measured],
        "prefill": [asdict(row) for row in read],
    }
    show([tables.latency_table(measured)] + ([tables.prefill_table(read)] if prefill else []), result, device)
    if plot is not None:
        draw("latency", measured, plot)


@app.command()
def text(
    target: Target,
    draft: Draft,
    text: Text,
    assistant: Annotated[str | None, typer.Option(help="A small LM as transformers' own assistant.")] = None,
    batches: Annotated[Any, numbers("Batch sizes.")] = "1,8",
    count: Annotated[int, typer.Option(min=1, help="Batches of each size.")] = 1,
    context: Annotated[int, typer.Option(min=4, help="Tokens of the longest prompt.")] = 1024,
    tree: Tree = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to write.")] = 128,
    backend: Backend = "auto",
    compile_target: Compile = False,
    sampling: Annotated[
        Any, sampling_settings("Sample, by these settings, or as the target's `own`.  [greedy]")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each engine; their median counts.")] = 3,
    dtype: Format = Dtype.auto,
    profile: Profile = False,
    trust_remote_code: RemoteCode = False,
    plot: Plot = None,
) -> None:
    """Whole texts: a draft beside what transformers offers.

    One engine after the other, all with the same seeds. The fastest of transformers' own has a star.
    """
    check_plot(plot)
    from transformers.utils import logging

    from ..benchmark import tables
    from ..benchmark import text as whole
    from ..benchmark.sampling import GREEDY
    from ..evaluation.room import check_room
    from ..evaluation.text import read_tokens

    logging.disable_progress_bar()
    model, tokenizer, its_draft = load_pair(target, draft, dtype, trust_remote_code)
    helper = None if assistant is None else load_model("assistant", assistant, dtype, trust_remote_code)
    its_draft.config.profile, its_draft.config.compile_target = profile, compile_target
    its_draft.config.attention_backend = backend
    if tree is not None:
        its_draft.config.tree_shape = tree
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "batches": count,
        "repeats": repeats,
        "assistant": helper,
        "sampling": GREEDY if sampling is None else sampling,
    }
    with in_one_line("smaller --batches or a shorter --context take less"):
        check_room(model.config, context, max_new_tokens)
        tokens = read_tokens(text, tokenizer)
        compared = [whole.measure(model, its_draft, tokens, context, size, **options) for size in batches]
    result = {
        "bench": "text",
        "target": target,
        "draft": draft,
        "assistant": assistant,
        "dtype": str(model.dtype),
        "backend": backend,
        "compile_target": compile_target,
        "tree": list(its_draft.config.tree_on(model.device)),
        "batches": [each.as_dict() for each in compared],
    }
    show([tables.text_table(compared)] + ([tables.phases_table(compared)] if profile else []), result, model.device)
    if plot is not None:
        draw("text", compared, plot)


def here(dtype: Dtype) -> tuple[torch.device, torch.dtype]:
    """Return the GPU, or the CPU if there is none, and the number format that `dtype` stands for there."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    own = torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, own if dtype is Dtype.auto else getattr(torch, dtype.value)


def check_plot(path: Path | None) -> None:
    """Fail, before hours of measuring, if no picture can be drawn at this path."""
    if path is None:
        return
    if path.suffix != ".png" or not path.parent.is_dir():
        fail(f"expected --plot FILE.png in a folder that exists, got {path}")
    if find_spec("matplotlib") is None:
        fail("--plot needs matplotlib, which is not installed: pip install 'hf-longspec[bench]'")


def draw(bench: str, measured: list[Any], path: Path) -> None:
    """Draw the picture of a benchmark, after its figures are shown: a full disk costs the picture only."""
    from ..benchmark.plots import PICTURES

    with in_one_line():
        PICTURES[bench](measured, path)


def listed(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))


def show(tables: list[Table], result: dict[str, Any], device: torch.device) -> None:
    from rich.console import Console

    from ..provenance import provenance

    console = Console(highlight=False)
    if not console.is_terminal:  # a file has no edge at which a line must be cut
        console.width = 200
    for table in tables:
        console.print(table)
    typer.echo(json.dumps(result | provenance(device)))
