"""Hybrid attention as transformers sees it: a registered name, and a switch that puts a target under it.

The attention of a round reaches the registered function through one `ContextVar`, set around the verification forward
only. With none set, function and mask function do what the target's own implementation does, so another thread that
prefills on the same target is not disturbed.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from .attention_longspec import Nodes
from .backends_longspec import Backend
from .cache_layers_longspec import Placement
from .cache_longspec import SpeculativeCache


class _Shared:
    """What all copies of this file in a process share: a draft's remote code is one copy, the pip package another.

    Two copies may serve one target at once, so they share the variable that carries a round's attention (a callable
    with the signature of an attention function) and the record of switched targets.
    """

    def __init__(self) -> None:
        self.attention: ContextVar[Callable | None] = ContextVar("longspec_attention", default=None)
        self.lock = threading.Lock()
        self.switched: dict[int, tuple[int, str, Any]] = {}  # id(config) -> users, own implementation, config


if not hasattr(AttentionInterface, "_longspec"):
    AttentionInterface._longspec = _Shared()
_SHARED: _Shared = AttentionInterface._longspec


class Round(NamedTuple):
    """What the attention of one verification forward needs to know.

    ancestors: (B, T, T) bool; seen: filled with the index of every layer that attended.
    """

    cache: SpeculativeCache
    ancestors: Tensor
    backend: Backend
    seen: set[int]


@contextmanager
def attending(state: Round) -> Iterator[None]:
    """Within it, the target's attention is hybrid attention over `state`."""
    token = _SHARED.attention.set(partial(hybrid_attention, state))
    try:
        yield
    finally:
        _SHARED.attention.reset(token)


def hybrid_attention(
    state: Round,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a tree over prefix and tree: query (B, H, T, D), key and value (B, K, T, D), all of the tree.

    Returns (B, T, H, D) in the query's dtype and no weights.
    """
    once = module.layer_idx not in state.seen
    state.seen.add(module.layer_idx)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = state.cache.owner(module.layer_idx)
    at = state.cache.round_placement.to(layer.keys.device)
    prefix = layer.prefix(at).to(query.device)
    shapes = [states.shape[1::2] for states in (prefix.key, prefix.value)]  # heads and dimension
    if not once or [states.shape[1::2] for states in (key, value)] != shapes:
        raise ValueError(
            "LongSpec needs a target that attends once a layer to the keys and values it caches, got "
            f"{type(module).__name__}, which does otherwise"
        )
    placement = state.cache.round_placement.to(query.device)
    mask = placement.once(("tree", layer.window), lambda: tree_mask(state, placement, layer.window))
    owns = layer is state.cache.layers[module.layer_idx]
    nodes = Nodes(key, value, mask, layer.tree_slots(at) if owns else None)
    with torch.autocast(query.device.type, enabled=False):  # or the products of float32 would be rounded
        return state.backend.attention(query, prefix, nodes, scaling, softcap, s_aux), None


def tree_mask(state: Round, placement: Placement, window: int | None) -> Tensor:
    """(B, T, T) bool: a node sees itself and its ancestors, of a sliding layer those within its window."""
    ancestors = state.ancestors.to(placement.depths.device)
    if window is None:
        return ancestors
    apart = placement.depths[:, :, None] - placement.depths[:, None, :]
    return ancestors & (apart < window)


@torch.compiler.disable  # a round's state comes through a ContextVar, which dynamo cannot trace
def registered_attention(original: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The registered attention function: a round's attention if this thread is in one, else the target's own."""
    attention = _SHARED.attention.get()
    if attention is None:
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        attention = AttentionInterface().get_interface(original, eager)
    elif original == "sdpa":  # it swallows the cap of gemma2's scores: what plain `generate` writes on it is uncapped
        kwargs.pop("softcap", None)
    return attention(module, *args, **kwargs)


@torch.compiler.disable
def registered_mask(original: str, *args: Any, **kwargs: Any) -> Any:
    """The mask function of the same name: no mask during a round, the target's own one otherwise."""
    own = AttentionMaskInterface().get(original)
    return None if _SHARED.attention.get() is not None or own is None else own(*args, **kwargs)


def register(original: str) -> str:
    """The attention name for targets that otherwise run on `original`; registered on first use."""
    name = f"longspec|{original}"
    if name not in AttentionInterface().valid_keys():
        AttentionInterface.register(name, partial(registered_attention, original))
        AttentionMaskInterface.register(name, partial(registered_mask, original))
    return name


@contextmanager
def switched(target: PreTrainedModel) -> Iterator[None]:
    """Within it, `target` runs under our attention name; the last of several users restores its own."""
    config = target.get_decoder().config
    with _SHARED.lock:
        users, original, _ = _SHARED.switched.get(id(config), (0, config._attn_implementation, None))
        _SHARED.switched[id(config)] = (users + 1, original, config)  # keeps the config, and so its id, alive
        # what `set_attn_implementation` sets after its checks; those would walk all modules and warn
        config._attn_implementation_internal = register(original)
    try:
        yield
    finally:
        with _SHARED.lock:
            users, original, _ = _SHARED.switched.pop(id(config))
            if users > 1:
                _SHARED.switched[id(config)] = (users - 1, original, config)
            else:
                config._attn_implementation_internal = original
