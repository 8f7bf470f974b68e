"""A second device without one: tensors that report the device `meta`, hold their values, and meet no CPU tensor.

As on a GPU, an operation on tensors of two devices raises, unless it copies or one of the tensors is a single number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

THERE = torch.device("meta")


class Remote(Tensor):
    """A tensor on the second device; `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Remote:
        return Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=THERE, requires_grad=False
        )

    def __init__(self, held: Tensor):
        self.held = held

    def tolist(self) -> list:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


@contextmanager
def second_device() -> Iterator[None]:
    """Make tensors `Remote` that are created on `meta` or moved there within the context."""
    with _Operations(), _Literals():
        yield


class _Literals(TorchFunctionMode):
    """A mode for `torch.tensor` and lists as indices: a dispatch mode sees no operation that makes these tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is not None and torch.device(kwargs["device"]) == THERE:
            return func(*args, **kwargs | {"device": "cpu"}).to(THERE)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], Remote):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(part) if isinstance(part, list) else part for part in index)
            args = (args[0], index, *args[2:])
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict) -> Any:
    name = func.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    remote = any(isinstance(tensor, Remote) for tensor in tensors)
    if name.startswith("index") and isinstance(args[0], Remote):  # indices may lie on the CPU
        tensors = [leaf for leaf in tree_leaves((args[0], args[2:])) if isinstance(leaf, Tensor)]
    if name not in ("copy_", "_to_copy"):
        if remote and any(not isinstance(tensor, Remote) and tensor.dim() > 0 for tensor in tensors):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    if kwargs.get("device") is not None:
        remote = torch.device(kwargs["device"]) == THERE
        kwargs = kwargs | {"device": torch.device("cpu")}
    out = func(*tree_map(held, args), **tree_map(held, kwargs))
    if name.endswith("_") and not name.startswith("_"):
        return args[0]  # an operation in place
    return tree_map(lambda leaf: Remote(leaf) if isinstance(leaf, Tensor) else leaf, out) if remote else out


def held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, Remote) else leaf
