"""Rows of tasks from a dataset on the Hub: the tests' own Hub, the real client, one line for each thing it refuses."""

import pytest
from hub_folders import STRANGER, connect, server
from hub_server import Drop, Shorten, Status
from hub_store import Blob, Repo
from huggingface_hub import constants

from hf_longspec.evaluation import rows
from hf_longspec.writing import MachineError

ROWS = b'{"context": "a", "_id": "x"}\n'
PLACE = "hf://datasets/me/set/data/x.jsonl"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with server() as running:
        running.store.repos["me/set"] = Repo("me", private=False)
        running.store.repos["me/set"].commit("main", "rows", {"data/x.jsonl": Blob(ROWS, large=False)})
        connect(monkeypatch, running.url, tmp_path / "hub")
        yield running


def told(place=PLACE, kind=ValueError):
    with pytest.raises(kind) as caught:
        rows.local_path(place)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_of_a_dataset(hub, monkeypatch):
    repo = hub.store.repos["me/set"]
    old = repo.at("main").oid
    repo.commit("main", "no rows", {"data/x.jsonl": Blob(b"", large=False)})
    assert rows.local_path(PLACE).read_bytes() == b""
    pinned = PLACE.replace("set/", f"set@{old}/")
    path = rows.local_path(pinned)
    assert rows.read_rows(path, "lcc", ("context",)) == [{"_id": "x", "context": "a"}]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert rows.local_path(pinned) == path, "what is in the cache needs no network"


def test_what_the_hub_refuses_is_one_line(hub, monkeypatch):
    assert "no such file in the dataset" in told(PLACE.replace("x.jsonl", "y.jsonl"))
    assert "no such revision 'v1'" in told(PLACE.replace("set/", "set@v1/"))
    assert "no such dataset, or a private one" in told(PLACE.replace("set/", "other/"))
    hub.store.repos["me/set"].gated = True
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    assert "ask for it on https://huggingface.co/datasets/me/set" in told()


def test_a_download_that_fails_is_one_line_and_comes_the_next_time(hub):
    for fault in (Status(418, "broken"), Shorten()):
        hub.fault("GET", "/resolve/", fault)
        assert told(kind=MachineError).startswith(PLACE)
    assert rows.local_path(PLACE).read_bytes() == ROWS


def test_without_a_network(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "not in the cache, and the Hub cannot be reached" in told()


def test_a_connection_that_ends_is_one_line(hub):
    for method in ("HEAD", "GET"):
        for _ in range(9):  # the client tries again
            hub.fault(method, "/resolve/", Drop())
        assert told(kind=MachineError).startswith(PLACE)
        with hub.lock:
            hub.faults.clear()
    assert rows.local_path(PLACE).read_bytes() == ROWS
