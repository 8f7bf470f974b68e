"""What a text or file becomes: special tokens at its ends, copies and empty ones left out."""

from collections import Counter

import pytest
from byte_tokenizer import END, TURN, byte_tokenizer, ids
from tokenizers.processors import TemplateProcessing

from hf_longspec.training.data.documents import read_documents
from hf_longspec.training.data.report import SourceReport
from hf_longspec.training.data.section import DataSection, HeldOut, Source


def bos_tokenizer():
    """Begins texts with `<turn>`, as llama's tokenizers do with their BOS."""
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<turn>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<turn> $A", special_tokens=[("<turn>", TURN)]
    )
    return tokenizer


def read(folder, tokenizer, held_out=(), **source):
    report = SourceReport("x", max_bad_share=0)
    section = DataSection((Source(str(folder), "text", **source),), held_out=HeldOut(names=tuple(held_out)))
    documents = read_documents(section.sources[0], section, tokenizer, report)
    return {document.name: document.ids.tolist() for document in documents}, report


@pytest.fixture
def folder(tmp_path):
    for name, text in {"p/a.py": "a", "p/b.py": "b<end>", "q/a.py": "a", "q/c.py": "c", "q/d.py": " "}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_each_file_begins_and_ends_as_a_document(folder):
    documents, report = read(folder, bos_tokenizer())
    expected = {"p/a.py": "<turn>a<end>", "p/b.py": "<turn>b<end>", "q/c.py": "<turn>c<end>"}
    assert documents == {name: ids(text) for name, text in expected.items()}
    assert (report.rows, report.documents, report.tokens) == (5, 3, 9)
    assert report.left_out == Counter({"duplicate": 1, "empty": 1})


def test_only_a_package_begins_with_a_bos(folder):
    documents, _ = read(folder, bos_tokenizer(), document="package")
    assert documents == {"p/a.py": [TURN, 97, END], "p/b.py": [98, END], "q/c.py": [TURN, 99, END]}


def test_of_copies_the_held_out_one_is_kept(folder):
    documents, _ = read(folder, bos_tokenizer(), held_out=["q"], document="package")
    assert documents == {"q/a.py": [TURN, 97, END], "q/c.py": [99, END], "p/b.py": [TURN, 98, END]}


def test_a_tokenizer_without_an_end(folder):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(
        ValueError, match="the tokenizer has no `eos_token` to end a text with; name another token as `separator`"
    ):
        read(folder, tokenizer)
