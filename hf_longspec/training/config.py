"""What a training run is: its stages and its numbers, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

AUTOCAST = (None, "bfloat16")


@dataclass(frozen=True)
class Stage:
    """A part of a run with samples of one length.

    With ``max_position`` set, samples get Anchor-Offset positions below it; without, their real positions 0..length-1.
    """

    steps: int
    length: int = 1024
    batch_size: int = 64
    max_position: int | None = None

    def __post_init__(self) -> None:
        _require_positive(self, "steps", "batch_size")
        if self.length < 2:
            raise ValueError(f"`length` must be at least 2 tokens, got {self.length!r}")
        if self.max_position is not None and self.max_position < self.length:
            raise ValueError(f"`max_position` must be at least `length`={self.length}, got {self.max_position!r}")


@dataclass(frozen=True)
class TrainingConfig:
    """One run: its stages in order under one learning-rate schedule (linear warm-up, then cosine to zero)."""

    stages: tuple[Stage, ...]
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: float = 0.1  # share of all steps
    max_grad_norm: float = 1.0
    ce_weight: float = 0.1  # of the cross-entropy to the real text, beside the KL to the target
    max_lag: int = 5  # one lag of 1..max_lag a batch; a tree of n levels is drafted at lags 1..n
    max_sink: int = 4  # Anchor-Offset: most tokens that keep their first positions
    loss_chunk: int = 8192  # tokens whose logits exist at a time
    autocast: str | None = "bfloat16"
    compile: bool = False
    seed: int = 0
    log_steps: int = 10
    checkpoint_seconds: float = 120.0
    max_seconds: float | None = None  # wall clock of one call of `train`; it then stops with a checkpoint

    def __post_init__(self) -> None:
        _require_positive(self, "learning_rate", "max_grad_norm", "max_lag", "loss_chunk", "log_steps")
        if not self.stages:
            raise ValueError("`stages` must hold at least one stage, got none")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"`warmup` must be a share of the steps in [0, 1), got {self.warmup!r}")
        if min(self.weight_decay, self.ce_weight, self.max_sink) < 0:
            raise ValueError("`weight_decay`, `ce_weight` and `max_sink` must not be negative")
        if self.autocast not in AUTOCAST:
            raise ValueError(f"`autocast` must be one of {AUTOCAST}, got {self.autocast!r}")
        for stage in self.stages:
            if self.max_lag >= stage.length or self.max_sink > stage.length:
                raise ValueError(
                    f"samples of {stage.length} tokens are too short for `max_lag`={self.max_lag} and "
                    f"`max_sink`={self.max_sink}"
                )

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[int, int]:
        """Index of the stage that ``step`` (from 0) belongs to, and the step's number within that stage."""
        if not 0 <= step < self.steps:
            raise ValueError(f"`step` must be in 0..{self.steps - 1}, got {step}")
        index = 0
        while step >= self.stages[index].steps:
            step -= self.stages[index].steps
            index += 1
        return index, step

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> TrainingConfig:
        """Raises `ValueError` for a field that does not exist or does not fit."""
        stages = tuple(Stage(**_known(Stage, stage)) for stage in fields.get("stages", ()))
        fields = _known(cls, fields) | {"stages": stages}
        if "betas" in fields:
            fields["betas"] = tuple(fields["betas"])
        return cls(**fields)

    @classmethod
    def load(cls, path: str | Path) -> TrainingConfig:
        """Reads the JSON that ``to_dict`` gives."""
        return cls.from_dict(json.loads(Path(path).read_text()))


def _known(cls: type, fields: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(cls)}
    if unknown := set(fields) - names:
        raise ValueError(f"{cls.__name__} has no field {sorted(unknown)}; its fields are {sorted(names)}")
    return dict(fields)


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"`{name}` must be positive, got {getattr(config, name)!r}")
