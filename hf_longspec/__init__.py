"""Lossless LongSpec decoding inside `model.generate`.

    from hf_longspec import LongSpecConfig, LongSpecForCausalLM

`import hf_longspec` by itself loads neither torch nor transformers. The import only leaves a stand-in for the config
in transformers' table of models, so that `AutoModelForCausalLM.from_pretrained`, `pipeline(assistant_model=...)` and
their like know drafts without remote code, whichever of the two packages is imported first (`registration.py` tells
how).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .registration import announce

if TYPE_CHECKING:
    from .modeling.configuration_longspec import LongSpecConfig
    from .modeling.modeling_longspec import LongSpecForCausalLM

__version__ = "0.1.0"
__all__ = ["LongSpecConfig", "LongSpecForCausalLM"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .registration import register

    globals().update(register())
    return globals()[name]


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


announce()
