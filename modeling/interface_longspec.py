"""Hybrid attention as transformers' attention interface sees it: a registered name, and a switch that puts a target under it.

The state of a round reaches the attention function through one `ContextVar`, set around the verification forward only.
With none set, function and mask function do what the target's own implementation does, so another thread that
prefills on the same target is not disturbed.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from .attention_longspec import Backend, apply_sinks, attend, merge
from .cache_longspec import SpeculativeCache


class Round(NamedTuple):
    """What the attention of one verification forward needs to know.

    ancestors: (B, T, T) bool; seen: filled with the index of every layer that attended.
    """

    cache: SpeculativeCache
    ancestors: Tensor
    backend: Backend
    seen: set[int]


_ROUND: ContextVar[Round | None] = ContextVar("longspec_round", default=None)


@contextmanager
def attending(state: Round) -> Iterator[None]:
    """Within it, the target's attention is hybrid attention over `state`."""
    token = _ROUND.set(state)
    try:
        yield
    finally:
        _ROUND.reset(token)


def hybrid_attention(
    original: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function: query (B, H, T, D) of the tree, key and value (B, K, T, D) of the tree.

    Returns (B, T, H, D) in the query's dtype and no weights.
    """
    state = _ROUND.get()
    if state is None:
        own = _own_attention(original, module)
        options = {"scaling": scaling, "softcap": softcap, "s_aux": s_aux}
        given = {name: option for name, option in options.items() if option is not None}
        return own(module, query, key, value, attention_mask, **given, **kwargs)
    state.seen.add(module.layer_idx)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = state.cache.layers[module.layer_idx]
    placement = state.cache.placement
    prefix = layer.prefix(placement)
    if prefix.mask is None:
        over_prefix = state.backend.prefix(query, prefix.key, prefix.value, scaling, softcap)
    else:
        over_prefix = attend(query, prefix.key, prefix.value, prefix.mask, scaling, softcap)
    mask = state.ancestors
    if layer.window is not None:
        apart = placement.depths[:, :, None] - placement.depths[:, None, :]
        mask = mask & (apart < layer.window)
    over_tree = attend(query, key, value, mask, scaling, softcap)
    out, lse = merge(*over_prefix, *over_tree)
    if s_aux is not None:
        out = apply_sinks(out, lse, s_aux)
    return out.transpose(1, 2).to(query.dtype).contiguous(), None


def hybrid_mask(original: str, *args: Any, **kwargs: Any) -> Any:
    """The mask function of the same name: no mask during a round, the target's own one otherwise."""
    if _ROUND.get() is not None:
        return None
    own = AttentionMaskInterface().get(original)
    return None if own is None else own(*args, **kwargs)


def _own_attention(original: str, module: nn.Module) -> Any:
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return AttentionInterface().get_interface(original, eager)


def register(original: str) -> str:
    """The attention name for targets that otherwise run on `original`; registered on first use."""
    name = f"longspec|{original}"
    if name not in AttentionInterface().valid_keys():
        AttentionInterface.register(name, partial(hybrid_attention, original))
        AttentionMaskInterface.register(name, partial(hybrid_mask, original))
    return name


class _Switch(NamedTuple):
    users: int
    original: str
    config: Any  # kept alive: `_SWITCHED` is keyed by its id


_LOCK = threading.Lock()
_SWITCHED: dict[int, _Switch] = {}


@contextmanager
def switched(target: PreTrainedModel) -> Iterator[None]:
    """Within it, `target` runs under our attention name; the last of several users restores its own.

    Raises `ValueError` where a target's attention does not follow transformers' attention interface.
    """
    config = target.get_decoder().config
    with _LOCK:
        users, original, _ = _SWITCHED.get(id(config), _Switch(0, config._attn_implementation, config))
        _SWITCHED[id(config)] = _Switch(users + 1, original, config)
        # what `set_attn_implementation` sets after its checks; those would walk all modules and warn
        config._attn_implementation_internal = register(original)
    try:
        yield
    finally:
        with _LOCK:
            users, original, _ = _SWITCHED.pop(id(config))
            if users > 1:
                _SWITCHED[id(config)] = _Switch(users - 1, original, config)
            else:
                config._attn_implementation_internal = original
