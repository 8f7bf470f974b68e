"""Published drafts converted straight from a Hub: the real client against the test Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from helpers import is_one_line
from hub_folders import connect
from hub_server import Cut, HubServer
from hub_store import LARGE, Blob
from huggingface_hub import constants
from published_format import TARGETS, random_weights, tiny, write_checkpoint, write_config
from typer.testing import CliRunner

from hf_longspec import cli

CONFIG = tiny(TARGETS["llama-3-8b-instruct-262k"])


def published(hub: HubServer, repo_id: str, folder: Path) -> str:
    """A repository with the files of a folder; its commit."""
    blobs = {path.name: Blob(path.read_bytes(), path.suffix in LARGE) for path in folder.iterdir()}
    hub.store.large |= {blob.oid: blob.data for blob in blobs.values() if blob.large}
    return hub.store.create(repo_id, "me", private=False).commit("main", "upload", blobs).oid


def convert(hub: HubServer, folder: Path, source: str, out: str, **environment: str):
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-m", "hf_longspec.cli", "convert", source, "--target", "me/target", "--out", out]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=os.environ | settings | environment, timeout=120
    )


def in_process(source: str, out: Path):
    """For a Hub that this process is connected to."""
    return CliRunner().invoke(cli.app, ["convert", source, "--target", "me/target", "--out", str(out)])


def test_conversion_from_a_hub(tmp_path, monkeypatch):
    """Only the safetensors are fetched, a transfer that breaks off is taken up again, and commits are noted."""
    weights = random_weights(CONFIG)
    both = write_checkpoint(tmp_path / "both", CONFIG, weights, shards=2)
    torch.save(weights, both / "pytorch_model.bin")
    with HubServer(users={"hf_me": "me"}) as hub:
        target = published(hub, "me/target", write_config(tmp_path / "target", CONFIG))
        source = published(hub, "me/both", both)
        hub.fault("GET", "/cdn/", Cut())
        done = convert(hub, tmp_path, "me/both", "draft")
        asked = {path for _, path in hub.requests}
        connect(monkeypatch, hub.url, tmp_path / "home" / "hub")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        offline = in_process("me/both", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "draft" / "conversion.json").read_text())
    assert (record["source_revision"], record["target_revision"]) == (source, target)
    assert sorted(record["files"]) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert f"me/both at {source}" in done.stdout and not any("pytorch_model" in path for path in asked)
    assert offline.exit_code == 0, offline.stderr  # from the cache


def test_repositories_that_cannot_be_had(tmp_path, monkeypatch):
    with HubServer(users={"hf_me": "me"}) as hub:
        published(hub, "me/target", write_config(tmp_path / "target", CONFIG))
        published(hub, "me/gated", write_checkpoint(tmp_path / "gated", CONFIG, random_weights(CONFIG), pickled=True))
        hub.store.repos["me/gated"].gated = True
        connect(monkeypatch, hub.url, tmp_path / "home" / "hub")
        monkeypatch.delenv("HF_TOKEN")  # the owner may read it
        missing, gated = (in_process(name, tmp_path / "draft") for name in ("me/missing", "me/gated"))
    for done, told in ((missing, "is not a valid model identifier"), (gated, "access a gated repo. Make sure")):
        assert done.exit_code == 2 and told in done.stderr and is_one_line(done.stderr)
    assert not (tmp_path / "draft").exists()
