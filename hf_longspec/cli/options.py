"""Shared by the commands: their options, and how the named target and draft are loaded."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .one_line import fail, in_one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TYPER: dict[str, Any] = dict(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def parse_tree(text: str) -> tuple[int, ...]:
    """Parse `"4,16,16"` as (4, 16, 16), and the empty string as (), no speculation."""
    return _numbers(text, "level widths such as 4,16,16") if text.strip() else ()


def parse_numbers(text: str) -> tuple[int, ...]:
    """Parse `"1024,4096"` as (1024, 4096)."""
    return _numbers(text, "numbers such as 16,64")


def _numbers(text: str, meant: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(number) for number in text.split(","))
    except ValueError:
        numbers = (0,)
    if any(number < 1 for number in numbers):
        raise typer.BadParameter(f"expected {meant} (at least 1 each), got {text!r}")
    return numbers


def numbers(help: str, metavar: str = "N,N,...") -> Any:
    """Make an option that takes a list of numbers."""
    return typer.Option(parser=parse_numbers, metavar=metavar, help=help)


def parse_sampling(text: str) -> dict[str, Any]:
    """Parse `"temperature=0.7,top_k=20"` or `"own"` as options of `generate`."""
    from ..benchmark import sampling

    try:
        return sampling.parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def sampling_settings(help: str) -> Any:
    """Make an option that takes settings of sampling."""
    return typer.Option(parser=parse_sampling, metavar="NAME=VALUE,...", help=help)


Tree = Annotated[
    Any,
    typer.Option(
        parser=parse_tree, metavar="W1,W2,...", help="Guesses at each level of the tree.  [default: the draft's own]"
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to write.")]
Target = Annotated[str, typer.Option(help="Folder or Hub id of the target.")]
Draft = Annotated[str, typer.Option(help="Folder or Hub id of its LongSpec draft.")]
Text = Annotated[
    list[Path], typer.Option(metavar="PATH", help="Held-out text: a file, or a folder of text files. Repeatable.")
]
Format = Annotated[Dtype, typer.Option(help="Number format; auto is the target's own.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python files of the two repositories.")]
Profile = Annotated[bool, typer.Option("--profile", help="Show where the time of a round goes.")]


def load_pair(
    target_name: str, draft_name: str, dtype: Dtype, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Any]:
    """Load a target, its tokenizer and the draft, on the GPU if there is one, or fail in one line."""
    target = load_model("target", target_name, dtype, trust_remote_code)
    tokenizer = load_tokenizer("target", target_name, trust_remote_code)
    return target, tokenizer, load_draft(draft_name, dtype, trust_remote_code)


def load_draft(name: str, dtype: Dtype, trust_remote_code: bool) -> Any:
    draft = load_model("draft", name, dtype, trust_remote_code)
    if draft.config.model_type != "longspec":
        fail(f"draft {name} is no LongSpec draft, its model type is {draft.config.model_type!r}")
    return draft


def load_tokenizer(role: str, name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    from ..loading import loading

    with in_one_line(), loading(role, name):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


def load_model(role: str, name: str, dtype: Dtype, trust_remote_code: bool) -> Any:
    """Load a causal language model in eval mode, on the GPU if there is one, or fail in one line."""
    import torch
    from transformers import AutoModelForCausalLM

    from ..loading import loading

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with in_one_line(f"{role} {name} does not fit on this {device} device"):
        with loading(role, name):
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype.value, trust_remote_code=trust_remote_code)
        return model.to(device).eval()
