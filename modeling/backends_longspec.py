"""The attention backends by name, and which of them can serve a call. Knows no models."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_longspec import Nodes, Prefix, PrefixAttention, eager_prefix, merged_attention
from .torch_flash_longspec import torch_prefix

Attention = Callable[[Tensor, Prefix, Nodes | None, float, float | None, Tensor | None], Tensor]


class Backend(NamedTuple):
    """A way to attend: `prefix` as `eager_prefix`, `attention` as `merged_attention`."""

    name: str
    prefix: PrefixAttention
    attention: Attention


def load_backend(name: str) -> Backend:
    """The backend of this name. Raises `ImportError` where its package is missing."""
    if name == "eager":
        return Backend(name, eager_prefix, functools.partial(merged_attention, eager_prefix))
    if name == "torch":
        return Backend(name, torch_prefix, functools.partial(merged_attention, torch_prefix))
    from .triton_longspec import triton_attention, triton_prefix

    return Backend(name, triton_prefix, triton_attention)


def resolve_backend(name: str, device: torch.device, head_dim: int, softcap: float | None) -> Backend:
    """The backend for a call: `name`, or the fastest that fits for `"auto"`.

    Raises `ValueError` with the reason where a backend asked for by name cannot run.
    """
    head = head_dim, softcap
    if name == "auto":
        fastest = ("triton", "torch") if device.type == "cuda" else ("torch",)
        name = next((name for name in fastest if MISFITS[name](device, *head) is None), "eager")
    elif name != "eager" and (reason := MISFITS[name](device, *head)):
        raise ValueError(f"attention_backend={name!r} cannot run here: {reason}; use 'auto' or 'eager'")
    return load_backend(name)


def triton_misfit(device: torch.device, head_dim: int, softcap: float | None) -> str | None:
    """Why our own kernel cannot serve a target, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    import triton

    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"it needs a CUDA device (or TRITON_INTERPRET=1, to try it slowly), got {device.type}"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs a CUDA device of capability 8.0 or newer, got {torch.cuda.get_device_capability(device)}"
    if head_dim > 256:
        return f"it needs a head dimension of at most 256, got {head_dim}"
    return None


def torch_misfit(device: torch.device, head_dim: int, softcap: float | None) -> str | None:
    """Why torch's built-in kernels cannot serve a target, or None."""
    if softcap is not None:
        return f"the target caps its attention scores (softcap={softcap}), torch's flash kernels cannot"
    if device.type not in ("cpu", "cuda"):
        return f"no flash kernel with log-sum-exp on {device.type}"
    if device.type == "cuda" and (head_dim % 8 or head_dim > 256):
        return f"the CUDA kernels need a head dimension that is a multiple of 8 and at most 256, got {head_dim}"
    return None


MISFITS = {"torch": torch_misfit, "triton": triton_misfit}
