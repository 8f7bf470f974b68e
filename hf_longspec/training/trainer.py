"""DraftTrainer: transformers' `Trainer` for a draft whose frozen target is read in the same step.

DraftTrainer changes four things: the draft's forward pass is a `Distillation`; samples come in their order;
checkpoints are whole or no checkpoints; evaluation decodes with `generate`. Everything else is as `TrainingArguments`
say.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerControl, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import rotate_checkpoints

from hf_longspec.modeling.modeling_longspec import LongSpecForCausalLM, not_finite

from ..writing import first_line
from .checkpoints import CheckpointError, last_complete, mark_complete, mark_unfinished
from .distillation import Distillation
from .held_out import measure_acceptance, measure_loss, prompts_of
from .models import with_lora
from .optimizer import make_muon
from .recipe import Recipe
from .samples import Collator

# What a record of training steps or of a whole run has that is not finite in a run that diverged.
STEADY = ("loss", "grad_norm", "train_loss")
# A loss in float16 is scaled, and each step that overflows is passed over and halves the scale. The scale begins at
# 65,536, so below this one at least 30 more steps were passed over than brought anything.
LEAST_SCALE = 1e-4


class DraftTrainer(Trainer):
    """Train `draft`, or a new adapter on it where the recipe says so.

    Raises `ValueError` if the draft does not fit the target, or if `held_out` is too small for the evaluation; while
    it trains, in every process, if the loss, the gradients or the weights are not finite.
    """

    control: TrainerControl
    optimizer: Any

    def __init__(
        self,
        target: PreTrainedModel,
        draft: LongSpecForCausalLM,
        recipe: Recipe,
        args: TrainingArguments,
        train_dataset: Any,
        held_out: Any = None,
    ):
        self.target, self.recipe = target, recipe
        self.prompts = prompts_of(held_out, recipe.evaluation) if recipe.evaluates else []
        distillation = Distillation(
            target,
            draft,
            recipe.signal,
            piece=recipe.target.piece,
            compiled=recipe.compiled,
            recompute=recipe.recompute,
        )
        # Wrappers (DDP, FSDP, ZeRO, autocast, PEFT) act on a model's forward. A method would be rebound by autocast.
        draft.forward = lambda **batch: distillation(**batch)  # type: ignore[method-assign, assignment]
        model = draft if recipe.draft.lora is None else with_lora(draft, recipe.draft.lora)
        self.keep_checkpoints, args.save_total_limit = args.save_total_limit, None
        collator = Collator(recipe.signal.max_lag, args.seed)
        super().__init__(model, args, collator, train_dataset, held_out if recipe.evaluates else None)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the learned tokens of all accumulated batches
        self._loss_shifts_labels = False  # our labels stand under the tokens that guess them: all labels count
        self.recent = RecentBatches(recipe.signal.max_lag, args.device)
        if self.is_fsdp_enabled and self.accelerator.is_fsdp2:
            keep_outputs(self.accelerator.state.fsdp_plugin)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.optimizer is None and self.recipe.muon:
            # accelerate knows: `accelerate launch --use_fsdp` tells `TrainingArguments` nothing
            sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
            self.optimizer = make_muon(self.model, self.args, sharded)
        return super().create_optimizer(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset or self.train_dataset)  # the data are shuffled: see `samples`

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.recent.add(inputs, outputs)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.check_steady(logs)
        if "grad_norm" in logs:  # the log of training steps
            sums = self.accelerator.reduce(self.recent.sums, "sum")
            logs |= self.recent.summary(sums, self.accelerator.num_processes)
            self.recent = RecentBatches(self.recipe.signal.max_lag, self.args.device)
        super().log(logs, start_time)

    def check_steady(self, logs: dict[str, float]) -> None:
        """Raise `ValueError` for a record of a run that diverged. The record is the same in all processes."""
        if self.accelerator.mixed_precision != "fp16":
            if wrong := [f"{name} {logs[name]}" for name in STEADY if not math.isfinite(logs.get(name, 0.0))]:
                raise self._diverged(f"expected finite numbers, got {', '.join(wrong)}")
        elif (scaler := self.accelerator.scaler) is not None and scaler.get_scale() < LEAST_SCALE:
            raise self._diverged(f"expected steps without overflow, got a loss scale of {scaler.get_scale():.0e}")

    def weights(self) -> dict[str, Tensor] | None:
        """Return the draft's whole weights in the first process, None in the others; all processes must call.

        Raises `ValueError`, in every process, for weights that are not finite, or too large for float16: a step on
        the way to infinity. The weights of drafts that work are below ten or so.
        """
        state = self.accelerator.get_state_dict(self.model_wrapped)
        first = self.is_world_process_zero()
        wrong = not_finite(state, torch.float16) if first else None
        if name := broadcast_object_list([wrong])[0]:
            raise self._diverged(f"expected weights that float16 can hold, got others in {name}")
        return state if first else None

    def _diverged(self, reason: str) -> ValueError:
        last = last_complete(Path(str(self.args.output_dir))) or "none"
        return ValueError(
            f"training diverged by step {self.state.global_step}: {reason}; last checkpoint: {last}. "
            "Start another run with a smaller trainer.learning_rate"
        )

    def snapshot(self) -> Any:
        """Return a copy of the draft as it would be used: in eval mode and in the target's format.

        All processes must call this method; only the first gets the draft, the others get None.
        """
        state = self.weights()
        if state is None:
            return None
        return self._assembled(state).to(self.target.device, self.target.dtype).eval()

    def _assembled(self, state: dict[str, Tensor]) -> Any:
        """Make a draft of the weights in `state`, with the adapter if one is trained."""
        with torch.device("meta"):
            draft: Any = LongSpecForCausalLM(copy.deepcopy(self.accelerator.unwrap_model(self.model).config))
            if self.recipe.draft.lora is not None:
                draft = with_lora(draft, self.recipe.draft.lora)
        draft.load_state_dict(state, assign=True)
        return draft

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure on the held-out split in the first process; the random generators are left as they were."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            draft = self.snapshot()
            measured = [None if draft is None else self._measure(draft)]
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in broadcast_object_list(measured)[0].items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measure(self, draft: Any) -> dict[str, float]:
        started, evaluation = time.monotonic(), self.recipe.evaluation
        metrics = measure_acceptance(self.target, draft, self.prompts, evaluation)
        if evaluation.loss_samples:
            count = min(evaluation.loss_samples, len(self.eval_dataset))
            samples = [self.eval_dataset[index] for index in range(count)]
            distillation = Distillation(self.target, draft, self.recipe.signal, piece=self.recipe.target.piece)
            metrics |= measure_loss(distillation, samples, self.recipe.signal)
        return metrics | {"seconds": time.monotonic() - started}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save as `Trainer` does, but not FSDP2's class for sharded modules, whose code would become the draft's."""
        if not self.is_fsdp_enabled:
            return super()._save(output_dir, state_dict)
        if not self.args.should_save:  # such a process does not have the weights either
            return None
        folder = Path(output_dir or str(self.args.output_dir))
        self._assembled(state_dict).save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save as `Trainer` does, but count a folder as a checkpoint only when it is whole, and delete none before."""
        self.weights()  # raises before an older checkpoint is given up for one of no use
        run = Path(str(self.args.output_dir))
        folder = run / f"checkpoint-{self.state.global_step}"
        writes = self.args.should_save
        try:
            if writes:
                mark_unfinished(folder)
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if writes:
                mark_complete(folder)
        except (
            OSError,
            SafetensorError,
            RuntimeError,
        ) as error:  # a full disk, as torch and safetensors report it
            reason = first_line(error)
            raise CheckpointError(
                f"checkpoint {folder} could not be written ({reason}); "
                f"the last whole one: {last_complete(run) or 'none'}"
            ) from error
        if writes:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run), self.keep_checkpoints, best_model_checkpoint=best, use_mtime=True)


def keep_outputs(plugin: Any) -> None:
    """Keep FSDP2 from rounding the loss, and the sums beside it, to the format that the draft computes in."""
    policy = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)


class RecentBatches:
    """Sums since the last log record, left on the device until the next record so that no step waits for them."""

    def __init__(self, max_lag: int, device: torch.device):
        self.started, self.read = time.monotonic(), 0
        # by lag: kl, cross-entropy, agreements, learned tokens
        self.sums = torch.zeros(max_lag + 1, 4, dtype=torch.float64, device=device)

    def add(self, inputs: dict[str, Any], outputs: dict[str, Tensor]) -> None:
        self.read += inputs["input_ids"].numel()
        learned = (inputs["labels"] >= 0).sum(1)
        terms = [outputs[name].detach() for name in ("kl", "cross_entropy", "agreements")]
        self.sums.index_add_(0, inputs["lags"], torch.stack([*terms, learned], dim=1).double())

    def summary(self, sums: Tensor, processes: int) -> dict[str, float]:
        """Return means over learned tokens, from the sums of all processes."""
        kl, ce, agreement = (sums[:, :3].sum(0) / sums[:, 3].sum()).tolist()
        by_lag = {
            f"agreement_lag_{lag}": (found[2] / found[3]).item() for lag, found in enumerate(sums) if found[3] > 0
        }
        speed = self.read * processes / (time.monotonic() - self.started)
        return {"kl": kl, "cross_entropy": ce, "agreement": agreement, **by_lag, "tokens_per_second": speed}
