"""A tiny pair and the draft's folder for the Hub, and a client that knows only the tests' own Hub."""

import json
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import HfApi, constants
from reports import report
from tiny_folders import tiny_folders
from transformers import AutoTokenizer

from hf_longspec.hub.card import About
from hf_longspec.hub.export import export, load_draft
from hf_longspec.vocabulary import vocabulary_sha256

TOKEN, STRANGER, REPO = "hf_me", "hf_stranger", "me/draft"
ABOUT = {
    "title": "LongSpec draft for Tiny",
    "base_model": "me/target",
    "base_model_revision": None,
    "vocabulary_sha256": None,
    "license": "apache-2.0",
    "language": ["en"],
    "tags": [],
    "datasets": [],
    "source": None,
    "training": "None: random weights.",
    "limits": ["It is tiny."],
}


def hub_folders(folder: Path) -> Path:
    """Write `tiny_folders`, `hub` with the exported draft, and its card's sources `card.json` and `report.json`."""
    tiny_folders(folder)
    told = report()
    told["target"]["vocabulary_sha256"] = vocabulary_sha256(AutoTokenizer.from_pretrained(folder / "target"))
    (folder / "report.json").write_text(json.dumps(told))
    (folder / "card.json").write_text(json.dumps(ABOUT))
    about, draft = About.load(folder / "card.json"), load_draft(str(folder / "draft"))
    target = str(folder / "target")
    export(draft, folder / "hub", target_folder_or_id=target, about=about, results=[told], repo_id=REPO)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def server() -> HubServer:
    return HubServer(users={TOKEN: "me", STRANGER: "stranger"})


def client(hub: HubServer, token: str | None = TOKEN) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def connect(patch: pytest.MonkeyPatch, url: str, home: Path) -> None:
    """Let this process take the server at `url` for the Hub, as `environment` does for a new process."""
    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(home))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setenv("HF_TOKEN", TOKEN)


def environment(url: str, home: Path, **changes: str) -> dict[str, str]:
    """Return variables by which a new process takes the server at `url` for the Hub, with nothing cached."""
    told = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    return told | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"} | changes
