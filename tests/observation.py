"""What an outsider can see of calls of `generate`, and how two such sights differ.

Knows no options: `play` makes the calls, with or without an assistant, which it does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from helpers import CACHE
from torch import Tensor
from transformers import Cache, PreTrainedModel

OF_OUR_OUTPUT = ("accept_lengths", "trees", "phase_seconds")  # fields that plain `generate` does not have
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # for float32 values that were added up in another order


class Seen(NamedTuple):
    """What was seen of the calls of one play.

    calls: for each call of `generate`, its output and the cache that the caller passed in, as plain containers;
    log: what streamers, processors and criteria were told, in order; random: the generator's state afterwards.
    """

    calls: list[Any]
    log: list[Any]
    random: Tensor
    error: Exception | None
    accept_lengths: list[list[int]]  # for every row of every call


Play = Callable[[Callable[..., Any], Any], Any]


def observe(target: PreTrainedModel, play: Play, case: Any, seed: int = 11, **assistant: Any) -> Seen:
    """Let `play(generate, case)` call `generate`, and note what can be seen, `case.log` included."""
    calls: list[Any] = []
    accepted: list[list[int]] = []
    error = None

    def generate(**options: Any) -> Any:
        out = None
        try:
            out = target.generate(**options, **assistant)
        finally:
            calls.append({"output": contents(out), "cache passed": contents(options.get(CACHE))})
        accepted.extend(getattr(out, "accept_lengths", None) or [])
        return out

    torch.manual_seed(seed)
    try:
        play(generate, case)
    except Exception as raised:  # any error is compared, or named in the table
        error = raised
    return Seen(calls, contents(case.log), torch.get_rng_state(), error, accepted)


def contents(value: Any) -> Any:
    """Copy a value into plain containers; a cache becomes the contents of its layers."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Cache):
        return {"type": type(value).__name__, "layers": [layer_contents(layer) for layer in value.layers]}
    if isinstance(value, Mapping):
        return {name: contents(part) for name, part in value.items() if name not in OF_OUR_OUTPUT}
    if isinstance(value, (list, tuple)):
        return [contents(part) for part in value]
    return value


def layer_contents(layer: Any) -> dict[str, Any]:
    held = {"type": type(layer).__name__, "length": layer.get_seq_length()}
    for name in ("keys", "values", "cumulative_length"):
        held[name] = contents(getattr(layer, name, None))
    return held


def differences(plain: Seen, other: Seen) -> list[str]:
    """List, a line each, how `other` differs from `plain`, differences of the text first; empty if they are equal."""
    if plain.error is not None or other.error is not None:
        errors = [None if seen.error is None else type(seen.error).__name__ for seen in (plain, other)]
        if errors[0] != errors[1]:
            return [f"error: {plain.error!r} is not {other.error!r}"]
    found = list(_differences("call", plain.calls, other.calls))
    log = other.log
    if any(call["output"] is None for call in other.calls) and log[len(plain.log) :] == [["end"]]:
        log = log[:-1]  # LongSpec tells a streamer the end when a call raises, too
    found += _differences("log", plain.log, log)
    if not torch.equal(plain.random, other.random):
        found.append("random generator: left in another state")
    return sorted(found, key=lambda line: "sequences" not in line)


def _differences(path: str, plain: Any, other: Any) -> Iterator[str]:
    if isinstance(plain, dict) and isinstance(other, dict):
        if list(plain) != list(other):
            yield f"{path}: has {list(plain)}, not {list(other)}"
        for name in plain.keys() & other.keys():
            yield from _differences(f"{path} {name}", plain[name], other[name])
    elif isinstance(plain, list) and isinstance(other, list):
        if len(plain) != len(other):
            yield f"{path}: {len(plain)} entries, not {len(other)}"
        for index, pair in enumerate(zip(plain, other, strict=False)):
            yield from _differences(f"{path} {index}", *pair)
    elif isinstance(plain, Tensor) and isinstance(other, Tensor):
        if plain.shape != other.shape or plain.dtype != other.dtype:
            yield f"{path}: {_short(plain)} is not {_short(other)}"
        elif not torch.allclose(plain, other, equal_nan=True, **(TOLERANCE if plain.is_floating_point() else {})):
            yield f"{path}: {_short(plain)} is not {_short(other)}"
    elif type(plain) is not type(other) or plain != other:
        yield f"{path}: {plain!r} is not {other!r}"


def _short(value: Tensor) -> str:
    shape = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return shape if value.is_floating_point() and value.numel() > 20 else f"{shape} {value.tolist()}"
