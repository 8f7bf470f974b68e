"""`hf-longspec evaluate`: acceptance by length of context."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from .options import Draft, Dtype, Format, MaxNewTokens, RemoteCode, Target, Text, Tree, fail, load_pair, numbers


def evaluate(
    target: Target,
    draft: Draft,
    text: Text,
    contexts: Annotated[Any, numbers("Prompt lengths in tokens.")] = "1024,4096,7168",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each length.")] = 12,
    tree: Tree = None,
    max_new_tokens: MaxNewTokens = 128,
    dtype: Format = Dtype.auto,
    compare: Annotated[bool, typer.Option("--compare", help="Run plain generate too: speed-up and equality.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Acceptance by length of context on held-out text, greedy: a table, and one line of JSON last."""
    from rich.console import Console
    from transformers.utils import logging

    from ..evaluation import acceptance, report
    from ..provenance import provenance

    logging.disable_progress_bar()
    model, tokenizer, its_draft = load_pair(target, draft, dtype, trust_remote_code)
    if tree is not None:
        its_draft.config.tree_shape = tree
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": None}
    buckets = []
    console = Console(highlight=False)
    try:
        tokens = acceptance.read_tokens(text, tokenizer)
        for bucket in acceptance.measure(model, its_draft, tokens, contexts, prompts, compare=compare, **options):
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
    setting |= {"new_tokens": max_new_tokens} | provenance(model.device)
    typer.echo(json.dumps(setting | {"buckets": [bucket.as_dict() for bucket in buckets]}))
