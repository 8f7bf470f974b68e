"""The engine: how the phases of a round are run, and by which backend a round attends. The seam for speed.

A decoding loop is exact with the plain engine here, which needs PyTorch only: every phase is called, every tensor is
new. The fast engine (fast_engine_longspec.py) keeps memory and CUDA graphs from call to call, compiles the target's
layers and brings backends of other packages; it gives the same results. Knows no models.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from .attention_longspec import Attention, Move, PrefixAttention, eager_prefix, merged_attention, move_slots
from .choice_longspec import Outcome, Times
from .copies_longspec import append, join_copy
from .torch_attention_longspec import torch_prefix
from .tree_longspec import Children, best_children


class Backend(NamedTuple):
    """A way to attend, and the small work of a round beside attention.

    prefix_attention: as `eager_prefix`. attention: as `merged_attention`. move: how accepted nodes are moved in the
    stores of a layer, as `move_slots`. children: how the draft chooses a level of the tree, as `best_children`.
    append: how the texts that guesses are copied from go on, as `append`. join_copy: how a copy joins a tree, as
    `join_copy`. draw: how an engine draws tokens along the paths on the device, if there are kernels for that.
    """

    name: str
    prefix_attention: PrefixAttention
    attention: Attention
    move: Move = move_slots
    children: Children = best_children
    append: Callable[..., None] = append
    join_copy: Callable[..., Any] = join_copy
    draw: Callable[..., Any] | None = None


class Demand(NamedTuple):
    """What a call asks of a backend: where and in which format, the layers' head dimension and soft-cap."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    softcap: float | None


class Engine:
    """Run rounds in plain PyTorch. An engine serves one call at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def suits(self, device: torch.device) -> bool:
        """Tell whether what this engine has kept can serve a call on `device`."""
        return device == self.device

    @staticmethod
    def check(config: Any, target: Any, device: torch.device, synced_gpus: bool) -> None:
        """Raise `ValueError` for options of a draft's config that this engine cannot serve for `target`."""

    @staticmethod
    def backend(name: str, demand: Demand) -> Backend:
        """Return the attention backend `name`. Raises `ValueError` with the reason where it cannot run."""
        check_backend(name, torch_misfit(demand) if name == "torch" else None)
        return plain_backend(name)

    def give_memory(self, cache: Any) -> None:
        """Give the call's cache, before anything is read into it, the memory that an earlier call has left."""

    def begin(self, call: Any, synced_gpus: bool) -> Any:
        """Prepare for the rounds of `call`, whose prompt has been read. Returns the call to go on with."""
        return call

    def moved(self, call: Any) -> None:
        """Take note that the cache has moved its stores."""

    def run(self, phase: Callable[..., Any], call: Any, *inputs: Any) -> Any:
        """Return `phase(call, *inputs)`; a phase works on the device alone."""
        return phase(call, *inputs)

    def draws(self, processors: list, device: torch.device) -> bool:
        """Tell whether `draw` knows the logits processors of a call whose text is on `device`."""
        return False

    def draw(self, call: Any, tree: Any, verified: Any) -> tuple[Any, list[Any]] | None:
        """Pick the tokens along the paths of a round's trees on the device: `Walk`, and what it is on the host.

        None where the host has to pick. Scores of the steps are not kept.
        """
        return None

    def round(self, call: Any) -> Outcome | None:
        """Run a round otherwise than phase by phase; None where it has to be run phase by phase."""
        return None

    def layers(self, call: Any) -> AbstractContextManager:
        """Return the context in which the layers of the call's target verify."""
        return nullcontext()

    def draft_layer(self, call: Any) -> AbstractContextManager:
        """Return the context in which the layer of the call's draft guesses."""
        return nullcontext()

    def end(self, call: Any) -> None:
        """Keep what the next call can use again. Not called after a failure."""


class Engines:
    """Keep the engine of a draft's last call for the next one; calls: how many calls use the draft's weights now."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kept: Engine | None = None
        self.calls = 0
        self.times: weakref.WeakKeyDictionary[Any, dict[tuple, Times]] = weakref.WeakKeyDictionary()

    def times_of(self, target: Any, kind: tuple) -> Times:
        """Return the seconds of rounds over `target` in calls of this kind; they are added to as rounds go by."""
        with self.lock:
            return self.times.setdefault(target, {}).setdefault(kind, Times())

    def take(self, kind: type[Engine], device: torch.device) -> Engine:
        """Return an engine of this kind for a call on `device`: the kept one if it suits. It serves no other call."""
        with self.lock:
            kept, self.kept = self.kept, None
        return kept if type(kept) is kind and kept.suits(device) else kind(device)

    def keep(self, engine: Engine | None) -> None:
        """Keep `engine` for the next call; None frees what is kept."""
        with self.lock:
            self.kept = engine

    def __reduce__(self) -> tuple[type, tuple]:
        return Engines, ()  # a copy of a draft begins without


def plain_backend(name: str) -> Backend:
    """Return the backend "eager" or "torch"."""
    prefix_attention = {"eager": eager_prefix, "torch": torch_prefix}[name]
    return Backend(name, prefix_attention, functools.partial(merged_attention, prefix_attention))


def check_backend(name: str, reason: str | None) -> None:
    """Raise `ValueError` for a backend asked for by name that cannot run, for this reason."""
    if reason is not None:
        raise ValueError(f"attention_backend={name!r} cannot run here: {reason}; use 'auto' or 'eager'")


def torch_misfit(demand: Demand) -> str | None:
    """Return why torch's built-in kernels cannot serve a target, or None."""
    device, head_dim = demand.device, demand.head_dim
    if demand.softcap is not None:
        return f"the target caps its attention scores (softcap={demand.softcap}), torch's flash kernels cannot"
    if device.type != "cpu" and (device.type != "cuda" or demand.dtype == torch.float64):
        return f"no flash kernel with log-sum-exp for {demand.dtype} on {device.type}"
    if device.type == "cuda" and (head_dim % 8 or head_dim > 256):
        return f"the CUDA kernels need a head dimension that is a multiple of 8 and at most 256, got {head_dim}"
    return None
