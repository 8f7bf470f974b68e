"""The ways to write a text with one target: what transformers offers, and ours without and with guesses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

DEFAULT, OURS = "generate", "LongSpec"


class Engine(NamedTuple):
    """One way to write a text: by these options of `generate`, or by the draft with a tree of its own if there is one.

    attention: an implementation of transformers other than the target's.
    """

    name: str
    options: dict[str, Any]
    attention: str | None = None
    tree: tuple[int, ...] | None = None

    @property
    def stock(self) -> bool:
        return self.tree is None


def engines_for(target: PreTrainedModel, draft: Any, batch: int, assistant: PreTrainedModel | None) -> list[Engine]:
    """What can write a batch of this size here; stock assisted decoding serves single prompts."""
    engines = [Engine(DEFAULT, {}), Engine("static cache", {"cache_implementation": "static"})]
    short = target.dtype in (torch.bfloat16, torch.float16)
    if target.device.type == "cuda" and short and is_flash_attn_2_available():
        engines.append(Engine("flash_attention_2", {}, attention="flash_attention_2"))
    if batch == 1:
        engines.append(Engine("prompt lookup", {"prompt_lookup_num_tokens": 10}))
        if assistant is not None:
            engines.append(Engine("assistant", {"assistant_model": assistant}))
    ours = {"assistant_model": draft}
    engines.append(Engine(f"{OURS}, no guesses", ours, tree=()))
    return [*engines, Engine(OURS, ours, tree=tuple(draft.config.tree_shape))]


@contextmanager
def chosen(target: PreTrainedModel, draft: Any, engine: Engine) -> Iterator[None]:
    """Within it, target and draft are set as an engine wants them."""
    tree = draft.config.tree_shape
    draft.config.tree_shape = tree if engine.tree is None else engine.tree
    try:
        with attending_by(target, engine.attention) if engine.attention else nullcontext():
            yield
    finally:
        draft.config.tree_shape = tree


@contextmanager
def attending_by(target: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Within it, `target` attends by another implementation of transformers."""
    own = target.config._attn_implementation
    target.set_attn_implementation(implementation)
    try:
        yield
    finally:
        target.set_attn_implementation(own)
