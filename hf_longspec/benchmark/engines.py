"""The ways to write a text with one target: transformers' own, and LongSpec without and with guesses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, StaticCache
from transformers.utils import is_flash_attn_2_available

DEFAULT, OURS = "generate", "LongSpec"
LOOKUP_TOKENS = 10


class Engine(NamedTuple):
    """One way to write a text, by these options of `generate`.

    attention: a transformers implementation other than the target's own; stock: whether it needs no LongSpec draft.
    """

    name: str
    options: dict[str, Any]
    attention: str | None = None
    stock: bool = True

    @contextmanager
    def chosen(self, target: PreTrainedModel) -> Iterator[None]:
        """Set `target` up for this engine within the context."""
        with attending_by(target, self.attention) if self.attention else nullcontext():
            yield


def engines_for(
    target: PreTrainedModel, draft: Any, batch: int, assistant: PreTrainedModel | None, length: int
) -> list[Engine]:
    """Return the engines that can write a batch of this size here; stock assisted decoding serves one prompt only.

    length: tokens of the longest prompt and its new text.
    """
    static: dict[str, Any] = {"cache_implementation": "static"}
    room = length + LOOKUP_TOKENS  # prompt lookup guesses past the end of the text (findings/lookup_past_the_end.sh)
    assisted_static = batch == 1 and assists_static_cache(target, room)
    # in all rows, or the target would be compiled once more for another length
    roomy = static | ({"max_cache_len": room} if assisted_static else {})
    engines = [Engine(DEFAULT, {}), Engine("static cache", roomy)]
    short = target.dtype in (torch.bfloat16, torch.float16)
    if target.device.type == "cuda" and short and is_flash_attn_2_available():
        engines.append(Engine("flash_attention_2", {}, attention="flash_attention_2"))
    if batch == 1:
        lookup = {"prompt_lookup_num_tokens": LOOKUP_TOKENS}
        engines.append(Engine("prompt lookup", lookup))
        if assisted_static:
            engines.append(Engine("prompt lookup, static cache", lookup | roomy))
        if assistant is not None:
            engines.append(Engine("assistant", {"assistant_model": assistant}))
            if assisted_static:  # as long as in the rows above: transformers keeps the greatest length
                engines.append(Engine("assistant, static cache", {"assistant_model": assistant} | static))
    idle = copy.deepcopy(draft)  # a draft of its own: each draft keeps only the graphs of its last call
    idle.config.tree_shape = ()
    engines.append(Engine(f"{OURS}, no guesses", {"assistant_model": idle}, stock=False))
    return [*engines, Engine(OURS, {"assistant_model": draft}, stock=False)]


def assists_static_cache(target: PreTrainedModel, length: int) -> bool:
    """Tell whether stock assisted decoding can cut guesses off a static cache of so many tokens.

    Since transformers 5.24 it can, unless layers attend to a window that is shorter.
    """
    return StaticCache(config=target.config.get_text_config(decoder=True), max_cache_len=length).is_croppable


@contextmanager
def attending_by(target: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Let `target` attend by another implementation of transformers within the context."""
    own = target.config._attn_implementation
    target.set_attn_implementation(implementation)
    try:
        yield
    finally:
        target.set_attn_implementation(own)
