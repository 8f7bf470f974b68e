"""Recipe: one stage of training, as a YAML file. Everything in it is checked before anything is loaded.

    target: {name: Qwen/Qwen2.5-Coder-1.5B-Instruct, dtype: bfloat16}
    draft: {config: {tree_shape: [4, 16, 16, 16, 16]}}
    data: {sources: [{path: my_code, format: text}], held_out: {share: 0.01}}
    signal: {length: 1024, max_lag: 5}
    evaluation: {contexts: [1024, 4096], prompts: 8}
    trainer: {output_dir: run, max_steps: 5000, per_device_train_batch_size: 64, learning_rate: 0.003}

Knows names and numbers, and loads no models, data or tokenizers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from .data import DataSection
from .data.fields import convert, from_mapping, suggestion

# `Trainer` would apply these to the draft alone; here they apply to target, draft and loss (see `Distillation`).
OURS = {"torch_compile": bool, "gradient_checkpointing": bool}
# Fields of TrainingArguments that begin so may change between the parts of one run: its losses stay the same.
FREE = (
    "data",
    "disable",
    "eval",
    "greater",
    "hub",
    "load",
    "log",
    "metric",
    "output",
    "push",
    "report",
    "run",
    "save",
)


def _at_least(section: Any, least: float, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not value >= least:
            raise ValueError(f"`{name}` must be at least {least}, got {value!r}")


@dataclass(frozen=True)
class Target:
    """The model to draft for.

    name: folder or Hub id.
    adapter: folder or Hub id of a PEFT adapter for the model.
    quantization: how bitsandbytes or torchao pack the weights while loading; None also for a target that is stored
        quantized.
    attn_implementation: as in `from_pretrained`.
    piece: tokens of a sample that the target reads at a time, behind a cache: very long samples take less memory.
    """

    name: str
    revision: str | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    quantization: Literal["bitsandbytes-4bit", "bitsandbytes-8bit", "torchao-int4", "torchao-int8"] | None = None
    adapter: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    piece: int | None = None

    def __post_init__(self) -> None:
        _at_least(self, 1, "piece")


@dataclass(frozen=True)
class Draft:
    """The draft to train.

    init: folder or Hub id of a draft to continue with, such as a draft of an earlier stage; None: random weights.
    config: fields of `LongSpecConfig`, beside the fields that follow from the target.
    vocab: number of tokens, the most frequent ones of the data, that the draft learns to guess and guesses among: the
        LM head is most of what a step costs. None: all tokens, or the tokens of `init`.
    lora: fields of peft's `LoraConfig`: train an adapter on the draft of `init`, and save only the adapter.
    """

    init: str | None = None
    config: dict = field(default_factory=dict)
    vocab: int | None = None
    lora: dict | None = None

    def __post_init__(self) -> None:
        _at_least(self, 1, "vocab")
        if self.lora is not None and self.vocab is not None:
            raise ValueError("an adapter holds no `vocab`: expected it to be left to the draft of `init`")
        if self.vocab is not None and "draft_vocab_size" in self.config:
            raise ValueError(
                "`vocab` counts the data for `config.draft_vocab_size`: expected one of the two, got both"
            )
        if self.lora is not None and self.init is None:
            raise ValueError("`lora` adapts a trained draft: expected `init`, got none")


@dataclass(frozen=True)
class Signal:
    """What the draft learns from.

    length: tokens of a sample.
    offset, sink, max_position: Anchor-Offset positions below `max_position` (None: all that the target has), where 0
        to `sink` first tokens of a document keep their positions. Set `offset` to false for samples of real long
        context.
    max_lag: the queries of a sample see the target's keys up to 1..max_lag tokens before their own; a tree of n levels
        is drafted at lags 1..n. 1: no lag but the one that cannot be avoided.
    kl_weight, ce_weight: weights of KL(target ‖ draft) and of the cross-entropy to the text.
    loss_chunk: tokens whose logits exist at a time.
    """

    length: int = 1024
    offset: bool = True
    sink: int = 4
    max_position: int | None = None
    max_lag: int = 5
    kl_weight: float = 1.0
    ce_weight: float = 0.1
    loss_chunk: int = 8192

    def __post_init__(self) -> None:
        _at_least(self, 2, "length")
        _at_least(self, 1, "max_lag", "loss_chunk")
        _at_least(self, 0, "sink", "kl_weight", "ce_weight")
        if self.kl_weight + self.ce_weight == 0:
            raise ValueError("`kl_weight` and `ce_weight` are both 0: nothing to learn")
        if self.max_lag >= self.length:
            raise ValueError(f"`length` must be more than `max_lag`={self.max_lag}, got {self.length}")
        if self.max_position is not None and self.max_position < self.length:
            raise ValueError(f"`max_position` must be at least `length`={self.length}, got {self.max_position}")


@dataclass(frozen=True)
class Evaluation:
    """Measurements on the held-out split whenever `trainer` evaluates (`eval_strategy`, `eval_steps`).

    contexts, prompts, max_new_tokens: greedy decoding behind `prompts` held-out prompts of each length in `contexts`.
    loss_samples: held-out samples for the loss, as long as the longest context, at their real positions; 0: none.
    patience: evaluations without a better accept length after which the run stops; None: never.
    """

    contexts: tuple[int, ...] = (1024,)
    prompts: int = 4
    max_new_tokens: int = 64
    loss_samples: int = 4
    patience: int | None = None

    def __post_init__(self) -> None:
        _at_least(self, 1, "prompts", "max_new_tokens", "patience")
        _at_least(self, 0, "loss_samples")
        if not self.contexts or min(self.contexts) < 1:
            raise ValueError(f"`contexts` must be lengths of at least 1 token, got {list(self.contexts)}")

    @property
    def length(self) -> int:
        return max(self.contexts)


@dataclass(frozen=True)
class Recipe:
    """One stage of training.

    trainer: fields of transformers' `TrainingArguments`, and the two of `OURS`. `max_steps` and `output_dir` must be
        among them; `optim` may be `muon` too.
    """

    target: Target
    data: DataSection
    trainer: dict
    draft: Draft = Draft()
    signal: Signal = Signal()
    evaluation: Evaluation = Evaluation()

    @property
    def compiled(self) -> bool:
        return self.trainer.get("torch_compile", False)

    @property
    def muon(self) -> bool:
        """Tell whether `trainer.optim` is `muon`, which `TrainingArguments` does not know; see `MuonAdamW`."""
        return self.trainer.get("optim") == "muon"

    @property
    def recompute(self) -> bool:
        return self.trainer.get("gradient_checkpointing", False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Make a recipe from a mapping. Raises `ValueError` with one line that names the key at fault."""
        given = from_mapping(cls, values, "recipe")
        bare = {key: "no" for key, value in given.trainer.items() if key.endswith("_strategy") and value is False}
        recipe = dataclasses.replace(given, trainer=given.trainer | bare)  # YAML reads a bare `no` as False
        check_trainer(recipe.trainer)
        if recipe.evaluates and recipe.data.held_out == type(recipe.data.held_out)():
            raise ValueError("recipe.data.held_out: expected a `share` or `names` to evaluate on, got neither")
        return recipe

    @classmethod
    def load(cls, path: Path, settings: Sequence[str] = ()) -> Recipe:
        """Read the recipe of a YAML file; `settings` such as `signal.offset=false` override its values."""
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the recipe {path}: {error}") from None
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
        for setting in settings:
            override(values, setting)
        return cls.from_dict(values)

    @property
    def evaluates(self) -> bool:
        return self.trainer.get("eval_strategy", "no") != "no"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def changes(self, other: Recipe) -> list[str]:
        """Return the keys that differ in a way that would give runs of the two recipes different losses."""
        ours, theirs = (flat(recipe.to_dict()) for recipe in (self, other))
        changed = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
        return [key for key in changed if not key.startswith(("evaluation.", *(f"trainer.{name}" for name in FREE)))]


def check_trainer(values: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a key that `TrainingArguments` lacks, a value of another type, or a missing key."""
    from transformers import TrainingArguments

    known = {item.name: item for item in dataclasses.fields(TrainingArguments) if item.init} | OURS
    hints = get_type_hints(TrainingArguments) | OURS
    for key, value in values.items():
        where = f"recipe.trainer.{key}"
        if key not in known:
            raise ValueError(f"recipe.trainer: unknown key {key!r}{suggestion(key, known)}")
        if hints[key] in (bool, int, float, str):
            convert(value, hints[key], where)
    check_optimizer(values)
    if values.get("max_steps", 0) < 1:
        raise ValueError("recipe.trainer.max_steps: expected the steps of the run, got none")
    if "output_dir" not in values:
        raise ValueError("recipe.trainer.output_dir: expected the folder of the run, got none")


def check_optimizer(values: Mapping[str, Any]) -> None:
    """Raise `ValueError` for an unknown `optim`, and for keys that `muon` would pass over."""
    from transformers.training_args import OptimizerNames

    name = values.get("optim", "muon")
    known = {item.value: item for item in OptimizerNames} | {"muon": None}
    if name not in known:
        raise ValueError(f"recipe.trainer.optim: unknown optimizer {str(name)!r}{suggestion(str(name), known)}")
    for key in ("optim_args", "optim_target_modules"):
        if values.get("optim") == "muon" and values.get(key) is not None:
            raise ValueError(f"recipe.trainer.{key}: `optim: muon` takes none, got {values[key]!r}")


def override(values: Any, setting: str) -> None:
    """Set a value, read as YAML, in a recipe's mapping: `signal.offset=false` or `data.sources.0.path=code`."""
    path, equals, value = setting.partition("=")
    *parents, last = path.split(".")
    if not equals or not path:
        raise ValueError(f"expected a setting such as signal.offset=false, got {setting!r}")
    place = values
    for name in parents:
        if isinstance(place, list):
            place = _item(place, name, setting)
        elif isinstance(place, dict):
            place = place.setdefault(name, {})
    if isinstance(place, list):
        place[place.index(_item(place, last, setting))] = yaml.safe_load(value)
    elif isinstance(place, dict):
        place[last] = yaml.safe_load(value)
    else:
        raise ValueError(f"{setting!r}: there is nothing below {'.'.join(parents)!r} in the recipe")


def _item(items: list[Any], name: str, setting: str) -> Any:
    if not name.isdigit() or int(name) >= len(items):
        raise ValueError(f"{setting!r}: expected a number below {len(items)}, got {name!r}")
    return items[int(name)]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings: `{"a": {"b": 1}}` becomes `{"a.b": 1}`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
