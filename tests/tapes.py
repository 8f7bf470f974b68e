"""CUDA graphs without CUDA: a tape of the tensor operations of a phase, replayed over the tensors they worked on.

A tape is as strict as a capture: it refuses an operation that asks the host for a value or takes one from the host. So
texts on the CPU show what a graph that is kept too long would write. Unlike a graph, a tape keeps all tensors alive
that it saw.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_longspec.modeling import fast_engine_longspec, fast_graphs_longspec

ASKS_THE_HOST = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_to_cpu", "equal"}


class Tape(TorchDispatchMode):
    """A stand-in for `torch.cuda.CUDAGraph`. A capture runs its operations, so its first replay has nothing to do."""

    def __init__(self):
        super().__init__()
        self.operations = []
        self.numbers = {}  # of the host, by identity
        self.fresh = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        is_number = name == "lift_fresh" and args[0].dim() == 0  # `x[:1] = 0` is a fill, which takes it as it is
        meets_number = name != "fill_" and any(id(leaf) in self.numbers for leaf in tensors((args, kwargs)))
        if name in ASKS_THE_HOST or (name == "lift_fresh" and not is_number) or meets_number:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        result = func(*args, **kwargs)
        if is_number:
            self.numbers[id(result)] = result
            return result
        given = {leaf.untyped_storage()._cdata for leaf in tensors((args, kwargs))}
        made = [leaf.untyped_storage()._cdata not in given for leaf in tensors(result)]
        if any(made) or not made or func._schema.is_mutable:  # all but views, which stay as they are
            self.operations.append((func, args, kwargs, result, made))
        return result

    def replay(self):
        if self.fresh:
            self.fresh = False
            return
        for func, args, kwargs, result, made in self.operations:
            again = func(*args, **kwargs)
            for mine, other, own in zip(tensors(result), tensors(again), made, strict=True):
                if own:
                    mine.copy_(other)


def tensors(value):
    """Return the tensors in `value`; the common case first, for a tape plays thousands of operations."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@contextmanager
def recording(tape):
    with tape:
        yield


def install(monkeypatch):
    """Capture phases on the CPU, and return the list of outcomes of all attempts to come."""
    outcomes = []
    capture = fast_graphs_longspec.Graphs._capture

    def watched(self, *args):
        outcomes.append(capture(self, *args))
        return outcomes[-1]

    monkeypatch.setattr(fast_graphs_longspec.Graphs, "_capture", watched)
    monkeypatch.setattr(fast_graphs_longspec, "capturing", recording)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(fast_engine_longspec, "graphs_misfit", lambda target, device, synced: synced or None)
    return outcomes
