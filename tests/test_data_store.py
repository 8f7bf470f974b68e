"""Tokens on disk: what is written comes back, whole or not at all, and what is broken is named."""

import json
import lzma
import pickle

import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer
from full_disk import full_disk

from hf_longspec.training.data.section import Source
from hf_longspec.training.data.store import Document, StoreWriter, TokenStore
from hf_longspec.training.data.stored import open_stores, token_folders
from hf_longspec.writing import MachineError

DOCUMENTS = [("a", [1, 2, 3], [0, 1, 1]), ("b", [], []), ("c", [300, 0], None)]


def write(folder, masked=False, documents=DOCUMENTS, vocabulary=301):
    with StoreWriter(folder, vocabulary, masked) as writer:
        for name, ids, mask in documents:
            mask = None if mask is None else np.array(mask, dtype=bool)
            writer.add(Document(name, np.array(ids, dtype=np.uint32), mask))
        writer.summary = {"rows": len(documents)}
    return folder


@pytest.mark.parametrize(("vocabulary", "dtype"), [(301, np.uint16), (65_536, np.uint16), (65_537, np.uint32)])
def test_documents_come_back(tmp_path, vocabulary, dtype):
    store = TokenStore.load(write(tmp_path / "deep/store", masked=True, vocabulary=vocabulary))
    assert store.tokens.dtype == dtype
    assert store.tokens.tolist() == [1, 2, 3, 300, 0]
    assert store.loss_mask.tolist() == [False, True, True, True, True]
    assert store.offsets.tolist() == [0, 3, 3, 5]
    assert (store.names, store.summary) == (("a", "b", "c"), {"rows": 3})
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["store"]


def test_without_a_mask(tmp_path):
    store = TokenStore.load(write(tmp_path / "store"))
    assert store.loss_mask is None and not (tmp_path / "store/loss_mask.npy").exists()
    assert np.load(tmp_path / "store/tokens.npy").tolist() == [1, 2, 3, 300, 0]


def test_a_worker_opens_the_files_itself(tmp_path):
    store = TokenStore.load(write(tmp_path / "store", documents=[("a", list(range(256)) * 100, None)]))
    sent = pickle.dumps(store)
    assert len(sent) < 1000
    assert np.array_equal(pickle.loads(sent).tokens, store.tokens)


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="a: token id 300 is outside the vocabulary of 300"):
        write(tmp_path / "store", documents=[("a", [1, 300], None)], vocabulary=300)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_already_stays(tmp_path):
    write(tmp_path / "store")
    write(tmp_path / "store", documents=[("other", [1], None)])
    assert TokenStore.load(tmp_path / "store").names == ("a", "b", "c")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_tokens_packed_by_xz(tmp_path):
    store = write(tmp_path / "store")
    (store / "tokens.npy.xz").write_bytes(lzma.compress((store / "tokens.npy").read_bytes()))
    (store / "tokens.npy").unlink()
    assert token_folders(tmp_path) == [store]
    assert TokenStore.load(store).tokens.tolist() == [1, 2, 3, 300, 0]
    assert sorted(path.name for path in store.glob("tokens*")) == ["tokens.npy", "tokens.npy.xz"]
    (store / "tokens.npy").unlink()
    (store / "tokens.npy.xz").write_bytes((store / "tokens.npy.xz").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"tokens.npy.xz: broken file"):
        TokenStore.load(store)
    assert [path.name for path in store.glob("*tokens*")] == ["tokens.npy.xz"]


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("tokens.npy", cut_off, "tokens.npy: broken file"),
        ("tokens.npy", lambda path: path.write_bytes(b"no array"), "tokens.npy: broken file"),
        ("tokens.npy", lambda path: path.unlink(), "tokens.npy: no such file"),
        (
            "tokens.npy",
            lambda path: np.save(path, np.arange(4)),
            "tokens.npy: expected 5 entries as offsets.npy says, got",
        ),
        ("loss_mask.npy", lambda path: np.save(path, np.ones(6, bool)), "loss_mask.npy: expected 5 entries"),
        ("offsets.npy", cut_off, "offsets.npy: broken file"),
        ("offsets.npy", lambda path: np.save(path, np.array([0, 5])), "offsets.npy: does not fit the 3 names"),
        ("offsets.npy", lambda path: np.save(path, np.array([0, 3, 2, 5])), "offsets.npy: does not fit the 3 names"),
        ("names.json", lambda path: path.write_text('["a"'), "names.json: broken file"),
        ("names.json", lambda path: path.unlink(), "names.json: no such file"),
    ],
)
def test_damage_is_named(tmp_path, name, damage, message):
    store = write(tmp_path / "store", masked=True)
    damage(store / name)
    with pytest.raises(ValueError, match=message):
        TokenStore.load(store)


def test_folders_of_tokens(tmp_path):
    for name in ("part-1/00001", "part-0/00000", ".part-2.tmp/00000"):
        write(tmp_path / name)
    assert token_folders(tmp_path) == [tmp_path / "part-0/00000", tmp_path / "part-1/00001"]
    assert token_folders(tmp_path / "part-0/00000") == [tmp_path / "part-0/00000"]
    with pytest.raises(ValueError, match="none: expected a folder with tokens.npy"):
        token_folders(tmp_path / "none")


def test_tokens_of_another_tokenizer(tmp_path):
    source = Source(str(write(tmp_path / "store")), "tokens")
    with pytest.raises(ValueError, match="store: token id 300 is outside the tokenizer's vocabulary of 258"):
        open_stores(source, byte_tokenizer())
    summary = {"tokenizer": "theirs", "vocabulary_sha256": "0" * 64}
    (tmp_path / "store/summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match="holds tokens of theirs, whose vocabulary is not that of the target"):
        open_stores(source, byte_tokenizer())


@pytest.mark.parametrize(
    "tokens, documents, name, file",
    [
        (1_000_000, 1, "a", "tokens.npy"),
        (100, 1, "a", "tokens.npy"),
        (1, 30, "a", "offsets.npy"),
        (0, 9, "a" * 40, "store"),
    ],
)
def test_a_disk_that_takes_no_more(tmp_path, tokens, documents, name, file):
    """Little is noticed only when a file is closed, and by `np.save` not even then."""
    rows = [(name, [1] * tokens, None)] * documents
    with full_disk(300), pytest.raises(MachineError, match=f"{file} cannot be written: File too large"):
        write(tmp_path / "store", documents=rows)
    assert not list(tmp_path.iterdir())
