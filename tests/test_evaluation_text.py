"""Texts as tokens, the places where prompts end, and HTML as text."""

import pytest
import torch

from hf_longspec.evaluation import text
from hf_longspec.evaluation.html_text import html_text


class Letters:
    """A tokenizer whose tokens are the letters a … m."""

    def __call__(self, text, verbose=True):
        return {"input_ids": [ord(letter) - ord("a") for letter in text if "a" <= letter <= "m"]}


def test_prompts_of_all_lengths_end_at_the_same_places():
    tokens = torch.arange(1000)
    assert text.places(tokens, longest=100, count=4) == [100, 400, 700, 1000]
    with pytest.raises(ValueError, match="at least 2000 tokens, got 1000"):
        text.places(tokens, longest=2000, count=4)


def test_text_is_read_in_the_order_of_paths(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.py").write_text("cd")
    (tmp_path / "a.txt").write_text("ab")
    (tmp_path / "ignored.bin").write_text("mmm")
    single = tmp_path / "single.xyz"
    single.write_text("e")
    assert text.read_tokens([tmp_path / "b", tmp_path / "a.txt", single], Letters()).tolist() == [2, 3, 0, 1, 4]
    assert text.read_tokens([tmp_path], Letters()).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="expected files, or folders with .py"):
        text.read_tokens([tmp_path / "none"], Letters())
    (tmp_path / "empty").write_text("")
    with pytest.raises(ValueError, match="expected text, got empty files"):
        text.read_tokens([tmp_path / "empty"], Letters())


def test_html_is_its_main_part_a_line_a_block():
    page = (
        "<html><head><title>no</title></head><body><nav>no</nav><main><h1>One\ntwo</h1>"
        "<p>three <b>four</b></p>\n<pre>  five\n    six</pre></main><p>no</p></body></html>"
    )
    assert html_text(page) == "One two\nthree four\n  five\n    six\n"
    assert html_text("<body><p>all</p><script>no</script>of it</body>") == "all\nof it\n"
