"""Whole runs on a tiny target: the loss falls, a cut run goes on to the same losses, mistakes are one line."""

import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from full_disk import full_disk
from helpers import tiny_target
from recipes import losses, tiny_recipe
from safetensors.torch import load_file, save_file
from tiny_folders import ALPHABET
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerControl, TrainerState
from typer.testing import CliRunner

from hf_longspec import LongSpecForCausalLM, cli
from hf_longspec.training.checkpoints import CheckpointError, last_complete
from hf_longspec.training.learning_curve import draw, read_log
from hf_longspec.training.recipe import Recipe
from hf_longspec.training.run import Outcome, WallClock, train
from hf_longspec.training.trainer import DraftTrainer

# peft asks transformers under a name that is going out of use
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
EVALUATED = {"trainer__eval_strategy": "steps", "trainer__eval_steps": 3}


def run(folder, name="run", max_seconds=None, **settings):
    """The outcome of a run in `folder/name` and its training losses by step."""
    path = tiny_recipe(folder, **({"trainer__output_dir": str(folder / name)} | settings))
    outcome = train(Recipe.load(path), max_seconds)
    return outcome, losses(folder / name)


class Run(NamedTuple):
    """outcome: of `train`; losses: by step."""

    folder: Path
    outcome: Outcome
    losses: dict[int, float]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The recipe as it stands, trained once; tests read it only."""
    folder = tmp_path_factory.mktemp("plain")
    return Run(folder / "run", *run(folder))


def weights(folder):
    return load_file(last_complete(folder) / "model.safetensors")


def test_a_run_cut_after_every_step_repeats_the_uninterrupted_one_to_the_bit(tmp_path):
    """With accumulated gradients; the cut one also evaluates in between, which draws nothing of the training's."""
    settings = {"trainer__gradient_accumulation_steps": 2, "trainer__max_steps": 4}
    whole, expected = run(tmp_path, "whole", **settings)
    assert whole.complete and whole.step == 4 and list(expected) == [1, 2, 3, 4]
    for step in range(1, 5):
        outcome, found = run(tmp_path, "parts", 0.0, **settings, **EVALUATED)
        assert outcome.step == step and outcome.complete == (step == 4) and (outcome.draft is not None) == (step == 4)
    assert found == expected
    ours, theirs = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_cut_run_with_muon_repeats_the_uninterrupted_one_to_the_bit(tmp_path, plain):
    settings = {"trainer__optim": "muon", "trainer__lr_scheduler_type": "cosine", "trainer__weight_decay": 0.1}
    _, expected = run(tmp_path, "whole", **settings)
    run(tmp_path, "parts", 0.0, **settings)
    run(tmp_path, "parts", 0.0, **settings)
    assert run(tmp_path, "parts", **settings)[1] == expected
    ours, theirs = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert plain.losses != expected


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_matrices_that_accelerate_shards_are_refused(tmp_path, monkeypatch):
    """`accelerate launch --use_fsdp` says so to accelerate alone; on a CPU it is said here."""
    monkeypatch.setattr(AcceleratorState, "fsdp_plugin", FullyShardedDataParallelPlugin(), raising=False)
    with pytest.raises(ValueError, match="muon needs whole matrices, which DeepSpeed and FSDP shard"):
        run(tmp_path, trainer__optim="muon")


def test_a_checkpoint_without_an_optimizer_is_not_gone_on_from(tmp_path):
    run(tmp_path, max_seconds=0.0, trainer__save_only_model=True)
    with pytest.raises(ValueError, match=r"checkpoint-1 has no optimizer to go on with \(trainer.save_only_model\)"):
        run(tmp_path)


@pytest.mark.parametrize("late", [True, False])
def test_the_clock_of_the_first_process_is_that_of_all(monkeypatch, late):
    """Whatever a process's own clock says; two real ones stop together in test_cli_train.py."""
    monkeypatch.setattr("hf_longspec.training.run.broadcast_object_list", lambda own: [late])
    clock, control = WallClock(1000 if late else 0), TrainerControl()
    clock.on_step_end(None, TrainerState(global_step=1, max_steps=6), control)
    assert clock.expired == control.should_save == control.should_training_stop == late


def test_half_written_checkpoints_are_passed_over(tmp_path, plain):
    run(tmp_path, "cut", 0.0)
    run(tmp_path, "cut", 0.0)
    newest = last_complete(tmp_path / "cut")
    with open(newest / "optimizer.pt", "r+b") as file:
        file.truncate(1000)
    (tmp_path / "cut" / "checkpoint-5").mkdir()
    (tmp_path / "cut" / "checkpoint-5" / "model.safetensors").write_bytes(b"half")
    assert last_complete(tmp_path / "cut").name == "checkpoint-1"
    outcome, found = run(tmp_path, "cut")
    assert outcome.complete and found == plain.losses


def test_a_run_with_another_recipe_is_refused(tmp_path):
    run(tmp_path, max_seconds=0.0)
    with pytest.raises(ValueError, match=r"holds a run with another recipe: signal.max_lag differ"):
        run(tmp_path, signal__max_lag=2)
    outcome, _ = run(tmp_path, trainer__save_steps=3, evaluation__prompts=1)
    assert outcome.complete


def test_a_full_disk_is_one_line_and_costs_no_checkpoint(tmp_path):
    run(tmp_path, max_seconds=0.0)
    lost = r"checkpoint-2 could not be written \(.*\); .* one: .*point-1$"
    with full_disk(20_000), pytest.raises(CheckpointError, match=lost):
        run(tmp_path)
    assert run(tmp_path)[0].complete


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, r"expected finite numbers, got loss nan"),
        ({"trainer__logging_nan_inf_filter": True}, r"expected finite numbers, got .*grad_norm nan"),
        ({"trainer__logging_steps": 100}, r"expected weights that float16 can hold, got others in "),
        (
            {"trainer__logging_steps": 100, "trainer__save_strategy": "no"},
            r"expected finite numbers, got train_loss nan",
        ),
        (
            {"trainer__logging_steps": 100, "trainer__save_strategy": "no", **EVALUATED},
            r"expected weights that float16 can hold, got others in ",
        ),
        ({"trainer__optim": "muon", "trainer__max_grad_norm": 0.0}, r"expected finite numbers, got loss nan"),
    ],
    ids=["log", "filtered log", "checkpoint", "end", "evaluation", "muon"],
)
def test_a_run_that_diverges_ends_with_one_error(tmp_path, settings, reason):
    path = tiny_recipe(tmp_path, trainer__learning_rate=1e30, **settings)
    result = CliRunner().invoke(cli.app, ["train", str(path)])
    assert result.exit_code == 2 and '"complete"' not in result.stdout, result.output
    (told,) = (line for line in result.stderr.splitlines() if line.startswith("hf-longspec: "))
    assert re.search(f"training diverged by step .: {reason}.*; last checkpoint: .*trainer.learning_rate$", told), told
    assert not (tmp_path / "run" / "draft").exists()


@pytest.mark.parametrize("every", [1, 100])
def test_a_run_that_diverges_keeps_its_good_checkpoint(tmp_path, plain, monkeypatch, every):
    """From its fourth step on the loss is NaN, whether steps are logged or not."""
    sound = DraftTrainer.compute_loss

    def broken(self, *arguments, **options):
        loss = sound(self, *arguments, **options)
        return loss * math.nan if self.state.global_step == 3 else loss

    with monkeypatch.context() as patch:
        patch.setattr(DraftTrainer, "compute_loss", broken)
        with pytest.raises(ValueError, match=r"training diverged by step 4: .* last checkpoint: .*checkpoint-2\."):
            run(tmp_path, trainer__save_total_limit=1, trainer__logging_steps=every)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert all(x.isfinite().all() for x in weights(tmp_path / "run").values())
    outcome, _ = run(tmp_path, trainer__save_total_limit=1)
    assert outcome.complete
    ours, theirs = (load_file(f"{each.draft}/model.safetensors") for each in (outcome, plain.outcome))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_weights_that_are_not_finite_are_not_gone_on_from(tmp_path, plain):
    """A checkpoint of an earlier release, and the draft of an earlier stage."""
    run(tmp_path, max_seconds=0.0)
    checkpoint = last_complete(tmp_path / "run") / "model.safetensors"
    broken = load_file(checkpoint)
    broken["mlp.up_proj.weight"][0, 0] = math.nan
    save_file(broken, checkpoint, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"checkpoint-1/model.safetensors: expected finite .* mlp.up_proj.weight"):
        run(tmp_path)
    with pytest.raises(ValueError, match=r"draft .*checkpoint-1: expected finite weights .* in mlp.up_proj.weight"):
        run(tmp_path, "next", draft__init=str(checkpoint.parent))


def test_steps_that_a_loss_scaler_passes_over_are_no_error():
    """Until their scale says that all overflow. accelerate scales losses on GPUs only: here the scaler is on a CPU."""
    weight = torch.zeros(1, requires_grad=True)
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), torch.amp.GradScaler("cpu")
    accelerator = SimpleNamespace(mixed_precision="fp16", scaler=scaler)
    trainer = SimpleNamespace(accelerator=accelerator, _diverged=ValueError)

    def step(gradient):
        scaler.scale((weight * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    for gradient in (1.0, math.inf, math.nan, 1.0):
        step(gradient)
        DraftTrainer.check_steady(trainer, {"loss": math.nan, "grad_norm": math.inf})
    assert weight.item() == -2
    for _ in range(28):
        step(math.inf)
    with pytest.raises(ValueError, match="expected steps without overflow, got a loss scale of 6e-05"):
        DraftTrainer.check_steady(trainer, {"loss": 1.0})
    accelerator.mixed_precision = "no"
    with pytest.raises(ValueError, match="expected finite numbers, got grad_norm inf"):
        DraftTrainer.check_steady(trainer, {"loss": 1.0, "grad_norm": math.inf})
    DraftTrainer.check_steady(trainer, {"eval_loss": math.nan})


@pytest.mark.slow
def test_the_command_says_that_the_disk_is_full(tmp_path):
    """Of a run that is done already: nothing of it is lost."""
    path, files = tiny_recipe(tmp_path), ("recipe.yaml", "learning_curve.png", "draft")
    assert CliRunner().invoke(cli.app, ["train", str(path)]).exit_code == 0
    written = [tmp_path / "run" / name for name in (*files[:2], "draft/model.safetensors")]
    before = [path.read_bytes() for path in written]
    for size, name in zip((0, 20_000, 60_000), files, strict=True):
        with full_disk(size):
            result = CliRunner().invoke(cli.app, ["train", str(path)])
        last = result.stderr.splitlines()[-1]
        assert result.exit_code == 1 and f"run/{name} cannot be written: " in last and "File too large" in last
        assert [path.read_bytes() for path in written] == before
    assert CliRunner().invoke(cli.app, ["train", str(path)]).exit_code == 0


def test_a_draft_written_again_leaves_what_is_not_its_own(tmp_path):
    outcome, _ = run(tmp_path, "run", trainer__max_steps=1)
    draft = Path(outcome.draft)
    own = {path.name: path.read_bytes() for path in draft.iterdir()}
    (draft / "model.safetensors").write_text("damaged")
    for name in ("card.json", "quantized/model.safetensors"):
        (draft / name).parent.mkdir(exist_ok=True)
        (draft / name).write_text("mine")
    (draft / "link").symlink_to("card.json")
    run(tmp_path, "run", trainer__max_steps=1)
    assert sorted(os.listdir(draft)) == sorted([*own, "card.json", "quantized", "link"])
    assert (draft / "link").read_text() == (draft / "quantized" / "model.safetensors").read_text() == "mine"
    assert {name: (draft / name).read_bytes() for name in own} == own


def test_the_target_is_left_alone_and_nowhere_written(plain):
    assert all(math.isfinite(loss) for loss in plain.losses.values())
    checkpoint = last_complete(plain.folder)
    draft = LongSpecForCausalLM.from_pretrained(plain.outcome.draft)
    assert set(weights(plain.folder)) == set(draft.state_dict())
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert len(optimizer["state"]) == len(list(draft.parameters()))
    sizes = [path.stat().st_size for path in checkpoint.glob("*.safetensors")]
    assert sum(sizes) < 1.1 * sum(x.numel() * 4 for x in draft.parameters()) + 10_000


def test_accumulated_batches_are_one_large_one(tmp_path, plain):
    parts = {"trainer__per_device_train_batch_size": 1, "trainer__gradient_accumulation_steps": 4}
    _, accumulated = run(tmp_path, "parts", **parts)
    assert accumulated == pytest.approx(plain.losses, rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"trainer__gradient_checkpointing": True}, {"target__piece": 17}, {"trainer__dataloader_num_workers": 1}],
    ids=lambda settings: next(iter(settings)),
)
def test_what_saves_memory_or_time_changes_no_loss(tmp_path, plain, settings):
    _, found = run(tmp_path, **settings)
    assert found == pytest.approx(plain.losses, rel=1e-5)


def test_bfloat16_keeps_float32_parameters(tmp_path):
    outcome, found = run(tmp_path, trainer__bf16=True, trainer__max_steps=2, target__dtype="bfloat16")
    assert all(math.isfinite(loss) for loss in found.values())
    assert {x.dtype for x in weights(tmp_path / "run").values()} == {torch.float32}
    assert LongSpecForCausalLM.from_pretrained(outcome.draft).dtype == torch.bfloat16


def test_ablations_are_settings(tmp_path):
    _, plain = run(tmp_path, "plain", trainer__max_steps=1)
    _, without_offset = run(tmp_path, "real positions", trainer__max_steps=1, signal__offset=False)
    assert without_offset != plain
    _, only_text = run(tmp_path, "text", trainer__max_steps=1, signal__kl_weight=0.0, signal__ce_weight=1.0)
    (record,) = (record for record in read_log(last_complete(tmp_path / "text")) if "loss" in record)
    assert record["loss"] == pytest.approx(record["cross_entropy"], rel=1e-5)
    (record,) = (record for record in read_log(last_complete(tmp_path / "plain")) if "loss" in record)
    assert record["loss"] == pytest.approx(record["kl"] + 0.1 * record["cross_entropy"], rel=1e-5)
    assert only_text[1] == pytest.approx(record["cross_entropy"], rel=1e-5)


def test_the_log_says_what_happened(tmp_path):
    run(tmp_path, trainer__logging_steps=3, **EVALUATED)
    log = read_log(last_complete(tmp_path / "run"))
    training = [record for record in log if "loss" in record]
    assert [record["step"] for record in training] == [3, 6]
    for record in training:
        expected = record["kl"] + 0.1 * record["cross_entropy"]
        assert record["loss"] == pytest.approx(expected, rel=0.01)  # a mean over steps, and one over tokens
        assert {"agreement", "grad_norm", "tokens_per_second", "learning_rate"} <= set(record)
    measured = [record for record in log if "eval_accept_length" in record]
    assert [record["step"] for record in measured] == [3, 6]
    lengths = [measured[0][f"eval_accept_length_{context}"] for context in (16, 48)]
    assert measured[0]["eval_accept_length"] == pytest.approx(sum(lengths) / 2)
    assert {"eval_loss", "eval_kl", "eval_agreement_lag_3", "eval_accept_level_3"} <= set(measured[0])
    assert (tmp_path / "run" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    draw({"with": log, "without": log}, tmp_path / "both.svg")
    assert "<svg" in (tmp_path / "both.svg").read_text()


def test_the_best_draft_is_kept_and_a_run_without_gain_stops(tmp_path):
    """At a learning rate of zero no evaluation is better than the first."""
    outcome, _ = run(
        tmp_path,
        trainer__learning_rate=0.0,
        trainer__eval_strategy="steps",
        trainer__eval_steps=1,
        trainer__save_steps=1,
        trainer__save_total_limit=1,
        trainer__load_best_model_at_end=True,
        evaluation__patience=2,
    )
    assert outcome.complete and outcome.step == 3 and outcome.best_checkpoint.endswith("checkpoint-1")
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]


def test_too_little_held_out_text(tmp_path):
    message = r"recipe.evaluation: expected 2000 held-out samples with 48 tokens of text, the split has \d+"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, evaluation__prompts=2000, **EVALUATED)


def test_samples_longer_than_the_target(tmp_path):
    with pytest.raises(ValueError, match="recipe.signal.length: the target has 512 positions, got 600 tokens"):
        run(tmp_path, signal__length=600, signal__max_position=None)


def test_a_bare_no_is_false_in_yaml(tmp_path):
    outcome, _ = run(tmp_path, trainer__eval_strategy=False, trainer__logging_strategy="steps")
    assert outcome.complete and outcome.best_accept_length is None


@pytest.mark.slow
def test_a_draft_that_reads_the_last_hidden_state(tmp_path, plain):
    """Whole, cut, in pieces and recomputed; and an earlier stage's draft may begin to read it."""
    reads = {"draft__config": {"window": 16, "tree_shape": [2, 4, 4], "target_hidden_state": True}}
    outcome, expected = run(tmp_path, "whole", **reads, **EVALUATED)
    draft = LongSpecForCausalLM.from_pretrained(outcome.draft)
    assert draft.config.target_hidden_state and expected[6] < expected[1]
    first = torch.load(last_complete(tmp_path / "whole") / "optimizer.pt", weights_only=True)
    assert len(first["state"]) == len(list(draft.parameters()))
    run(tmp_path, "parts", 0.0, **reads)
    assert run(tmp_path, "parts", **reads)[1] == expected
    for saved in ({"target__piece": 17}, {"trainer__gradient_checkpointing": True}):
        assert run(tmp_path, next(iter(saved)), **reads, **saved)[1] == pytest.approx(expected, rel=1e-5)
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    prompt = torch.randint(2, 200, (1, 30))
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(target.generate(prompt, assistant_model=draft, **options), target.generate(prompt, **options))
    later, _ = run(tmp_path, "later", draft__init=plain.outcome.draft, **reads)
    draft = LongSpecForCausalLM.from_pretrained(later.draft)
    assert draft.hidden_proj.weight.any() and draft.hidden_layernorm.weight.any()


def test_a_draft_goes_on_from_an_earlier_stage(tmp_path, plain):
    second, found = run(tmp_path, "long", draft__init=plain.outcome.draft, signal__offset=False, signal__length=128)
    fresh = run(tmp_path, "fresh", signal__offset=False, signal__length=128)[1]
    assert found[1] < 0.95 * fresh[1]
    with pytest.raises(ValueError, match="hidden_size: draft has 64, target has 32"):
        run(tmp_path, "stranger", draft__init=str(tmp_path / "stranger"))


@pytest.mark.slow
def test_lora_on_a_draft(tmp_path):
    peft = pytest.importorskip("peft")
    base, _ = run(tmp_path, "base", trainer__max_steps=2)
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    settings = {"draft__init": base.draft, "draft__lora": lora, "draft__config": {}}
    _, expected = run(tmp_path, "whole", **settings, **EVALUATED)
    run(tmp_path, "adapter", 0.0, **settings)
    outcome, found = run(tmp_path, "adapter", **settings)
    assert found == expected and found[6] != found[1]
    adapter = load_file(f"{outcome.draft}/adapter_model.safetensors")
    assert adapter and all("lora_" in name for name in adapter)
    draft = LongSpecForCausalLM.from_pretrained(base.draft)
    adapted = peft.PeftModel.from_pretrained(draft, outcome.draft).eval()
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    prompt = torch.randint(2, 200, (1, 30))
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    plain = target.generate(prompt, **options)
    assert torch.equal(target.generate(prompt, assistant_model=adapted, **options), plain)
    merged = adapted.merge_and_unload()
    assert type(merged) is LongSpecForCausalLM
    assert torch.equal(target.generate(prompt, assistant_model=merged, **options), plain)


def test_a_draft_for_a_target_with_lora(tmp_path):
    peft = pytest.importorskip("peft")
    _, expected = run(tmp_path, "plain", trainer__max_steps=2)
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(target, config).save_pretrained(tmp_path / "adapter")
    outcome, found = run(
        tmp_path, "adapted", trainer__max_steps=2, target__adapter=str(tmp_path / "adapter"), **EVALUATED
    )
    assert outcome.complete and found != expected


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["torchao-int8", "bitsandbytes-4bit", "bitsandbytes-8bit"])
def test_a_draft_for_a_quantized_target(name, tmp_path):
    pytest.importorskip(name.partition("-")[0])
    tiny_recipe(tmp_path)
    size = {"vocab_size": len(ALPHABET), "hidden_size": 64, "intermediate_size": 64}  # bitsandbytes wants no less
    tiny_target("llama", **size).save_pretrained(tmp_path / "target")
    outcome, found = run(tmp_path, trainer__max_steps=2, target__quantization=name, **EVALUATED)
    assert outcome.complete and all(math.isfinite(loss) for loss in found.values())


def test_fields_of_peft_and_of_drafts_are_checked(tmp_path):
    tiny_recipe(tmp_path)
    with pytest.raises(ValueError, match="recipe.draft.config: unknown key 'windw', did you mean 'window'"):
        run(tmp_path, draft__config={"windw": 3})
    lora = {"draft__init": str(tmp_path / "draft"), "draft__config": {}, "draft__lora": {"target_module": ["q_proj"]}}
    with pytest.raises(ValueError, match="recipe.draft.lora: unknown key 'target_module', did you mean"):
        run(tmp_path, **lora)


def test_end_to_end(tmp_path):
    """A target that has learned a pattern, and a draft trained on it: its guesses are accepted."""
    letters = "the quick brown fox jumps over a lazy dog; "
    target = tiny_target("llama", vocab_size=256, max_position_embeddings=512)
    path = tiny_recipe(tmp_path)
    for file in (tmp_path / "text").iterdir():
        file.write_text(letters[int(file.stem) % len(letters) :] + letters * 12)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "target")
    text = torch.tensor(tokenizer(letters * 12)["input_ids"])
    learn(target, text)
    target.save_pretrained(tmp_path / "target")
    settings = {"trainer__max_steps": 60, "trainer__eval_on_start": True, "trainer__logging_steps": 10}
    evaluation = {"trainer__eval_strategy": "steps", "trainer__eval_steps": 30, "evaluation__max_new_tokens": 30}
    outcome, found = run(tmp_path, **settings, **evaluation)
    lengths = [
        record["eval_accept_length"]
        for record in read_log(last_complete(tmp_path / "run"))
        if "eval_accept_length" in record
    ]
    assert lengths[0] < 1.4 and lengths[-1] > 1.5, lengths
    assert found[60] < 0.5 * found[10]
    assert path.exists() and json.dumps(outcome._asdict())


def learn(target, text):
    """The pattern of a text (N,), by heart."""
    optimizer = torch.optim.AdamW(target.parameters(), lr=3e-3)
    for step in range(150):
        starts = torch.randint(len(text) - 64, (8,), generator=torch.Generator().manual_seed(step))
        ids = torch.stack([text[start : start + 64] for start in starts])
        target(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
def test_a_draft_of_frequent_tokens(tmp_path):
    """It learns and guesses among those of the text; a cut run and a second stage keep them."""
    outcome, expected = run(tmp_path, "whole", draft__vocab=6, **EVALUATED)
    draft = LongSpecForCausalLM.from_pretrained(outcome.draft)
    text = "".join(path.read_text() for path in (tmp_path / "text").iterdir())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "target")
    assert len(draft.draft_vocab) == 6 == draft.config.draft_vocab_size
    assert set(draft.draft_vocab.tolist()) <= set(tokenizer(text, add_special_tokens=False).input_ids)
    _, found = run(tmp_path, "whole", draft__vocab=6, **EVALUATED)
    assert found == expected
    run(tmp_path, "parts", 0.0, draft__vocab=6)
    assert run(tmp_path, "parts", draft__vocab=6)[1] == expected
    second, _ = run(tmp_path, "second", draft__init=outcome.draft, draft__config={})
    later = LongSpecForCausalLM.from_pretrained(second.draft)
    assert torch.equal(later.draft_vocab, draft.draft_vocab)


def test_a_cut_run_keeps_the_tokens_it_began_with(tmp_path):
    """The text has other letters when it goes on: the draft would be trained among these and guess among the old."""
    first, _ = run(tmp_path, max_seconds=0.0, draft__vocab=6)
    began = LongSpecForCausalLM.from_pretrained(last_complete(tmp_path / "run")).draft_vocab
    for path in (tmp_path / "text").iterdir():
        path.write_text(path.read_text().translate({ord(letter): ord(letter) + 11 for letter in "abcdefgh"}))
    outcome, _ = run(tmp_path, draft__vocab=6)
    log = read_log(last_complete(tmp_path / "run"))
    beyond = [record["cross_entropy"] for record in log if record.get("step", 0) > 1 and "cross_entropy" in record]
    assert beyond == [0.0] * 5, "no token of the new text is among them"
    assert torch.equal(LongSpecForCausalLM.from_pretrained(outcome.draft).draft_vocab, began)


def test_a_vocabulary_that_cannot_be_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match=r"recipe.draft.vocab: `draft_vocab_size` must be None or in 1..256, got 300"):
        run(tmp_path, draft__vocab=300)
    message = "recipe.draft.vocab: `tree_shape` level 1 can have at most 1 parents × 1 tokens = 1 nodes, got 2"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, draft__vocab=1)
    assert not (tmp_path / "run").exists()


def test_a_config_that_does_not_fit_the_draft_to_go_on_with(tmp_path):
    first, _ = run(tmp_path, "first", draft__vocab=6, trainer__max_steps=1)
    message = r"first/draft cannot be loaded: recipe.draft.config: \{'draft_vocab_size': 5\} does not fit the weights$"
    with pytest.raises(OSError, match=message):
        run(tmp_path, "second", draft__init=first.draft, draft__config={"draft_vocab_size": 5})
