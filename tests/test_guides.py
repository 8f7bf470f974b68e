"""The guides in docs/ are true: quoted errors are what the library says, commands and links are there."""

import argparse
import functools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import typer
import yaml
from helpers import tiny_draft, tiny_target
from tiny_folders import ALPHABET, tiny_folders
from transformers import AutoConfig, AutoModelForCausalLM, pipeline
from typer.testing import CliRunner

from hf_longspec import LongSpecConfig, LongSpecForCausalLM, cli
from hf_longspec.hub.card import About
from hf_longspec.modeling.configuration_longspec import TREE, check_release
from hf_longspec.modeling.target_longspec import check_fit
from hf_longspec.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GUIDES = ["USE", "TRAIN", "EVALUATE", "PUBLISH", "RESULTS", "LIMITS", "HOW_IT_WORKS", "TROUBLESHOOTING"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(DOCS / f"{name}.md" for name in GUIDES)]
DRAFT = ROOT / "hub_configs" / "smollm2-135m-instruct"
QWEN = {  # what tells the shape of Qwen2.5-Coder-0.5B from SmolLM2's
    "vocab_size": 151_936,
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}


def guide(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def words(text: str) -> str:
    return " ".join(text.split())


def said(call, *args, **kwargs) -> str:
    """What a call is refused with."""
    try:
        call(*args, **kwargs)
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def decode(target=None, fields=None, **options) -> str:
    """What `generate` refuses options with, or fields of the draft's config."""
    target = target or tiny_target("llama")
    draft = tiny_draft(target)
    for name, value in (fields or {}).items():
        setattr(draft.config, name, value)
    return said(target.generate, torch.arange(2, 8)[None], assistant_model=draft, max_new_tokens=4, **options)


def stranger() -> str:
    with torch.device("meta"):
        target = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **QWEN))
    return said(check_fit, LongSpecConfig.from_pretrained(DRAFT), target)


def unserved(family: str, **shape) -> str:
    return said(LongSpecConfig.from_target, AutoConfig.for_model(family, **shape))


# Loads the folders that it is given, and tells what it is refused with.
WITHOUT_PACKAGE = """
import json, sys
from transformers import AutoModelForCausalLM
told = []
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except ValueError as error:
        told.append(str(error))
print(json.dumps(told), file=sys.stderr)  # standard output holds a question
"""


@functools.cache
def without_package() -> list[str]:
    """What transformers says of a draft with code and of a shipped one, where hf-longspec is not imported."""
    with tempfile.TemporaryDirectory() as folder:
        LongSpecConfig.from_pretrained(DRAFT).save_pretrained(folder)
        command = [sys.executable, "-c", WITHOUT_PACKAGE, folder, str(DRAFT)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    return json.loads(done.stderr.splitlines()[-1])


MISTAKES = {
    "a draft without its package": lambda: without_package()[0].strip().splitlines()[-1],
    "a shipped draft without its package": lambda: without_package()[1].split(".")[0],
    "a draft alone": lambda: said(LongSpecForCausalLM.from_pretrained(DRAFT).generate, torch.ones(1, 3).long()),
    "another target": stranger,
    "an encoder": lambda: unserved("t5"),
    "a state space": lambda: unserved("mamba"),
    "latent attention": lambda: unserved("deepseek_v3"),
    "dynamic NTK": lambda: unserved(
        "llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    ),
    "training mode": lambda: decode(tiny_target("llama", attention_dropout=0.1).train()),
    "beams": lambda: decode(num_beams=4),
    "two assistants": lambda: decode(prompt_lookup_num_tokens=3),
    "no cache": lambda: decode(use_cache=False, prefill_chunk_size=4),
    "an offloaded cache": lambda: decode(cache_implementation="offloaded"),
    "attention weights": lambda: decode(output_attentions=True, return_dict_in_generate=True),
    "an option of the draft": lambda: decode(tree_shape=(2, 2)),
    "a tree": lambda: decode(fields={"tree_shape": (4, 0)}),
    "a backend": lambda: decode(fields={"attention_backend": "flash"}),
}
# Only where there is no GPU.
ON_A_CPU = {
    "triton": lambda: decode(fields={"attention_backend": "triton"}),
    "graphs": lambda: decode(fields={"cuda_graphs": True}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_quoted_errors_are_what_is_said(mistake):
    assert words(MISTAKES[mistake]()) in words(guide("TROUBLESHOOTING"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("mistake", ON_A_CPU)
def test_quoted_errors_of_a_cpu(mistake, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert words(ON_A_CPU[mistake]()) in words(guide("TROUBLESHOOTING"))


def test_quoted_errors_of_the_command(tmp_path):
    folders = tiny_folders(tmp_path)
    mistakes = [
        {"target": "./missing"},
        {"draft": str(folders / "target")},
        {"tree": "4,x"},
        {"prompt_file": "missing.txt"},
    ]
    for mistake in mistakes:
        given = {"target": folders / "target", "draft": folders / "draft", "prompt_file": folders / "prompt.txt"}
        flags = [[f"--{name.replace('_', '-')}", str(value)] for name, value in (given | mistake).items()]
        result = CliRunner().invoke(cli.app, ["generate", *sum(flags, [])])
        line = [line for line in result.stderr.splitlines() if line.strip()][-1]
        assert result.exit_code == 2 and words(line.replace(f"{folders}/target", "DRAFT")) in words(
            guide("TROUBLESHOOTING")
        ), line


def test_quoted_error_of_a_draft_without_tokenizer(tmp_path):
    folders = tiny_folders(tmp_path)
    with pytest.raises(OSError, match="holds no tokenizer") as error:
        pipeline("text-generation", model=str(folders / "target"), assistant_model=str(folders / "draft"))
    assert str(error.value).replace(str(folders / "draft"), "DRAFT") in words(guide("TROUBLESHOOTING"))


@pytest.mark.parametrize("version", ["5.16.1", "5.99.0"])
def test_quoted_errors_of_another_transformers(monkeypatch, version):
    monkeypatch.setattr("hf_longspec.modeling.configuration_longspec.transformers.__version__", version)
    with pytest.raises(ImportError) as error:
        check_release(["GenerationMixin._prefill is gone or takes other arguments"])
    assert str(error.value) in words(guide("TROUBLESHOOTING"))


def one_folder() -> str:
    with tempfile.TemporaryDirectory() as folder:
        target = tiny_target("llama")
        target.save_pretrained(folder)
        return said(tiny_draft(target).save_pretrained, folder).replace(folder, "FOLDER")


def spread_draft() -> str:
    target = tiny_target("llama")
    draft = tiny_draft(target)
    draft.hf_device_map = {"mlp": 0, "self_attn": "cpu"}
    return said(target.generate, torch.arange(2, 8)[None], assistant_model=draft, max_new_tokens=4)


@pytest.mark.parametrize("mistake", [one_folder, spread_draft])
def test_quoted_errors_of_a_draft(mistake):
    assert words(mistake()) in words(guide("TROUBLESHOOTING"))


def test_quoted_error_of_the_demo(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LONGSPEC_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    result = CliRunner().invoke(cli.app, ["demo"])
    assert result.exit_code == 1
    line = result.stderr.strip().splitlines()[-1]
    assert line.split(": ERROR")[0] in guide("TROUBLESHOOTING"), line


def code_block(page: str, language: str) -> str:
    """The first block of a guide in this language."""
    return re.search(rf"^```{language}\n(.*?)^```", guide(page), re.M | re.S)[1]


def test_the_card_in_the_guide_is_complete(tmp_path):
    (tmp_path / "card.json").write_text(code_block("PUBLISH", "json"), encoding="utf-8")
    assert About.load(tmp_path / "card.json").base_model == "me/my-model"


def test_the_recipe_in_the_guide_is_one():
    recipe = Recipe.from_dict(yaml.safe_load(code_block("TRAIN", "yaml")))
    assert recipe.evaluates and len(TREE) <= recipe.signal.max_lag


def command_says(*arguments: str) -> list[str]:
    """What the command is refused with, in lines."""
    result = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert result.exit_code in (1, 2), result.output
    return [words(line) for line in result.stderr.splitlines() if line.startswith("hf-longspec: ")]


def test_quoted_errors_of_training(tmp_path, monkeypatch):
    """On the recipe that examples/train_your_own.py writes, for a tiny target."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    from train_your_own import recipe_for

    text, run = tmp_path / "text", Path("my_run")
    text.mkdir()
    for number in range(20):
        (text / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * (number and 12))
    target = tiny_folders(run) / "target"
    tiny_target("llama", vocab_size=len(ALPHABET), max_position_embeddings=8192).save_pretrained(target)
    given = argparse.Namespace(out=run, text=text, suffix=".py", steps=3, batch=1, prompts=8)
    asked = recipe_for(given, str(target), None) | {"draft": {}}
    asked["data"] |= {"separator": "Ā", "held_out": {"names": ["0"]}}

    def trained(*options, **changes):
        recipe = asked | {"trainer": asked["trainer"] | changes}
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return ["train", str(run / "recipe.yaml"), *options]

    said = [
        *command_says(*trained(max_step=5)),
        *command_says(*trained()),
        *command_says(*trained("--set", "signal.length=16384")),
    ]
    off = ["--set", "trainer.eval_strategy='no'", "--set", "trainer.eval_on_start=false"]
    said += command_says(*trained(*off, learning_rate=1e30, output_dir=str(run / "other")))
    done = CliRunner().invoke(cli.app, trained(*off))
    assert done.exit_code == 0, done.output
    said += command_says(*trained(*off, learning_rate=0.1))
    assert len(said) == 5, said
    for line in said:
        assert line in words(guide("TRAIN")), line


def test_quoted_errors_of_publishing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.token", None, raising=False)
    folders, draft = tiny_folders(tmp_path), Path("runs/mine/draft")
    LongSpecForCausalLM.from_pretrained(folders / "draft").save_pretrained(draft)
    said = command_says("push", draft, "me/mine", "--dry-run")
    said += command_says("export", "--draft", draft, "--target", folders / "target", "--out", "ready")
    assert len(said) == 4
    card = tmp_path / "card.json"
    card.write_text(code_block("PUBLISH", "json"), encoding="utf-8")
    said += command_says("export", "--draft", draft, "--target", folders / "target", "--out", "ready", "--card", card)
    for line in said:
        assert line in words(guide("PUBLISH")), line


def commands() -> list[tuple[str, str]]:
    """Every `hf-longspec …` of a guide's code, its lines joined, comments left out."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^\s*(?:\$ )?(hf-longspec [a-z].*)$", text, re.M):
            found.append((page.name, words(line.split(" #")[0])))
    return found


@pytest.mark.parametrize("page, line", commands())
def test_commands_have_these_options(page, line):
    command, path = typer.main.get_command(cli.app), []
    for word in line.split()[1:]:
        if not hasattr(command, "commands") or word not in command.commands:
            break
        path.append(word)
        command = command.commands[word]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    asked = set(re.findall(r"(?<=\s)--[a-z-]+", line))
    assert path and not hasattr(command, "commands"), f"{line}: no such command"
    assert asked <= known | {"--help"}, f"{line}: {asked - known} are no options"


@pytest.mark.parametrize("page", [*PAGES, DOCS / "CLIENTS.md"], ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_that_are_named_are_there(page):
    for name in re.findall(r"examples/\w+\.py", page.read_text(encoding="utf-8")):
        assert (ROOT / name).is_file(), name


@pytest.mark.slow
def test_the_picture_of_a_round_is_what_its_script_draws(tmp_path):
    script = tmp_path / "round.py"
    script.write_text((DOCS / "img" / "round.py").read_text(encoding="utf-8"), encoding="utf-8")
    subprocess.run([sys.executable, script], check=True, timeout=300)
    assert (tmp_path / "round.svg").read_bytes() == (DOCS / "img" / "round.svg").read_bytes()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_log_has_an_index():
    """Each entry has a line in the index, in the order of the entries, and no line is too long to read."""
    log = guide("LOG")
    entries = re.findall(r"^## (\d{4}-\d\d-\d\d .*)$", log, re.M)
    anchors = [re.sub(r"[^\w\- ]", "", entry.lower()).replace(" ", "-") for entry in entries]
    places = dict(re.findall(r"^\[(\d+)\]: #(\S+)$", log, re.M))
    index = re.findall(r"^- (\d{4}-\d\d-\d\d) \[.*\]\[(\d+)\]$", log, re.M)
    assert [places[number] for _, number in index] == anchors
    assert [date for date, _ in index] == [entry[:10] for entry in entries]
    assert max(map(len, log.splitlines())) <= 140
