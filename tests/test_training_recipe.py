"""Recipes: mistakes in one line, settings over them, what makes two runs differ; and all that are shipped."""

from pathlib import Path

import pytest
import torch
import yaml
from recipes import tiny_recipe

from hf_longspec import LongSpecConfig
from hf_longspec.training.models import check_lengths
from hf_longspec.training.recipe import Recipe, override
from hf_longspec.training.run import training_arguments, write_recipe

HUB_CONFIGS = Path(__file__).parent.parent / "hub_configs"
LEAST = {
    "target": {"name": "x"},
    "data": {"sources": [{"path": "x", "format": "text"}]},
    "trainer": {"max_steps": 3, "output_dir": "run"},
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"signl": {}}, "recipe: unknown key 'signl', did you mean 'signal'"),
        ({"signal": {"lenght": 5}}, "recipe.signal: unknown key 'lenght', did you mean 'length'"),
        ({"signal": {"length": "long"}}, "recipe.signal.length: expected int, got 'long'"),
        ({"signal": {"length": 3}}, "recipe.signal: `length` must be more than `max_lag`=5, got 3"),
        ({"signal": {"kl_weight": 0, "ce_weight": 0}}, "recipe.signal: `kl_weight` and `ce_weight` are both 0"),
        ({"signal": {"max_position": 1000}}, "`max_position` must be at least `length`=1024, got 1000"),
        ({"signal": {"sink": -1}}, "`sink` must be at least 0, got -1"),
        ({"target": {}}, "recipe.target: the key 'name' is missing"),
        (
            {"target": {"name": "x", "quantization": "int5"}},
            "recipe.target.quantization: expected one of",
        ),
        ({"draft": {"lora": {"r": 4}}}, "recipe.draft: `lora` adapts a trained draft: expected `init`, got none"),
        ({"draft": {"vocab": 0}}, "recipe.draft: `vocab` must be at least 1, got 0"),
        ({"draft": {"init": "y", "lora": {}, "vocab": 9}}, "recipe.draft: an adapter holds no `vocab`"),
        ({"draft": {"vocab": 9, "config": {"draft_vocab_size": 9}}}, "recipe.draft: `vocab` counts the data"),
        ({"evaluation": {"contexts": []}}, "recipe.evaluation: `contexts` must be lengths of at least 1 token"),
        ({"trainer": {"max_step": 3}}, "recipe.trainer: unknown key 'max_step', did you mean 'max_steps'"),
        ({"trainer": {"output_dir": "run"}}, "recipe.trainer.max_steps: expected the steps of the run, got none"),
        ({"trainer": {"max_steps": 3}}, "recipe.trainer.output_dir: expected the folder of the run, got none"),
        (
            {"trainer": {"max_steps": 3, "output_dir": "run", "learning_rate": "1e-3"}},
            "recipe.trainer.learning_rate: expected float, got '1e-3'",
        ),
        (
            {"trainer": {"max_steps": 3, "output_dir": "run", "optim": "moun"}},
            "recipe.trainer.optim: unknown optimizer 'moun', did you mean 'muon'?",
        ),
        (
            {"trainer": {"max_steps": 3, "output_dir": "run", "optim": 3}},
            "recipe.trainer.optim: unknown optimizer '3'",
        ),
        (
            {"trainer": {"max_steps": 3, "output_dir": "run", "optim": "muon", "optim_args": "beta=1"}},
            "recipe.trainer.optim_args: `optim: muon` takes none, got 'beta=1'",
        ),
        (
            {"trainer": {"max_steps": 3, "output_dir": "run", "eval_strategy": "steps"}},
            "recipe.data.held_out: expected a `share` or `names` to evaluate on, got neither",
        ),
    ],
)
def test_mistakes_are_one_line(change, message):
    with pytest.raises(ValueError) as error:
        Recipe.from_dict(LEAST | change)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(ValueError, match="cannot read the recipe .*missing.yaml"):
        Recipe.load(tmp_path / "missing.yaml")
    (tmp_path / "broken.yaml").write_text("target: [")
    with pytest.raises(ValueError, match="broken.yaml is no YAML: .*line 1"):
        Recipe.load(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match=r"recipe: expected keys and values, got \[1\]"):
        Recipe.load(tmp_path / "list.yaml")


def test_settings_over_a_recipe(tmp_path):
    path = tiny_recipe(tmp_path)
    settings = ["signal.offset=false", "data.sources.0.path=code", "draft.config.tree_shape=[1, 1]", "evaluation={}"]
    recipe = Recipe.load(path, settings)
    assert recipe.signal.offset is False and recipe.data.sources[0].path == "code"
    assert recipe.draft.config == {"window": 16, "tree_shape": [1, 1]} and recipe.evaluation.contexts == (1024,)
    for setting, message in {
        "signal.offset": "expected a setting such as signal.offset=false, got 'signal.offset'",
        "data.sources.1.path=x": "expected a number below 1, got '1'",
        "signal.length.of=3": "there is nothing below 'signal.length'",
    }.items():
        with pytest.raises(ValueError, match=message):
            Recipe.load(path, [setting])


def test_override_makes_sections_that_are_not_there():
    values = {"a": [1, 2]}
    override(values, "b.c=3")
    override(values, "a.1=x")
    assert values == {"a": [1, "x"], "b": {"c": 3}}


def test_what_makes_another_run():
    recipe = Recipe.from_dict(LEAST)
    assert recipe.changes(Recipe.from_dict(LEAST | {"signal": {"offset": False}})) == ["signal.offset"]
    free = {"save_steps": 7, "logging_steps": 1, "report_to": "none", "eval_strategy": "no"}
    assert recipe.changes(Recipe.from_dict(LEAST | {"trainer": LEAST["trainer"] | free})) == []
    other = LEAST["trainer"] | {"learning_rate": 0.1}
    assert recipe.changes(Recipe.from_dict(LEAST | {"trainer": other})) == ["trainer.learning_rate"]


def test_a_recipe_survives_its_own_file(tmp_path):
    recipe = Recipe.load(tiny_recipe(tmp_path))
    write_recipe(recipe, tmp_path)
    assert Recipe.from_dict(yaml.safe_load((tmp_path / "recipe.yaml").read_text())).changes(recipe) == []


RECIPES = sorted(HUB_CONFIGS.glob("*/recipe*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_recipes_fit_their_drafts(path):
    recipe = Recipe.load(path)
    config = LongSpecConfig.from_pretrained(path.parent)
    assert all(
        getattr(LongSpecConfig(**recipe.draft.config), key) == getattr(config, key) for key in recipe.draft.config
    )
    check_lengths(recipe, config)
    levels = len(config.tree_on(torch.device("cuda")))
    assert recipe.signal.max_lag >= levels - 1, "levels of the tree that training never showed"
    assert recipe.evaluates
    training_arguments(Recipe.load(path, ["trainer.use_cpu=true", "trainer.bf16=false"]))
    assert path.read_text().startswith("# ")
    if path.stem != "recipe":
        assert recipe.draft.init and not recipe.signal.offset and recipe.signal.length > 4096


def test_each_stage_begins_with_the_draft_of_the_one_before():
    assert RECIPES
    for path in RECIPES:
        recipe = Recipe.load(path)
        if recipe.draft.init is not None:
            earlier = [Recipe.load(other).trainer["output_dir"] for other in RECIPES if other.parent == path.parent]
            assert recipe.draft.init.removesuffix("/draft") in earlier
