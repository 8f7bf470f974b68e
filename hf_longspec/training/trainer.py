"""Training of one draft against one frozen target, on one device.

The loop: take the batch of this step, read the target, run the draft, take the chunked loss, step. A run may be cut at
any step and continued to the same losses, because batches depend on the step alone and the checkpoint holds the rest.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_longspec.modeling.modeling_longspec import LongSpecForCausalLM

from .batches import Batch, Batches
from .checkpoint import Checkpoint
from .config import TrainingConfig
from .forward import draft_hidden
from .loss import DistillationLoss, chunk_sums, distillation_loss
from .teacher import read_target


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate in ``step`` (from 0) of ``steps``: linear warm-up, then cosine to zero."""
    warm = round(warmup * steps)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class Trainer:
    """Trains ``draft`` (in float32, on the target's device) on windows of ``tokens``; logs to ``folder``.

    Raises `ValueError` if the draft does not fit the target, or if ``folder`` holds another run's checkpoint.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft: LongSpecForCausalLM,
        tokens: np.ndarray,
        config: TrainingConfig,
        folder: str | Path,
    ):
        self.bound = draft.bind(target)
        self.target = target.eval().requires_grad_(False)
        self.draft = draft.to(self.bound.device, torch.float32)
        self.config, self.folder = config, Path(folder)
        self.batches = Batches(tokens, config)
        self.optimizer = torch.optim.AdamW(
            decayed_and_other(self.draft, config.weight_decay),
            lr=config.learning_rate,
            betas=config.betas,
            fused=self.bound.device.type == "cuda",
        )
        self.step = 0
        compiled = compiler(config) if config.compile else lambda function: function
        self._read_target, self._draft_hidden = compiled(read_target), compiled(draft_hidden)
        self._chunk_sums = compiled(chunk_sums(self.bound.logits))
        self._resume()

    def train(self) -> bool:
        """Runs to the last step or to ``max_seconds``; True when the run is complete."""
        config, started = self.config, time.monotonic()
        last_checkpoint, recent = started, RecentSteps()
        with tqdm(total=config.steps, initial=self.step, unit="step", dynamic_ncols=True, mininterval=5) as progress:
            while self.step < config.steps:
                batch = self.batches[self.step]
                loss, norm = self.train_step(batch)
                recent.add(batch, loss, norm)
                self.step += 1
                progress.update()
                now = time.monotonic()
                if self.step % config.log_steps == 0 or self.step == config.steps:
                    record = recent.summary() | {"learning_rate": self.learning_rate(self.step - 1)}
                    self._log({"step": self.step} | record)
                    progress.set_postfix_str(f"loss {record['loss']:.3f}, {record['tokens_per_second']:,.0f} tok/s")
                    recent = RecentSteps()
                if now - last_checkpoint > config.checkpoint_seconds:
                    self.save_checkpoint()
                    last_checkpoint = now
                if config.max_seconds is not None and now - started > config.max_seconds:
                    break
        self.save_checkpoint()
        return self.step == config.steps

    def train_step(self, batch: Batch) -> tuple[DistillationLoss, Tensor]:
        """One optimizer step; returns the loss before it and the gradient's norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        loss = self.loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.draft.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        return loss, norm

    def loss(self, batch: Batch) -> DistillationLoss:
        ids, labels, positions = (x.to(self.bound.device, non_blocking=True) for x in batch[:3])
        with self._autocast():
            states = self._read_target(self.target, self.bound.layer, ids, positions)
            hidden = self._draft_hidden(self.draft, self.bound, ids, positions, states, batch.lag)
            return distillation_loss(
                self._chunk_sums, hidden, states.hidden, labels, self.config.ce_weight, self.config.loss_chunk
            )

    def learning_rate(self, step: int) -> float:
        return self.config.learning_rate * learning_rate_factor(step, self.config.steps, self.config.warmup)

    def save_checkpoint(self) -> None:
        states = self.draft.state_dict(), self.optimizer.state_dict()
        Checkpoint(self.step, self.config.to_dict(), *states).save(self.folder)

    def _resume(self) -> None:
        checkpoint = Checkpoint.load(self.folder)
        if checkpoint is None:
            return
        # These may change between the parts of a run; anything else would change its losses.
        free = {"max_seconds", "checkpoint_seconds", "log_steps", "compile"}
        ours = self.config.to_dict()
        changed = [name for name in ours if name not in free and ours[name] != checkpoint.config.get(name)]
        if changed:
            raise ValueError(
                f"{self.folder} holds the checkpoint of another run: {', '.join(changed)} differ; "
                "choose another folder or the same settings"
            )
        self.step = checkpoint.step
        self.draft.load_state_dict(checkpoint.draft)
        self.optimizer.load_state_dict(checkpoint.optimizer)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.autocast is None:
            return nullcontext()
        return torch.autocast(self.bound.device.type, getattr(torch, self.config.autocast))

    def _log(self, record: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")


class RecentSteps:
    """Measurements since the last log line, left on the device until then so that no step waits for them."""

    def __init__(self) -> None:
        self.started, self.tokens = time.monotonic(), 0
        self.lags: list[int] = []
        self.values: list[Tensor] = []

    def add(self, batch: Batch, loss: DistillationLoss, norm: Tensor) -> None:
        self.tokens += batch.ids.numel()
        self.lags.append(batch.lag)
        self.values.append(torch.stack([*(value.detach() for value in loss), norm]))

    def summary(self) -> dict[str, Any]:
        rows = torch.stack(self.values).tolist()  # waits for the device
        seconds = time.monotonic() - self.started
        names = ("loss", "kl", "cross_entropy", "agreement", "grad_norm")
        means = {name: sum(column) / len(rows) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
        by_lag: dict[str, list[float]] = {}
        for lag, row in sorted(zip(self.lags, rows, strict=True)):
            by_lag.setdefault(str(lag), []).append(row[names.index("agreement")])
        agreement = {lag: sum(values) / len(values) for lag, values in by_lag.items()}
        return means | {"agreement_by_lag": agreement, "tokens_per_second": self.tokens / seconds, "seconds": seconds}


def compiler(config: TrainingConfig) -> Callable[..., Any]:
    """`torch.compile` with one graph a sample length and lag: fixed shapes give the fastest kernels."""
    graphs = config.max_lag * len({(stage.batch_size, stage.length) for stage in config.stages})
    # beyond this limit (8) torch goes on uncompiled; imported here because it is slow
    from torch._dynamo import config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, graphs + 1)
    return torch.compile(dynamic=False)


def decayed_and_other(draft: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weight decay for matrices, none for biases and norms."""
    parameters = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    others = [parameter for parameter in parameters if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
