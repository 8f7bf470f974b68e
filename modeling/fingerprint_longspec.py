"""Fingerprints: what a CUDA graph has taken from modules and options as it was when it was captured.

Where the tensors lie (what is in them may change), switches such as training flags, active adapters and scalings, and
which hooks there are. Equal fingerprints mean that a replay does what a new capture would.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

_VALUES = {type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.layout}
_DEEPEST = 8  # containers in containers; below that an object is known by its identity only


def fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """Of a module and all its parts. Holds none of their tensors or objects, only classes."""
    return tuple((type(part), plain(vars(part))) for part in module.modules())


def has_hooks(module: nn.Module) -> bool:
    """Whether a module or a part of it has hooks that are not transformers' own: they may do what they like."""
    hooks = [(*part._forward_hooks.values(), *part._forward_pre_hooks.values()) for part in module.modules()]
    modules = (getattr(hook, "__module__", None) or "" for hook in itertools.chain.from_iterable(hooks))
    return not all(name.startswith("transformers.") for name in modules)


def plain(value: Any, depth: int = 0) -> Any:
    """A value as one to compare that keeps nothing alive: of a tensor its place, of an object its identity."""
    if type(value) in _VALUES:
        return value
    if isinstance(value, Tensor):
        return place(value)
    if isinstance(value, dict) and depth < _DEEPEST:
        return [(plain(key, depth + 1), plain(item, depth + 1)) for key, item in value.items()]
    if isinstance(value, (list, tuple)) and depth < _DEEPEST:
        return type(value), tuple(plain(item, depth + 1) for item in value)
    if isinstance(value, (set, frozenset)) and depth < _DEEPEST:
        return frozenset(plain(item, depth + 1) for item in value)
    return id(value)


def place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies and how it is read there."""
    if hasattr(tensor, "__tensor_flatten__"):  # one that wraps others, as quantized weights do
        names, _ = tensor.__tensor_flatten__()
        return tuple(place(getattr(tensor, name)) for name in names)
    return tensor.data_ptr(), tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride()
