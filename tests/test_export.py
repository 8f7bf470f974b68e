"""The folder for the Hub: what is in it, that it is checked as a stranger would, and what it is refused for."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from full_disk import full_disk
from helpers import is_one_line, tiny_target
from hub_folders import ABOUT, contents, hub_folders
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from hf_longspec import cli
from hf_longspec.hub.card import About
from hf_longspec.hub.export import export, load_draft
from hf_longspec.hub.faults import file_faults, hub_faults
from hf_longspec.vocabulary import vocabulary_sha256

pytestmark = pytest.mark.slow

runner = CliRunner()
FILES = ("LICENSE", "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
MODELING = Path(__file__).parents[1] / "modeling"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return hub_folders(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def broken(folders, tmp_path):
    """A copy of the folder, to be broken."""
    return Path(shutil.copytree(folders / "hub", tmp_path / "hub"))


def write(folders, out, about=None, draft=None, target="target"):
    told = About(**(ABOUT | {"source": None} | (about or {})))
    draft = draft or load_draft(str(folders / "draft"))
    return export(draft, out, target_folder_or_id=str(folders / target), about=told, results=[])


def test_what_is_in_the_folder(folders):
    files = contents(folders / "hub")
    code = {path.name: path.read_bytes() for path in MODELING.glob("*_longspec.py")}
    assert {name: data for name, data in files.items() if name.endswith(".py")} == code
    assert files["tokenizer.json"] == (folders / "target" / "tokenizer.json").read_bytes()
    assert files["LICENSE"] == (MODELING.parent / "LICENSE").read_bytes()
    assert set(files) == {*code, *FILES}
    assert files["model.safetensors"] == (folders / "draft" / "model.safetensors").read_bytes()
    hash_of_vocabulary = vocabulary_sha256(AutoTokenizer.from_pretrained(folders / "target"))
    assert hash_of_vocabulary in ModelCard.load(folders / "hub" / "README.md").text


def test_the_command(folders, tmp_path):
    """Card and report as files, card.json beside the draft; the check loads the folder and writes with the target."""
    draft = shutil.copytree(folders / "draft", tmp_path / "draft")
    shutil.copy(folders / "card.json", draft)
    (tmp_path / "recipe.yaml").write_text("stages: [short, long]\n")
    arguments = ["--draft", draft, "--target", folders / "target", "--out", tmp_path / "deep" / "hub"]
    arguments += ["--results", folders / "report.json", "--recipe", tmp_path / "recipe.yaml", "--repo-id", "me/draft"]
    result = runner.invoke(cli.app, ["export", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert "checked: loads as remote code" in result.stdout
    files = contents(tmp_path / "deep" / "hub")
    assert set(files) == set(contents(folders / "hub"))
    assert all(f"{len(data):>14,}  {name}" in result.stdout for name, data in files.items())
    assert "- short" in files["README.md"].decode()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["hub"]


def test_the_folder_has_the_license_of_its_code(folders, tmp_path):
    write(folders, tmp_path / "hub", {"license": "llama3"})
    assert (tmp_path / "hub" / "LICENSE.code").is_file() and not (tmp_path / "hub" / "LICENSE").exists()


def test_what_is_wrong_with_the_files(broken):
    card = (broken / "README.md").read_text()
    assert file_faults(broken, card) == []
    (broken / "optimizer.pt").write_bytes(b"")
    (broken / "plot.png").write_bytes(b"")
    (broken / "other.py").write_bytes(b"")
    (broken / "tree_longspec.py").unlink()
    assert file_faults(broken, card + "![speed](plot.png)") == [
        "tree_longspec.py is missing: the draft's code imports it",
        "optimizer.pt: nothing of a draft; take it out of the folder",
        "other.py: nothing of a draft; take it out of the folder",
    ]


def test_what_is_missing_is_named_before_anything_is_loaded(broken):
    for name in ("LICENSE", "README.md", "tokenizer_config.json", "model.safetensors"):
        (broken / name).unlink()
    assert hub_faults(broken) == [
        "README.md is missing",
        "model.safetensors is missing",
        "tokenizer_config.json is missing",
        "a license is missing: one of LICENSE, LICENSE.code",
    ]


@pytest.mark.parametrize("metadata", ["a: [", "- a list"])
def test_a_card_that_cannot_be_read(broken, metadata):
    (broken / "README.md").write_text(f"---\n{metadata}\n---\n# Draft\n")
    faults = hub_faults(broken)
    assert len(faults) == 1 and faults[0].startswith("README.md: its metadata cannot be read: ")


def test_weights_and_tokenizers_that_do_not_fit(folders, broken):
    """And a card without results and repository, and a target of another shape."""
    weights = load_file(broken / "model.safetensors")
    weights["input_layernorm.weight"][3] = torch.nan
    weights["extra"] = weights.pop("mlp.up_proj.weight")
    weights["self_attn.q_proj.bias"] = torch.zeros(3)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(folders / "target")
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(broken)
    card = (broken / "README.md").read_text()
    (broken / "README.md").write_text(card.replace("me/draft", "path/of/this/repository").replace("- longspec\n", ""))
    tiny_target("llama", vocab_size=256, num_hidden_layers=2).config.save_pretrained(broken.parent / "other")
    faults = hub_faults(broken, target=str(broken.parent / "other"))
    for part in (
        "README.md: metadata: tags lack longspec",
        "README.md: it tells another vocabulary than that of the folder's tokenizer",
        "README.md: the lines of use name no repository; export with --repo-id",
        "missing keys: mlp.up_proj.weight",
        "unexpected keys: extra",
        "mismatched keys: ('self_attn.q_proj.bias'",
        "weights that are not finite: input_layernorm.weight",
        "tokenizer: the draft has 256 tokens, the tokenizer gives 256",
        "target_num_hidden_layers: draft has 4, target has 2",
    ):
        assert sum(part in fault for fault in faults) == 1, (part, faults)
    assert len(faults) == 9


def test_code_that_does_not_load(broken):
    code = broken / "tree_longspec.py"
    code.write_text(code.read_text() + "\nimport hf_longspec\n")
    faults = hub_faults(broken)
    assert len(faults) == 1 and faults[0].startswith("does not load as remote code:") and "hf_longspec" in faults[0]


def test_what_export_refuses(folders, tmp_path):
    with pytest.raises(ValueError, match="expected a new or empty folder to write to, got"):
        write(folders, folders / "hub")
    with pytest.raises(ValueError, match="hidden_size: draft has 64, target has 32"):
        write(folders, tmp_path / "hub", draft=load_draft(str(folders / "stranger")))
    with pytest.raises(ValueError, match="vocabulary: card.json tells 0000, the tokenizer of .* has"):
        write(folders, tmp_path / "hub", {"vocabulary_sha256": "0000"})
    with pytest.raises(ValueError, match="is no LongSpec draft, its model type is 'llama'"):
        load_draft(str(folders / "target"))
    assert list(tmp_path.iterdir()) == []


def test_a_source_whose_weights_are_not_those_of_its_config(broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 40, "final_norm": True}))
    with pytest.raises(ValueError, match="missing keys: norm.weight; mismatched keys: .*mlp.down_proj.weight"):
        load_draft(str(broken))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"draft": "nowhere/none"}, "draft nowhere/none cannot be loaded:"),
        ({"target": "nowhere/none"}, "target nowhere/none cannot be loaded:"),
        ({"card": None}, "expected a card.json beside the draft draft, or one named by --card"),
        ({"card": "missing.json"}, "No such file or directory: 'missing.json'"),
        ({"results": "card.json"}, "expected reports of the format"),
        ({"recipe": "prompt.txt"}, "expected an object with keys, got str"),
    ],
)
def test_mistakes_end_in_one_line(folders, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(folders)
    given = {"draft": "draft", "target": "target", "out": tmp_path / "hub", "card": "card.json"} | changes
    arguments = [text for name, value in given.items() if value for text in (f"--{name}", str(value))]
    result = runner.invoke(cli.app, ["export", *arguments])
    assert result.exit_code == 2 and message in result.stderr and is_one_line(result.stderr), result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full(folders, tmp_path):
    arguments = ["--draft", folders / "draft", "--target", folders / "target", "--out", tmp_path / "deep" / "hub"]
    arguments += ["--card", folders / "card.json"]
    with full_disk(30_000):
        result = runner.invoke(cli.app, ["export", *map(str, arguments)])
    assert result.exit_code == 1 and is_one_line(result.stderr), result.output
    assert f"{tmp_path / 'deep' / 'hub'} cannot be written: " in result.stderr and "File too large" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["export", "push"])
def test_no_room_for_the_check(folders, tmp_path, monkeypatch, command):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file" / "scratch"))
    arguments = ["--draft", folders / "draft", "--target", folders / "target", "--out", tmp_path / "hub"]
    if command == "push":
        arguments = [folders / "hub", "me/draft", "--dry-run"]
    else:
        arguments += ["--card", folders / "card.json"]
    result = runner.invoke(cli.app, [command, *map(str, arguments)])
    assert result.exit_code == 2 and is_one_line(result.stderr), result.output
    assert "Not a directory" in result.stderr


def test_weights_that_are_no_safetensors(broken):
    (broken / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(OSError, match="draft .* cannot be loaded: "):
        load_draft(str(broken))
