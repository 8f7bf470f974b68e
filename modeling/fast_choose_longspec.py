"""The choice of an attention backend: by name, or the fastest that can serve a call. Knows no models."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor
from transformers.utils import logging

from .attention_longspec import Prefix
from .engine_longspec import Backend, Demand, check_backend, plain_backend, torch_misfit

logger = logging.get_logger(__name__)
# Up to 64 queries a key/value head our kernel is faster than FlashAttention-3, with 256 slower (H200, heads of 128).
FEW = 64
FLASH_3 = ("flash_attn_interface", "fa3_fwd_interface")  # the package's own module, and that of the wheel fa3-fwd


def load_backend(name: str) -> Backend:
    """Load the backend of this name. Raises `ImportError` where its package is missing or cannot be loaded."""
    if name in ("eager", "torch"):
        return plain_backend(name)
    from .fast_triton_copies_longspec import fused_append, fused_join
    from .fast_triton_draw_longspec import fused_paths
    from .fast_triton_tree_longspec import fused_best_children, triton_move

    kernels: dict[str, Any] = {
        "move": triton_move,
        "children": fused_best_children,
        "append": fused_append,
        "join_copy": fused_join,
        "draw": fused_paths,
    }
    if name == "triton":
        from .fast_triton_attention_longspec import triton_attention, triton_prefix

        return Backend(name, triton_prefix, triton_attention, **kernels)
    from .fast_flash_longspec import flash_attention, flash_prefix, load_flash_2, load_flash_3

    try:
        if name == "flash_attn_2":
            flash = load_flash_2(imported("flash_attn"))
        else:
            flash = load_flash_3(imported(installed_flash_3() or FLASH_3[0]))
    except (ImportError, AttributeError) as error:  # of a package that is too old
        raise ImportError(f"attention_backend={name!r} cannot be loaded: {error}") from error
    attention = functools.partial(flash_attention, flash)
    return Backend(name, functools.partial(flash_prefix, flash), attention, **kernels)


def resolve_backend(name: str, demand: Demand) -> Backend:
    """Return the backend for a call: `name`, or for `"auto"` the fastest that fits.

    Raises `ValueError` with the reason where a backend asked for by name cannot run, `ImportError` where its package
    is installed but broken.
    """
    if name == "auto":
        return fastest(demand)
    check_backend(name, MISFITS[name](demand) if name != "eager" else None)
    return load_backend(name)


def fastest(demand: Demand) -> Backend:
    """Return the fastest backend that fits. A package that is installed but broken is passed over with a warning."""
    for name in ("flash_attn_3", "triton", "torch") if demand.device.type == "cuda" else ("torch",):
        try:
            if MISFITS[name](demand) is None:
                backend = load_backend(name)
                return by_size(load_backend("triton"), backend) if name == "flash_attn_3" else backend
        except ImportError as error:
            logger.warning_once(f"LongSpec goes on with another attention backend: {error}")
    return load_backend("eager")


def imported(module: str) -> Any:
    """Import a package. Raises `ImportError` also for one that was built for another torch and fails otherwise."""
    # not an import statement: transformers would ask all who load a draft's code for the package
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ImportError(f"the package {module} cannot be imported: {reason}") from error


def by_size(small: Backend, large: Backend) -> Backend:
    """Return a backend that is `small` where a key/value head has at most `FEW` queries, else `large`."""

    def prefix(query: Tensor, states: Prefix, *options: Any) -> tuple[Tensor, Tensor]:
        return (small if few(query, states) else large).prefix_attention(query, states, *options)

    def attention(query: Tensor, states: Prefix, *options: Any) -> Tensor:
        return (small if few(query, states) else large).attention(query, states, *options)

    def few(query: Tensor, states: Prefix) -> bool:
        return query.shape[1] // states.key.shape[1] * query.shape[2] <= FEW

    return small._replace(name=f"{small.name} and {large.name}", prefix_attention=prefix, attention=attention)


def triton_misfit(demand: Demand) -> str | None:
    """Return why our own kernel cannot serve a target, or None."""
    device, head_dim = demand.device, demand.head_dim
    if demand.dtype == torch.float64:
        return "it computes in float32, got a target in float64"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    triton = imported("triton")
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"it needs a CUDA device (or TRITON_INTERPRET=1, to try it slowly), got {device.type}"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs a CUDA device of capability 8.0 or newer, got {torch.cuda.get_device_capability(device)}"
    if head_dim > 256:
        return f"it needs a head dimension of at most 256, got {head_dim}"
    return None


def flash_2_misfit(demand: Demand) -> str | None:
    """Return why FlashAttention-2 cannot serve a target, or None."""
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash_attn is not installed"
    version = importlib.metadata.version("flash_attn")
    if Version(version) < Version("2.7"):
        return f"it needs the package flash_attn 2.7 or newer, got {version}"
    return flash_misfit(demand)


def flash_3_misfit(demand: Demand) -> str | None:
    """Return why FlashAttention-3 cannot serve a target, or None."""
    module = installed_flash_3()
    if module is None:
        return "no package with FlashAttention-3 is installed (flash_attn_interface, or the wheel fa3-fwd)"
    if reason := flash_misfit(demand):
        return reason
    if torch.cuda.get_device_capability(demand.device)[0] != 9:
        return f"it needs a Hopper GPU, got one of capability {torch.cuda.get_device_capability(demand.device)}"
    return build_misfit(module, build_flags(module), demand)


def build_misfit(module: str, left_out: dict[str, Any], demand: Demand) -> str | None:
    """Return what a build of FlashAttention-3 with these flags cannot serve, or None."""
    sizes = [size for size in (64, 96, 128, 192, 256) if not left_out.get(f"FLASHATTENTION_DISABLE_HDIM{size}")]
    if demand.dtype == torch.float16 and left_out.get("FLASHATTENTION_DISABLE_FP16"):
        return f"{module} is built without float16"
    if demand.softcap is not None and left_out.get("FLASHATTENTION_DISABLE_SOFTCAP"):
        return f"{module} is built without soft-capping, the target has softcap={demand.softcap}"
    if demand.head_dim > max(sizes):
        return f"{module} is built for head dimensions of at most {max(sizes)}, got {demand.head_dim}"
    return None


def flash_misfit(demand: Demand) -> str | None:
    """Return what neither package can serve, or what the kernel for the tree cannot; None for a fit."""
    if demand.device.type != "cuda":
        return f"it needs a CUDA device, got {demand.device.type}"
    if demand.dtype not in (torch.float16, torch.bfloat16):
        return f"it needs a target in float16 or bfloat16, got {demand.dtype}"
    if demand.head_dim % 8 or demand.head_dim > 256:
        return f"it needs a head dimension that is a multiple of 8 and at most 256, got {demand.head_dim}"
    return triton_misfit(demand)


def installed_flash_3() -> str | None:
    """Return the installed module of FlashAttention-3, or None."""
    return next((module for module in FLASH_3 if importlib.util.find_spec(module) is not None), None)


def build_flags(module: str) -> dict[str, Any]:
    """Return what a build of FlashAttention-3 says that it left out; nothing where it does not say."""
    config = module.replace("interface", "config")
    return importlib.import_module(config).CONFIG["build_flags"] if importlib.util.find_spec(config) else {}


MISFITS = {
    "torch": torch_misfit,
    "triton": triton_misfit,
    "flash_attn_2": flash_2_misfit,
    "flash_attn_3": flash_3_misfit,
}
