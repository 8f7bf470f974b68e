"""The command line on a tiny pair of folders, and its answers to mistakes."""

import json
import shutil
import subprocess
import sys

import pytest
from helpers import is_one_line
from tiny_folders import tiny_folders
from transformers import AutoConfig
from typer.testing import CliRunner

from hf_longspec import LongSpecConfig, LongSpecForCausalLM, cli
from hf_longspec.demo.weights import WeightsError, smollm2_folder

runner = CliRunner()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny_folders(tmp_path_factory.mktemp("pair"))


def generate(folders, **options):
    given = {"target": folders / "target", "draft": folders / "draft", "prompt_file": folders / "prompt.txt"}
    arguments = ["generate"]
    for name, value in (given | {"max_new_tokens": 8} | options).items():
        flag = "--" + name.replace("_", "-")
        arguments += [flag] if value is True else [flag, str(value)]
    return runner.invoke(cli.app, arguments)


def test_generate_compares_the_pair(folders):
    result = generate(folders, tree="2,3", profile=True)
    assert result.exit_code == 0, result.output
    assert "prompt of 40 tokens" in result.output
    assert "equal, token for token (8 tokens, float32)" in result.output
    for row in ("decoding, tokens/s", "(τ)", "speed-up", "draft state, bytes", "verify", "commit"):
        assert row in result.output


def test_generate_samples_with_a_seed(folders):
    first, second, other = (generate(folders, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert all("equal, token for token" in result.output for result in (first, second, other))
    texts = [result.output.split("plain generate")[1].split("LongSpec")[0] for result in (first, second, other)]
    assert texts[0] == texts[1] != texts[2]


def test_generate_without_speculation(folders):
    result = generate(folders, tree="")
    assert result.exit_code == 0 and "equal, token for token" in result.output


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompt_file": "missing.txt"}, "cannot read prompt file missing.txt"),
        ({"target": "./missing"}, "target ./missing: no such folder"),
        ({"draft": "./missing"}, "draft ./missing: no such folder"),
        ({"tree": "4,x"}, "expected level widths such as 4,16,16"),
        ({"tree": "4,0"}, "expected level widths such as 4,16,16"),
        ({"tree": "4,-1"}, "expected level widths such as 4,16,16"),
        ({"tree": "100000"}, "`tree_shape` level 1 can have at most"),
        ({"dtype": "float8"}, "Invalid value for '--dtype'"),
        ({"max_new_tokens": 0}, "Invalid value for '--max-new-tokens'"),
        ({"temperature": -1}, "Invalid value for '--temperature'"),
    ],
)
def test_mistakes(folders, options, message):
    result = generate(folders, **options)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_draft_for_another_target(folders):
    result = generate(folders, draft=folders / "stranger")
    assert result.exit_code == 2 and "hidden_size: draft has 64, target has 32" in result.stderr


def test_a_backend_whose_package_is_broken(folders, tmp_path, monkeypatch):
    """A draft may name its backend."""
    draft = shutil.copytree(folders / "draft", tmp_path / "draft")
    config = AutoConfig.from_pretrained(draft)
    config.attention_backend = "triton"
    config.save_pretrained(draft)
    (tmp_path / "triton.py").write_text("raise OSError('built for another torch')")
    monkeypatch.setitem(sys.modules, "triton", None)
    del sys.modules["triton"]
    monkeypatch.syspath_prepend(tmp_path)
    pair = ["--target", folders / "target", "--draft", draft, "--max-new-tokens", "2", "--dtype", "float32"]
    text = ["bench", "text", "--text", folders / "prompt.txt", "--context", "8", "--batches", "1", "--repeats", "1"]
    distilled = ["distill-data", "--prompts", folders / "prompt.txt", "--format", "text", "--suffix", ".txt"]
    distilled += ["--max-prompt-tokens", "8", "--separator", "Ā", "--out", tmp_path / "out"]
    for command in (["generate", "--prompt-file", folders / "prompt.txt"], text, distilled):
        given = ["--backend", "triton"] if command is text else []
        result = runner.invoke(cli.app, [str(word) for word in (*command, *pair, *given)])
        assert result.exit_code == 2 and is_one_line(result.stderr), result.output
        assert "the package triton cannot be imported: built for another torch" in result.stderr
    assert not (tmp_path / "out").exists()


def test_draft_that_is_no_draft(folders):
    result = generate(folders, draft=folders / "target")
    assert result.exit_code == 2 and "is no LongSpec draft, its model type is 'llama'" in result.stderr


def test_folder_without_a_model(folders, tmp_path):
    result = generate(folders, target=tmp_path)
    assert result.exit_code == 2 and f"target {tmp_path} cannot be loaded:" in result.stderr
    assert is_one_line(result.stderr)


def test_damaged_weights(folders, tmp_path):
    shutil.copytree(folders / "draft", tmp_path / "draft")
    weights = tmp_path / "draft" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    result = generate(folders, draft=tmp_path / "draft")
    assert result.exit_code == 2 and f"draft {tmp_path / 'draft'} cannot be loaded: " in result.stderr


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"intermediate_size": 99}, "its weights have other shapes than its config tells"),
        ({"hidden_size": "wide"}, "field 'hidden_size': TypeError: Field 'hidden_size' expected int, got str"),
    ],
)
def test_a_config_that_is_not_of_the_weights(folders, tmp_path, changed, message):
    shutil.copytree(folders / "target", tmp_path / "target")
    config = tmp_path / "target" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    result = generate(folders, target=tmp_path / "target")
    assert result.exit_code == 2 and f"target {tmp_path / 'target'} cannot be loaded: " in result.stderr
    assert message in result.stderr and is_one_line(result.stderr)


def test_prompt_that_is_empty_or_not_text(folders, tmp_path):
    (tmp_path / "empty").write_text("")
    assert "the prompt is empty" in generate(folders, prompt_file=tmp_path / "empty").stderr
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "cannot read prompt file" in generate(folders, prompt_file=tmp_path / "binary").stderr


def test_texts_that_differ_are_an_error(folders, monkeypatch):
    from hf_longspec.evaluation import side_by_side

    monkeypatch.setattr(side_by_side, "judge", lambda *args, **options: side_by_side.Verdict(position=3))
    result = generate(folders)
    assert result.exit_code == 1 and "The two texts part at new token 3 (float32)" in result.output


def test_demo_without_a_draft(monkeypatch, tmp_path):
    monkeypatch.setattr("hf_longspec.demo.DRAFT", tmp_path)
    result = runner.invoke(cli.app, ["demo"])
    assert result.exit_code == 2 and "this installation carries no draft" in result.stderr


def test_demo_without_network(monkeypatch):
    def unreachable():
        raise WeightsError("pip could not download it")

    monkeypatch.setattr("hf_longspec.demo.weights.smollm2_folder", unreachable)
    result = runner.invoke(cli.app, ["demo", "--draft", "./any"])
    assert result.exit_code == 1 and result.stderr == "hf-longspec: pip could not download it\n"


def test_demo(folders, monkeypatch, tmp_path):
    """All of it but its model and prompt."""
    monkeypatch.setattr("hf_longspec.demo.weights.smollm2_folder", lambda: folders / "target")
    monkeypatch.setattr("hf_longspec.demo.PROMPT", folders / "prompt.txt")
    command = ["demo", "--draft", str(folders / "draft"), "--max-new-tokens", "8", "--dtype", "float32"]
    result = runner.invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    assert "prompt of 40 tokens" in result.output
    assert "equal, token for token (8 tokens, float32)" in result.output


@pytest.mark.slow
def test_demo_on_the_real_model(tmp_path):
    """With random weights, so that this holds for any draft."""
    config = LongSpecConfig.from_target(AutoConfig.from_pretrained(smollm2_folder()), tree_shape=(2, 2))
    LongSpecForCausalLM(config).save_pretrained(tmp_path)
    command = [sys.executable, "-m", "hf_longspec.cli", "demo", "--draft", str(tmp_path), "--max-new-tokens", "8"]
    result = subprocess.run([*command, "--dtype", "float32"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "prompt of 4383 tokens" in result.stdout
    assert "equal, token for token (8 tokens, float32)" in result.stdout


def test_command_as_installed(folders):
    command = [sys.executable, "-m", "hf_longspec.cli", "generate", "--target", "./missing"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "Missing option" in result.stderr and "Traceback" not in result.stderr
