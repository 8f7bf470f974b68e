"""Prompts of tasks: rows and their faults, what is cut, which bucket, chat templates, and where rows may lie."""

import json
import zipfile
from pathlib import Path

import pytest
from tiny_folders import tiny_folders
from transformers import AutoTokenizer

from hf_longspec.evaluation import rows
from hf_longspec.evaluation.plan import chosen, plan, source
from hf_longspec.evaluation.task import Wanted
from hf_longspec.evaluation.tasks import TASKS, parse_task

CHAT = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token a byte, so that tokens can be counted by hand."""
    return AutoTokenizer.from_pretrained(tiny_folders(tmp_path_factory.mktemp("pair")) / "target")


def jsonl(path, *found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


def build(task, place, wanted):
    return task.make(task, Path(place), wanted)


def texts(tokenizer, built):
    return [tokenizer.decode(sample.ids) for sample in built.samples]


def test_rows_fall_into_the_smallest_bucket_that_holds_them(tokenizer, tmp_path):
    place = jsonl(
        tmp_path / "lcc.jsonl",
        *({"context": letter * size} for letter, size in zip("abcd", (5, 10, 11, 3), strict=True)),
    )
    built = build(TASKS["lcc"], place, Wanted(tokenizer, (10, 20), 2))
    assert [(sample.context, text) for sample, text in zip(built.samples, texts(tokenizer, built), strict=True)] == [
        (10, "a" * 5),
        (10, "b" * 10),
        (20, "c" * 11),
    ]
    assert [sample.id for sample in built.samples] == ["1", "2", "3"]  # lines, without an `_id`
    assert {(sample.max_new_tokens, sample.stops) for sample in built.samples} == {(64, False)}


def test_a_long_row_loses_its_middle(tokenizer, tmp_path):
    place = jsonl(tmp_path / "repobench-p.jsonl", {"context": "abcdefghij", "input": "XY", "_id": "one"})
    (sample,) = build(TASKS["repobench-p"], place, Wanted(tokenizer, (7,), 1)).samples
    assert (tokenizer.decode(sample.ids), sample.cut, sample.id) == ("abcijXY", 5, "one")


def test_instructions_alone_may_be_too_long(tokenizer, tmp_path):
    place = jsonl(tmp_path / "gov_report.jsonl", {"context": "a" * 500})
    with pytest.raises(ValueError, match="task gov_report: a context of 20 tokens has no place"):
        build(TASKS["gov_report"], place, Wanted(tokenizer, (20,), 1))


def test_rows_that_cannot_be_cut_are_left_out_and_counted(tokenizer, tmp_path):
    place = jsonl(tmp_path / "aime.jsonl", {"problem": "1 + 1?"}, {"problem": "x" * 300})
    built = build(TASKS["aime"], place, Wanted(tokenizer, (200,), 4))
    assert len(built.samples) == 1 and built.left_out == "1 of 2 prompts are longer than 200 tokens"
    assert texts(tokenizer, built)[0].endswith("\\boxed{answer}.\n\n1 + 1?")


def test_chat_templates_are_used_where_a_task_asks(tokenizer, tmp_path, monkeypatch):
    place = jsonl(tmp_path / "rows.jsonl", {"context": "The report.", "input": "", "problem": "?"})
    wanted = Wanted(tokenizer, (400,), 1)
    plain = texts(tokenizer, build(TASKS["gov_report"], place, wanted))[0]
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    assert texts(tokenizer, build(TASKS["gov_report"], place, wanted)) == [f"[user]{plain}[assistant]"]
    assert texts(tokenizer, build(TASKS["lcc"], place, wanted)) == ["The report."]


def test_prompts_of_ones_own(tokenizer, tmp_path, monkeypatch):
    place = jsonl(tmp_path / "mine.jsonl", {"prompt": "as it is"}, {"messages": [{"role": "user", "content": "Hi"}]})
    wanted = Wanted(tokenizer, (50,), 5)
    with pytest.raises(ValueError, match="row 2: 'messages', but the target's tokenizer has no chat template"):
        build(TASKS["prompts"], place, wanted)
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    assert texts(tokenizer, build(TASKS["prompts"], place, wanted)) == ["as it is", "[user]Hi[assistant]"]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "b.md").write_text("second")
    (tmp_path / "texts" / "a.txt").write_text("first")
    built = build(TASKS["prompts"], str(tmp_path / "texts"), wanted)
    assert texts(tokenizer, built) == ["first", "second"]
    assert [sample.id for sample in built.samples] == ["texts/a.txt", "texts/b.md"]


def test_a_needle_lies_further_down_in_each_prompt(tokenizer, tmp_path):
    (tmp_path / "hay.txt").write_text("".join(f"{number:04d} " for number in range(400)))
    built = build(TASKS["needle"], f"{tmp_path / 'hay.txt'}", Wanted(tokenizer, (500, 900), 3))
    assert [sample.context for sample in built.samples] == [500, 900] * 3
    depths = []
    for sample, text in zip(built.samples, texts(tokenizer, built), strict=True):
        assert len(sample.ids) == sample.context and text.count("The number to remember is ") == 1
        hay = text.split("remember:\n\n")[1].split("\n\nWhich number")[0]
        depths.append(hay.index("The number") / len(hay.replace("The number to remember is 1234567.", "")))
    assert depths == pytest.approx([0.25, 0.25, 0.5, 0.5, 0.75, 0.75], abs=0.1)


def test_solved_problems_fill_the_context(tokenizer, tmp_path):
    found = [{"problem": f"P{number}", "solution": "s" * 20} for number in range(10)]
    place = jsonl(tmp_path / "math.jsonl", *found)
    built = build(TASKS["math"], place, Wanted(tokenizer, (200, 300), 2))
    asked = [text.rsplit("Problem: ", 1)[1] for text in texts(tokenizer, built)]
    assert asked == ["P0", "P0", "P5", "P5"]
    one = len("Problem: P1\nSolution: " + "s" * 20 + "\n\n")
    for sample, text in zip(built.samples, texts(tokenizer, built), strict=True):
        assert sample.context - one < len(sample.ids) <= sample.context
        assert f"Problem: {asked[0]}\nSolution" not in text or "P5" in asked
        assert text.count("Solution: ") == (len(sample.ids) - len(text.replace("s" * 20, ""))) // 20


@pytest.mark.parametrize(
    "content, message",
    [
        (
            '{"context": "a"}\n{"context": 3}\nnonsense\n[]\n{}\n',
            "4 of 5 rows are malformed; line 2: .* got 3; line 3: .*; and 1 more",
        ),
        (
            '{"context": "a"}\n\n{"contxt": "b"}',
            "1 of 2 rows are malformed; line 3: expected a text 'context', got None",
        ),
        ("\n", "lcc.jsonl: no rows in it"),
        (b"\xff\xfe", "lcc.jsonl is no UTF-8 text"),
        ('{"context": "\\ud800"}', "1 of 1 rows are malformed; line 1: .* surrogates not allowed"),
    ],
)
def test_malformed_rows_are_named(tmp_path, content, message):
    (tmp_path / "lcc.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        rows.read_rows(tmp_path, "lcc", ("context",))


def test_malformed_prompts_are_named(tmp_path):
    place = jsonl(tmp_path / "x.jsonl", {"prompt": "fine"}, {"messages": [{"role": "user"}]})
    with pytest.raises(ValueError, match="1 of 2 rows are malformed; line 2: expected a text 'prompt', or 'messages'"):
        rows.read_prompts(tmp_path / place)
    (tmp_path / "list.json").write_text('[{"prompt": "fine"}]')
    with pytest.raises(ValueError, match="line 1: expected a JSON object, got list"):
        rows.read_prompts(tmp_path / "list.json")


def test_a_mark_in_front_of_utf8_is_no_text(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "fine"}\r\n')
    assert rows.read_prompts(tmp_path / "x.jsonl") == [{"_id": "1", "prompt": "fine"}]


def test_rows_may_lie_in_an_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/lcc.jsonl", '{"context": "a"}\n')
    assert rows.read_rows(tmp_path / "data.zip", "lcc", ("context",)) == [{"_id": "1", "context": "a"}]
    with pytest.raises(ValueError, match=r"expected one qmsum.jsonl in it, got \[\]"):
        rows.read_rows(tmp_path / "data.zip", "qmsum", ())
    (tmp_path / "broken.zip").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="broken.zip is no zip archive"):
        rows.read_rows(tmp_path / "broken.zip", "lcc", ())
    with pytest.raises(ValueError, match="lcc.jsonl: no such file, where the rows of task lcc were expected"):
        rows.read_rows(tmp_path, "lcc", ())


def test_a_place_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected hf://datasets/OWNER/NAME/FILE, got 'hf://me/set'"):
        rows.local_path("hf://me/set")
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        rows.local_path(str(tmp_path / "nowhere"))


def test_tasks_are_chosen_by_name():
    assert parse_task("needle=a=b")[1] == "a=b"
    assert parse_task("lcc")[1].startswith("hf://datasets/THUDM/LongBench")
    assert [task.name for task, _ in chosen("held-out", ["aime"], None)] == ["code", "books", "math", "aime"]
    assert {task.max_new_tokens for task, _ in chosen("held-out", [], 7)} == {7}
    for suite, specs, message in (
        (None, [], "nothing to measure"),
        ("other", [], "unknown suite 'other'; known are held-out"),
        (None, ["lc"], "unknown task 'lc'; known are gov_report, qmsum"),
        (None, ["text"], "task text needs a file or folder: --task text=PATH"),
        ("held-out", ["code=x"], "each task can be measured once in a run, got code more"),
    ):
        with pytest.raises(ValueError, match=message):
            chosen(suite, specs, None)


def test_a_plan_goes_from_short_to_long(tokenizer, tmp_path):
    place = jsonl(tmp_path / "lcc.jsonl", {"context": "a" * 15}, {"context": "b"}, {"context": "c"})
    (tmp_path / "t.txt").write_text("z" * 100)
    made = plan(
        chosen(None, [f"lcc={place}", f"text={tmp_path / 't.txt'}"], None), Wanted(tokenizer, (10, 20), 1), tmp_path
    )
    assert [(sample.task, sample.context) for sample in made.samples] == [
        ("lcc", 10),
        ("text", 10),
        ("lcc", 20),
        ("text", 20),
    ]
    assert [source["name"] for source in made.sources] == [place, str(tmp_path / "t.txt")]


def test_a_plan_without_prompts_or_with_one_id_twice_is_refused(tokenizer, tmp_path):
    twice = jsonl(tmp_path / "twice.jsonl", {"context": "a", "_id": "x"}, {"context": "b", "_id": "x"})
    with pytest.raises(ValueError, match="an _id of its own, got 'x' twice"):
        plan(chosen(None, [f"lcc={twice}"], None), Wanted(tokenizer, (10,), 2), tmp_path)
    long = jsonl(tmp_path / "long.jsonl", {"problem": "x" * 300})
    with pytest.raises(ValueError, match="no prompts: aime: 1 of 1 prompts are longer than 100 tokens"):
        plan(chosen(None, [f"aime={long}"], None), Wanted(tokenizer, (100,), 2), tmp_path)


def test_a_source_is_told_with_its_commit_or_checksum(tmp_path):
    path = tmp_path / "snapshots" / "0123abc" / "lcc.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of the standard's own example
    place = "hf://datasets/a/b/lcc.jsonl"
    assert source(TASKS["lcc"], place, path) == {"task": "lcc", "name": place, "version": "0123abc", "sha256": digest}
    assert source(TASKS["text"], "somewhere", tmp_path) == {"task": "text", "name": "somewhere"}
