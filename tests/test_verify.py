"""Whether a draft's code is that of a release: told of every file, in a folder and on the Hub, and nothing is run."""

import json
import os
import shutil

import pytest
from helpers import is_one_line, tiny_draft, tiny_target
from hub_folders import REPO, client, connect, server
from hub_server import Drop
from typer.testing import CliRunner

from hf_longspec import cli
from hf_longspec.hub import releases
from hf_longspec.hub.listing import list_files
from hf_longspec.hub.push import push
from hf_longspec.hub.releases import Release
from hf_longspec.hub.verify import Verdict, verify

runner = CliRunner()
OURS = releases.present_files()
OTHER = "0" * 64
# The second has the files of this installation, the first another tree and one file that went.
KNOWN = {
    "1.0": Release("2026-01-01", OURS | {"tree_longspec.py": OTHER, "sharing_longspec.py": OTHER}),
    "1.1": Release(None, OURS),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "draft"
    tiny_draft(tiny_target("llama")).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy, to be changed."""
    return shutil.copytree(saved, tmp_path / "draft")


@pytest.fixture
def known(monkeypatch):
    """The command knows the releases of these tests."""
    monkeypatch.setattr(releases, "known", lambda: dict(KNOWN))


@pytest.fixture
def hub(monkeypatch, tmp_path_factory, saved, known):
    with server() as running:
        connect(monkeypatch, running.url, tmp_path_factory.mktemp("cache"))
        push(saved, REPO)
        running.requests.clear()
        yield running


def check(folder, known=KNOWN):
    return verify(list_files(str(folder)), known)


def strange(found):
    """Files that are not as a release has them."""
    return {file.name: file.verdict for file in found.files if file.verdict is not Verdict.released}


def change(folder, name="config.json", **entries):
    """Give a config these entries, which `None` takes away."""
    path = folder / name
    config = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({key: value for key, value in (config | entries).items() if value is not None}))


def test_what_save_pretrained_writes_is_the_release(folder):
    found = check(folder)
    assert found.good and found.release == "1.1" and found.notes == ()
    assert {file.name for file in found.files} == set(OURS)
    assert {file.releases for file in found.files} == {("1.0", "1.1"), ("1.1",)}


def test_a_byte_that_differs_a_file_more_and_one_less(folder):
    path = folder / "cache_longspec.py"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n", 1))
    (folder / "verification_longspec.py").unlink()
    (folder / "setup.py").write_text("")
    (folder / "deep").mkdir()
    shutil.copy(folder / "tree_longspec.py", folder / "deep")
    found = check(folder)
    assert not found.good and found.release == "1.1"
    assert strange(found) == {
        "cache_longspec.py": Verdict.differs,
        "verification_longspec.py": Verdict.missing,
        "setup.py": Verdict.unknown,
        "deep/tree_longspec.py": Verdict.unknown,
    }


def test_the_older_release(folder):
    """It is named where all files are its own; a file that only the newer one has makes the code neither's."""
    known = {"1.0": KNOWN["1.1"], "1.1": Release(None, OURS | {"tree_longspec.py": OTHER})}
    assert check(folder, known).good and check(folder, known).release == "1.0"
    known["1.0"] = Release(None, OURS | {"cache_longspec.py": OTHER})
    found = check(folder, known)
    assert found.mixed and not found.good and strange(found) == {}


def test_nothing_of_any_release(folder):
    found = check(folder, {"1.0": Release(None, dict.fromkeys(OURS, OTHER))})
    assert found.release is None and set(strange(found).values()) == {Verdict.differs}
    assert set(strange(check(folder, {})).values()) == {Verdict.unknown}


@pytest.mark.parametrize(
    "name, entries, told",
    [
        ("config.json", {"auto_map": {"AutoModel": "other/repo--m.X"}}, "auto_map: other/repo--m.X: code of another"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "a/b--t.T"]}}, "a/b--t.T: code of another"),
        ("config.json", {"text_config": {"auto_map": {"AutoConfig": "a/b--c.C"}}}, "a/b--c.C: code of another"),
        ("config.5.0.0.json", {"auto_map": {"AutoModel": "a/b--m.X"}}, "config.5.0.0.json, auto_map: a/b--m.X"),
        ("config.json", {"auto_map": {"AutoModel": "deep/m.X"}}, "deep/m.X: there is no such file here"),
        ("config.json", {"auto_map": {"AutoModel": "/tmp/m.X"}}, "/tmp/m.X: there is no such file here"),
        ("config.json", {"custom_pipelines": {"x": {"impl": "a/b--p.P", "pt": ["AutoModel"]}}}, "a/b--p.P: code"),
        ("config.json", {"attn_implementation": {"": "a/kernel"}}, "a/kernel: kernels of another repository"),
        ("adapter_config.json", {"base_model_name_or_path": "a/b"}, "is loaded in the draft's place"),
    ],
)
def test_code_that_a_config_names_elsewhere(folder, name, entries, told):
    change(folder, name, **entries)
    found = check(folder)
    assert not found.good and strange(found) == {}
    assert len(found.elsewhere) == 1 and told in found.elsewhere[0]


@pytest.mark.parametrize("data", [b"{", b"\xff", b"[" * 100_000])
def test_a_config_that_cannot_be_read(folder, data):
    (folder / "tokenizer_config.json").write_bytes(data)
    assert "tokenizer_config.json is no JSON" in check(folder).elsewhere[0]


def test_code_elsewhere_alone(tmp_path):
    change(tmp_path, auto_map={"AutoModel": "other/repo--m.X"})
    found = check(tmp_path)
    assert not found.good and found.files == () and len(found.elsewhere) == 1


def test_links(folder, tmp_path):
    """Whatever a link leads to is read; a folder behind one is not."""
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.move(folder / "tree_longspec.py", outside)
    (folder / "tree_longspec.py").symlink_to(outside / "tree_longspec.py")
    found = check(folder)
    assert found.good and "tree_longspec.py is a link out of the folder" in found.notes[0]
    (folder / "more").symlink_to(outside)
    (folder / "cache_longspec.py").unlink()
    (folder / "cache_longspec.py").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.py")
    found = check(folder)
    assert "more is a link to a folder" in found.elsewhere[0]
    assert strange(found) == {"cache_longspec.py": Verdict.unreadable, "pipe.py": Verdict.unreadable}


def test_what_else_could_run_is_noted(folder):
    for name in ("pytorch_model.bin", "helper.so"):
        (folder / name).write_bytes(b"")
    found = check(folder)
    assert found.good and "helper.so is a program" in found.notes[0] and "may be a pickle" in found.notes[1]


def run(*arguments):
    """Exit code, lines of both outputs, and what the last line of standard output holds."""
    result = runner.invoke(cli.app, ["verify", *map(str, arguments)])
    lines = result.stdout.splitlines()
    return result, lines, json.loads(lines[-1]) if result.exit_code < 2 and lines else None


def test_the_command(folder, known):
    result, lines, told = run(folder)
    assert result.exit_code == 0 and result.stderr == ""
    assert [line.split() for line in lines[:-2]] == [[name, "1.1"] for name in OURS]
    assert lines[-2] == (
        f"all {len(OURS)} code files are those of hf-longspec 1.1 "
        "(not released yet: as in this installation, and may still change)"
    )
    assert told["verified"] and told["release"] == "1.1" and told["released"] is None and told["revision"] is None
    (folder / "a\nb.py").write_text("")
    (folder / "tree_longspec.py").unlink()
    change(folder, auto_map={"AutoModel": "other/repo--m.X"})
    result, lines, told = run(folder)
    assert result.exit_code == 1 and not told["verified"]
    assert ["'a\\nb.py'", "unknown", "file"] in [line.split() for line in lines]
    assert ["tree_longspec.py", "missing"] in [line.split() for line in lines]
    assert told["files"]["a\nb.py"] == "unknown file" and told["files"]["cache_longspec.py"] == ["1.0", "1.1"]
    assert result.stderr.splitlines() == [
        "hf-longspec: config.json, auto_map: other/repo--m.X: code of another repository",
        f"hf-longspec: 2 of {len(OURS) + 1} code files are not as a release has them "
        "(known: 1.0, 1.1; a newer hf-longspec may know more)",
    ]


def test_mixed_releases(folder, monkeypatch):
    mixed = {"1.0": KNOWN["1.0"], "1.1": Release("2026-02-02", OURS | {"cache_longspec.py": OTHER})}
    monkeypatch.setattr(releases, "known", lambda: mixed)
    result, lines, told = run(folder)
    assert result.exit_code == 1 and not told["verified"] and told["release"] == "1.1"
    assert result.stderr == "hf-longspec: files of several releases; no release has them all\n"
    assert ["cache_longspec.py", "1.0"] in [line.split() for line in lines]


def test_mistakes_end_in_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    mistakes = {
        (tmp_path / "nowhere",): "nowhere: no such folder",
        (folder / "config.json",): "is a file; expected the folder of a draft",
        (folder, "--revision", "v1"): "is a folder, which has no revision 'v1'",
        ("not a name",): "Repo id must use alphanumeric chars",
        ("me/draft",): "me/draft: no such folder, and offline mode is on",
    }
    for path in folder.glob("*.py"):
        path.unlink()
    change(folder, auto_map=None)
    mistakes[folder,] = "holds no .py files"
    for arguments, message in mistakes.items():
        result, _, _ = run(*arguments)
        assert result.exit_code == 2 and is_one_line(result.stderr) and message in result.stderr, result.output


def test_a_repository(hub, saved, tmp_path):
    """Code and configs are downloaded, weights are not; a revision is a branch, a tag or a commit."""
    first = hub.store.repos[REPO].branches["main"]
    result, lines, told = run(REPO)
    assert result.exit_code == 0 and told["revision"] == first and lines[0] == f"{REPO} at {first}"
    asked = {path.rpartition("/")[2] for _, path in hub.requests if "/resolve/" in path}
    assert asked == {*OURS, "config.json", "generation_config.json"} & {path.name for path in saved.iterdir()}
    client(hub).create_tag(REPO, tag="v1")
    code = (saved / "tree_longspec.py").read_bytes()
    (tmp_path / "tree_longspec.py").write_bytes(code + b"\nraise SystemExit('it was run')\n")
    (tmp_path / "[a].py").write_bytes(b"")
    push(tmp_path, REPO)
    result, _, told = run(REPO)
    assert result.exit_code == 1 and told["files"]["tree_longspec.py"] == "differs from every known release"
    assert told["files"]["[a].py"] == "unknown file"
    for revision in ("v1", first):
        result, _, told = run(REPO, "--revision", revision)
        assert result.exit_code == 0 and told["revision"] == first


def test_a_repository_that_cannot_be_had(hub):
    for arguments, message in {
        ("me/none",): "me/none: no such folder, and no repository on the Hub that you may see",
        (REPO, "--revision", "v9"): "me/draft: no such revision 'v9'",
    }.items():
        result, _, _ = run(*arguments)
        assert result.exit_code == 2 and is_one_line(result.stderr) and message in result.stderr, result.output
    hub.fault("GET", "/api/models/", Drop())
    result, _, _ = run(REPO)
    assert result.exit_code == 1 and is_one_line(result.stderr), result.output
    assert "me/draft cannot be read from the Hub: " in result.stderr
    hub.store.repos[REPO].gated = True
    hub.store.repos[REPO].members.clear()
    result, _, _ = run(REPO)
    assert result.exit_code == 2 and "access is granted to some accounts only" in result.stderr, result.output
