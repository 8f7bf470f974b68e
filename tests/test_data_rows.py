"""Readers: every row has a name, bad ones are counted, broken files are one error that names the file."""

import gzip
import json
import lzma
from collections import Counter

import datasets
import pytest

from hf_longspec.training.data.files import text_rows
from hf_longspec.training.data.report import SourceReport
from hf_longspec.training.data.rows import Row, json_rows
from hf_longspec.training.data.section import Source
from hf_longspec.training.data.tables import hub_rows, parquet_rows

LINES = '{"text": "one"}\n\n{"text": 2}\n["three"]\n{"text": "four"\n{"text": "fünf"}\n'


def report():
    return SourceReport("source", max_bad_share=1)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".bz2"])
def test_json_lines_are_named_by_file_and_line(tmp_path, suffix):
    import bz2

    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}[suffix]
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(pack(LINES.encode()))
    found = report()
    rows = list(json_rows(file, "a", Source(str(file), "json"), found))
    assert rows == [Row("a:1", {"text": "one"}), Row("a:3", {"text": 2}), Row("a:6", {"text": "fünf"})]
    assert (found.rows, found.bad) == (5, 2)
    assert found.bad_rows == [
        "a:4: expected an object, got list",
        "a:5: no JSON: Expecting ',' delimiter at column 16",
    ]


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
@pytest.mark.parametrize("damage", ["cut off", "scrambled", "not packed"])
def test_a_broken_archive_is_named(tmp_path, suffix, damage):
    import random

    lines = "".join(json.dumps({"text": random.Random(i).random()}) + "\n" for i in range(2000)).encode()
    whole = {".gz": gzip.compress, ".xz": lzma.compress}[suffix](lines)
    middle = len(whole) // 2
    data = {
        "cut off": whole[:middle],
        "scrambled": whole[:middle] + bytes(64) + whole[middle + 64 :],
        "not packed": b'{"text": "plain"}\n',
    }[damage]
    file = tmp_path / f"shard.jsonl{suffix}"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"shard.jsonl{suffix}: broken file") as caught:
        list(json_rows(file, "shard", Source(str(file), "json"), report()))
    assert "\n" not in str(caught.value)


def test_json_lines_that_are_not_utf8(tmp_path):
    file = tmp_path / "latin.jsonl"
    file.write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(ValueError, match="latin.jsonl: broken file: line 2 is not UTF-8"):
        list(json_rows(file, "latin", Source(str(file), "json"), report()))


def test_parquet(tmp_path):
    file = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"text": ["one", None], "id": [1, 2]}).to_parquet(file)
    rows = list(parquet_rows(file, "a", Source(str(file), "parquet"), report()))
    assert rows == [Row("a:0", {"text": "one"}), Row("a:1", {"text": None})]
    with pytest.raises(ValueError, match=r"a.parquet: expected a column 'body', got text, id; set `field`"):
        list(parquet_rows(file, "a", Source(str(file), "parquet", field="body"), report()))


@pytest.mark.parametrize("damage", ["cut off", "scrambled"])
def test_a_broken_parquet_file_is_named(tmp_path, damage):
    file = tmp_path / "shard.parquet"
    datasets.Dataset.from_dict({"text": [str(i) * 7 for i in range(2000)]}).to_parquet(file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-100] if damage == "cut off" else whole[:4] + bytes(400) + whole[404:])
    with pytest.raises(ValueError, match="shard.parquet: broken file"):
        list(parquet_rows(file, "shard", Source(str(file), "parquet"), report()))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_that_looks_like_a_dataset(tmp_path, streaming):
    (tmp_path / "hub/data").mkdir(parents=True)
    lines = "".join(json.dumps({"text": f"t{i}", "other": i}) + "\n" for i in range(3))
    (tmp_path / "hub/data/train-00000.jsonl").write_text(lines)
    source = Source(str(tmp_path / "hub"), "hub")
    expected = [Row(f"train:{i}", {"text": f"t{i}"}) for i in range(3)]
    assert list(hub_rows(source, report(), streaming)) == expected
    with pytest.raises(ValueError, match="hub: expected a column 'body', got text, other"):
        list(hub_rows(Source(source.path, "hub", field="body"), report(), streaming))
    with pytest.raises(ValueError, match="hub: cannot be loaded: .*test"):
        list(hub_rows(Source(source.path, "hub", split="test"), report(), streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_shard_of_a_dataset(tmp_path, streaming):
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_dict({"text": ["one"] * 9}).to_parquet(tmp_path / "hub/train.parquet")
    whole = (tmp_path / "hub/train.parquet").read_bytes()
    (tmp_path / "hub/train.parquet").write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"hub: cannot be (loaded|read).*"):
        list(hub_rows(Source(str(tmp_path / "hub"), "hub"), report(), streaming))


def test_a_dataset_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match="missing: cannot be loaded: "):
        list(hub_rows(Source(str(tmp_path / "missing"), "hub"), report(), False))


@pytest.fixture
def folder(tmp_path):
    for name, text in {
        "alpha/z.py": "abc",
        "alpha/b/one.py": "de",
        "beta/notes.txt": "no code",
        "beta/celery/app.py": "held out",
        "beta/table.py": "[" + "1, " * 400 + "]",
        "beta/numbers.py": "12345\n67890\n",
        "beta/binary.py": "a\0b",
        "gamma/empty.py": " \n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "gamma/latin.py").write_bytes("é".encode("latin-1"))
    return tmp_path


def test_files_come_in_path_order_and_what_is_left_out_is_counted(folder):
    found = report()
    rows = list(text_rows(Source(str(folder), "text"), found, lambda name: "celery" in name))
    assert rows == [Row("beta/celery/app.py", "held out"), Row("alpha/b/one.py", "de"), Row("alpha/z.py", "abc")]
    assert found.left_out == Counter({"long lines": 1, "mostly digits": 1, "binary": 1, "empty": 1})
    assert (found.rows, found.bad_rows) == (8, ["gamma/latin.py: not UTF-8 (byte 0)"])


def test_a_single_file_is_read_whatever_its_ending(folder):
    file = folder / "beta/notes.txt"
    assert list(text_rows(Source(str(file), "text"), report(), lambda name: False)) == [Row("notes.txt", "no code")]


@pytest.mark.parametrize(
    ("path", "message"),
    [("none", "none: no such file or folder"), ("beta", r"beta: expected files that end with \.c, got none")],
)
def test_folders_without_files(folder, path, message):
    with pytest.raises(ValueError, match=message):
        list(text_rows(Source(str(folder / path), "text", suffixes=(".c",)), report(), lambda name: False))


def test_too_many_bad_rows_stop_the_run():
    early = SourceReport("s.jsonl", max_bad_share=0.01, rows=500)
    for row in range(10):
        early.bad_row(f"s.jsonl:{row}", "no JSON")
    with pytest.raises(
        ValueError, match=r"11 bad rows of 500 are more than `max_bad_share` \(0.01\): s.jsonl:0: no JSON"
    ):
        early.bad_row("s.jsonl:10", "no JSON")  # 1 % of 1000 is reached, the least that is judged by
    late = SourceReport("s.jsonl", max_bad_share=0.1, rows=20)
    late.bad_row("s.jsonl:1", "no JSON")
    late.bad_row("s.jsonl:2", "no JSON")
    late.finish()
    late.bad_row("s.jsonl:3", "no JSON")
    with pytest.raises(ValueError, match="3 bad rows of 20 are more than"):
        late.finish()
    with pytest.raises(ValueError, match="s.jsonl: expected rows, got none"):
        SourceReport("s.jsonl", max_bad_share=1).finish()
