"""From a section to samples: what is in them, that they are the same each time, and how sources are mixed."""

import json
from collections import Counter
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from byte_tokenizer import END, byte_tokenizer, ids
from torch.utils.data import DataLoader

from hf_longspec.training.data import DataSection, build_datasets
from hf_longspec.training.data.mix import shares_of, shuffled_sources

LENGTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows as JSON Lines and Parquet (half each), two packages of code, and chats."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.RandomState(0)
    texts = ["".join(random.choice(list("abcdefgh"), random.randint(1, 70))) for _ in range(200)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "hub").mkdir()
    datasets.Dataset.from_dict({"text": texts[:100]}).to_parquet(folder / "hub/train-00000-of-00002.parquet")
    datasets.Dataset.from_dict({"text": texts[100:]}).to_parquet(folder / "hub/train-00001-of-00002.parquet")
    for name, text in {"p/a.py": "Pa" * 10, "p/z/b.py": "Qb" * 10, "q/c.py": "Rc" * 10, "q/celery.py": "Sd"}.items():
        (folder / "code" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "code" / name).write_text(text)
    chat = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]
    (folder / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    return folder


def build(folder, *sources, seed=0, length=LENGTH, tokenizer=None, held_out_length=None, **rules):
    named = [{**source, "path": str(folder / source["path"])} for source in sources]
    section = DataSection.from_dict({"sources": named, "cache": str(folder / "cache")} | rules)
    return build_datasets(section, tokenizer or byte_tokenizer(), length, seed, held_out_length)


ROWS = {"path": "rows.jsonl", "format": "json"}
CODE = {"path": "code", "format": "text"}


def texts_of(samples):
    """The documents (pieces) of samples as token lists, in order; they hold no 0, as the filling does."""
    found = []
    for sample in samples:
        tokens, documents = sample["input_ids"].numpy(), sample["document_ids"].numpy()
        for number in range(documents.max() + 1):
            chosen = documents == number
            if tokens[chosen].any():
                found.append(tokens[chosen].tolist())
    return found


def same(one, two):
    return all(torch.equal(one[key], two[key]) for key in ("input_ids", "document_ids", "positions", "loss_mask"))


def bytes_of(samples):
    return sorted(sample["input_ids"].numpy().tobytes() for sample in samples)


def test_all_rows_are_there_once(folder):
    train, held_out = build(folder, ROWS)
    rows = [json.loads(line)["text"] for line in (folder / "rows.jsonl").read_text().splitlines()]
    expected = Counter()
    for text in set(rows):
        whole = [*ids(text), END]
        expected.update(tuple(whole[start : start + LENGTH]) for start in range(0, len(whole), LENGTH))
    found = Counter(map(tuple, texts_of(train[index] for index in range(len(train)))))
    assert found == expected
    assert len(held_out) == 0
    record = train.summary["sources"][0]
    assert record["rows"] == 200 and record["documents"] + record["left_out"].get("duplicate", 0) == 200
    assert record["samples"] == len(train)


def test_sources_that_hold_the_same_give_the_same(folder):
    hub = {"path": "hub", "format": "hub"}
    parquet = {"path": "hub", "format": "parquet"}
    first, *others = [build(folder, source, seed=3)[0] for source in (ROWS, hub, parquet)]
    for other in others:
        assert len(other) == len(first) and all(same(first[index], other[index]) for index in range(len(first)))


@pytest.mark.parametrize("source", [ROWS, {"path": "hub", "format": "hub"}, CODE | {"document": "package"}])
def test_a_stream_gives_the_same_samples(folder, source):
    rules = {"held_out": {"share": 0.3}}
    train, held_out = build(folder, source, length=16, **rules)
    stream, its_held_out = build(folder, source, length=16, streaming=True, shuffle_buffer=5, **rules)
    once = list(islice(stream, len(train)))
    assert bytes_of(once) == bytes_of(train[index] for index in range(len(train)))
    assert bytes_of(its_held_out) == bytes_of(held_out)
    again = list(islice(stream, 3 * len(train)))
    assert all(same(one, two) for one, two in zip(once, again, strict=False))
    assert bytes_of(again[len(train) : 2 * len(train)]) == bytes_of(once)  # it begins again


def test_held_out_documents_are_never_trained_on(folder):
    train, held_out = build(folder, ROWS, held_out={"share": 0.2, "windows": 1000}, long_documents="drop")
    whole = build(folder, ROWS, long_documents="drop")[0]
    mine, theirs, all_of_them = (
        {tuple(text) for text in texts_of(data[index] for index in range(len(data)))}
        for data in (train, held_out, whole)
    )
    assert mine and theirs and not mine & theirs
    assert mine | theirs == all_of_them
    assert [len(build(folder, ROWS, held_out={"share": 0.2, "windows": most})[1]) for most in (1, 3)] == [1, 3]


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_samples_may_be_longer_than_all_texts_of_a_source(folder, streaming):
    """CODE has packages of 42 and of 20 characters and an end each, no text of ROWS is longer than 70."""
    sources = ROWS | {"weight": 0.5}, CODE | {"document": "package", "weight": 0.5}
    rules = {"held_out": {"share": 0.2, "names": ["p"], "windows": 1000}, "long_documents": "full"}
    rules |= {"streaming": True, "shuffle_buffer": 5} if streaming else {}
    train, held_out = build(folder, *sources, length=16, held_out_length=36, **rules)
    assert bytes_of(islice(train, 20)) == bytes_of(islice(build(folder, *sources, length=16, **rules)[0], 20))
    lengths = {len(sample["input_ids"]) for sample in held_out}
    assert lengths == {36} and held_out.summary["length"] == 36
    nothing = build(folder, *sources, length=16, held_out_length=90, **rules)[1]
    assert len(nothing) == 0 and nothing.summary["length"] == 90


def test_a_package_is_one_document_and_a_held_out_file_is_not_in_it(folder):
    train, held_out = build(folder, CODE | {"document": "package"}, length=100, held_out={"names": ["celery"]})
    p, q = [*ids("Pa" * 10), END, *ids("Qb" * 10), END], [*ids("Rc" * 10), END]
    assert texts_of([train[0]]) == [p, q]
    assert texts_of([held_out[0]]) == [[*ids("Sd"), END]]


def test_chats_learn_the_assistants_turns(folder):
    chats = {"path": "chats.jsonl", "format": "json", "kind": "chat"}
    for loss, learned in (("assistant", "because<end>"), ("all", "u:why?<end>\n<turn>a:because<end>\n")):
        train, _ = build(folder, chats | {"loss": loss}, length=64)
        sample = train[0]
        assert sample["input_ids"][sample["loss_mask"]].tolist() == ids(learned)


@pytest.mark.parametrize("streaming", [False, True])
def test_order_depends_on_the_seed_alone_and_workers_change_nothing(folder, streaming):
    sources = [ROWS | {"weight": 3}, CODE | {"weight": 1}]
    first, second, other = (build(folder, *sources, seed=seed, streaming=streaming)[0] for seed in (1, 1, 2))
    taken = [[sample for _, sample in zip(range(40), data, strict=False)] for data in (first, second, other)]
    assert all(same(one, two) for one, two in zip(*taken[:2], strict=True))
    assert not all(same(one, two) for one, two in zip(taken[0], taken[2], strict=True))
    worked = islice(DataLoader(first, batch_size=None, num_workers=1 if streaming else 2), 40)
    assert all(same(one, two) for one, two in zip(taken[0], worked, strict=True))
    skipped = islice(skip_first_batches(DataLoader(first, batch_size=4), 5), 5)
    resumed = [{key: value[row] for key, value in batch.items()} for batch in skipped for row in range(4)]
    assert all(same(one, two) for one, two in zip(taken[0][20:], resumed, strict=True))


def test_streams_have_one_epoch_and_one_worker(folder):
    stream, _ = build(folder, ROWS, streaming=True)
    stream.set_epoch(0)
    with pytest.raises(ValueError, match="a stream has one endless epoch, got epoch 1"):
        stream.set_epoch(1)
    with pytest.raises(ValueError, match="streaming needs `dataloader_num_workers` of 0 or 1, got 2"):
        next(iter(DataLoader(stream, batch_size=None, num_workers=2)))


def test_weights_hold_in_each_epoch_and_no_sample_comes_twice_before_all_have_come(folder):
    train, _ = build(folder, ROWS | {"weight": 1}, CODE | {"weight": 3})
    rows, code = train.sources
    total = len(rows) + len(code)
    assert len(train) == total and train.counts.tolist() == [round(total / 4), total - round(total / 4)]
    code_of = {code[index]["input_ids"].numpy().tobytes() for index in range(len(code))}
    seen = Counter()
    for epoch in range(4):
        train.set_epoch(epoch)
        keys = [train[index]["input_ids"].numpy().tobytes() for index in range(total)]
        assert sum(key in code_of for key in keys) == train.counts[1]
        seen.update(keys)
    times = [seen[rows[index]["input_ids"].numpy().tobytes()] for index in range(len(rows))]
    assert set(times) <= {4 * int(train.counts[0]) // len(rows), 4 * int(train.counts[0]) // len(rows) + 1}
    with pytest.raises(IndexError, match=f"sample {total} of {total}"):
        train[total]


def test_a_stream_holds_its_weights_in_every_thousand(folder):
    stream, _ = build(folder, ROWS | {"weight": 2}, CODE | {"weight": 1}, streaming=True, length=64)
    is_code = [not set(b"PQRS").isdisjoint(sample["input_ids"].tolist()) for sample in islice(stream, 1000)]
    assert is_code.count(True) == 333


def test_shares():
    assert shares_of([1, 1, 2], 10).tolist() == [3, 2, 5]
    assert shares_of([50, 150], 200).tolist() == [50, 150]
    assert sorted(shuffled_sources(np.array([2, 3]), (0, 1)).tolist()) == [0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="a source has less than one of 100 samples by its weight"):
        shares_of([1, 999], 100)


def test_the_cache_is_used_until_a_file_or_the_tokenizer_changes(folder):
    build(folder, ROWS)
    count = len(list((folder / "cache").iterdir()))
    build(folder, ROWS | {"weight": 2.0}, seed=5, length=16)
    assert len(list((folder / "cache").iterdir())) == count
    (folder / "more.jsonl").write_text('{"text": "one"}\n')
    more = {"path": "more.jsonl", "format": "json"}
    assert len(build(folder, more)[0]) == 1
    (folder / "more.jsonl").write_text('{"text": "one"}\n{"text": "' + "two" * 20 + '"}\n')
    assert build(folder, more)[0].summary["sources"][0]["documents"] == 2
    other = byte_tokenizer()
    other.eos_token = "<turn>"
    build(folder, more, tokenizer=other)
    assert len(list((folder / "cache").iterdir())) == count + 3


@pytest.mark.parametrize(
    ("source", "rules", "message"),
    [
        ({"path": "none.jsonl", "format": "json"}, {}, "none.jsonl: no such file or folder"),
        (ROWS | {"field": "body"}, {}, "max_bad_share.*rows.jsonl:1: no 'body', only text; rows.jsonl:2"),
        (ROWS | {"kind": "chat", "field": "text", "loss": "assistant"}, {}, "rows.jsonl:1: no turn of an assistant"),
        (
            ROWS,
            {"min_tokens": 1000},
            "nothing to train on in samples of 32 tokens: .*'shorter than min_tokens'",
        ),
        (ROWS, {"separator": "<none>"}, "`separator`: the tokenizer has no token '<none>'"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_mistakes(folder, source, rules, message, streaming):
    with pytest.raises(ValueError, match=message) as caught:
        next(iter(build(folder, source, streaming=streaming, **rules)[0]))
    assert "\n" not in str(caught.value)


def test_samples_need_two_tokens(folder):
    with pytest.raises(ValueError, match="expected samples of at least 2 tokens, got 1"):
        build(folder, ROWS, length=1)
