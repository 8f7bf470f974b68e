"""The attention of one layer over prefix and tree: every backend that can run here, side by side, on random numbers.

Knows the backends, and beside them the attention functions of transformers and FlashAttention; knows no models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..modeling.attention_longspec import Memo, Nodes, Prefix, Span, Spans, attend
from ..modeling.cache_layers_longspec import BUCKET
from ..modeling.configuration_longspec import ATTENTION_BACKENDS
from ..modeling.engine_longspec import Backend, Demand
from ..modeling.fast_choose_longspec import flash_3_misfit, imported, installed_flash_3, resolve_backend
from ..modeling.tree_longspec import ancestor_mask
from .timing import Speed, milliseconds

# Bytes of distinct keys and values that the calls go through in turn: several times the size of a GPU's own cache.
ROTATION = 2**28
LAYERS = 64  # layers with keys and values of their own, at most
CALLS = 8  # calls that are timed together, at least
CHILDREN = 4  # children of each node of the trees
WITHOUT_MASK = "FA3, no mask"

Call = Callable[[], Tensor]


class Heads(NamedTuple):
    """The shape of an attention layer."""

    query: int
    kv: int
    dim: int


@dataclass(frozen=True)
class Timed:
    """One way to attend, and its time. error: the largest difference from the reference; None without a mask."""

    name: str
    milliseconds: float
    error: float | None


@dataclass(frozen=True)
class Case:
    """The ways to attend from `nodes` queries to a prefix of `context` tokens and to each other, with their times.

    bytes_floor: milliseconds that it takes to read the keys and values once; arithmetic_floor: milliseconds that the
    arithmetic of the two matrix products takes.
    """

    context: int
    nodes: int
    bytes_floor: float
    arithmetic_floor: float
    timed: list[Timed]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Layer(NamedTuple):
    """The inputs of one layer, batch 1, with a prefix of `context` tokens and T nodes.

    query: (1, H, T, D); key, value: (1, K, S, D), stores that hold the prefix and the tree behind it; tree_key,
    tree_value: (1, K, T, D), the tree alone; mask: (1, T, T) bool.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    tree_key: Tensor
    tree_value: Tensor
    mask: Tensor
    spans: Spans
    context: int

    @property
    def scaling(self) -> float:
        return self.query.shape[-1] ** -0.5

    def whole(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys and values (1, K, n + T, D) of prefix and tree, and their mask (1, T, n + T) bool."""
        end = self.context + self.mask.shape[1]
        mask = torch.nn.functional.pad(self.mask, (self.context, 0), value=True)
        return self.key[:, :, :end], self.value[:, :, :end], mask


def random_layer(
    heads: Heads, context: int, nodes: int, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Layer:
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    slots = -(-(context + nodes) // BUCKET) * BUCKET
    key, value = random(1, heads.kv, slots, heads.dim), random(1, heads.kv, slots, heads.dim)
    tree = slice(context, context + nodes)
    parents = (torch.arange(nodes, device=device)[None] - 1).clamp(min=0) // CHILDREN
    starts, ends = torch.tensor([[0], [context]], device=device)
    return Layer(
        query=random(1, heads.query, nodes, heads.dim),
        key=key,
        value=value,
        tree_key=key[:, :, tree].clone(),
        tree_value=value[:, :, tree].clone(),
        mask=ancestor_mask(parents, nodes),
        # in a CUDA graph the host does not know the spans
        spans=Spans(starts, ends, None if device.type == "cuda" else (Span(0, context),), Memo()),
        context=context,
    )


def tree_attention(backend: Backend, layer: Layer) -> Tensor:
    """Return the attention output (1, H, T, D) of the nodes as a verification computes it in each layer."""
    prefix = Prefix(layer.key, layer.value, layer.spans, None)
    nodes = Nodes(layer.tree_key, layer.tree_value, layer.mask, layer.spans.ends)
    return backend.attention(layer.query, prefix, nodes, layer.scaling, None, None).transpose(1, 2)


def with_backend(backend: Backend, layers: list[Layer]) -> list[Call]:
    def prepared(layer: Layer) -> Call:
        return lambda: tree_attention(backend, layer)

    return [prepared(layer) for layer in layers]


def with_sdpa(layers: list[Layer]) -> list[Call]:
    """Prepare calls of transformers' own SDPA function with a boolean mask, its default for a tree."""
    groups = layers[0].query.shape[1] // layers[0].key.shape[1]
    module: Any = SimpleNamespace(num_key_value_groups=groups, is_causal=True)

    def prepared(layer: Layer) -> Call:
        key, value, mask = layer.whole()
        options = {"attention_mask": mask[:, None], "scaling": layer.scaling}
        return lambda: sdpa_attention_forward(module, layer.query, key, value, **options)[0].transpose(1, 2)

    return [prepared(layer) for layer in layers]


def with_flash_3(function: Callable[..., Tensor], layers: list[Layer]) -> list[Call]:
    """Prepare calls of FlashAttention-3 over as many keys without a mask, in its fastest layout, (1, S, K, D)."""
    keys = layers[0].context + layers[0].mask.shape[1]
    lengths = torch.tensor([keys], dtype=torch.int32, device=layers[0].query.device)

    def prepared(layer: Layer) -> Call:
        states = [part.transpose(1, 2).contiguous() for part in (layer.query, layer.key, layer.value)]
        return lambda: function(*states, cache_seqlens=lengths, softmax_scale=layer.scaling)

    return [prepared(layer) for layer in layers]


def flash_3(demand: Demand) -> Callable[..., Tensor] | None:
    """Return FlashAttention-3's `flash_attn_with_kvcache`, or None if no package of it is installed and can run."""
    try:
        module = None if flash_3_misfit(demand) else installed_flash_3()
        return None if module is None else imported(module).flash_attn_with_kvcache
    except ImportError:  # the package is installed but broken: `choose` tells why
        return None


def choose(
    names: Sequence[str], device: torch.device, dtype: torch.dtype, heads: Heads
) -> tuple[list[Backend], dict[str, str]]:
    """Return the backends of these names; without names, all that can run here, and why each of the others cannot.

    Raises `ValueError` or `ImportError` for a backend that is asked for by name and cannot run here.
    """
    known = [name for name in ATTENTION_BACKENDS if name != "auto"]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"expected backends among {', '.join(known)}, got {', '.join(unknown)}")
    found, missing = [], {}
    for name in names or known:
        try:
            found.append(resolve_backend(name, Demand(device, dtype, heads.dim, None)))
        except (ValueError, ImportError) as error:
            if names:
                raise
            missing[name] = str(error)
    return found, missing


def tuned(sizes: Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype, heads: Heads) -> list[Backend]:
    """Return the fused kernel once for each of these tile sizes, which are the five numbers of `Tiles`.

    Raises `ValueError` for other numbers, and for tiles that need more shared memory than the device has.
    """
    demand = Demand(device, dtype, heads.dim, None)
    backend = resolve_backend("triton", demand)
    from ..modeling.fast_triton_attention_longspec import Tiles, shared_bytes, triton_attention

    found = []
    for numbers in sizes:
        if len(numbers) != len(Tiles._fields) or any(number & (number - 1) for number in numbers[:3]):
            raise ValueError(
                f"expected tiles as {','.join(Tiles._fields)}, the first three powers of two, got {numbers}"
            )
        tiles = Tiles(*numbers)
        needed = tiles.bytes(1 << (heads.dim - 1).bit_length(), dtype.itemsize)
        if needed > shared_bytes(device):
            raise ValueError(f"tiles {numbers} need {needed} bytes of shared memory, got {shared_bytes(device)}")
        attention = functools.partial(triton_attention, tiles=tiles)
        found.append(backend._replace(name="x".join(map(str, numbers)), attention=attention))
    return found


def measure(
    heads: Heads,
    context: int,
    nodes: int,
    backends: Sequence[Backend],
    speed: Speed,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
) -> Case:
    """Time each of `backends`, and the stock attention functions, on the same random numbers."""
    size = 2 * heads.kv * (context + nodes) * heads.dim * dtype.itemsize
    count = min(max(-(-ROTATION // size), 2), LAYERS)
    layers = [random_layer(heads, context, nodes, device, dtype, seed) for seed in range(count)]
    exact = attend(layers[0].query, *layers[0].whole(), layers[0].scaling)[0]

    def timed(name: str, calls: list[Call]) -> Timed:
        error = None if name == WITHOUT_MASK else float((calls[0]() - exact).abs().max())
        return Timed(name, milliseconds(calls * -(-CALLS // count), device, repeats), error)

    results = [timed(backend.name, with_backend(backend, layers)) for backend in backends]
    results.append(timed("sdpa, mask", with_sdpa(layers)))
    if (function := flash_3(Demand(device, dtype, heads.dim, None))) is not None:
        results.append(timed(WITHOUT_MASK, with_flash_3(function, layers)))
    operations = 4 * heads.query * nodes * (context + nodes) * heads.dim
    return Case(context, nodes, speed.floor(size), speed.floor(0, operations), results)
