"""The card of a draft: complete from what it is built of, valid for the Hub's client, and its faults named."""

import dataclasses
import hashlib
import json

import pytest
import yaml
from huggingface_hub import ModelCard
from reports import report
from tiny_folders import tiny_folders
from transformers import AutoTokenizer

from hf_longspec import LongSpecConfig
from hf_longspec.hub.card import About, Source, card_faults, draft_card
from hf_longspec.vocabulary import vocabulary_sha256

ABOUT = {
    "title": "LongSpec draft for Tiny",
    "base_model": "someone/tiny",
    "base_model_revision": "0123abc",
    "vocabulary_sha256": "f" * 64,
    "license": "apache-2.0",
    "language": ["en", "code"],
    "tags": ["tiny"],
    "datasets": [],
    "source": None,
    "training": "Trained on 10 tokens.",
    "limits": ["It is tiny."],
}


@pytest.fixture
def about(tmp_path):
    (tmp_path / "card.json").write_text(json.dumps(ABOUT))
    return About.load(tmp_path / "card.json")


def test_vocabulary_hash_is_over_lines_in_the_order_of_ids(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folders(tmp_path) / "target")
    lines = [f"{i}\t{tokenizer.convert_ids_to_tokens(i)}\n" for i in range(len(tokenizer))]
    before = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert vocabulary_sha256(tokenizer) == before
    tokenizer.add_tokens(["<new>"])
    assert vocabulary_sha256(tokenizer) != before


def test_a_card_is_complete_and_valid(about, tmp_path):
    recipe = {"stages": [{"length": 1024}]}
    card = draft_card(LongSpecConfig(), about, [report()], recipe=recipe, repo_id="me/draft")
    assert card_faults(card) == []
    card.save(tmp_path / "README.md")
    read = ModelCard.load(tmp_path / "README.md")
    assert card_faults(read) == []
    assert read.data.base_model == "someone/tiny" and read.data.license == "apache-2.0"
    assert {"longspec", "tiny"} <= set(read.data.tags)
    found = {(result.dataset_name, result.metric_type): result.metric_value for result in read.data.eval_results}
    assert found == {
        ("code, context 1,024", "accept_length"): 3.5,
        ("code, context 1,024", "speed_up"): 2.0,
        ("code, context 4,096", "accept_length"): 3.25,
        ("code, context 4,096", "speed_up"): 1.5,
    }
    assert yaml.safe_load(read.text.split("```yaml\n")[1].split("```")[0]) == recipe
    assert 'from_pretrained("me/draft", trust_remote_code=True' in read.text
    assert "`hf-longspec verify me/draft`" in read.text


def test_the_lines_of_use_are_python(about):
    use = draft_card(LongSpecConfig(), about, []).text.split("```python\n")[1].split("```")[0]
    compile(use, "card", "exec")
    assert len([line for line in use.splitlines() if line.strip()]) <= 10


def test_numbers_of_a_card_are_those_of_the_report(about):
    text = draft_card(LongSpecConfig(), about, [report()]).text
    assert "| code | 1,024 | 4 | 3.50 | 3.0 – 4.0 | 10.0 | 20.0 | 2.00× | 3 / 1 / 0 |" in text
    assert "| **all** | 4,096 | 4 | 3.25 |" in text
    for told in ("hf-longspec evaluate --target tiny", "CPU, 2 threads", "torch 2.13", "434,688 bytes", "f" * 64):
        assert told in text


def test_folders_of_the_machine_stay_out_of_a_card(about):
    told = report()
    told["target"]["name"], told["draft"]["name"] = "/home/me/models/tiny", "~/drafts/draft"
    pair = "--target '/home/me/my models/tiny' --draft ~/drafts/draft"
    told["provenance"]["command"] = f"hf-longspec evaluate {pair} --task text=/home/me/books --output out/a"
    card = str(draft_card(LongSpecConfig(), about, [told]))
    assert "/home" not in card and "/drafts" not in card
    assert "evaluate --target tiny --draft draft --task text=books --output out/a" in card


def test_a_converted_draft_names_its_source(about):
    source = Source(repo_id="sail/some-draft", format="one decoder layer", note="Weights as published.")
    text = draft_card(LongSpecConfig(), dataclasses.replace(about, source=source), []).text
    assert "Converted from [sail/some-draft](https://huggingface.co/sail/some-draft) (one decoder layer)." in text


def test_what_a_card_lacks_is_named(about):
    bare = dataclasses.replace(about, vocabulary_sha256=None, limits=[], language=[])
    faults = card_faults(draft_card(LongSpecConfig(), bare, []))
    assert len(faults) == 3
    assert "language is missing" in faults[0] and "no evaluation results" in faults[1]
    assert "vocabulary is not known" in faults[2]
    empty = card_faults(ModelCard("---\nbase_model_relation: draft\nlicense: other\n---\n# Nothing\n"))
    for told in (
        "library_name",
        "pipeline_tag",
        "base_model is",
        "base_model_relation is one of adapter",
        "tags lack",
    ):
        assert any(told in fault for fault in empty), told
    assert "section 'Limits' is missing or empty" in empty


def test_a_vocabulary_may_come_from_the_report(about):
    unknown = dataclasses.replace(about, vocabulary_sha256=None)
    assert card_faults(draft_card(LongSpecConfig(), unknown, [report()])) == []
    other = dataclasses.replace(about, vocabulary_sha256="0" * 64)
    with pytest.raises(ValueError, match="to tell one vocabulary, got 0000"):
        draft_card(LongSpecConfig(), other, [report()])


def test_reports_of_another_format_are_refused(about):
    with pytest.raises(ValueError, match="version 1, got 'hf-longspec evaluation', version 9"):
        draft_card(LongSpecConfig(), about, [report() | {"version": 9}])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"colour": "red"}, "unknown colour; expected title, base_model"),
        ({"title": ...}, "missing title; expected"),
        ({"title": " "}, "expected `title` to be a text"),
        ({"language": "en"}, "expected `language` to be a list of strings, got 'en'"),
        ({"source": {"repo_id": "a/b"}}, "source: missing format, note; expected repo_id"),
        ({"license": "other"}, "the license 'other' needs `license_name`"),
    ],
)
def test_mistakes_in_card_json(tmp_path, change, message):
    data = {name: value for name, value in (ABOUT | change).items() if value is not ...}
    (tmp_path / "card.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        About.load(tmp_path / "card.json")
