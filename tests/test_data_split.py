"""The held-out split: by package, name or content, and always the same."""

import hashlib

import numpy as np
import pytest

from hf_longspec.training.data.section import HeldOut, Source
from hf_longspec.training.data.split import group_key, in_share, is_held_out, is_named
from hf_longspec.training.data.store import Document

FILES, PACKAGES = Source("x", "text"), Source("x", "text", document="package")


def document(name, *ids, mask=None):
    return Document(name, np.array(ids, dtype=np.uint16), None if mask is None else np.array(mask, dtype=bool))


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
def test_by_folder_or_file_name(name, expected):
    assert is_named(name, ["celery", "networkx"]) is expected
    for source in (FILES, PACKAGES):
        assert is_held_out(document(name, 1), source, HeldOut(names=("celery", "networkx"))) is expected


def test_the_share_is_the_lowest_hashes():
    keys = [str(number).encode() for number in range(2000)]
    held = {key for key in keys if in_share(key, 0.1)}
    assert held < {key for key in keys if in_share(key, 0.2)}
    lowest = sorted(keys, key=lambda key: hashlib.sha256(key).hexdigest())[: len(held)]
    assert held == set(lowest) and 150 < len(held) < 250
    assert not any(in_share(key, 0.0) for key in keys)


def test_a_package_stands_on_one_side():
    held_out = HeldOut(share=0.5)
    sides = {
        package: {is_held_out(document(f"p{package}/{file}.py", file), PACKAGES, held_out) for file in range(5)}
        for package in range(40)
    }
    assert all(len(side) == 1 for side in sides.values())
    assert set.union(*sides.values()) == {False, True}


def test_a_document_is_told_by_its_tokens_whatever_its_name_and_their_type():
    held_out = HeldOut(share=0.5)
    for ids in range(40):
        one = is_held_out(document("a", ids, 7), FILES, held_out)
        two = is_held_out(Document("b", np.array([ids, 7], dtype=np.uint32)), FILES, held_out)
        assert one is two


def test_answers_to_one_prompt_stand_on_one_side():
    held_out = HeldOut(share=0.5)
    for prompt in range(40):
        sides = {is_held_out(document("a", prompt, 7, answer, mask=[0, 0, 1]), FILES, held_out) for answer in range(5)}
        assert len(sides) == 1


def test_neighbours_of_a_package_and_a_side_are_one_document():
    names = ["a/1.py", "a/b/2.py", "c.py", "d/3.py"]
    assert [group_key(document(name), False, PACKAGES, 0)[1] for name in names] == ["a", "a", "c.py", "d"]
    assert group_key(document("a/1.py"), True, PACKAGES, 0) != group_key(document("a/1.py"), False, PACKAGES, 0)
    assert group_key(document("a/1.py"), False, FILES, 0) != group_key(document("a/2.py"), False, FILES, 1)
