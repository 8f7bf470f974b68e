"""BoundTarget: what a draft borrows from its target, and whether they fit.

Embedding, LM head and query rotation are called as the target's own modules and functions, so that hooks, adapters
and quantization stay in force. Two parts are borrowed otherwise: rows of the LM head, for drafts with a vocabulary of
their own, and the last hidden state, caught on its way to the LM head. Knows nothing of trees or caches.
"""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from .configuration_longspec import LongSpecConfig, kv_shape, layer_config, layer_kinds, main_rope_parameters

# Families whose full-attention layers carry no rotary embedding while their sliding layers do, and those where that
# holds only if there are sliding layers.
_NO_ROPE_ON_FULL_LAYERS = ("afmoe", "cohere2", "cohere2_moe", "flint")
_NO_ROPE_BESIDE_SLIDING = ("exaone4", "exaone_moe", "kolibri1")
# Families that choose by the content of the keys which of them a query may see.
_OWN_MASKS = ("doge",)


# Cosines and sines (…, T, rotary dims); none where a layer has no rotary embedding.
Angles = tuple[Tensor, ...]


class BoundTarget(NamedTuple):
    """The parts of a target that one draft uses, found once a call.

    embed:  token ids (B, T) -> embeddings (B, T, hidden) as the target's first layer sees them
    scale:  embeddings a user passed as `inputs_embeds` -> the same
    logits: draft hidden states (B, T, hidden) -> (B, T, vocab), the target's logit scale or cap included
    scaled: what the target's LM head `head` puts out -> the same with scale or cap
    angles: a tensor of the queries' dtype and device, positions (B, T) -> what `rotate` needs of these positions
    rotate: queries (B, H, T, D), their angles -> rotated as the target rotates those of its layer `layer`
    """

    embed: Callable[[Tensor], Tensor]
    scale: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor]
    scaled: Callable[[Tensor], Tensor]
    head: nn.Module
    angles: Callable[[Tensor, Tensor], Angles]
    rotate: Callable[[Tensor, Angles], Tensor]
    layer: int
    device: torch.device
    dtype: torch.dtype


def bind(config: LongSpecConfig, target: PreTrainedModel) -> BoundTarget:
    """Check that a draft with this config fits `target`, and find the parts that the draft borrows.

    Raises `ValueError` with one line per mismatch, `name: draft has …, target has …`.
    """
    check_fit(config, target)
    decoder = target.get_decoder()
    text_config = target.config.get_text_config(decoder=True)
    attention = attention_module(decoder, config.target_layer)
    device = execution_device(attention, target)
    if text_config.model_type in _OWN_MASKS:
        raise ValueError(f"LongSpec does not serve attention masks of a target's own, got {type(target).__name__}")
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        raise ValueError(
            "LongSpec needs a target whose decoder takes `position_ids`, since the nodes of a tree do not stand in a "
            f"row, got {type(decoder).__name__}"
        )
    embedding, head = target.get_input_embeddings(), target.get_output_embeddings()
    # FSDP shards a root module's own weights again behind its forward, and says here how to get them back
    gather = getattr(target, "unshard", lambda: None)
    # Granite multiplies behind its embedding; Gemma scales inside of it.
    multiplier = getattr(decoder, "embedding_multiplier", None)

    def scale(embeds: Tensor) -> Tensor:
        return embeds if multiplier is None else embeds * multiplier

    def embed(ids: Tensor) -> Tensor:
        gather()
        return scale(embedding(ids)).to(device)

    def logits(hidden: Tensor) -> Tensor:
        gather()
        return scaled_logits(head(hidden), text_config).to(device)

    angles, rotate = query_rotation(decoder, attention, text_config, config.target_layer)
    return BoundTarget(
        embed=embed,
        scale=scale,
        logits=logits,
        scaled=lambda logits: scaled_logits(logits, text_config),
        head=head,
        angles=angles,
        rotate=rotate,
        layer=config.target_layer,
        device=device,
        dtype=target.dtype,  # of a weight that is not packed; a layer's own may be uint8 or float8
    )


def check_fit(config: LongSpecConfig, target: PreTrainedModel) -> None:
    """Raise `ValueError` that lists every mismatch between a draft's config and a target."""
    text = target.config.get_text_config(decoder=True)
    kinds = layer_kinds(text)
    if "sliding" in kinds and getattr(text, "sliding_window", None) == 1:  # plain cache and mask disagree
        raise ValueError(f"LongSpec does not serve sliding_window=1, got {text.model_type!r}")
    kv_heads, head_dim = kv_shape(layer_config(text, config.target_layer))
    actual = {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "target_num_hidden_layers": text.num_hidden_layers,
        "rope_parameters": main_rope_parameters(text),
    }
    mismatches = [
        f"{name}: draft has {getattr(config, name)}, target has {value}"
        for name, value in actual.items()
        if not _same(getattr(config, name), value)
    ]
    if not mismatches and kinds[config.target_layer] == "shared":
        mismatches.append(
            f"target_layer: draft has {config.target_layer}, target has no keys and values of its own there"
        )
    if mismatches:
        raise ValueError("this LongSpec draft does not fit the target:\n  " + "\n  ".join(mismatches))


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        # keys that a newer transformers adds with their default do not change the frequencies
        keys = (set(ours) | set(theirs)) - {"type", "partial_rotary_factor"}
        same_part = ours.get("partial_rotary_factor", 1.0) == theirs.get("partial_rotary_factor", 1.0)
        return same_part and all(ours.get(key) == theirs.get(key) for key in keys)
    return ours == theirs


def attention_module(decoder: nn.Module, layer: int) -> nn.Module:
    """Return the attention module of a decoder layer: the module that knows its `layer_idx` and its `scaling`.

    Raises `ValueError` for a target without such a module.
    """
    stacks = [module for module in decoder.children() if isinstance(module, nn.ModuleList)]
    for stack in stacks:
        for module in stack[layer].modules() if layer < len(stack) else ():
            # a file that knows the table of attention functions is one that asks it
            follows = hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS")
            if follows and hasattr(module, "layer_idx") and hasattr(module, "scaling"):
                return module
    raise ValueError(
        f"LongSpec needs a target whose layers hold an attention module that uses transformers' attention interface, "
        f"got {type(decoder).__name__}"
    )


def execution_device(module: nn.Module, target: PreTrainedModel) -> torch.device:
    """Return where a module computes: as accelerate's hooks say, since offloaded weights lie on `meta`."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            if getattr(one, "execution_device", None) is not None:
                return torch.device(one.execution_device)
    # some quantizations keep their weights in buffers, or where torch does not see them
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), target.device)


def query_rotation(
    decoder: nn.Module, attention: nn.Module, text_config: Any, layer: int
) -> tuple[Callable[[Tensor, Tensor], Angles], Callable[[Tensor, Angles], Tensor]]:
    """Return how the target rotates the queries of `layer`: its angles, of its rotary module, and its rotation.

    That covers half and interleaved pairs, partial rotation, per-layer frequencies and length scaling alike.
    """
    rotary = getattr(decoder, "rotary_emb", None)
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if rotary is None or not is_rotated(attention, text_config, layer):
        return lambda like, positions: (), lambda query, angles: query
    names = set(inspect.signature(apply).parameters) if apply is not None else set()
    alone = {"x", "cos", "sin"} <= names  # gemma3n and gemma4 rotate queries and keys in two calls
    if apply is None or not (alone or {"q", "k", "cos", "sin"} <= names):
        raise ValueError(f"LongSpec does not know how {type(attention).__name__} rotates its queries")

    by_type = "layer_type" in inspect.signature(rotary.forward).parameters
    options = {"layer_type": text_config.layer_types[layer]} if by_type else {}

    # axes of positions in images and films, which agree for text; section i of the angles is turned by axis i mod 3,
    # but in hunyuan_vl by an axis of its own
    sections = getattr(rotary, "mrope_section", None) or ()
    axes = len(sections) if text_config.model_type == "hunyuan_vl_text" else 3 if sections else 0

    def angles(like: Tensor, positions: Tensor) -> Angles:
        positions = positions.expand(axes, -1, -1) if axes else positions
        cos, sin = rotary(like, positions, **options)
        return cos.to(like.device), sin.to(like.device)

    def rotate(query: Tensor, angles: Angles) -> Tensor:
        cos, sin = angles
        # partial rotation: some families slice in the attention module, so slice before the call for all of them;
        # gpt_oss gives one angle a pair, the others two
        rotated = cos.shape[-1] * (2 if text_config.model_type == "gpt_oss" else 1)
        part = query[..., :rotated]
        turned = apply(part, cos, sin) if alone else apply(part, part[:, :0], cos, sin)[0]  # keys of no heads
        turned = turned.to(query.dtype)
        return turned if rotated == query.shape[-1] else torch.cat([turned, query[..., rotated:]], dim=-1)

    return angles, rotate


def is_rotated(attention: nn.Module, text_config: Any, layer: int) -> bool:
    """Tell whether a layer has a rotary embedding at all; families say so in several ways."""
    thetas = getattr(text_config, "layer_rope_theta", None)  # of each layer, 0 for none
    parameters = getattr(text_config, "rope_parameters", None) or {}  # by the type of layer, in some families
    types = getattr(text_config, "layer_types", None)
    if not getattr(attention, "use_rope", True) or (thetas is not None and not thetas[layer]):
        return False
    if types is not None and parameters.get(types[layer], {}) is None:
        return False
    if layer_kinds(text_config)[layer] == "sliding" or getattr(attention, "force_rope", False):
        return True
    hybrid = getattr(text_config, "sliding_window", None) is not None
    family = text_config.model_type
    return family not in _NO_ROPE_ON_FULL_LAYERS and not (family in _NO_ROPE_BESIDE_SLIDING and hybrid)


def scaled_logits(logits: Tensor, text_config: Any) -> Tensor:
    """Apply the target's own last step to its logits: Granite divides, Cohere multiplies, Gemma caps."""
    if (divisor := getattr(text_config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (factor := getattr(text_config, "logit_scale", None)) is not None:
        logits = logits * factor
    if (cap := getattr(text_config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def check_cached(layer: Any, config: LongSpecConfig) -> None:
    """Raise `ValueError` if a target left other keys and values in its cache than its config promised.

    layer: of the cache, the one that a draft with this config attends to.
    """
    expected = (config.num_key_value_heads, config.head_dim)
    held = [states[0, :, 0].shape for states in (layer.keys, layer.values)] if layer.is_initialized else []
    if held != [expected, expected]:
        found = (
            " and ".join(str(tuple(shape)) for shape in held)
            or "none, as where a target trains with gradient checkpointing"
        )
        raise ValueError(f"LongSpec needs cached keys and values of (heads, dimension) {expected}, got {found}")


# --- rows of the LM head ---------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Rows of the target's LM head, weight (N, hidden) and bias (N,), for a draft that guesses N frequent tokens only.

    At 128k tokens the head is most of what a level of the tree reads; a quarter of the tokens are nearly all that is
    ever written (FR-Spec, arXiv 2502.14856; EAGLE-3, arXiv 2503.01840). The text does not change, for the target
    verifies with its whole vocabulary: a token that is left out is never guessed.
    """

    weight: Tensor
    bias: Tensor | None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return logits (…, N) of hidden states (…, hidden)."""
        return linear(hidden, self.weight, self.bias)


class HeadRows:
    """Keep, for each LM head, the rows that one draft guesses with, while neither head nor draft changes.

    Rows are freed with the head or with the draft; a copy of the draft gathers its own. A change through `.data` is
    not seen: it makes guesses worse, not the text.
    """

    def __init__(self) -> None:
        self.kept: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Rows]] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return HeadRows, ()

    def of(self, head: nn.Module | None, ids: Tensor, device: torch.device) -> Rows:
        """Return the rows `ids` (N,) of `head` on `device`. Raises `ValueError` where a head is more than its rows."""
        layer = plain_linear(head)
        sources = [tensor for tensor in (layer.weight, layer.bias, ids) if tensor is not None]
        snapshot, rows = self.kept.get(layer, (None, None))
        if rows is None or snapshot is None or rows.weight.device != device or not snapshot.still(sources):
            if (highest := int(ids.max())) >= len(layer.weight):
                known = f"0..{len(layer.weight) - 1}"
                raise ValueError(f"a draft vocabulary has tokens of the target's LM head, {known}, got {highest}")
            with torch.no_grad():
                parts = (layer.weight, layer.bias)
                rows = Rows(*(None if part is None else part[ids.to(part.device)].to(device) for part in parts))
            self.kept[layer] = Snapshot(sources), rows
        return rows


class Snapshot:
    """Tell whether tensors are the same ones as before, in the same memory and not written to since."""

    def __init__(self, tensors: list[Tensor]):
        self.before = [(weakref.ref(tensor), *_state(tensor)) for tensor in tensors]

    def still(self, tensors: list[Tensor]) -> bool:
        return len(tensors) == len(self.before) and all(
            reference() is tensor and (pointer, version) == _state(tensor)
            for (reference, pointer, version), tensor in zip(self.before, tensors, strict=True)
        )


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def vocabulary(ids: Tensor | Sequence[int], size: int) -> Tensor:
    """Return a copy of token ids (N,) in int64. Raises `ValueError` for repeated ids and ids beyond `size`."""
    ids = torch.as_tensor(ids, device="cpu")
    if ids.dim() != 1 or not len(ids) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"a draft vocabulary is a row of token ids, got {tuple(ids.shape)} of {ids.dtype}")
    lowest, highest, repeated = int(ids.min()), int(ids.max()), len(ids) - len(ids.unique())
    if lowest < 0 or highest >= size:
        raise ValueError(f"a draft vocabulary has token ids in 0..{size - 1}, got {lowest}..{highest}")
    if repeated:
        raise ValueError(f"a draft vocabulary has each token once, got {repeated} more than once")
    return ids.detach().to(torch.long, copy=True)


def plain_linear(head: nn.Module | None) -> nn.Linear:
    """Return `head` if its weight and bias are all that it is. Raises `ValueError` for any other head."""
    reason = _head_misfit(head)
    if reason is not None:
        raise ValueError(
            "a draft with a vocabulary of its own needs a target whose LM head is a plain torch.nn.Linear, "
            f"got {reason}; draft.set_draft_vocab(None) lets it guess among all tokens"
        )
    assert isinstance(head, nn.Linear)
    return head


def _head_misfit(head: nn.Module | None) -> str | None:
    if type(head) is not nn.Linear:  # not of a subclass: quantized, adapted and parametrized layers are such
        return f"a {type(head).__module__}.{type(head).__name__}"
    if head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head):
        return "one with hooks"
    if type(head.weight) is not nn.Parameter:
        return f"a weight of type {type(head.weight).__name__}"
    formats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    if head.weight.device.type == "meta" or head.weight.dtype not in formats:
        return f"a weight of {head.weight.dtype} on {head.weight.device}"
    return None


def foreign_hooks(module: nn.Module) -> dict[int, Any]:
    """Return the forward hooks of a module and its parts, by their ids, but for transformers' and our own."""
    tables = [table for part in module.modules() for table in (part._forward_pre_hooks, part._forward_hooks)]
    hooks = {key: hook for table in tables for key, hook in table.items()}
    ours = (Caught.catch.__module__, "transformers.")
    return {key: hook for key, hook in hooks.items() if not (getattr(hook, "__module__", None) or "").startswith(ours)}


# --- the last hidden state -------------------------------------------------------------------------------------------


class Caught:
    """The last hidden states (B, T, hidden) of this thread's latest forward; `of_last_token` is (B, hidden).

    What the target made of the token before the root holds more of what comes next than the keys and values of one
    layer: the LM head chose the root from it. No cache has it, and to ask the target for hidden states would keep
    those of all layers and of the whole prompt.
    """

    def __init__(self) -> None:
        self.states: Tensor | None = None
        self.thread = threading.get_ident()

    @torch.compiler.disable  # dynamo, in a target that its user compiled, knows no threads
    def catch(self, module: Any, inputs: Any, output: Any) -> None:
        if threading.get_ident() == self.thread:  # others may use the target too
            self.states = output[0]

    def every(self) -> Tensor:
        """Return the states of all tokens. Raises `ValueError` if no forward went through the decoder as a module."""
        if self.states is None:
            raise ValueError(
                "this LongSpec draft reads the target's last hidden state (config.target_hidden_state): expected a "
                "target that calls its decoder as a module, got one that does not, such as one compiled before"
            )
        return self.states

    def of_last_token(self) -> Tensor:
        return self.every()[:, -1].clone()  # of a prompt, the rest is let go


@contextmanager
def catching(target: PreTrainedModel, wanted: bool) -> Iterator[Caught | None]:
    """Catch what the decoder of `target` puts out in this thread, if `wanted`; else yield None."""
    if not wanted:
        yield None
        return
    caught = Caught()
    hook = target.get_decoder().register_forward_hook(caught.catch)
    try:
        yield caught
    finally:
        hook.remove()
