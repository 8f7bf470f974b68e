"""The tokenizer of a draft's folder: its own, or else its target's, or one line that says where to take it from."""

import json

import pytest
from tiny_folders import tiny_folders
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_longspec import LongSpecConfig

TEXT = "the quick brown fox"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny_folders(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def shipped(folders, tmp_path):
    """A folder as in hub_configs/: a config, and a card that names the target."""
    LongSpecConfig.from_pretrained(folders / "draft").save_pretrained(tmp_path)
    for code in tmp_path.glob("*.py"):
        code.unlink()
    (tmp_path / "card.json").write_text(json.dumps({"base_model": str(folders / "target")}))
    return tmp_path


def test_the_targets_by_the_card(folders, shipped):
    expected = AutoTokenizer.from_pretrained(folders / "target")
    found = AutoTokenizer.from_pretrained(shipped, padding_side="left")
    assert type(found) is type(expected) and found(TEXT).input_ids == expected(TEXT).input_ids
    assert found.padding_side == "left"


@pytest.mark.parametrize("names_its_class", [True, False])
def test_the_folders_own_goes_first(folders, shipped, names_its_class):
    tokenizer = AutoTokenizer.from_pretrained(folders / "target")
    tokenizer.add_tokens(["<own>"])
    tokenizer.save_pretrained(shipped)
    config = json.loads((shipped / "tokenizer_config.json").read_text())
    if not names_its_class:
        (shipped / "tokenizer_config.json").write_text(
            json.dumps({k: config[k] for k in config if k != "tokenizer_class"})
        )
    found = AutoTokenizer.from_pretrained(shipped)
    assert isinstance(found, PreTrainedTokenizerFast) and "<own>" in found.get_vocab()
    found.save_pretrained(shipped / "again")
    assert json.loads((shipped / "again" / "tokenizer_config.json").read_text())["tokenizer_class"] != "DraftTokenizer"


def test_no_tokenizer_at_all(folders, shipped):
    """One line says that the target's is meant, and why it could not be had if the card names one."""
    told = "holds no tokenizer, since a draft has its target's: AutoTokenizer.from_pretrained\\(TARGET\\)"
    with pytest.raises(OSError, match=f"{folders / 'draft'} {told}$"):
        AutoTokenizer.from_pretrained(folders / "draft")
    (shipped / "card.json").write_text(json.dumps({"base_model": "me/nowhere"}))
    with pytest.raises(OSError, match=f"{told}; me/nowhere cannot be loaded: ") as error:
        AutoTokenizer.from_pretrained(shipped)
    assert "\n" not in str(error.value)
