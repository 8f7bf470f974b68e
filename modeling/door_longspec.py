"""The door into `generate`: two methods of `GenerationMixin`, wrapped once, that ask the assistant to do the work.

`generate` looks its decoding method up on the target's class, so nothing short of this reaches it with the assistant,
the streamer and everything else a user passed. Knows no draft: dispatch is by method, since a class loaded as remote
code is never the one of the pip package, and both may live in one process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel
from transformers.generation import GenerationMixin


def install() -> None:
    """Let `generate` reach drafts that offer `assisted_decoding`; others are served as before. Idempotent."""
    _wrap("_assisted_decoding", lambda assistant: getattr(assistant, "assisted_decoding", None))
    _wrap("_validate_generation_mode", lambda assistant: getattr(assistant, "check_generation", None))


def _wrap(name: str, own_method: Callable[[Any], Callable | None]) -> None:
    original = getattr(GenerationMixin, name)
    if hasattr(original, "_longspec_original"):
        return

    @functools.wraps(original)
    def dispatch(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        # `_validate_generation_mode` gets the assistant inside its last argument, `_assisted_decoding` by keyword
        options = kwargs or (args[-1] if args and isinstance(args[-1], dict) else {})
        method = own_method(options.get("assistant_model"))
        return original(self, *args, **kwargs) if method is None else method(self, *args, **kwargs)

    dispatch._longspec_original = original  # type: ignore[attr-defined]
    setattr(GenerationMixin, name, dispatch)
