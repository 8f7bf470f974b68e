"""`python -m hf_longspec.training.layer_study RECIPE` finds the layer whose keys and values a draft should read.

Layers differ more than anything else that a recipe sets, and neighbours may be far apart (docs/LOG.md, 2026-11-26).
One small draft for each layer learns from the same forward passes of the target, so that all layers cost little more
than one. The recipe sets the rest: target, data, signal, batch, optimizer. Good settings for the drafts are

    --set draft.config.intermediate_size=1024 --set draft.vocab=16384
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments, get_scheduler, set_seed

from hf_longspec.modeling.configuration_longspec import layer_kinds
from hf_longspec.modeling.fast_compiled_longspec import compiled_layers
from hf_longspec.modeling.modeling_longspec import LongSpecForCausalLM, not_finite

from ..evaluation.room import positions_of
from .batch import Batch, batch_of
from .distillation import Distillation
from .documents import target_masks
from .forward import draft_hidden
from .loss import DistillationSums, LossWeights, distillation_loss
from .models import load_target, load_tokenizer, make_draft
from .optimizer import make_muon
from .recipe import Recipe
from .run import datasets, training_arguments
from .samples import Collator
from .teacher import TargetStates, read_layers
from .vocabulary import frequent_tokens


@dataclass(frozen=True)
class Score:
    """KL of a layer's draft, over all lags on held-out text, and how often draft and target first guess the same."""

    layer: int
    kl: float
    agreement: float


class Study:
    """Drafts of one recipe that differ in `target_layer`, one draft for each of `layers`."""

    def __init__(self, target: PreTrainedModel, recipe: Recipe, layers: Sequence[int], vocabulary: Tensor | None):
        self.target, self.recipe, self.layers = target, recipe, list(layers)
        self.drafts: list[LongSpecForCausalLM] = []
        for layer in layers:
            set_seed(0)
            own = replace(recipe.draft, config=recipe.draft.config | {"target_layer": layer}, vocab=None)
            draft = make_draft(own, target, target.device)
            draft.set_draft_vocab(vocabulary)
            self.drafts.append(draft.train())
        self.bounds = [draft.bind(target) for draft in self.drafts]
        # one loss for all drafts: they borrow the same rows of the same LM head
        self.terms = Distillation(target, self.drafts[0], recipe.signal, compiled=recipe.compiled).terms

    def read(self, batch: Batch) -> list[TargetStates]:
        masks = None if batch.document_ids is None else target_masks(self.target, batch.document_ids)
        with compiled_layers(self.target) if self.recipe.compiled else nullcontext():
            return read_layers(self.target, self.layers, batch.input_ids, batch.positions, masks)

    def sums(self, index: int, states: TargetStates, batch: Batch) -> DistillationSums:
        """Compute the loss of draft number `index`."""
        signal, device = self.recipe.signal, batch.input_ids.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.target.dtype == torch.bfloat16):
            hidden = draft_hidden(self.drafts[index], self.bounds[index], batch, states)
        weights = LossWeights(signal.kl_weight, signal.ce_weight)
        hidden = hidden.to(states.hidden.dtype)
        return distillation_loss(self.terms, hidden, states.hidden, batch.labels, weights, signal.loss_chunk)

    def train(self, samples: Any, args: TrainingArguments) -> None:
        optimizers = [make_muon(draft, args, sharded=False) for draft in self.drafts]
        warm_up = args.get_warmup_steps(args.max_steps)
        schedules: list[Any] = [
            get_scheduler(args.lr_scheduler_type, each, warm_up, args.max_steps) for each in optimizers
        ]
        collate, size = Collator(self.recipe.signal.max_lag, args.seed), args.train_batch_size
        for step in range(args.max_steps):
            batch = Batch(**collate([samples[step * size + index] for index in range(size)])).to(self.target.device)
            for index, states in enumerate(self.read(batch)):
                self.sums(index, states, batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(self.drafts[index].parameters(), args.max_grad_norm)
                optimizers[index].step()
                optimizers[index].zero_grad()
                schedules[index].step()
        for layer, draft in zip(self.layers, self.drafts, strict=True):
            if name := not_finite(draft.state_dict()):
                raise ValueError(
                    f"the draft of layer {layer} diverged: expected finite weights, got others in {name}; "
                    "lower trainer.learning_rate"
                )

    @torch.no_grad()
    def scores(self, held_out: Any, count: int) -> list[Score]:
        """Score each layer by up to `count` held-out samples, at their real positions."""
        lags = range(1, self.recipe.signal.max_lag + 1)
        sums = torch.zeros(len(self.drafts), 3, dtype=torch.float64)  # kl, agreements, tokens
        for number in range(min(count, len(held_out))):
            batch = batch_of([held_out[number]]).to(self.target.device)
            for index, states in enumerate(self.read(batch)):
                for lag in lags:
                    found = self.sums(index, states, batch.with_lag(lag))
                    tokens = (batch.labels >= 0).sum()
                    sums[index] += torch.stack([found.kl.sum(), found.agreements.sum(), tokens]).double().cpu()
        return [Score(layer, *(row[:2] / row[2]).tolist()) for layer, row in zip(self.layers, sums, strict=True)]


def study(recipe: Recipe, layers: Sequence[int] | None, count: int) -> list[Score]:
    """Train and score one draft for each layer; layers: None: all that a draft can read.

    Raises `ValueError` for a recipe that a study cannot follow, and for layers that no draft can read.
    """
    if not recipe.muon:
        raise ValueError("recipe.trainer.optim: a layer study trains with muon; expected it, got another")
    if recipe.draft.init is not None or recipe.draft.lora is not None:
        raise ValueError("recipe.draft: a layer study trains new drafts; expected neither `init` nor `lora`")
    recipe = replace(recipe, evaluation=replace(recipe.evaluation, contexts=(recipe.signal.length,)))
    args = training_arguments(recipe)
    target = load_target(recipe.target, args.device)
    kinds = layer_kinds(target.config.get_text_config(decoder=True))
    readable = [index for index, kind in enumerate(kinds) if kind == "full"]
    layers = readable if layers is None else layers
    if other := sorted(set(layers) - set(readable)):
        raise ValueError(f"layers: expected some of {readable}, which have full attention, got {other}")
    positions = positions_of(target.config.get_text_config(decoder=True)) or recipe.signal.length
    samples, held_out = datasets(recipe, args, load_tokenizer(recipe.target), positions)
    if held_out is None or not len(held_out):
        raise ValueError("recipe.data.held_out: a layer study needs held-out text, got none")
    vocabulary = None
    if recipe.draft.vocab is not None:
        size = target.config.get_text_config(decoder=True).vocab_size
        vocabulary = frequent_tokens(samples, size)[: recipe.draft.vocab]
    made = Study(target, recipe, layers, vocabulary)
    made.train(samples, args)
    return made.scores(held_out, count)


def parse_layers(text: str) -> list[int]:
    """Parse layers: `"10,12"` is [10, 12]."""
    try:
        return [int(layer) for layer in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected layers such as 10,12,14, got {text!r}") from None


def main(
    recipe: Annotated[Path, typer.Argument(help="YAML file, as those in hub_configs.")],
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
    layers: Annotated[
        Any, typer.Option(parser=parse_layers, metavar="N,N,...", help="All layers of full attention without.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Held-out samples.")] = 64,
) -> None:
    """Trains a small draft for each layer side by side, and ranks the layers by held-out KL."""
    try:
        scores = study(Recipe.load(recipe, settings or []), layers, samples)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    for score in sorted(scores, key=lambda score: score.kl):
        typer.echo(f"layer {score.layer:3}: KL {score.kl:.3f}, agreement {score.agreement:.3f}")


if __name__ == "__main__":
    typer.run(main)
