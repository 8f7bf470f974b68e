"""A recipe's section: what is refused, in one line that names the key."""

import pytest

from hf_longspec.training.data import DataSection, HeldOut, Source

JSON = {"path": "a.jsonl", "format": "json"}


def section(**values):
    return {"sources": [JSON]} | values


def test_a_section_with_all_of_its_keys():
    given = section(
        sources=[{**JSON, "kind": "chat", "loss": "assistant", "weight": 2}, {**JSON, "weight": 0.5}],
        held_out={"share": 0, "names": ["celery"]},
        min_tokens=4,
    )
    expected = DataSection(
        sources=(
            Source("a.jsonl", "json", kind="chat", loss="assistant", weight=2.0),
            Source("a.jsonl", "json", weight=0.5),
        ),
        held_out=HeldOut(names=("celery",)),
        min_tokens=4,
    )
    assert DataSection.from_dict(given) == expected
    assert [source.column for source in expected.sources] == ["messages", "text"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], r"data: expected keys and values, got \[\]"),
        ({}, "data: the key 'sources' is missing"),
        ({"sources": []}, "data: `sources` must name at least one source"),
        ({"sources": JSON}, r"data.sources: expected a list, got \{"),
        ({"sources": ["a.jsonl"]}, r"data.sources\[0\]: expected keys and values, got 'a.jsonl'"),
        (section(stremaing=True), "data: unknown key 'stremaing', did you mean 'streaming'.; keys: sources, held_out"),
        (section(held_out={"shares": 0.1}), "data.held_out: unknown key 'shares', did you mean 'share'"),
        (
            section(sources=[JSON, {**JSON, "wieght": 1}]),
            r"data.sources\[1\]: unknown key 'wieght', did you mean 'weight",
        ),
        (section(sources=[{"path": "x"}]), r"data.sources\[0\]: the key 'format' is missing"),
        (section(sources=[{**JSON, "format": "csv"}]), r"sources\[0\].format: expected one of hub, json, .*got 'csv'"),
        (section(sources=[{**JSON, "weight": "2"}]), r"data.sources\[0\].weight: expected float, got '2'"),
        (section(sources=[{**JSON, "weight": True}]), r"data.sources\[0\].weight: expected float, got True"),
        (section(sources=[{**JSON, "limit": 1.5}]), r"data.sources\[0\].limit: expected int, got 1.5"),
        (section(sources=[{**JSON, "weight": 0}]), r"data.sources\[0\]: `weight` must be positive, got 0"),
        (section(sources=[{**JSON, "loss": "assistant"}]), "`loss: assistant` needs `kind: chat`"),
        (section(sources=[{**JSON, "answer_field": "a"}]), "`answer_field` needs `kind: chat`"),
        (section(sources=[{**JSON, "chat_template": "a"}]), "`chat_template` needs `kind: chat`"),
        (section(sources=[{**JSON, "document": "package"}]), "`document: package` needs files"),
        (section(sources=[{"path": "x", "format": "text", "kind": "chat"}]), "`kind: chat` needs rows"),
        (section(sources=[JSON, {**JSON, "weight": 1}]), "give all sources a `weight`, or none"),
        (section(sources=[JSON, JSON], streaming=True), "`streaming` of several sources needs a `weight`"),
        (section(streaming=True, held_out={"names": ["a"]}), "`streaming` holds out by `held_out.share`"),
        (section(held_out={"share": 1}), r"data.held_out: `share` must be in \[0, 1\), got 1.0"),
        (section(held_out={"names": "celery"}), "data.held_out.names: expected a list, got 'celery'"),
        (section(min_tokens=1), "`min_tokens` must be at least 2, got 1"),
        (section(max_bad_share=2), r"`max_bad_share` must be in \[0, 1\], got 2.0"),
        (section(long_documents="keep"), "data.long_documents: expected one of cut, first, drop, full, got 'keep'"),
    ],
)
def test_mistakes(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        DataSection.from_dict(values)
    assert "\n" not in str(caught.value)
