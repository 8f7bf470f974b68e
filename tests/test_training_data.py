"""Packing: what is read, what is left out and why, and windows of the flat array."""

from collections import Counter

import numpy as np
import pytest
import torch

from hf_longspec.training.data.packed import (
    Document,
    PackedTokens,
    TokenWindows,
    concatenate,
    find_files,
    is_held_out,
    pack,
    read_documents,
    reason_to_skip,
)


def by_letter(texts, add_special_tokens):
    """A tokenizer: 1 for a, 2 for b, …"""
    assert not add_special_tokens
    return {"input_ids": [[ord(letter) - 96 for letter in text] for text in texts]}


@pytest.fixture
def folder(tmp_path):
    for name, text in {
        "alpha/z.py": "abc",
        "alpha/b/one.py": "de",
        "beta/copy.py": "abc",
        "beta/notes.txt": "no code",
        "beta/celery/app.py": "held out",
        "beta/table.py": "[" + "1, " * 400 + "]",
        "beta/numbers.py": "12345\n67890\n",
        "gamma/empty.py": " \n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "gamma/latin.py").write_bytes("é".encode("latin-1"))
    return tmp_path


def test_documents_come_in_path_order_and_what_is_left_out_is_counted(folder):
    skipped = Counter()
    files = [
        path for path in find_files(folder, [".py"]) if not is_held_out(str(path.relative_to(folder)), ["celery"])
    ]
    documents = list(read_documents(folder, files, set(), skipped))
    assert documents == [Document("alpha/b/one.py", "de"), Document("alpha/z.py", "abc")]
    assert skipped == {"duplicate": 1, "long lines": 1, "mostly digits": 1, "empty": 1, "not UTF-8": 1}


def test_a_copy_of_a_held_out_text_never_reaches_training(folder):
    seen, skipped = set(), Counter()
    list(read_documents(folder, [folder / "beta/copy.py"], seen, skipped))
    names = [
        document.name for document in read_documents(folder, find_files(folder / "alpha", [".py"]), seen, skipped)
    ]
    assert names == ["alpha/b/one.py"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("celery/app.py", True),
        ("pip/_vendor/celery/app.py", True),
        ("vendor/networkx.py", True),
        ("celery_tools/app.py", False),
        ("docs/celery-notes.py", False),
    ],
)
def test_held_out_by_folder_or_file_name(name, expected):
    assert is_held_out(name, ["celery", "networkx"]) is expected


def test_ordinary_code_is_kept():
    assert reason_to_skip("def f(x):\n    return x + 1\n") is None
    assert reason_to_skip("a\0b") == "binary"


def test_pack_ends_each_document_with_the_separator():
    packed = pack([Document("x", "abc"), Document("y", ""), Document("z", "de")], by_letter, 0, 300, batch=2)
    assert packed.tokens.dtype == np.uint16
    assert packed.tokens.tolist() == [1, 2, 3, 0, 0, 4, 5, 0]
    assert packed.offsets.tolist() == [0, 4, 5, 8]
    assert packed.names == ("x", "y", "z")


def test_pack_refuses_tokens_outside_the_vocabulary():
    with pytest.raises(ValueError, match="x: token id 26 is outside the vocabulary of 20"):
        pack([Document("x", "az")], by_letter, 0, 20)
    with pytest.raises(ValueError, match=r"separator must be a token id in 0\.\.19, got 20"):
        pack([], by_letter, 20, 20)


def test_save_load_and_concatenate(tmp_path):
    parts = [pack([Document(name, name)], by_letter, 0, 200) for name in ("ab", "cde")]
    whole = concatenate(parts)
    whole.save(tmp_path / "packed")
    loaded = PackedTokens.load(tmp_path / "packed")
    assert isinstance(loaded.tokens, np.memmap)
    assert loaded.tokens.tolist() == [1, 2, 0, 3, 4, 5, 0]
    assert loaded.offsets.tolist() == [0, 3, 7]
    assert loaded.names == ("ab", "cde")


@pytest.mark.parametrize(("count", "windows"), [(5, 1), (8, 1), (9, 2), (12, 2), (13, 3)])
def test_windows_carry_one_more_token_for_the_last_label(count, windows):
    data = TokenWindows(np.arange(count, dtype=np.uint16), 4)
    assert len(data) == windows
    for index in range(windows):
        assert torch.equal(data[index], torch.arange(4 * index, 4 * index + 5))
    with pytest.raises(IndexError, match=f"window {windows} of {windows}"):
        data[windows]


def test_windows_need_enough_tokens():
    with pytest.raises(ValueError, match="windows of 4 tokens need more than 4 tokens, got 4"):
        TokenWindows(np.arange(4, dtype=np.uint16), 4)
