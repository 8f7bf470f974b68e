"""`config.compile_target`: the target's decoder layers go through torch.compile while they verify.

What lies between the matrix products of a layer (norms, rotary embedding, activation, residual sums) is some thirty
kernels in most families; fused it is six. Attention and the cache are opaque to the compiler: it makes graphs of the
pieces around them, the same for all layers. Knows decoder layers as modules only.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .target_longspec import attention_module

_SETTINGS: dict[str, Any] = {
    "allow_unspec_int_on_nn_module": True,  # or each layer would be compiled for its own `layer_idx`
    "skip_nnmodule_hook_guards": False,  # or hooks that come or go would not be noticed, such as PEFT's
    "recompile_limit": 64,  # of the shapes and targets that share the code of one family
    "fail_on_recompile_limit_hit": True,  # or a layer would go on without, almost unnoticed
}
# One thread at a time: before torch 2.13 these settings are the process's, not the thread's.
_LOCK = threading.Lock()


@contextmanager
def compiled_layers(target: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Within it, this thread runs the decoder layers of `target` compiled, if that is `wanted`; other threads do not.

    The first forward with another number of nodes or rows compiles, the second such number for all that follow. Errors
    of the compiler come through.
    """
    if not wanted:
        yield
        return
    import torch._dynamo  # seconds, which others need not wait

    layers, thread = decoder_layers(target), threading.get_ident()
    with _LOCK, torch._dynamo.config.patch(**_SETTINGS):
        own = [vars(layer).get("forward") for layer in layers]  # of an instance; most have only that of their class
        try:
            for layer in layers:
                layer.forward = functools.partial(dispatch, thread, layer.forward)
            yield
        finally:
            for layer, forward in zip(layers, own, strict=True):
                if forward is not None:
                    layer.forward = forward
                else:
                    vars(layer).pop("forward", None)


def dispatch(thread: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stands in for the `forward` of a layer: compiled in `thread`, as it is in all others."""
    run = compiled_run() if threading.get_ident() == thread else run_layer
    return run(forward, *args, **kwargs)


def run_layer(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)


@functools.cache
def compiled_run() -> Callable[..., Any]:
    """`run_layer`, compiled; what it compiled torch keeps beside the code of the layers, for all calls."""
    from .fast_linear_pass_longspec import OneRowPass  # seconds, as above

    options: dict[str, Any] = {
        # rounded where the layers' own code rounds, so that texts in half precision part no more often than they must
        "emulate_precision_casts": True,
        "triton.cudagraphs": False,
        "post_grad_custom_pre_pass": OneRowPass(),
    }
    return torch.compile(run_layer, options=options)


def decoder_layers(target: PreTrainedModel) -> list[nn.Module]:
    """The stack that holds the target's attention modules."""
    decoder = target.get_decoder()
    attention = attention_module(decoder, 0)
    stacks = [module for module in decoder.children() if isinstance(module, nn.ModuleList)]
    return list(next(stack for stack in stacks if attention in stack[0].modules()))


def check_compilable(target: PreTrainedModel) -> None:
    """Raises `ValueError` for `compile_target=True` with a target whose layers cannot be compiled."""
    reason = misfit(target)
    if reason is not None:
        raise ValueError(f"compile_target=True cannot be had here: {reason}; use False")


def misfit(target: PreTrainedModel) -> str | None:
    """Why the layers of this target cannot be compiled, or None."""
    if any(hasattr(module, "_hf_hook") for module in target.modules()):
        return "accelerate's hooks move data in every forward"
    if hasattr(target, "unshard"):
        return "FSDP gathers weights in every forward"
    quantizer = getattr(target, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        return f"{type(quantizer).__name__} has kernels that torch.compile cannot trace"
    if any(is_compiled(module) for module in target.modules()):
        return "it is compiled already"
    return None


def is_compiled(module: nn.Module) -> bool:
    """Whether a module or its forward went through torch.compile."""
    return module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")
