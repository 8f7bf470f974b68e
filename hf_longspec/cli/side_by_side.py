"""`hf-longspec demo` and `hf-longspec generate`: a pair on one prompt, without and with the draft."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .one_line import fail, in_one_line
from .options import Draft, Dtype, Format, MaxNewTokens, Profile, RemoteCode, Target, Tree, load_pair, parse_tree


def demo(
    tree: Annotated[
        Any,
        typer.Option(parser=parse_tree, metavar="W1,W2,...", help="Guesses at each level of the tree; CPUs want few."),
    ] = "2,2,2,2",
    max_new_tokens: MaxNewTokens = 128,
    dtype: Annotated[Dtype, typer.Option(help="Number format of target and draft.")] = Dtype.bfloat16,
    draft: Annotated[str | None, typer.Option(help="Another draft for SmolLM2-135M-Instruct.")] = None,
    profile: Profile = False,
) -> None:
    """A small model writes on, without and with its draft.

    SmolLM2-135M-Instruct goes on with a long Python file; its draft is shipped here. Needs no GPU and no Hub.
    """
    from ..demo import DRAFT, PROMPT
    from ..demo.weights import smollm2_folder

    if draft is None and not (DRAFT / "config.json").is_file():
        fail(f"this installation carries no draft in {DRAFT}; name one with --draft")
    with in_one_line():
        folder = smollm2_folder()
    prompt = PROMPT.read_text(encoding="utf-8")
    show(str(folder), draft or str(DRAFT), prompt, dtype, tree, profile, max_new_tokens=max_new_tokens)


def generate(
    target: Target,
    draft: Draft,
    prompt_file: Annotated[Path, typer.Option(help="Text to go on with, UTF-8.")],
    tree: Tree = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy; above 0 samples.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    dtype: Format = Dtype.auto,
    profile: Profile = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Your model writes on, without and with its draft."""
    try:
        prompt = prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read prompt file {prompt_file}: {error}")
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    options = {"max_new_tokens": max_new_tokens, "seed": seed, **sampling}
    show(target, draft, prompt, dtype, tree, profile, trust_remote_code, **options)


def show(
    target_name: str,
    draft_name: str,
    prompt: str,
    dtype: Dtype,
    tree: tuple[int, ...] | None,
    profile: bool,
    trust_remote_code: bool = False,
    **options: Any,
) -> None:
    """Run the pair on one prompt, without and with the draft, and print both texts with their speeds.

    Exits with code 1 if the texts part where rounding does not explain it.
    """
    from rich.console import Console
    from transformers.utils import logging

    from ..evaluation import report, side_by_side

    logging.disable_progress_bar()
    console = Console(highlight=False)
    target, tokenizer, draft = load_pair(target_name, draft_name, dtype, trust_remote_code)
    draft.config.profile = profile
    if tree is not None:
        draft.config.tree_shape = tree
    inputs = dict(tokenizer(prompt, return_tensors="pt").to(target.device))
    if not inputs["input_ids"].numel():
        fail("the prompt is empty")
    options.setdefault("do_sample", False)
    length, number_format = inputs["input_ids"].shape[1], str(target.dtype).removeprefix("torch.")
    setting = f"{target_name}, {number_format}, {target.device}; prompt of {length} tokens"
    console.print(setting, style="bold", soft_wrap=True)
    runs = []
    with in_one_line("a shorter prompt takes less"):
        side_by_side.warm_up(target, inputs, draft, **options)
        for name, assistant, style in (("plain generate", None, "blue"), ("LongSpec", draft, "magenta")):
            console.rule(name)
            streamer = report.ConsoleStreamer(tokenizer, console, style)
            runs.append(side_by_side.run(target, inputs, assistant, streamer=streamer, **options))
        plain, speculative = runs
        sampled = options["do_sample"]
        verdict = side_by_side.judge(target, inputs, plain.tokens, speculative.tokens, sampled=sampled)
    console.rule()
    console.print(report.table(plain, speculative, draft.state_bytes))
    console.print(report.chosen(speculative), soft_wrap=True)
    if profile:
        console.print(report.phases(speculative))
    console.print(report.sentence(verdict, len(plain.tokens), number_format), soft_wrap=True)
    if not (verdict.equal or verdict.tie):
        raise typer.Exit(1)
