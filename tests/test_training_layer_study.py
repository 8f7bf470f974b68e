"""The study of layers: drafts learn side by side as they would alone, and what is ranked is what they learned."""

import pytest
import typer
from recipes import tiny_recipe
from typer.testing import CliRunner

from hf_longspec.training import layer_study
from hf_longspec.training.layer_study import study
from hf_longspec.training.recipe import Recipe

SETTINGS = {
    "trainer__optim": "muon",
    "trainer__max_steps": 12,
    "trainer__learning_rate": 0.02,
    "signal__length": 32,
    "draft__vocab": 20,
}


def recipe(folder, **settings):
    return Recipe.load(tiny_recipe(folder, **(SETTINGS | settings)))


def test_layers_learn_side_by_side_as_they_would_alone(tmp_path):
    together = study(recipe(tmp_path), None, 4)
    assert [score.layer for score in together] == list(range(len(together)))
    for score in (together[0], together[-1]):
        assert study(recipe(tmp_path), [score.layer], 4) == [pytest.approx(score)]


def test_more_steps_give_a_smaller_kl(tmp_path):
    few, many = (study(recipe(tmp_path, trainer__max_steps=steps), [1], 4)[0] for steps in (1, 60))
    assert many.kl < 0.8 * few.kl and many.agreement > few.agreement


def test_a_layer_whose_draft_diverges_is_an_error(tmp_path):
    """A KL of NaN ranks anywhere."""
    with pytest.raises(ValueError, match=r"layer 1 diverged: .* got others in .*; lower trainer.learning_rate"):
        study(recipe(tmp_path, trainer__learning_rate=1e30, trainer__max_steps=3), [1], 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainer__optim": "adamw_torch"}, "trainer.optim: a layer study trains with muon"),
        ({"data__held_out": {}}, "needs held-out text"),
        ({"draft__init": "draft", "draft__vocab": None}, "neither `init` nor `lora`"),
    ],
)
def test_recipes_that_a_study_cannot_follow(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        study(recipe(tmp_path, **settings), [1], 1)


def command(*arguments):
    app = typer.Typer()
    app.command()(layer_study.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_ranks_layers(tmp_path):
    path = tiny_recipe(tmp_path, **SETTINGS)
    result = command(path, "--layers", "0,1", "--samples", 2, "--set", "trainer.max_steps=2")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if line.startswith("layer")]
    assert len(lines) == 2
    losses = [float(line.split("KL ")[1].split(",")[0]) for line in lines]
    assert losses == sorted(losses)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "1,x"], "expected layers such as 10,12,14, got '1,x'"),
        (["--layers", "1,9"], "layers: expected some of [0, 1, 2, 3], which have full attention, got [9]"),
        (["--set", "trainer.optim=adamw_torch"], "a layer study trains with muon"),
        (["--set", "trainer.max_step=3"], "unknown key 'max_step'"),
    ],
)
def test_mistakes_end_without_a_traceback(tmp_path, options, message):
    result = command(tiny_recipe(tmp_path, **SETTINGS), *options)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert message in " ".join(result.stderr.replace("│", " ").split())
