"""`hf-longspec bench` on tiny models: tables, the line of JSON, pictures, and its answers to mistakes."""

import importlib.util
import json
import math
import re
import shutil

import pytest
from full_disk import full_disk
from helpers import interpreted
from tiny_folders import tiny_folders
from typer.testing import CliRunner

from hf_longspec import cli

runner = CliRunner()
ATTENTION = ["attention", "--contexts", "64,96", "--nodes", "1,5", "--heads", "4,2,16", "--repeats", "1"]
LATENCY = ["latency", "--shape", "tiny", "--contexts", "64,96", "--tree", "2,3", "--verify-tokens", "3,5"]
LATENCY += ["--rounds", "2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny_folders(tmp_path_factory.mktemp("pair"))


def text(folders):
    pair = ["--target", str(folders / "target"), "--draft", str(folders / "draft")]
    options = ["--context", "20", "--max-new-tokens", "6", "--repeats", "1", "--tree", "2,3", "--batches", "1,3"]
    return ["text", *pair, "--text", str(folders / "prompt.txt"), *options]


def bench(*arguments):
    """The lines that people see, and the last one."""
    result = runner.invoke(cli.app, ["bench", *arguments])
    assert result.exit_code == 0, result.output + result.stderr
    *table, last = result.stdout.strip().splitlines()
    record = json.loads(last, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    for name in ("command", "device", "commit", "torch", "transformers", "triton", "python", "hf-longspec"):
        assert name in record
    assert record["command"].startswith("hf-longspec")
    return "\n".join(table), record


def test_attention():
    table, record = bench(*ATTENTION, "--backends", "eager,torch")  # the interpreter of the others takes minutes
    assert [(case["context"], case["nodes"]) for case in record["cases"]] == [(64, 1), (64, 5), (96, 1), (96, 5)]
    assert {"eager", "torch", "sdpa, mask"} <= {timed["name"] for timed in record["cases"][0]["timed"]}
    assert "arithmetic floor" in table and len(table.splitlines()) == 5
    assert record["heads"] == [4, 2, 16] and all(math.isfinite(speed) for speed in record["speed"].values())


@pytest.mark.slow
def test_attention_of_one_backend():
    table, record = bench(*ATTENTION, "--backends", "torch")
    assert [timed["name"] for timed in record["cases"][0]["timed"]] == ["torch", "sdpa, mask"]


@pytest.mark.slow
@interpreted
def test_attention_with_tiles(monkeypatch):
    monkeypatch.setattr("hf_longspec.benchmark.attention.LAYERS", 2)  # taken in turns: 64 are long for an interpreter
    command = ["attention", "--contexts", "20", "--nodes", "5", "--heads", "2,1,16", "--repeats", "1"]
    tiles = ["--tiles", "16,16,4,2,1", "--tiles", "32,32,4,1,2"]
    _, record = bench(*command, "--backends", "torch", *tiles)
    timed = record["cases"][0]["timed"]
    assert [way["name"] for way in timed] == ["torch", "16x16x4x2x1", "32x32x4x1x2", "sdpa, mask"]
    assert all(way["error"] < 1e-5 for way in timed)
    result = runner.invoke(cli.app, ["bench", *command, "--tiles", "24,16,4,2,1"])
    assert result.exit_code == 2 and "the first three powers of two, got (24, 16, 4, 2, 1)" in result.stderr


def test_children():
    table, record = bench("children", "--nodes", "1,3", "--width", "4", "--vocab", "50,60", "--repeats", "1")
    choices = record["choices"]
    assert [(choice["vocab"], choice["nodes"]) for choice in choices] == [(50, 1), (50, 3), (60, 1), (60, 3)]
    assert all(choice["milliseconds"]["torch"] > 0 for choice in choices) and "bytes floor" in table


def test_latency():
    table, record = bench(*LATENCY)
    assert (record["shape"], record["tree"], record["verify_tokens"]) == ("tiny", [2, 3], [3, 5])
    assert record["prefill"] == []
    assert [context["context"] for context in record["contexts"]] == [64, 96]
    assert [step["name"] for step in record["contexts"][0]["steps"]][:2] == ["generate", "one token"]
    for line in ("context 96: ", "verify 5", "its grow", "outside of graph replays", "draft state, bytes", "greedy"):
        assert line in table


def test_latency_of_sampled_rounds():
    table, record = bench(*LATENCY, "--contexts", "64", "--sampling", "temperature=0.7,top_p=0.8,top_k=0")
    assert record["contexts"][0]["sampling"] == {"do_sample": True, "temperature": 0.7, "top_p": 0.8}
    assert "sampled, temperature=0.7, top_p=0.8" in table


@pytest.mark.slow
def test_latency_with_prompts():
    table, record = bench(*LATENCY, "--prefill")
    names = [(row["name"], row["context"]) for row in record["prefill"]]
    ways = ["generate", "generate, chunks of 8,192", "LongSpec", "LongSpec, chunks of 8,192"]
    assert names == [(way, context) for context in (64, 96) for way in ways]
    assert all(row["seconds"] > 0 for row in record["prefill"]) and "LongSpec, chunks of 8,192" in table


def test_text(folders):
    table, record = bench(*text(folders), "--profile", "--assistant", str(folders / "target"))
    assert [(batch["batch"], batch["prompts"]) for batch in record["batches"]] == [(1, 1), (3, 3)]
    for batch in record["batches"]:
        names = [engine["name"] for engine in batch["engines"]]
        assert ("assistant" in names) == ("prompt lookup" in names) == (batch["batch"] == 1)
        assert batch["sampling"] == {"do_sample": False}
        assert batch["fastest_stock"] in names and "LongSpec" not in batch["fastest_stock"]
        for engine in batch["engines"]:
            assert engine["stock"] or (engine["equal"], engine["different"]) == (batch["batch"], 0)
    assert record["tree"] == [2, 3] and record["assistant"] == str(folders / "target")
    assert "x fastest" in table and " * " in table and "phases, ms" in table and table.startswith("greedy")


def test_text_that_is_sampled(folders):
    table, record = bench(*text(folders), "--sampling", "temperature=0.7,top_k=5,repetition_penalty=1.1")
    settings = {"do_sample": True, "temperature": 0.7, "top_k": 5, "repetition_penalty": 1.1}
    assert [batch["sampling"] for batch in record["batches"]] == [settings] * 2
    assert table.startswith("sampled, temperature=0.7, top_k=5, repetition_penalty=1.1")
    for batch in record["batches"]:
        assert [engine["equal"] for engine in batch["engines"] if not engine["stock"]] == [batch["batch"]] * 2


@pytest.mark.slow
def test_text_by_the_targets_own_settings(folders, tmp_path):
    target = tmp_path / "target"
    shutil.copytree(folders / "target", target)
    config = json.loads((target / "generation_config.json").read_text())
    (target / "generation_config.json").write_text(json.dumps(config | {"do_sample": True, "top_p": 0.9}))
    command = [part.replace(str(folders / "target"), str(target)) for part in text(folders)]
    _, record = bench(*command, "--batches", "1", "--sampling", "own")
    assert record["batches"][0]["sampling"] == {"do_sample": True, "top_k": 50, "top_p": 0.9}


@pytest.mark.slow
def test_pictures(folders, tmp_path):
    pytest.importorskip("matplotlib")
    attention = [*ATTENTION, "--backends", "torch"]
    for name, command in (("attention", attention), ("latency", LATENCY), ("text", text(folders))):
        bench(*command, "--plot", str(tmp_path / f"{name}.png"))
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_full_disk_costs_the_picture_only(tmp_path):
    pytest.importorskip("matplotlib")
    command = ["attention", "--contexts", "64", "--nodes", "1", "--heads", "2,1,16", "--backends", "torch"]
    with full_disk(1000):
        result = runner.invoke(cli.app, ["bench", *command, "--repeats", "1", "--plot", str(tmp_path / "a.png")])
    assert result.exit_code == 1 and json.loads(result.stdout.splitlines()[-1])["bench"] == "attention"
    last = result.stderr.splitlines()[-1]
    assert last == f"hf-longspec: {tmp_path / 'a.png'} cannot be written: File too large"
    assert not any(tmp_path.iterdir())


def test_pictures_without_matplotlib(monkeypatch, tmp_path):
    own = importlib.util.find_spec
    monkeypatch.setattr("hf_longspec.cli.bench.find_spec", lambda name: None if name == "matplotlib" else own(name))
    result = runner.invoke(cli.app, ["bench", *ATTENTION, "--plot", str(tmp_path / "a.png")])
    assert result.exit_code == 2
    assert result.stderr == (
        "hf-longspec: --plot needs matplotlib, which is not installed: pip install 'hf-longspec[bench]'\n"
    )


@pytest.mark.parametrize(
    "command, wrong, message",
    [
        (ATTENTION, ["--contexts", "64,x"], "expected numbers such as 16,64 (at least 1 each), got '64,x'"),
        (ATTENTION, ["--nodes", "0"], "expected numbers such as 16,64 (at least 1 each), got '0'"),
        (ATTENTION, ["--heads", "5,2,16"], "K/V heads that divide them, head dimension, got --heads 5,2,16"),
        (ATTENTION, ["--heads", "4,2"], "got --heads 4,2"),
        (ATTENTION, ["--backends", "torch,best"], "expected backends among eager, torch"),
        (ATTENTION, ["--plot", "missing/a.png"], "expected --plot FILE.png in a folder that exists"),
        (ATTENTION, ["--plot", "a.pdf"], "expected --plot FILE.png in a folder that exists, got a.pdf"),
        (["children"], ["--width", "70", "--vocab", "50"], "at most nodes x tokens, got 70 of 1 x 50"),
        (LATENCY, ["--shape", "llama-9b"], "expected a shape among tiny"),
        (LATENCY, ["--tree", ""], "expected level widths such as 4,16,16, got an empty --tree"),
        (LATENCY, ["--tree", "4,x"], "expected level widths such as 4,16,16"),
        (LATENCY, ["--tree", "1000"], "`tree_shape` level 1 can have at most"),
        (LATENCY, ["--backend", "best"], "`attention_backend` must be one of"),
        (LATENCY, ["--rounds", "0"], "Invalid value for '--rounds'"),
        (LATENCY, ["--sampling", "top_p=1.5"], "expected top_p to be a number above 0 and at most 1, got '1.5'"),
        (LATENCY, ["--sampling", "own"], "got --sampling own: random weights come without a config"),
    ],
)
def test_mistakes(command, wrong, message):
    result = runner.invoke(cli.app, ["bench", *command, *wrong])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--batches", "1,x"], "expected numbers such as 16,64 (at least 1 each), got '1,x'"),
        (["--context", "50"], "at least 50"),
        (["--context", "9999"], "new tokens are more than the target's 512 positions"),
        (["--max-new-tokens", "1"], "Invalid value for '--max-new-tokens'"),
        (["--sampling", "top_q=1"], "expected 'own' or settings among do_sample, temperature, top_k"),
        (["--assistant", "./missing"], "assistant ./missing: no such folder"),
    ],
)
def test_mistakes_about_text(folders, wrong, message):
    result = runner.invoke(cli.app, ["bench", *text(folders), *wrong])
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())


def test_more_than_fits():
    command = ["attention", "--contexts", str(10**13), "--nodes", "1", "--heads", "2,1,16", "--backends", "torch"]
    result = runner.invoke(cli.app, ["bench", *command])
    assert result.exit_code == 1
    assert re.fullmatch(
        r"hf-longspec: out of memory( \(\d+ bytes more were wanted\))?: shorter --contexts take less\n", result.stderr
    )
