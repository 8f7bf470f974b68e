"""`config.compile_target`: the decoder layers of the target, and the draft's, go through torch.compile in rounds.

Between the matrix products of a layer lie some thirty kernels in most families (norms, rotary embedding, activation,
residual sums); fused they are six. Attention and the cache are opaque to the compiler, which makes graphs of the
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

from .fast_graphs_longspec import forward_misfit
from .target_longspec import attention_module

_SETTINGS: dict[str, Any] = {
    "allow_unspec_int_on_nn_module": True,  # or each layer would be compiled for its own `layer_idx`
    "skip_nnmodule_hook_guards": False,  # or hooks that come or go would not be noticed, such as PEFT's
    "recompile_limit": 64,  # of the shapes and targets that share the code of one family
    "fail_on_recompile_limit_hit": True,  # or a layer would go on without, almost unnoticed
}
# One thread at a time: before torch 2.13 these settings are the process's, not the thread's.
_LOCK = threading.Lock()


PARTS = ("before_attention", "between_attentions", "behind_attention")  # of a draft's layer


@contextmanager
def compiled_layers(target: PreTrainedModel) -> Iterator[None]:
    """Let this thread run the decoder layers of `target` compiled; other threads run the layers' own code.

    The first forward of a new number of nodes or rows compiles, and the second such number for all that follow. Errors
    of the compiler come through.
    """
    with compiled([(layer, "forward") for layer in decoder_layers(target)]):
        yield


@contextmanager
def compiled_draft(draft: nn.Module) -> Iterator[None]:
    """Do the same for what a draft's layer does before, between and behind its attentions."""
    with compiled([(draft, part) for part in PARTS]):
        yield


@contextmanager
def compiled(methods: list[tuple[nn.Module, str]]) -> Iterator[None]:
    """Let this thread run methods of modules compiled, within the context."""
    import torch._dynamo  # seconds, which others need not wait

    thread = threading.get_ident()
    with _LOCK, torch._dynamo.config.patch(**_SETTINGS):
        own = [
            vars(module).get(name) for module, name in methods
        ]  # of an instance; most have only that of their class
        try:
            for module, name in methods:
                setattr(module, name, functools.partial(dispatch, thread, getattr(module, name)))
            yield
        finally:
            for (module, name), method in zip(methods, own, strict=True):
                if method is not None:
                    setattr(module, name, method)
                else:
                    vars(module).pop(name, None)


def dispatch(thread: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stand in for the `forward` of a layer: compiled in `thread`, uncompiled in all others."""
    run = compiled_run() if threading.get_ident() == thread else run_layer
    return run(forward, *args, **kwargs)


def run_layer(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)


@functools.cache
def compiled_run() -> Callable[..., Any]:
    """Return `run_layer`, compiled; torch keeps the compiled code beside the layers' own code, for all calls."""
    from .fast_linear_pass_longspec import LinearPass  # seconds, as above

    options: dict[str, Any] = {
        # rounded where the layers' own code rounds, so that texts in half precision part no more often than they must
        "emulate_precision_casts": True,
        "triton.cudagraphs": False,
        "post_grad_custom_pre_pass": LinearPass(),
    }
    return torch.compile(run_layer, options=options)


def decoder_layers(target: PreTrainedModel) -> list[nn.Module]:
    """Return the stack of decoder layers that holds the target's attention modules."""
    decoder = target.get_decoder()
    attention = attention_module(decoder, 0)
    stacks = [module for module in decoder.children() if isinstance(module, nn.ModuleList)]
    return list(next(stack for stack in stacks if attention in stack[0].modules()))


def check_compilable(target: PreTrainedModel) -> None:
    """Raise `ValueError` for `compile_target=True` with a target whose layers cannot be compiled."""
    reason = compile_misfit(target)
    if reason is not None:
        raise ValueError(f"compile_target=True cannot be had here: {reason}; use False")


def compile_misfit(target: PreTrainedModel) -> str | None:
    """Return why the layers of this target cannot be compiled, or None."""
    if (reason := forward_misfit(target)) is not None:
        return reason
    quantizer = getattr(target, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        return f"{type(quantizer).__name__} has kernels that torch.compile cannot trace"
    if any(is_compiled(module) for module in target.modules()):
        return "it is compiled already"
    return None


def is_compiled(module: nn.Module) -> bool:
    """Tell whether a module or its forward went through torch.compile."""
    return module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")
