"""One run of training, from a recipe to a draft: `hf-longspec train` without its options.

The folder of the run (`trainer.output_dir`) holds the recipe, the tokens of `draft.vocab`, checkpoints, the learning
curve and, at the end, the draft. A run that is started again with the same recipe continues from its last whole
checkpoint, to the same losses.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments, set_seed

from hf_longspec.modeling.modeling_longspec import not_finite

from ..evaluation.room import positions_of
from ..writing import whole_file, writing
from .checkpoints import last_complete, step_of
from .data import build_datasets
from .learning_curve import LearningCurve
from .models import check_lengths, check_vocab, load_target, load_tokenizer, make_draft, whole_on_every_process
from .recipe import OURS, Recipe
from .samples import AnchorOffset, NumberedSamples, NumberedStream
from .trainer import DraftTrainer
from .vocabulary import frequent_tokens

RECIPE, VOCABULARY = "recipe.yaml", "draft_vocab.json"
# Defaults that differ from the defaults of TrainingArguments.
DEFAULTS = {
    "report_to": "none",
    "logging_nan_inf_filter": False,  # the filter waits for the device at every step
    "metric_for_best_model": "accept_length",
    "greater_is_better": True,
    "ddp_find_unused_parameters": False,
}


class Outcome(NamedTuple):
    """How a run, or a part of it, has ended.

    complete: all steps are done, or no better accept length came for `patience` evaluations.
    draft: the folder of the draft, if the run is complete.
    """

    complete: bool
    step: int
    steps: int
    draft: str | None
    best_accept_length: float | None
    best_checkpoint: str | None


class WallClock(TrainerCallback):
    """End a part of a run with a checkpoint after `seconds` of the first process; None: never."""

    def __init__(self, seconds: float | None):
        self.end = None if seconds is None else time.monotonic() + seconds
        self.expired = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.end is not None and state.global_step < state.max_steps:
            late = [time.monotonic() > self.end]
            if broadcast_object_list(late)[0]:  # a process that stopped alone would leave the others waiting
                self.expired = control.should_save = control.should_training_stop = True
        return control


def train(recipe: Recipe, max_seconds: float | None = None) -> Outcome:
    """Start a run, or continue it.

    Raises `ValueError` or `OSError`, one line each, where the recipe asks for something that cannot be had;
    `MachineError`, of which `CheckpointError` is one, where the disk is full.
    """
    args = training_arguments(recipe)
    checkpoint = resume_point(recipe, args)
    with whole_on_every_process(args):
        target = load_target(recipe.target, args.device)
        tokenizer = load_tokenizer(recipe.target)
        set_seed(args.seed)
        draft = make_draft(recipe.draft, target, args.device)
    check_lengths(recipe, draft.config)
    if recipe.draft.vocab is not None:
        check_vocab(recipe.draft, draft.config)
    with args.main_process_first():
        positions = positions_of(draft.config)
        assert positions is not None  # a draft's config states its positions
        samples, held_out = datasets(recipe, args, tokenizer, positions)
    if recipe.draft.vocab is not None:
        draft.set_draft_vocab(vocabulary(recipe.draft.vocab, samples, draft.config.vocab_size, args, checkpoint))
    trainer = DraftTrainer(target, draft, recipe, args, samples, held_out)
    trainer.add_callback(LearningCurve())
    if recipe.evaluation.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(recipe.evaluation.patience))
    clock = WallClock(max_seconds)
    trainer.add_callback(clock)
    if trainer.is_world_process_zero():
        write_recipe(recipe, Path(str(args.output_dir)))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    folder = None if clock.expired else export(trainer)
    state = trainer.state
    best = state.best_metric, state.best_model_checkpoint
    return Outcome(not clock.expired, state.global_step, state.max_steps, folder, *best)


def training_arguments(recipe: Recipe) -> TrainingArguments:
    given = {key: value for key, value in recipe.trainer.items() if key not in OURS}
    if recipe.muon:
        del given["optim"]  # `DraftTrainer` makes this optimizer
    args = TrainingArguments(**(DEFAULTS | given | {"remove_unused_columns": False}))
    if args.n_gpu > 1:
        raise ValueError(
            f"one process trains on one GPU, got {args.n_gpu}: start `accelerate launch -m hf_longspec.cli train "
            "RECIPE`, or set CUDA_VISIBLE_DEVICES"
        )
    if args.accelerator_config.dispatch_batches:
        raise ValueError(
            "trainer.accelerator_config: expected dispatch_batches: false, as batches of one and of several documents "
            "cannot be joined, got true"
        )
    # None would join the batches of streams: each process reads the stream itself
    args.accelerator_config.dispatch_batches = False
    deepspeed, whole = args.deepspeed_plugin, "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    if deepspeed is not None and deepspeed.hf_ds_config.is_zero3() and not deepspeed.hf_ds_config.is_true(whole):
        raise ValueError(f"trainer.deepspeed: expected {whole}: true, as drafts are measured and saved whole")
    return args


def resume_point(recipe: Recipe, args: TrainingArguments) -> Path | None:
    """Return the run's last whole checkpoint, or None.

    Raises `ValueError` if the checkpoint is of a run with another recipe, lacks what a run needs to continue, or is of
    an earlier release and diverged.
    """
    run = Path(str(args.output_dir))
    checkpoint = last_complete(run)
    if checkpoint is not None:
        earlier = Recipe.from_dict(yaml.safe_load((run / RECIPE).read_text(encoding="utf-8")))
        if changed := recipe.changes(earlier):
            raise ValueError(
                f"{run} holds a run with another recipe: {', '.join(sorted(changed))} differ; "
                "choose another `trainer.output_dir`, or the same recipe"
            )
        for file in sorted(checkpoint.glob("*.safetensors")):
            if name := not_finite(load_file(file)):
                raise ValueError(f"{file}: expected finite weights to go on with, got others in {name}")
        states = [path.stem for path in checkpoint.glob("rng_state*.pth")]
        # `Trainer` would continue with an empty optimizer, and warm up again
        if step_of(checkpoint) < args.max_steps and not states:
            raise ValueError(f"{checkpoint} has no optimizer to go on with (trainer.save_only_model)")
        if states and args.deepspeed_plugin is not None and not fits(states, args):
            raise ValueError(
                f"{checkpoint} is of another number of processes than {args.world_size}, with which ZeRO cannot go on"
            )
    return checkpoint


def fits(states: list[str], args: TrainingArguments) -> bool:
    """Tell whether `states` are the random states of this many processes: rng_state_RANK each, or rng_state of one.

    A node may hold only the states of its own processes.
    """
    ranks = {0 if state == "rng_state" else int(state.removeprefix("rng_state_")) for state in states}
    return args.process_index in ranks and max(ranks) < args.world_size


def write_recipe(recipe: Recipe, run: Path) -> None:
    text = yaml.safe_dump(_lists(recipe.to_dict()), sort_keys=False, allow_unicode=True)
    with whole_file(run / RECIPE) as path:
        path.write_text(text, encoding="utf-8")


def _lists(value: Any) -> Any:
    """Return `value` with lists for tuples, which YAML does not have."""
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def datasets(recipe: Recipe, args: TrainingArguments, tokenizer: Any, positions: int) -> tuple[Any, Any]:
    """Return all samples of the run in order, and the held-out samples, which are as long as the longest context."""
    signal = recipe.signal
    longest = recipe.evaluation.length if recipe.evaluates else None
    train, held_out = build_datasets(recipe.data, tokenizer, signal.length, args.seed, longest)
    count = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    move = AnchorOffset(signal, signal.max_position or positions, args.seed)
    numbered = NumberedStream if isinstance(train, IterableDataset) else NumberedSamples
    return numbered(train, count, move), held_out


def vocabulary(
    size: int, samples: Any, vocab_size: int, args: TrainingArguments, checkpoint: Path | None
) -> list[int]:
    """Return the tokens that the draft guesses among: counted when the run begins, then read from the run's folder.

    Counting takes time, and other text, or more samples for more processes, could give other tokens.
    """
    path = Path(str(args.output_dir)) / VOCABULARY
    if checkpoint is not None:
        return json.loads(path.read_text())
    ids = frequent_tokens(samples, vocab_size)[:size].tolist()
    if args.process_index == 0:
        with whole_file(path) as unfinished:
            unfinished.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps(ids))
    return ids


def export(trainer: DraftTrainer) -> str | None:
    """Write the draft, in the target's format and with its code, or the adapter; return the first process's folder."""
    draft = trainer.snapshot()
    if draft is not None:
        folder = Path(str(trainer.args.output_dir)) / "draft"
        with writing(folder):
            folder.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".", dir=folder) as place:
                draft.save_pretrained(place)
                for file in Path(place).iterdir():  # any other file in the folder of a finished run is the user's
                    file.replace(folder / file.name)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.wait_for_everyone()  # the launcher may end all processes that still run when one fails to end
    return None if draft is None else str(folder)
