"""LongSpecForCausalLM: the draft. One decoder layer between the target's embedding and the target's LM head.

    x = x + self_attn(norm(x))      over the last `window` tokens
    x = x + hidden_proj(norm(h))    h: the target's last hidden state behind the newest token it has read (optional)
    x = x + cross_attn(norm(x))     over the target's cached keys and values of one layer
    x = x + mlp(norm(x))

How the two attentions find their keys is up to the caller: training runs the attentions over whole samples, drafting
over the window and the tree. Parameter names are those of the published checkpoints (github.com/sail-sg/LongSpec).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .checks_longspec import check_generation
from .choice_longspec import Times
from .configuration_longspec import LongSpecConfig
from .engine_longspec import Backend, Demand, Engine, Engines
from .generation_longspec import assisted_decoding
from .interface_longspec import install_door, without_kernels
from .target_longspec import BoundTarget, HeadRows, Rows, bind, vocabulary

SelfAttend = Callable[[Tensor, Tensor, Tensor], Tensor]
CrossAttend = Callable[[Tensor], Tensor]

_USAGE = (
    "a LongSpec draft has no embedding, LM head or context of its own and cannot run alone; "
    "pass it to its target: target.generate(**inputs, assistant_model=draft)"
)


def refuse(*args: Any, **kwargs: Any) -> None:
    """Raise `ValueError`: a draft cannot run alone."""
    raise ValueError(_USAGE)


class LongSpecRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


class LongSpecMLP(nn.Module):
    def __init__(self, config: LongSpecConfig):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(hidden, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, hidden, bias=config.mlp_bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class LongSpecSelfAttention(nn.Module):
    def __init__(self, config: LongSpecConfig):
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=True)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=True)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=True)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)


class LongSpecCrossAttention(nn.Module):
    def __init__(self, config: LongSpecConfig):
        super().__init__()
        self.head_dim = config.head_dim
        queries = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=True)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)


class LongSpecForCausalLM(PreTrainedModel):
    """A LongSpec draft; see the module docstring for its layer and `LongSpecConfig` for its options.

    It is used only through its target: `target.generate(**inputs, assistant_model=draft)`.
    """

    config_class = LongSpecConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _no_split_modules = ["LongSpecForCausalLM"]

    def __init__(self, config: LongSpecConfig):
        without_kernels(config)
        super().__init__(config)
        # not of the class: transformers would mix its own `generate` in, by a twin class whose objects pickle refuses
        self.generate = refuse
        self.generation_config = GenerationConfig.from_model_config(config)  # other programs read it
        self.hidden_layernorm: nn.Module | None = None
        self.hidden_proj: nn.Linear | None = None
        if config.num_hidden_layers:
            self._add_layer(config)
        else:  # tells device and format, as weights do
            self.no_layer = nn.Parameter(torch.empty(0))
        ids = None if config.draft_vocab_size is None else torch.arange(config.draft_vocab_size)
        self.register_buffer("draft_vocab", ids)
        self._head_rows = HeadRows()
        # not a buffer: it must stay float32 when the draft is cast, and exist when it is built on the meta device
        self._frequencies = {torch.device("cpu"): rope_frequencies(config)}
        self._engines = Engines()
        self.post_init()

    def _add_layer(self, config: LongSpecConfig) -> None:
        self.self_attn = LongSpecSelfAttention(config)
        self.cross_attn = LongSpecCrossAttention(config)
        self.mlp = LongSpecMLP(config)
        self.input_layernorm = LongSpecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_self_attention_layernorm = LongSpecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_cross_attention_layernorm = LongSpecRMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.target_hidden_state:
            self.hidden_layernorm = LongSpecRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.hidden_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.norm = LongSpecRMSNorm(config.hidden_size, config.rms_norm_eps) if config.final_norm else nn.Identity()

    @classmethod
    def without_layer(cls, target: PreTrainedModel, **fields: Any) -> LongSpecForCausalLM:
        """Make a draft with no weights for `target`: it guesses what the text itself has had before.

        fields: of its config. Raises `ValueError` as `LongSpecConfig.from_target` does.
        """
        return cls(LongSpecConfig.from_target(target.config, **({"num_hidden_layers": 0} | fields)))

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.draft_vocab is not None:  # of a checkpoint that has none
            init.copy_(self.draft_vocab, torch.arange(len(self.draft_vocab), device=self.draft_vocab.device))

    def get_input_embeddings(self) -> None:
        """None, as `get_output_embeddings` is: both are the target's. FSDP and PEFT ask."""

    def get_output_embeddings(self) -> None:
        """None: see `get_input_embeddings`."""

    def set_draft_vocab(self, ids: Tensor | Sequence[int] | None) -> None:
        """Let the draft guess only tokens `ids` (N,), and read only their rows of the target's LM head.

        The text does not change: what the target writes beyond these tokens is just never guessed. The draft keeps a
        copy of the rows, N × hidden, beside each target. Ids are saved with the draft; `None`: guess among all tokens.
        Raises `ValueError` for ids that are not in the vocabulary or come twice.
        """
        if ids is None:
            self.draft_vocab, self.config.draft_vocab_size = None, None
            return
        self.draft_vocab = vocabulary(ids, self.config.vocab_size).to(self.device)
        self.config.draft_vocab_size = len(self.draft_vocab)

    def head_rows(self, bound: BoundTarget) -> Rows | None:
        """Return the rows of the target's LM head that the draft guesses with; None for the whole LM head.

        Raises `ValueError` where rows of the target's LM head cannot be taken alone.
        """
        size = None if self.draft_vocab is None else len(self.draft_vocab)
        if size != self.config.draft_vocab_size:
            raise ValueError(
                f"`draft_vocab_size` is {size}, as draft.set_draft_vocab has it, got {self.config.draft_vocab_size}"
            )
        return None if self.draft_vocab is None else self._head_rows.of(bound.head, self.draft_vocab, bound.device)

    def layer(
        self,
        embeds: Tensor,
        angles: tuple[Tensor, Tensor],
        self_attend: SelfAttend,
        cross_attend: CrossAttend,
        read: Tensor | None = None,
    ) -> Tensor:
        """Run the draft's forward pass, up to the input of the target's LM head.

        Args:
            embeds: (B, T, hidden), the target's embedding of the tokens.
            angles: of the T positions (`angles`), or of the one position where all T stand.
            self_attend: (query (B, H, T, D), key (B, K, T, D), value (B, K, T, D)) -> (B, H, T, D); all rotated.
            cross_attend: query (B, H, T, D), which is not rotated (see `BoundTarget.rotate`) -> (B, H, T, D) over the
                target's keys and values.
            read: what `read_hidden_state` made of the target's last hidden state, (B, T, hidden) or (B, 1, hidden).
        Returns: (B, T, hidden).
        """
        x, query, key, value = self.before_attention(embeds, *angles)
        x, query = self.between_attentions(x, self_attend(query, key, value), read)
        return self.behind_attention(x, cross_attend(query))

    def before_attention(self, embeds: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the layer's input, and query, key and value of the self-attention; see `layer`."""
        config = self.config
        x = embeds.to(self.self_attn.q_proj.weight.dtype)
        normed = self.input_layernorm(x)
        both = torch.cat(
            [self.self_attn.q_proj(normed), self.self_attn.k_proj(normed)], dim=-1
        )  # to be turned at once
        both = rotate_half_pairs(_heads(both, config.head_dim), cos, sin)
        query, key = both.split([config.num_attention_heads, config.num_key_value_heads], dim=1)
        return x, query, key, _heads(self.self_attn.v_proj(normed), config.head_dim)

    def between_attentions(self, x: Tensor, attended: Tensor, read: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the sum so far and the query of the cross-attention, from what the self-attention returned."""
        x = x + self.self_attn.o_proj(_merge_heads(attended))
        x = x if read is None else x + read
        return x, _heads(self.cross_attn.q_proj(self.post_self_attention_layernorm(x)), self.config.head_dim)

    def behind_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        """Return what the layer returns, from what the cross-attention returned."""
        x = x + self.cross_attn.o_proj(_merge_heads(attended))
        x = x + self.mlp(self.post_cross_attention_layernorm(x))
        return self.norm(x)

    def read_hidden_state(self, hidden: Tensor | None) -> Tensor | None:
        """Return what the layer adds for the target's last hidden state (B, T, hidden); None for drafts without it.

        hidden: zeros for tokens that no target has read; zeros add nothing.
        """
        if not self.config.target_hidden_state or hidden is None:
            return None
        assert self.hidden_proj is not None and self.hidden_layernorm is not None, "`bind` checks"
        return self.hidden_proj(self.hidden_layernorm(hidden.to(self.hidden_proj.weight.dtype)))

    def window_kv(self, embeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, K, T, D) of the self-attention: functions of token and position only.

        embeds: (B, T, hidden), the target's embedding of the tokens; positions: (B, T).
        """
        normed = self.input_layernorm(embeds.to(self.self_attn.k_proj.weight.dtype))
        key = _heads(self.self_attn.k_proj(normed), self.config.head_dim)
        value = _heads(self.self_attn.v_proj(normed), self.config.head_dim)
        return rotate_half_pairs(key, *self.angles(positions)), value

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine (B, 1, T, rotary dims) of the target's main RoPE at `positions` (B, T), in float32.

        The sine has the sign of each dimension's own turn, see `rope_frequencies`.
        """
        device = positions.device
        frequencies, scaling = self._frequencies[torch.device("cpu")]
        if device not in self._frequencies:
            self._frequencies[device] = (frequencies.to(device), scaling)
        frequencies, scaling = self._frequencies[device]
        angles = positions[:, None, :, None].float() * frequencies
        return angles.cos() * scaling, angles.sin() * scaling

    def bind(self, target: PreTrainedModel) -> BoundTarget:
        """Return the parts that this draft borrows from `target`. Raises `ValueError` that lists each mismatch."""
        if self.config.target_hidden_state and self.hidden_proj is None:
            raise ValueError(
                "`target_hidden_state` is False, as the draft was made and has no weights for it, got True"
            )
        return bind(self.config, target)

    @property
    def state_bytes(self) -> int:
        """Bytes of the decoding state of one sequence at the present dtype, whatever the context.

        That is the window, the tree and, for drafts that read it, the target's last hidden state.
        """
        config = self.config
        slots = config.window + 1 + 1 + sum(config.tree_on(self.device)[:-1])
        numbers = 2 * config.num_key_value_heads * slots * config.head_dim
        return (numbers + config.target_hidden_state * config.hidden_size) * self.dtype.itemsize

    @contextmanager
    def placed(self, device: torch.device, dtype: torch.dtype) -> Iterator[LongSpecForCausalLM]:
        """Yield the draft on `device` in `dtype` for a call: this one, cast for good, or a copy for this call alone.

        A copy where another thread's call, or one around this call, uses the draft otherwise.
        """
        with self._engines.lock, torch.inference_mode(False):  # or a caller's would leave it unfit for training
            free = not self._engines.calls or (self.device, self.dtype) == (device, dtype)
            draft = (self if free else copy.deepcopy(self)).to(device=device, dtype=dtype)
            draft._engines.calls += 1
        try:
            yield draft
        finally:
            with draft._engines.lock:
                draft._engines.calls -= 1

    def take_engine(self, device: torch.device) -> Engine:
        """Return an engine of the kind that the config asks for, for one call on `device`."""
        return self._engines.take(engine_class(self.config), device)

    def keep_engine(self, engine: Engine | None) -> None:
        """Keep an engine for the next call, with the memory and graphs of the last call."""
        self._engines.keep(engine)

    def check_engine(self, target: PreTrainedModel, device: torch.device, synced_gpus: bool) -> None:
        """Raise `ValueError` for options of the config that cannot be had with `target` on `device`."""
        engine_class(self.config).check(self.config, target, device, synced_gpus)

    def find_backend(self, demand: Demand) -> Backend:
        """Return the attention backend that the config asks for. Raises `ValueError` where it cannot run."""
        return engine_class(self.config).backend(self.config.attention_backend, demand)

    def times_of(self, target: PreTrainedModel, batch: int, length: int, greedy: bool) -> Times:
        """Return what rounds have cost in earlier calls over `target` with about `length` tokens."""
        return self._engines.times_of(target, (batch, length.bit_length(), greedy))

    def release(self) -> None:
        """Free the memory that the last call has left for the next call: one cache of the target, and graphs."""
        self.keep_engine(None)

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, *rest: Any, **more: Any
    ) -> Any:
        """Save as transformers does, with the code.

        Raises `ValueError` for weights that are not finite, and for a folder that holds another model; then nothing is
        written.
        """
        if (other := other_model(save_directory)) is not None:
            raise ValueError(f"a draft is saved in a folder of its own, got {save_directory}, which holds {other}")
        if name := not_finite(self.state_dict() if state_dict is None else state_dict):
            raise ValueError(f"a draft is saved with finite weights only, got NaN or infinity in {name}")
        code = f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
        self.config.auto_map = (getattr(self.config, "auto_map", None) or {}) | {"AutoModel": code}
        return super().save_pretrained(save_directory, is_main_process, state_dict, *rest, **more)

    # `target.generate(assistant_model=draft)` arrives here: see generation_longspec.py
    assisted_decoding = assisted_decoding
    check_generation = check_generation
    forward = refuse


def other_model(folder: str | os.PathLike) -> str | None:
    """Tell what model that is no draft a folder holds; None if there is none."""
    if os.path.isfile(os.path.join(folder, "adapter_config.json")):
        return "a PEFT adapter"
    if not os.path.isfile(os.path.join(folder, "config.json")):
        return None
    kind = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    return None if kind == LongSpecConfig.model_type else f"a model of type {kind!r}"


def not_finite(weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity, in its own format or as `dtype`; None: none."""
    floats = {name: x for name, x in weights.items() if x.is_floating_point() and not x.is_meta}
    return next((name for name, x in floats.items() if not x.to(dtype or x.dtype).isfinite().all()), None)


def engine_class(config: LongSpecConfig) -> type[Engine]:
    """Return the plain engine for a config that asks for no more, else the fast engine; imported only then."""
    if config.attention_backend in ("eager", "torch") and config.cuda_graphs is False and not config.compile_target:
        return Engine
    from .fast_engine_longspec import FastEngine

    return FastEngine


def rope_frequencies(config: LongSpecConfig) -> tuple[Tensor, float]:
    """Return frequencies (rotary dims,) and attention scaling of `config.rope_parameters`, in float32 on the CPU.

    The first half turns backwards, since in a rotated pair (a, b) b enters a with the negative sine.
    Length-dependent scalings are those of short texts: a window never spans more than `window` tokens.
    """
    parameters = config.rope_parameters or {}
    rope_type = parameters.get("rope_type", "default")
    if rope_type != "default":
        with torch.device("cpu"):  # transformers builds models on the meta device, where these would have no numbers
            frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
    else:
        dims = int(config.head_dim * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, dims, 2, dtype=torch.float32, device="cpu") / dims
        frequencies = 1.0 / parameters.get("rope_theta", 10_000.0) ** exponents  # as transformers rounds it
        scaling = 1.0
    return torch.cat([-frequencies, frequencies]), scaling


def rotate_half_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to x (B, H, T, D) in pairs (i, i + dims/2); dimensions beyond the rotary ones pass through.

    sin: negative in the first half, as `LongSpecForCausalLM.angles` has it.
    """
    dims = cos.shape[-1]
    rotary = x[..., :dims]
    turned = torch.addcmul(rotary * cos, rotary.roll(dims // 2, dims=-1), sin).to(x.dtype)
    return turned if dims == x.shape[-1] else torch.cat([turned, x[..., dims:]], dim=-1)


def _heads(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # (B, T, H·D) -> (B, H, T, D)


def _merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, H·D)


LongSpecConfig.register_for_auto_class()
LongSpecForCausalLM.register_for_auto_class("AutoModelForCausalLM")
install_door()
