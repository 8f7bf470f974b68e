"""CUDA graphs: a phase of a round is launched at once, when its first round has shown that it works.

A round of a small model is some thousand kernels, each of which costs the host more than the device. What a graph
keeps stands here: the tensors it works on lie in the stores of a cache and in `Settled`; all else that a phase reads
is a constant of the graph, told by `captured_values`. Equal values mean that a replay does what a new capture would.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel
from transformers.utils import logging

from .call_longspec import Call
from .interface_longspec import OurName
from .positions_longspec import last_short_length
from .target_longspec import foreign_hooks
from .tree_longspec import TreeForm

logger = logging.get_logger(__name__)


class Captured(NamedTuple):
    """A phase as a graph, the inputs that the graph reads and the result that a replay overwrites."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Any, ...]
    result: Any


Key = tuple[Callable[..., Any], TreeForm]  # a phase, and the form of the trees in it


class Graphs:
    """Run the phases of a round as CUDA graphs, one for each form of trees: all of them are captured, or none.

    A phase is a function whose work is all on the device. Its first argument is the `Call`, the others are tensors and
    tuples of tensors. The inputs of the capture belong to the graph: a replay copies other inputs into them. The next
    replay overwrites what a replay returns. The function must not ask the host for anything that changes between
    rounds.
    """

    def __init__(self) -> None:
        self.captures = False
        self.values: Any = None
        self.forget()

    def forget(self) -> None:
        """Drop all graphs: something that they work on has moved or changed."""
        self.warm: set[Key] = set()
        self.captured: dict[Key, Captured] = {}

    def require(self, values: Any) -> None:
        """Forget the graphs if they were captured while the values were other ones than these."""
        if values != self.values:
            self.forget()
        self.values = values

    def drop(self, *phases: Callable[..., Any]) -> None:
        """Drop the graphs of some phases, which will work on other tensors."""
        self.warm = {key for key in self.warm if key[0] not in phases}
        self.captured = {key: graph for key, graph in self.captured.items() if key[0] not in phases}

    def run(self, phase: Callable[..., Any], call: Any, *inputs: Any) -> Any:
        key = phase, call.form
        if not self.captures or key not in self.warm:  # libraries set themselves up in a first run
            self.warm.add(key)
            return phase(call, *inputs)
        if key not in self.captured and not self._capture(key, call, inputs):
            return phase(call, *inputs)
        graph, own, result = self.captured[key]
        overwrite(own, inputs)
        graph.replay()
        return result

    def _capture(self, key: Key, call: Any, inputs: tuple[Any, ...]) -> bool:
        """Record a phase. Returns whether that was possible."""
        phase, _ = key
        graph = torch.cuda.CUDAGraph()
        try:
            with capturing(graph):
                result = phase(call, *inputs)
        except RuntimeError as error:  # torch's way to say that something in it cannot be captured
            self.captures = False
            reason = str(error).strip().splitlines()[0]
            logger.warning_once(f"LongSpec goes on without CUDA graphs, a round cannot be captured: {reason}")
            return False
        self.captured[key] = Captured(graph, inputs, result)
        return True


def overwrite(ours: Any, theirs: Any) -> None:
    """Copy `theirs`, a tensor or nested tuples of tensors, into `ours`; most are the same tensors and need no copy."""
    if ours is theirs:
        return
    if isinstance(ours, Tensor):
        ours.copy_(theirs, non_blocking=True)
    elif isinstance(ours, tuple):
        for mine, other in zip(ours, theirs, strict=True):
            overwrite(mine, other)
    else:
        assert ours == theirs, "a graph is replayed with what it was captured with"


_LOCK = threading.Lock()


@functools.lru_cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one for all: each stream's libraries keep memory of their own


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """Record what this thread launches into `graph`. Other threads go on: one thread captures at a time.

    While a capture runs, and for ever if it fails, torch refuses to draw random numbers from the generator that was
    the device's default when it began. So it is a copy for that moment: no phase draws any.
    """
    device = torch.cuda.current_device()
    generator, stream = torch.cuda.default_generators[device], _capture_stream(device)
    with _LOCK:
        torch.cuda.synchronize(device)
        with torch.cuda.stream(stream):
            state = generator.graphsafe_get_state()
            generator.graphsafe_set_state(generator.clone_state())
            try:
                graph.capture_begin(capture_error_mode="thread_local")
            finally:
                generator.graphsafe_set_state(state)
            try:
                yield
            finally:
                graph.capture_end()
        torch.cuda.synchronize(device)


def graphs_misfit(target: PreTrainedModel, device: torch.device, synced_gpus: bool) -> str | None:
    """Return why rounds over this target cannot be captured, or None."""
    if synced_gpus:
        return "ranks wait for each other in every forward"
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, got {device.type}"
    if (reason := forward_misfit(target)) is not None:
        return reason
    if torch.is_autocast_enabled(device.type):
        return "autocast keeps copies of the weights"
    if last_short_length(target) is not None:
        return "the frequencies of longrope depend on the length"
    return None


def forward_misfit(target: PreTrainedModel) -> str | None:
    """Return why every forward of this target needs the host, so that its kernels cannot be captured or compiled."""
    if any(hasattr(module, "_hf_hook") for module in target.modules()):
        return "accelerate's hooks move data in every forward"
    if hasattr(target, "unshard"):
        return "FSDP gathers weights in every forward"
    return None


# --- the tensors that graphs work on ---------------------------------------------------------------------------------


class Settled:
    """Keep the small tensors that a call's rounds read and write in one place, from call to call."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def put(self, name: str, value: Any) -> Any:
        """Return a copy of `value`, tensors in tuples and dicts; in the memory of the last call's value, if alike."""
        ours = self.state.get(name)
        if ours is None or _form(ours) != _form(value):
            self.state[name] = pytree.tree_map_only(Tensor, Tensor.clone, value)
        else:
            for mine, other in zip(pytree.tree_leaves(ours), pytree.tree_leaves(value), strict=True):
                if isinstance(mine, Tensor):
                    mine.copy_(other)
        return self.state[name]

    @property
    def location(self) -> Any:
        """Where the tensors lie, as a value to compare."""
        return plain(self.state)


def _form(value: Any) -> Any:
    """Return what two values must have in common for one to be written over the other."""
    leaves, form = pytree.tree_flatten(value)
    return form, [
        (leaf.shape, leaf.dtype, leaf.device, leaf.is_inference()) if isinstance(leaf, Tensor) else plain(leaf)
        for leaf in leaves
    ]


# --- the constants of graphs -----------------------------------------------------------------------------------------


def captured_values(call: Call) -> tuple[Any, ...]:
    """Return, as a value to compare, all that the phases of a round read beside the tensors in `Settled`."""
    target, draft, cache = call.target, call.generator.draft, call.cache
    options = {name: value for name, value in vars(draft.config).items() if name not in ("cuda_graphs", "profile")}
    return (
        weakref.ref(target),
        object() if has_hooks(target) or has_hooks(draft) else None,  # equal to nothing: each call is captured
        fingerprint(target),
        plain(vars(target.config)),
        plain(vars(target.config.get_text_config(decoder=True))),
        fingerprint(draft),
        plain(options),
        (call.backend.name, plain(call.generator.head_rows)),
        [(type(layer), layer.window, plain((layer.keys, layer.values))) for layer in cache.owners],
        (cache.tree_size, call.text.batch, call.text.padding),
        plain(call.extras),
        torch.is_inference_mode_enabled(),
    )


_VALUES = {type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.layout}
_DEEPEST = 8  # containers in containers; below that an object is known by its identity only


def fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """Return what a graph has taken from a module and all its parts, as a value to compare.

    That is where the tensors lie (their content may change), switches such as training flags, active adapters and
    scalings, and which hooks there are. The value holds none of the tensors or objects, only classes.
    """
    return tuple((type(part), plain(vars(part))) for part in module.modules())


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a module or a part of it has hooks of others, which may do what they like."""
    return bool(foreign_hooks(module))


def plain(value: Any, depth: int = 0) -> Any:
    """Return `value` as one to compare that keeps nothing alive: a tensor's location, an object's identity."""
    if type(value) in _VALUES:
        return value
    if isinstance(value, OurName):  # in another thread's round
        return value.original
    if isinstance(value, Tensor):
        return location(value)
    if isinstance(value, dict) and depth < _DEEPEST:
        return [(plain(key, depth + 1), plain(item, depth + 1)) for key, item in value.items()]
    if isinstance(value, (list, tuple)) and depth < _DEEPEST:
        return type(value), tuple(plain(item, depth + 1) for item in value)
    if isinstance(value, (set, frozenset)) and depth < _DEEPEST:
        return frozenset(plain(item, depth + 1) for item in value)
    return id(value)


def location(tensor: Tensor) -> tuple[Any, ...]:
    """Return where a tensor lies and how it is read there."""
    if hasattr(tensor, "__tensor_flatten__"):  # one that wraps others, as quantized weights do
        names, _ = tensor.__tensor_flatten__()
        return tuple(location(getattr(tensor, name)) for name in names)
    return tensor.data_ptr(), tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride()
