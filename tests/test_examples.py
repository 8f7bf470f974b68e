"""The examples run as a user runs them, on the real SmolLM2 and with few tokens."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from hf_longspec.demo.weights import smollm2_folder

ROOT = Path(__file__).parents[1]
PARTS = ("pair",)  # of examples
EXAMPLES = sorted(file.stem for file in (ROOT / "examples").glob("*.py") if file.stem not in PARTS)


def run(name, *arguments):
    """What an example prints. Fails with its errors if it does not end well."""
    smollm2_folder()  # not in the time of the example
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": search, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_quickstart():
    printed = run("quickstart", "--dtype", "float32", "--max-prompt-tokens", 300, "--max-new-tokens", 32)
    assert printed.endswith("the same text\n")
    assert float(re.search(r"([\d.]+) tokens a forward", printed)[1]) > 2


@pytest.mark.slow
def test_chat_reads_only_what_is_new():
    printed = run("chat", "--say", "Hello!", "--say", "Tell me a joke.", "--max-new-tokens", 24)
    first, second = re.findall(r"\((\d+) tokens from the cache, (\d+) read, (\d+) written", printed)
    assert first[0] == "0"
    # all of the first turn but its newest token, which no forward has read
    assert int(second[0]) == int(first[1]) + int(first[2]) - 1
    assert int(second[1]) < int(first[1])


@pytest.mark.slow
def test_structured_output_is_valid():
    printed = run("structured_output")
    assert re.search(r"^valid: Person\(name='.+', born=1867, fields=\['", printed, re.M), printed


@pytest.mark.slow
def test_summaries_in_a_batch_are_those_of_plain_generate(tmp_path):
    """Three documents of different lengths, so two are padded."""
    words = (ROOT / "docs" / "CLIENTS.md").read_text(encoding="utf-8").split()
    files = [tmp_path / f"{count}.txt" for count in (30, 80, 120)]
    for file in files:
        file.write_text(" ".join(words[: int(file.stem)]), encoding="utf-8")
    printed = run("summarize", *files, "--dtype", "float32", "--max-new-tokens", 12, "--compare")
    lengths = [int(found) for found in re.findall(r"txt: (\d+) tokens of prompt", printed)]
    assert len(lengths) == 3 and lengths == sorted(set(lengths))
    assert "3 of 3 texts are the same" in printed


@pytest.mark.slow
def test_a_draft_that_is_trained(tmp_path):
    """On the default target and text, for a few steps only: too few for τ, not for the loss."""
    printed = run("train_your_own", "--out", tmp_path, "--steps", 6, "--batch", 2, "--prompts", 2)
    losses = [float(found) for found in re.findall(r"'eval_kl': '?([\d.]+)", printed)]
    assert len(losses) == 2 and losses[1] < losses[0]
    found = re.findall(r"^after (\d+) steps: ([\d.]+) tokens a forward", printed, re.M)
    assert [steps for steps, _ in found] == ["0", "6"] and float(found[0][1]) > 1.5, printed
    assert re.search(r"^[\d.]+ tokens a forward, the same text as plain generate", printed, re.M), printed
    assert (tmp_path / "run" / "draft" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", EXAMPLES)
def test_help(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert f"python examples/{name}.py" in printed and "--target" in printed


def test_a_draft_without_its_target_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--draft", "some/draft"])
    with pytest.raises(SystemExit, match="expected --target and --draft together"):
        runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__")
