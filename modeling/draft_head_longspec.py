"""The LM head of a draft that guesses among frequent tokens only: those rows of the target's.

At 128k tokens the head is most of what a level of the tree reads; a quarter of them are nearly all that is ever
written (FR-Spec, arXiv 2502.14856; EAGLE-3, arXiv 2503.01840). The text stays what it was, for the target verifies
with its whole vocabulary: a token that is left out is never guessed. Knows nothing of trees or of how tokens rank.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class Rows(NamedTuple):
    """Rows of a linear layer: weight (N, hidden), bias (N,)."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, hidden: Tensor) -> Tensor:
        """(…, hidden) -> (…, N)."""
        return linear(hidden, self.weight, self.bias)


class HeadRows:
    """For each LM head the rows that one draft guesses with: gathered once, kept while neither head nor draft changes.

    They go with the head or with the draft; a copy of the draft gathers its own. A change through `.data` is not seen:
    it makes guesses worse, not the text.
    """

    def __init__(self) -> None:
        self.kept: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Rows]] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return HeadRows, ()

    def of(self, head: nn.Module | None, ids: Tensor, device: torch.device) -> Rows:
        """The rows `ids` (N,) of `head`, on `device`. Raises `ValueError` where a head has more to it than rows."""
        layer = plain_linear(head)
        sources = [tensor for tensor in (layer.weight, layer.bias, ids) if tensor is not None]
        known, rows = self.kept.get(layer, (None, None))
        if rows is None or known is None or rows.weight.device != device or not known.still(sources):
            with torch.no_grad():
                parts = (layer.weight, layer.bias)
                rows = Rows(*(None if part is None else part[ids.to(part.device)].to(device) for part in parts))
            self.kept[layer] = Snapshot(sources), rows
        return rows


class Snapshot:
    """Tells whether tensors are the same ones as before, in the same memory and not written to since."""

    def __init__(self, tensors: list[Tensor]):
        self.before = [(weakref.ref(tensor), *_state(tensor)) for tensor in tensors]

    def still(self, tensors: list[Tensor]) -> bool:
        return len(tensors) == len(self.before) and all(
            known() is tensor and (pointer, version) == _state(tensor)
            for (known, pointer, version), tensor in zip(self.before, tensors, strict=True)
        )


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def vocabulary(ids: Tensor | Sequence[int], size: int) -> Tensor:
    """Token ids (N,) int64, a copy. Raises `ValueError` for ids beyond a vocabulary of `size` or that come twice."""
    ids = torch.as_tensor(ids)
    if ids.dim() != 1 or not len(ids) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"a draft vocabulary is a row of token ids, got {tuple(ids.shape)} of {ids.dtype}")
    lowest, highest, repeated = int(ids.min()), int(ids.max()), len(ids) - len(ids.unique())
    if lowest < 0 or highest >= size:
        raise ValueError(f"a draft vocabulary has token ids in 0..{size - 1}, got {lowest}..{highest}")
    if repeated:
        raise ValueError(f"a draft vocabulary has each token once, got {repeated} more than once")
    return ids.detach().to(torch.long, copy=True)


def plain_linear(head: nn.Module | None) -> nn.Linear:
    """`head`, if all that it does is in its weight and bias; else a `ValueError`."""
    reason = _misfit(head)
    if reason is not None:
        raise ValueError(
            "a draft with a vocabulary of its own needs a target whose LM head is a plain torch.nn.Linear, "
            f"got {reason}; draft.set_draft_vocab(None) lets it guess among all tokens"
        )
    assert isinstance(head, nn.Linear)
    return head


def _misfit(head: nn.Module | None) -> str | None:
    if type(head) is not nn.Linear:  # not of a subclass: quantized, adapted and parametrized layers are such
        return f"a {type(head).__name__}"
    if head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head):
        return "one with hooks"
    if type(head.weight) is not nn.Parameter:
        return f"a weight of type {type(head.weight).__name__}"
    if head.weight.device.type == "meta" or head.weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"a weight of {head.weight.dtype} on {head.weight.device}"
    return None
