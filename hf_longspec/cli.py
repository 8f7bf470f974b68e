"""The command `hf-longspec`. Options and messages only; what does the work is imported when a command needs it."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

HUB_CONFIGS = Path(__file__).parent / "hub_configs"


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def parse_tree(text: str) -> tuple[int, ...]:
    """`"4,16,16"` is (4, 16, 16); the empty string is (), no speculation."""
    try:
        widths = tuple(int(width) for width in text.split(",")) if text.strip() else ()
    except ValueError:
        widths = (0,)
    if any(width < 1 for width in widths):
        raise typer.BadParameter(f"expected level widths such as 4,16,16 (at least 1 each), got {text!r}")
    return widths


Tree = Annotated[
    Any,
    typer.Option(parser=parse_tree, metavar="W1,W2,...", help="Nodes of each tree level.  [default: the draft's own]"),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to write.")]
Target = Annotated[str, typer.Option(help="Folder or Hub id of the target.")]
Draft = Annotated[str, typer.Option(help="Folder or Hub id of its LongSpec draft.")]
Format = Annotated[Dtype, typer.Option(help="Number format; auto is the target's own.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python files of the two repositories.")]
Profile = Annotated[bool, typer.Option("--profile", help="Show where the time of a round goes.")]


@app.callback()
def main_help() -> None:
    """Lossless LongSpec decoding: the text of plain `generate`, faster."""


@app.command()
def demo(
    tree: Annotated[
        Any,
        typer.Option(parser=parse_tree, metavar="W1,W2,...", help="Nodes of each tree level; CPUs want few of them."),
    ] = "2,2,2,2",
    max_new_tokens: MaxNewTokens = 128,
    dtype: Annotated[Dtype, typer.Option(help="Number format of target and draft.")] = Dtype.bfloat16,
    draft: Annotated[str | None, typer.Option(help="Another draft for SmolLM2-135M-Instruct.")] = None,
    profile: Profile = False,
) -> None:
    """SmolLM2-135M-Instruct goes on with a long Python file, without and with the draft shipped here."""
    from .demo.weights import NAME, WeightsError, smollm2_folder

    if draft is None and not (HUB_CONFIGS / NAME / "config.json").is_file():
        fail(f"this installation carries no draft in {HUB_CONFIGS / NAME}; name one with --draft")
    try:
        folder = smollm2_folder()
    except WeightsError as error:
        fail(str(error), code=1)
    prompt = (Path(__file__).parent / "demo" / "prompt.txt").read_text(encoding="utf-8")
    show(str(folder), draft or str(HUB_CONFIGS / NAME), prompt, dtype, tree, profile, max_new_tokens=max_new_tokens)


@app.command()
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
    """Any target goes on with a text, without and with its draft."""
    try:
        prompt = prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read prompt file {prompt_file}: {error}")
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    options = {"max_new_tokens": max_new_tokens, "seed": seed, **sampling}
    show(target, draft, prompt, dtype, tree, profile, trust_remote_code, **options)


@app.command()
def evaluate(
    target: Target,
    draft: Draft,
    text: Annotated[list[Path], typer.Option(help="Held-out text: a file, or a folder of text files. Repeatable.")],
    contexts: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "1024,4096,7168",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each length.")] = 12,
    tree: Tree = None,
    max_new_tokens: MaxNewTokens = 128,
    dtype: Format = Dtype.auto,
    compare: Annotated[bool, typer.Option("--compare", help="Run plain generate too: speed-up and equality.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Acceptance by length of context on held-out text, greedy: a table, and one line of JSON last."""
    import json

    from rich.console import Console
    from transformers.utils import logging

    from .evaluation import acceptance, report

    logging.disable_progress_bar()
    try:
        lengths = [int(length) for length in contexts.split(",")]
    except ValueError:
        fail(f"expected prompt lengths such as 1024,4096, got --contexts {contexts!r}")
    model, tokenizer, its_draft = load_pair(target, draft, dtype, trust_remote_code)
    if tree is not None:
        its_draft.config.tree_shape = tree
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": None}
    buckets = []
    console = Console(highlight=False)
    try:
        tokens = acceptance.read_tokens(text, tokenizer)
        for bucket in acceptance.measure(model, its_draft, tokens, lengths, prompts, compare=compare, **options):
            buckets.append(bucket)
            console.print(f"context {bucket.context}: τ = {bucket.accept_length:.2f}", soft_wrap=True)
    except (ValueError, OSError) as error:
        fail(str(error))
    console.print(report.acceptance_table(buckets))
    setting: dict[str, Any] = {
        "target": target,
        "draft": draft,
        "tree": list(its_draft.config.tree_shape),
        "dtype": str(model.dtype),
    }
    setting |= {"device": report.device_name(model.device), "new_tokens": max_new_tokens} | report.versions()
    typer.echo(json.dumps(setting | {"buckets": [bucket.as_dict() for bucket in buckets]}))


@app.command()
def bench(
    target: Target,
    draft: Draft,
    text: Annotated[list[Path], typer.Option(help="Text to cut prompts from: a file, or a folder of text files.")],
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8",
    context: Annotated[int, typer.Option(min=4, help="Tokens of the longest prompt.")] = 1024,
    tree: Tree = None,
    max_new_tokens: MaxNewTokens = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each engine.")] = 3,
    dtype: Format = Dtype.auto,
    profile: Profile = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Total tokens per second of batches, greedy, without and with the draft: a table, and one line of JSON last."""
    import json

    from rich.console import Console
    from transformers.utils import logging

    from .evaluation import acceptance, report, throughput

    logging.disable_progress_bar()
    try:
        sizes = [int(size) for size in batches.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        fail(f"expected batch sizes such as 1,8, got --batches {batches!r}")
    model, tokenizer, its_draft = load_pair(target, draft, dtype, trust_remote_code)
    its_draft.config.profile = profile
    if tree is not None:
        its_draft.config.tree_shape = tree
    results = []
    try:
        tokens = acceptance.read_tokens(text, tokenizer)
        for size in sizes:
            options = {"max_new_tokens": max_new_tokens, "repeats": repeats}
            results.append(throughput.measure(model, its_draft, tokens, context, size, **options))
    except (ValueError, OSError) as error:
        fail(str(error))
    Console(highlight=False).print(report.throughput_table(results))
    setting = {"target": target, "draft": draft, "tree": list(its_draft.config.tree_shape), "dtype": str(model.dtype)}
    setting |= {"device": report.device_name(model.device)} | report.versions()
    typer.echo(json.dumps(setting | {"batches": [result.as_dict() for result in results]}))


@app.command()
def support(
    families: Annotated[
        str, typer.Option(metavar="NAME,NAME,...", help="Model types to try.  [default: all that transformers has]")
    ] = "",
    output: Annotated[Path | None, typer.Option(help="Markdown file for the table; else it is printed.")] = None,
) -> None:
    """Which model families are served: each is tried on a tiny random model. Exit code 1 if any is WRONG."""
    import torch
    from rich.console import Console
    from transformers.utils import logging

    from .evaluation import families as trials_of
    from .evaluation import support_table, tiny_models

    if output is not None and not output.parent.is_dir():
        fail(f"cannot write {output}: no such folder")
    known = tiny_models.families()
    chosen = [name.strip() for name in families.split(",") if name.strip()]
    if unknown := [name for name in chosen if name not in known]:
        fail(f"transformers has no causal language model of the type {', '.join(unknown)}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # tiny models only wait for more
    console, trials = Console(highlight=False, stderr=output is None), []
    for trial in trials_of.try_families(chosen or known):
        trials.append(trial)
        console.print(f"{trial.family}: {trial.result.value}", trial.reason, markup=False, soft_wrap=True)
    command = "hf-longspec support" + (f" --families {','.join(chosen)}" if chosen else "")
    page = support_table.support_table(trials, command + (f" --output {output}" if output else ""))
    if output is None:
        typer.echo(page)
    else:
        output.write_text(page, encoding="utf-8")
    if any(trial.result is trials_of.Result.wrong for trial in trials):
        raise typer.Exit(1)


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
    """Runs the pair side by side on the console. Exit code 1 if the texts part where rounding does not explain it."""
    from rich.console import Console
    from transformers.utils import logging

    from .evaluation import report, side_by_side

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
    try:
        side_by_side.warm_up(target, inputs, draft, **options)
        for name, assistant, style in (("plain generate", None, "blue"), ("LongSpec", draft, "magenta")):
            console.rule(name)
            streamer = report.ConsoleStreamer(tokenizer, console, style)
            runs.append(side_by_side.run(target, inputs, assistant, streamer=streamer, **options))
    except ValueError as error:  # generate's way, and ours, to refuse what a user asked for
        fail(str(error))
    plain, speculative = runs
    sampled = options["do_sample"]
    verdict = side_by_side.judge(target, inputs, plain.tokens, speculative.tokens, sampled=sampled)
    console.rule()
    console.print(report.table(plain, speculative, draft.state_bytes))
    if profile:
        console.print(report.phases(speculative))
    console.print(report.sentence(verdict, len(plain.tokens), number_format), soft_wrap=True)
    if not (verdict.equal or verdict.tie):
        raise typer.Exit(1)


def load_pair(
    target_name: str, draft_name: str, dtype: Dtype, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Any]:
    """Target, its tokenizer and the draft, on the GPU if there is one. Says in one line what cannot be loaded."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = []
    for role, name in (("target", target_name), ("draft", draft_name)):
        if name.startswith((".", "/")) and not Path(name).is_dir():
            fail(f"{role} {name}: no such folder")
        try:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype.value, trust_remote_code=trust_remote_code)
            if role == "target":
                tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            fail(f"{role} {name} cannot be loaded: {str(error).strip().splitlines()[0]}")
        loaded.append(model.to(device).eval())
    target, draft = loaded
    if draft.config.model_type != "longspec":
        fail(f"draft {draft_name} is no LongSpec draft, its model type is {draft.config.model_type!r}")
    return target, tokenizer, draft


def fail(message: str, code: int = 2) -> NoReturn:
    """One line on standard error, no traceback; code 2 says that the command was at fault, 1 that the machine was."""
    typer.echo(f"hf-longspec: {message}", err=True)
    raise typer.Exit(code)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
