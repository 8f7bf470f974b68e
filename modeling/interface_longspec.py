"""The interface to transformers: every private name of it that LongSpec builds on, and nothing else.

Three things: the door, by which `generate` reaches a draft; the attention switch, by which a target attends through
LongSpec during a round; and the steps of plain `generate` that a call repeats, such as reading the prompt. A new
release of transformers that breaks LongSpec breaks it here. Knows no draft, tree or cache of ours.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import fields
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMixin
from transformers.utils import logging

from .configuration_longspec import check_release

# The steps of `generate` that are wrapped, each with the draft's method that is called instead.
_DOOR = {"_assisted_decoding": "assisted_decoding", "_validate_generation_mode": "check_generation"}
# All steps that are wrapped or called, each with the arguments that it must take.
_STEPS = {
    "_assisted_decoding": "input_ids logits_processor stopping_criteria generation_config synced_gpus streamer "
    "inputs_tensor assistant_model assistant_tokenizer tokenizer model_kwargs",
    "_validate_generation_mode": "generation_mode generation_config generation_mode_kwargs",
    "_prefill": "input_ids generation_config model_kwargs is_first_iteration",
    "_update_model_kwargs_for_generation": "outputs model_kwargs",
    "prepare_inputs_for_generation": "input_ids next_sequence_length",
    "_optimize_model_for_decode": "",
    "_has_unfinished_sequences": "this_peer_finished synced_gpus device",
}
# The name of the cache in the arguments of forwards and of `generate` and in outputs, which transformers 5.24 changed.
CACHE = "cache" if "cache" in {field.name for field in fields(GenerateDecoderOnlyOutput)} else "past_key_values"
# Inputs of a target with one value for each token, beside the usual ones.
PER_TOKEN = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
_OWN_INPUTS = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", CACHE}
_OWN_INPUTS |= {"use_cache", "logits_to_keep", "return_dict"}

Attend = Callable[..., tuple[Tensor, Tensor | None]]  # with the signature of a registered attention function


# --- releases of transformers ----------------------------------------------------------------------------------------


def changes() -> Iterator[str]:
    """Yield what the installed transformers does otherwise than this file builds on, one change an item."""
    for name, arguments in _STEPS.items():
        found = inspect.signature(getattr(GenerationMixin, name, lambda: None)).parameters
        needed, allowed = set(arguments.split()), {"self", *arguments.split()}
        if name not in _DOOR:  # a call may leave out what has a default, but what `generate` passes has to be known
            allowed |= {
                key for key, one in found.items() if one.default is not one.empty or one.kind is one.VAR_KEYWORD
            }
        if not found or not needed <= found.keys() <= allowed:
            yield f"GenerationMixin.{name} is gone or takes other arguments"
    codes = (
        getattr(inspect.unwrap(step), "__code__", None) for step in vars(GenerationMixin).values() if callable(step)
    )
    used = {name for code in codes if code is not None for name in code.co_names}
    yield from (f"`generate` sets no {name}" for name in {"_is_user_defined", "_pad_token_tensor"} - used)
    if CACHE not in {field.name for field in fields(GenerateDecoderOnlyOutput)}:
        yield f"outputs have no {CACHE}"
    if not hasattr(transformers.PreTrainedConfig(), "_attn_implementation_internal"):
        yield "configs have no _attn_implementation_internal"
    own = {"get_mask_sizes", "get_max_length", "get_seq_length", "lazy_initialization", "update"}
    yield from (f"a layer of a cache needs {name}" for name in CacheLayerMixin.__abstractmethods__ - own)


if (warning := check_release(changes())) is not None:
    logging.get_logger(__name__).warning_once(warning)


# --- the door --------------------------------------------------------------------------------------------------------


def install_door() -> None:
    """Let `generate` reach drafts that offer `assisted_decoding`; other assistants are served as before. Idempotent.

    `generate` looks its decoding method up on the target's class, so only a wrapped method gets the assistant, the
    streamer and all else that a user passed. Dispatch is by method, since a class loaded as remote code is never the
    class of the pip package, and both may live in one process.
    """
    for name, own in _DOOR.items():
        _wrap(name, own)


def _wrap(name: str, own: str) -> None:
    original = getattr(GenerationMixin, name)
    if hasattr(original, "_longspec_original"):
        return

    @functools.wraps(original)
    def dispatch(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        # `_validate_generation_mode` gets the assistant inside its last argument, `_assisted_decoding` by keyword
        options = kwargs or (args[-1] if args and isinstance(args[-1], dict) else {})
        method = getattr(options.get("assistant_model"), own, None)
        return original(self, *args, **kwargs) if method is None else method(self, *args, **kwargs)

    dispatch._longspec_original = original  # type: ignore[attr-defined]
    setattr(GenerationMixin, name, dispatch)


# --- the attention switch --------------------------------------------------------------------------------------------


class _Shared:
    """What all copies of this file in a process share: a draft's remote code is one copy, the pip package another.

    Two copies may serve one target at once, so they share the variable that carries a round's attention and the record
    of switched targets.
    """

    def __init__(self) -> None:
        self.attention: ContextVar[Attend | None] = ContextVar("longspec_attention", default=None)
        self.lock = threading.Lock()
        self.switched: dict[int, tuple[int, str, Any]] = {}  # id(config) -> users, own implementation, config


if not hasattr(AttentionInterface, "_longspec"):
    AttentionInterface._longspec = _Shared()
_SHARED: _Shared = AttentionInterface._longspec


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """Let targets that run under our attention name attend by `attend` in this thread."""
    token = _SHARED.attention.set(attend)
    try:
        yield
    finally:
        _SHARED.attention.reset(token)


@torch.compiler.disable  # a round's attention comes through a ContextVar, which dynamo cannot trace
def registered_attention(original: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Attend by a round's attention if this thread is in a round, else by the target's own implementation."""
    attention = _SHARED.attention.get()
    if attention is None:
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        attention = AttentionInterface().get_interface(original, eager)
    elif original == "sdpa":  # it swallows the cap of gemma2's scores: what plain `generate` writes on it is uncapped
        kwargs.pop("softcap", None)
    return attention(module, *args, **kwargs)


@torch.compiler.disable
def registered_mask(original: str, *args: Any, **kwargs: Any) -> Any:
    """Make no mask during a round, and the mask of the target's own implementation otherwise."""
    own = AttentionMaskInterface().get(original)
    return None if _SHARED.attention.get() is not None or own is None else own(*args, **kwargs)


_OURS = "longspec|"


class OurName(str):
    """Our attention name. What is copied or pickled during a round takes the target's own name along instead."""

    @property
    def original(self) -> str:
        return self.removeprefix(_OURS)

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return str, (self.original,)


def register(original: str) -> OurName:
    """Return the attention name for targets that otherwise run on `original`; registered on first use."""
    name = OurName(_OURS + str(original))
    if name not in AttentionInterface().valid_keys():
        AttentionInterface.register(name, functools.partial(registered_attention, original))
        AttentionMaskInterface.register(name, functools.partial(registered_mask, original))
    return name


@contextmanager
def switched(target: PreTrainedModel) -> Iterator[Callable[[], bool]]:
    """Run `target` under our attention name; the last of several users restores the target's own name.

    Yields a function that tells whether our name has stood since. `set_attn_implementation` in another thread takes it
    away, and what is set so stays.
    """
    config = target.get_decoder().config
    with _SHARED.lock:
        name = config._attn_implementation
        users, original, _ = _SHARED.switched.get(id(config), (0, name, None))
        if not str(name).startswith(_OURS):  # nobody's round has switched it, or a user has set it in between
            # what `set_attn_implementation` sets after its checks; those would walk all modules and warn
            original, name = name, register(name)
            config._attn_implementation_internal = name
        _SHARED.switched[id(config)] = (users + 1, original, config)  # keeps the config, and so its id, alive
    try:
        yield lambda: config._attn_implementation is name
    finally:
        with _SHARED.lock:
            users, original, _ = _SHARED.switched.pop(id(config))
            if users > 1:
                _SHARED.switched[id(config)] = (users - 1, original, config)
            elif str(config._attn_implementation).startswith(_OURS):
                config._attn_implementation_internal = original


def without_kernels(config: Any) -> None:
    """Forget the kernels that a draft was loaded with beside its target: it attends by its own, and checks would fail.

    They are arguments of `from_pretrained`: `attn_implementation` and `experts_implementation`.
    """
    config._attn_implementation_internal = config._experts_implementation_internal = None


# --- the steps of plain `generate` -----------------------------------------------------------------------------------


def prefill(
    target: PreTrainedModel, ids: Tensor, cache: Cache, generation_config: GenerationConfig, model_kwargs: dict
) -> Any:
    """Let the target read a prompt as in plain `generate`, in chunks or at once, into `cache`.

    ids: (B, L); `cache` replaces the user's cache in `model_kwargs`. Returns the outputs of the last forward.
    """
    model_kwargs[CACHE] = cache
    return target._prefill(ids, generation_config, model_kwargs, is_first_iteration=not generation_config.is_assistant)


def first_inputs(target: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
    """Return what `generate` makes of prompts of one token, ids (B, 1), for `prefill`."""
    inputs = {"attention_mask": torch.ones_like(ids), "use_cache": True}
    takes_positions = "position_ids" in inspect.signature(target.forward).parameters
    return inputs | ({"position_ids": torch.zeros_like(ids)} if takes_positions else {})


def step_inputs(
    target: PreTrainedModel, ids: Tensor, outputs: Any, model_kwargs: dict[str, Any]
) -> Iterator[tuple[Tensor | None, dict[str, Any]]]:
    """Yield what plain `generate` passes to its forwards of one token, one by one: position and unusual inputs.

    ids: (B, L) prompts; which tokens follow makes no difference. The position is (B,), or (axes, B) where a target has
    several (mrope), and None where the target counts for itself. The unusual inputs are what a user passed for the
    target's own `forward`, and token types, which continue as the prompt's last.
    """
    cache, model_kwargs = model_kwargs[CACHE], dict(model_kwargs)
    while True:
        ids = torch.cat([ids, ids.new_zeros(len(ids), 1)], dim=1)
        model_kwargs = target._update_model_kwargs_for_generation(outputs, model_kwargs) | {CACHE: cache}
        inputs = target.prepare_inputs_for_generation(ids, next_sequence_length=1, **model_kwargs)
        positions = inputs.get("position_ids")
        extras = {name: value for name, value in inputs.items() if name not in _OWN_INPUTS and value is not None}
        # before transformers 5.23 the types of the whole text come along with the one token
        extras |= {name: extras[name][:, -1:] for name in PER_TOKEN if name in extras}
        yield None if positions is None else positions[..., -1], extras


def uncompiled() -> AbstractContextManager:
    """Return a context in which what a user has compiled runs as it was written; one thread at a time may enter."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def forward(target: PreTrainedModel, ids: Tensor, positions: Tensor, cache: Cache, extras: dict[str, Any]) -> Any:
    """Run the target over ids (B, T) at positions (…, B, T) behind `cache`; extras: as of `step_inputs`."""
    extras = {name: value.expand(-1, ids.shape[1]) if name in PER_TOKEN else value for name, value in extras.items()}
    own = {"input_ids": ids, "position_ids": positions, CACHE: cache, "use_cache": True, "return_dict": True}
    return target(**own, **extras)


def decoding(target: PreTrainedModel) -> AbstractContextManager:
    """Return the context in which plain `generate` decodes: mixtures of experts switch kernels there."""
    return target._optimize_model_for_decode()


def has_unfinished(target: PreTrainedModel, finished: bool, synced_gpus: bool, device: torch.device) -> bool:
    """Tell whether another round is due; under `synced_gpus`, as long as any rank has something to write."""
    return target._has_unfinished_sequences(finished, synced_gpus, device=device)


def is_stateful(target: PreTrainedModel) -> bool:
    """Tell whether the target keeps a state other than keys and values, as transformers says."""
    return target._is_stateful


def is_user_defined(cache: Cache) -> bool:
    """Tell whether the user passed this cache to `generate`."""
    return getattr(cache, "_is_user_defined", False)


def padding_token(generation_config: GenerationConfig) -> int:
    """Return the token that `generate` writes behind the end of a row."""
    return int(generation_config._pad_token_tensor)
