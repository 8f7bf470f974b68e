"""LongSpecConfig: the shape of a draft, the shape of its tree, and which target it belongs to.

Of a draft's files this one is loaded first, so it begins with a look at transformers. Knows the target only by its
config. Architecture fields are fixed once a draft is trained; decoding options
(`tree_shape`, `verify_tokens`, `attention_backend`, `cuda_graphs`, `compile_target`, `profile`) may be changed on a
loaded draft at any time.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import os
from collections.abc import Iterable, Iterator
from typing import Any

import transformers
from packaging.requirements import Requirement
from packaging.version import Version

# The first and the last release of transformers that this code was made for and tried with, and the public names that
# it uses; interface_longspec.py has the private ones.
RELEASES = ("5.17", "5.24")
PUBLIC = {
    "transformers": "AttentionInterface AttentionMaskInterface AutoConfig Cache DynamicCache GenerationConfig "
    "PreTrainedConfig PreTrainedModel StaticCache initialization",
    "transformers.activations": "ACT2FN",
    "transformers.cache_utils": "CacheLayerMixin DynamicSlidingWindowLayer StaticLayer",
    "transformers.generation": "BaseStreamer ExponentialDecayLengthPenalty GenerateDecoderOnlyOutput GenerationMixin "
    "GenerationMode",
    "transformers.modeling_rope_utils": "ROPE_INIT_FUNCTIONS",
    "transformers.utils": "logging",
}


def check_release(changes: Iterable[str]) -> str | None:
    """Raise `ImportError` for a transformers that is too old, or newer than this code knows and with one of `changes`.

    A newer release that has changed nothing is served; returns the line that warns of it, None for a known release.
    """
    first, last, installed = (Version(version).release[:2] for version in (*RELEASES, transformers.__version__))
    if first <= installed <= last:
        return None
    told = f"this draft's code knows transformers {RELEASES[0]} to {RELEASES[1]}, got {transformers.__version__}"
    if installed < first:
        raise ImportError(f"{told}; pip install -U transformers")
    way_out = "pip install -U hf-longspec, or re-export the draft with it"
    if _package_knows():
        way_out = "import hf_longspec before you load the draft: the installed one knows this transformers"
    for change in changes:
        raise ImportError(f"{told}, where {change}; {way_out}")
    return f"{told}, which still has all that the code builds on. Should something fail: {way_out}"


def _package_knows() -> bool:
    """Tell whether the installed hf-longspec, which need not be this code, asks for a transformers as installed."""
    try:
        needs = map(Requirement, importlib.metadata.requires("hf-longspec") or ())
    except importlib.metadata.PackageNotFoundError:
        return False
    asked = (need.specifier for need in needs if need.name == "transformers")
    return any(versions.contains(transformers.__version__, prereleases=True) for versions in asked)


def _lost_names() -> Iterator[str]:
    for module, names in PUBLIC.items():
        for name in names.split():
            try:
                if not hasattr(importlib.import_module(module), name):
                    importlib.import_module(f"{module}.{name}")
            except ImportError:
                yield f"{module} has no {name}"


check_release(_lost_names())
from transformers import AutoConfig, DynamicCache, PreTrainedConfig  # noqa: E402

# What a draft guesses by default: a CPU has no arithmetic to spare, so there only what is nearly sure pays.
TREE, CPU_TREE = (4, 16, 16, 16, 16), (1, 1, 1)
COPIES = 24  # tokens, with tree_shape="auto"
ACCEPTANCE = (0.7, 0.65)
ATTENTION_BACKENDS = ("auto", "eager", "torch", "triton", "flash_attn_2", "flash_attn_3")


class LongSpecConfig(PreTrainedConfig):
    r"""Configuration of a LongSpec draft (arXiv 2502.17421, section 3).

    Args:
        vocab_size, hidden_size, intermediate_size, hidden_act, mlp_bias, num_attention_heads, num_key_value_heads,
        head_dim, rms_norm_eps, rope_parameters, max_position_embeddings: as in the target, see `from_target`.
        num_hidden_layers (`int`): 1; 0 for a draft without weights, whose guesses are copied from the text.
        window (`int`): reach of the draft's own self-attention in tokens, the current one included.
        target_model_type (`str`): `model_type` of the target's text config.
        target_num_hidden_layers (`int`): number of decoder layers of the target.
        target_layer (`int`): the target layer whose cached keys and values the draft attends to.
        target_hidden_state (`bool`): the draft also reads the target's last hidden state at the token before the root,
            of which the target's LM head made the root. One vector a sequence. The published drafts do not.
        draft_vocab_size (`int`, *optional*): how many tokens the draft guesses among, see
            `LongSpecForCausalLM.set_draft_vocab`. `None`: all.
        final_norm (`bool`): an RMSNorm before the target's LM head; the published drafts have none.
        tree_shape (`str` or `tuple[int, ...]`): `"auto"`: chosen round by round, from no guesses to `TREE`, on a CPU
            `CPU_TREE`, by what rounds cost and write. Or the nodes of each tree level below the root: `(1, 1, 1)` is a
            chain, `()` means that the draft guesses nothing.
        verify_tokens (`int`, *optional*): rows fed to the target, root included: the tree's best. `None`: all of it;
            with `"auto"` a number that suits the device.
        copy_tokens (`int`, *optional*): length of a branch that is copied from the text itself, where the last tokens
            have come before. `None`: none with a tree shape of your own, `COPIES` with `"auto"`.
        acceptance (`tuple[float, ...]`): how often a guess of each level is accepted where its parent was; the last
            one counts for all deeper levels. What `"auto"` begins with.
        attention_backend (`str`): how the target attends while it verifies: one of `ATTENTION_BACKENDS`. "auto" is
            "triton" on a GPU, with "flash_attn_3" for large trees if that is installed; "torch" elsewhere; "eager"
            where neither can run. With "triton" and the two of flash_attn, Triton kernels also choose the tree's nodes
            and move the accepted path.
        cuda_graphs (`str` or `bool`): replay a round's phases as CUDA graphs: `"auto"` where that is possible. Graphs
            are kept for the next call, with the memory they work on: see `LongSpecForCausalLM.release`.
        compile_target (`bool`): run the target's decoder layers through torch.compile while they verify. The first
            call waits for the compiler, later ones only where trees or batches have sizes it has not met.
        profile (`bool`): time each phase of each round.
        transformers_range (`tuple[str, str]`): the first and the last release of transformers that this code knows.
    """

    model_type = "longspec"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    hidden_act: str = "silu"
    mlp_bias: bool = False
    num_hidden_layers: int = 1
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    rope_parameters: dict | None = None
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    window: int = 512
    draft_vocab_size: int | None = None
    final_norm: bool = False
    target_model_type: str = "llama"
    target_num_hidden_layers: int = 32
    target_layer: int = 31
    target_hidden_state: bool = False
    tree_shape: str | tuple | list | None = "auto"
    verify_tokens: int | None = None
    copy_tokens: int | None = None
    acceptance: tuple | list = ACCEPTANCE
    attention_backend: str = "auto"
    cuda_graphs: str | bool = "auto"
    compile_target: bool = False
    profile: bool = False
    transformers_range: tuple | list = RELEASES

    def __post_init__(self, **kwargs: Any) -> None:
        self.transformers_range = RELEASES  # of the code that runs, whichever code has saved the draft
        if isinstance(self.tree_shape, list):  # JSON has lists only
            self.tree_shape = tuple(self.tree_shape)
        if self.tree_shape is None:  # of drafts saved by earlier code
            self.tree_shape = "auto"
        if isinstance(self.acceptance, list):
            self.acceptance = tuple(self.acceptance)
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Raise `ValueError` for a field of no meaning. Called on construction and before every generation."""
        positive = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        for name in (*positive, "head_dim", "window", "target_num_hidden_layers"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {getattr(self, name)!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "`num_attention_heads` must be a multiple of `num_key_value_heads`, got "
                f"{self.num_attention_heads} and {self.num_key_value_heads}"
            )
        if not _is_int(self.target_layer) or not 0 <= self.target_layer < self.target_num_hidden_layers:
            raise ValueError(
                f"`target_layer` must be in 0..{self.target_num_hidden_layers - 1}, got {self.target_layer!r}"
            )
        if self.attention_backend not in ATTENTION_BACKENDS:
            raise ValueError(
                f"`attention_backend` must be one of {ATTENTION_BACKENDS}, got {self.attention_backend!r}"
            )
        if self.cuda_graphs != "auto" and not isinstance(self.cuda_graphs, bool):
            raise ValueError(f"`cuda_graphs` must be 'auto', True or False, got {self.cuda_graphs!r}")
        for name in ("compile_target", "target_hidden_state"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}")
        if self.verify_tokens is not None and (not _is_int(self.verify_tokens) or self.verify_tokens < 1):
            raise ValueError(f"`verify_tokens` must be None or a positive integer, got {self.verify_tokens!r}")
        size = self.draft_vocab_size
        if size is not None and (not _is_int(size) or not 1 <= size <= self.vocab_size):
            raise ValueError(f"`draft_vocab_size` must be None or in 1..{self.vocab_size}, got {size!r}")
        if self.copy_tokens is not None and (not _is_int(self.copy_tokens) or self.copy_tokens < 0):
            raise ValueError(f"`copy_tokens` must be None or an integer of at least 0, got {self.copy_tokens!r}")
        likely = self.acceptance if isinstance(self.acceptance, (tuple, list)) else ()
        if not likely or not all(isinstance(share, (int, float)) and 0 <= share <= 1 for share in likely):
            raise ValueError(f"`acceptance` must be one number from 0 to 1 for each level, got {self.acceptance!r}")
        if self.num_hidden_layers not in (0, 1):
            raise ValueError(f"`num_hidden_layers` must be 1, or 0 without a draft, got {self.num_hidden_layers!r}")
        if self.num_hidden_layers == 0 and (self.tree_shape not in ("auto", ()) or self.target_hidden_state):
            raise ValueError(
                f'a draft without a layer needs tree_shape="auto" or (), and target_hidden_state=False, got '
                f"{self.tree_shape!r} and {self.target_hidden_state!r}"
            )
        self.check_tree(TREE if self.tree_shape == "auto" else self.tree_shape)

    def tree_on(self, device: Any) -> tuple[int, ...]:
        """Return the nodes of each level of the deepest trees of a draft that runs on `device`."""
        if self.num_hidden_layers == 0:
            return ()
        if self.tree_shape == "auto":
            return CPU_TREE if device.type == "cpu" else TREE
        assert isinstance(self.tree_shape, (tuple, list)), "`check` has looked"
        return tuple(self.tree_shape)

    def check_tree(self, shape: Any, rows: int | None = None) -> None:
        """Raise `ValueError` for a tree that cannot be grown; rows: of the target's LM head, which may be pruned."""
        if not isinstance(shape, (tuple, list)) or not all(_is_int(width) for width in shape):
            raise ValueError(f'`tree_shape` must be "auto" or a tuple of integers, one width a level, got {shape!r}')
        parents, known = 1, self.draft_vocab_size or self.vocab_size
        vocab = min(known, rows or known)
        head = " of the target's LM head" if vocab < known else ""
        for level, width in enumerate(shape, start=1):
            if width < 1:
                raise ValueError(f"`tree_shape` widths must be at least 1, got {width} at level {level}")
            if width > parents * vocab:
                raise ValueError(
                    f"`tree_shape` level {level} can have at most {parents} parents × {vocab} tokens{head} = "
                    f"{parents * vocab} nodes, got {width}"
                )
            parents = width

    @classmethod
    def from_target(cls, target: Any, **fields: Any) -> LongSpecConfig:
        """Make the config of a draft that fits a target; `fields` override or add.

        target: a model, its config, or its folder or name on the Hub. Raises `ValueError` for targets LongSpec cannot
        serve: encoder–decoder models, models without per-layer key/value caches of full size, RoPE whose frequencies
        depend on the current length (dynamic NTK).
        """
        named = isinstance(target, (str, os.PathLike))
        config = AutoConfig.from_pretrained(target) if named else getattr(target, "config", target)
        if not isinstance(config, PreTrainedConfig):
            raise ValueError(f"expected a target's config, model, folder or name, got a {type(target).__name__}")
        text = config.get_text_config(decoder=True)
        if config.is_encoder_decoder:
            raise ValueError(f"LongSpec needs a decoder-only target, got the encoder–decoder {config.model_type!r}")
        layer = fields.get("target_layer", default_target_layer(text))
        own = layer_config(text, layer)
        kv_heads, head_dim = kv_shape(own)
        inner = getattr(own, "intermediate_size", None)
        shape = {
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": (inner[0] if isinstance(inner, (list, tuple)) else inner) or 4 * text.hidden_size,
            "hidden_act": getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", None) or "silu",
            "mlp_bias": getattr(text, "mlp_bias", False),
            "num_attention_heads": own.num_attention_heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "rms_norm_eps": getattr(text, "rms_norm_eps", None) or 1e-6,  # some families state None
            "initializer_range": getattr(text, "initializer_range", 0.02),
            "rope_parameters": main_rope_parameters(text),
            "max_position_embeddings": getattr(text, "max_position_embeddings", cls.max_position_embeddings),
            "target_model_type": text.model_type,
            "target_num_hidden_layers": text.num_hidden_layers,
            "target_layer": layer,
            "pad_token_id": getattr(text, "pad_token_id", None),
            "bos_token_id": getattr(text, "bos_token_id", None),
            "eos_token_id": getattr(text, "eos_token_id", None),
        }
        return cls(**(shape | fields))


def layer_kinds(text_config: PreTrainedConfig) -> list[str]:
    """Return `"full"`, `"sliding"` or `"shared"` (uses another layer's K/V) for each layer of a target.

    Read off the cache that transformers itself would build. Raises `ValueError` for any other kind of layer state.
    """
    family = text_config.model_type
    if not _is_int(getattr(text_config, "num_hidden_layers", None)):
        raise ValueError(f"LongSpec needs a target made of decoder layers, got {family!r} without `num_hidden_layers`")
    own = layer_config(text_config, 0)
    if getattr(own, "attention_chunk_size", None) is not None:
        raise ValueError(f"LongSpec does not serve chunked attention, got {family!r}")
    if getattr(own, "kv_lora_rank", None) is not None:
        raise ValueError(f"LongSpec does not serve latent attention, got {family!r} with a `kv_lora_rank`")
    width = getattr(own, "word_embed_proj_dim", None)  # of embedding and LM head, in opt-350m
    if width is not None and width != own.hidden_size:
        raise ValueError(f"LongSpec needs embeddings of width {own.hidden_size}, got {family!r} with {width}")
    names = {"DynamicLayer": "full", "DynamicSlidingWindowLayer": "sliding", "DummyLayer": "shared"}
    try:
        layers = [type(layer).__name__ for layer in DynamicCache(config=text_config).layers]
    except KeyError as kind:  # of a layer that transformers knows once the family's modeling file was imported
        layers = [kind.args[0]]
    if not layers or set(layers) - set(names):
        raise ValueError(
            "LongSpec needs a target with standard per-layer key/value caches, got "
            f"{family!r} with {sorted(set(layers)) or 'none'}"
        )
    if not _is_int(getattr(own, "num_attention_heads", None)):
        raise ValueError(f"LongSpec needs a target made of attention layers, got {family!r} without attention heads")
    shared = getattr(text_config, "num_kv_shared_layers", None) or 0
    owners = len(layers) if len(layers) < text_config.num_hidden_layers else len(layers) - shared
    kinds = [names[layer] for layer in layers[:owners]]
    return kinds + ["shared"] * (text_config.num_hidden_layers - len(kinds))


def default_target_layer(text_config: PreTrainedConfig) -> int:
    """Return the last full-attention layer that owns its K/V; in a target without one, the last sliding layer."""
    kinds = layer_kinds(text_config)
    for kind in ("full", "sliding"):
        if kind in kinds:
            return len(kinds) - 1 - kinds[::-1].index(kind)
    raise ValueError(f"no layer of {text_config.model_type!r} owns keys and values: {kinds}")


def layer_config(text_config: PreTrainedConfig, layer: int) -> PreTrainedConfig:
    """Return the config of one layer: gemma4's full layers, for one, have larger heads than its sliding layers.

    The first layer's config where a target has no layer of this number, which `check` and `check_fit` refuse.
    """
    return text_config.per_layer_config[layer if _is_int(layer) and 0 <= layer < text_config.num_hidden_layers else 0]


def kv_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """Return the key/value heads and the head dimension of a layer with this config."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def main_rope_parameters(text_config: PreTrainedConfig) -> dict:
    """Return the RoPE parameters of the target's full-attention layers as one flat dict; default RoPE where none are.

    The sliding layers' parameters where only sliding layers have a rotary embedding. Raises `ValueError` for dynamic
    NTK, whose cached keys change meaning as the text grows.
    """
    parameters = getattr(text_config, "rope_parameters", None) or {}
    if "full_attention" in parameters:
        parameters = parameters["full_attention"] or next(filter(None, parameters.values()), {})
    parameters = copy.deepcopy(dict(parameters)) or {"rope_type": "default", "rope_theta": 10_000.0}
    rope_type = parameters.get("rope_type", "default")
    if "dynamic" in rope_type:
        raise ValueError(
            f"LongSpec cannot serve a target whose RoPE depends on the length, got rope_type {rope_type!r}"
        )
    return parameters


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
