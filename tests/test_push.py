"""A draft's folder to the Hub: one commit, and every fault once: one clear line, and a second try that mends it."""

import signal
import threading
import time

import pytest
import torch
from hub_folders import REPO, STRANGER, client, connect, contents, hub_folders, server
from hub_server import Cut, Damage, Drop, Lose, Status
from typer.testing import CliRunner

from hf_longspec import LongSpecForCausalLM, cli
from hf_longspec.hub.push import HubError, push

pytestmark = pytest.mark.slow  # it meets huggingface_hub, not transformers

runner = CliRunner()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return hub_folders(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    with server() as running:
        connect(monkeypatch, running.url, tmp_path_factory.mktemp("cache"))
        yield running


def test_all_files_arrive_in_one_commit(hub, folders):
    told = push(folders / "hub", REPO, private=True)
    repo = hub.store.repos[REPO]
    assert repo.files() == contents(folders / "hub")
    assert repo.private and repo.branches == {"main": told.oid}
    assert len(repo.commits) == 2  # the Hub's own first one, and this
    assert repo.at("main").files["model.safetensors"].large and not repo.at("main").files["README.md"].large
    assert push(folders / "hub", REPO).oid == told.oid and len(repo.commits) == 2  # nothing is new


def test_a_repository_of_another_model_is_left_alone(hub, folders):
    """Its config and weights would be replaced by the draft's."""
    push(folders / "target", REPO)
    before = hub.store.repos[REPO].files()
    with pytest.raises(
        HubError, match="me/draft holds a model of type 'llama'; a draft needs a repository of its own"
    ):
        push(folders / "hub", REPO)
    assert hub.store.repos[REPO].files() == before


def test_a_revision_is_a_branch(hub, folders, tmp_path):
    push(folders / "hub", REPO)
    first = dict(hub.store.repos[REPO].branches)
    push(folders / "hub", REPO, revision="next")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nother")
    push(tmp_path, REPO, revision="next")
    repo = hub.store.repos[REPO]
    assert repo.branches["main"] == first["main"]
    assert repo.files("next") == contents(folders / "hub") | contents(tmp_path)


@pytest.mark.parametrize(
    "method, part, fault, message",
    [
        ("POST", "/repos/create", Status(500, "sorry"), "the Hub answered 500 .sorry.; run the same command again"),
        ("POST", "/repos/create", Drop(), "at http://127.0.0.1:.* cannot be reached .*; run the same command again"),
        ("POST", "/validate-yaml", Status(400, "no"), "Invalid metadata in README.md"),
        ("POST", "/preupload/", Status(404, "gone", "RepoNotFound"), "has no repository me/draft that this token"),
        ("POST", "/preupload/", Status(404, "no", "RevisionNotFound"), "me/draft has no such revision .no."),
        (
            "POST",
            "/preupload/",
            Status(403, "no", "GatedRepo"),
            "access to me/draft is restricted; ask for it at http",
        ),
        ("POST", "/objects/batch", Status(403, "storage is full"), "may not write to me/draft .storage is full."),
        ("PUT", "/large/", Status(403, "expired"), "Error while uploading 'model.safetensors' to the Hub. this token"),
        ("PUT", "/large/", Damage(100), "model.safetensors.*answered 422 .the SHA-256 or the size of the uploaded"),
        ("POST", "/verify/", Status(422, "size"), "model.safetensors.*answered 422 .size."),
        ("POST", "/commit/", Status(412, "The branch has moved"), "answered 412 .The branch has moved.; run the same"),
        ("POST", "/commit/", Drop(), "cannot be reached"),
        ("POST", "/commit/", Cut(), "cannot be reached"),
        ("POST", "/commit/", Lose(), "cannot be reached"),
    ],
)
def test_each_fault_once(hub, folders, tmp_path, method, part, fault, message):
    """Into a repository with an older draft: it holds that, or the new one, and never some of both."""
    (tmp_path / "config.json").write_text("{}")
    push(tmp_path, REPO)
    before, after = contents(tmp_path), contents(folders / "hub")
    hub.fault(method, part, fault)
    with pytest.raises(HubError, match=message) as raised:
        push(folders / "hub", REPO)
    assert "\n" not in str(raised.value) and not hub.faults
    done = isinstance(fault, (Lose, Cut))
    assert hub.store.repos[REPO].files() == (after if done else before)
    push(folders / "hub", REPO)
    assert hub.store.repos[REPO].files() == after
    assert len(hub.store.repos[REPO].commits) == 3


@pytest.mark.parametrize(
    "fault, message",
    [
        (Status(401, "Invalid username or password."), "the Hub does not accept the token; log in"),
        (Status(403, "no rights"), "this token may not write to me/draft .no rights."),
        (Lose(), "cannot be reached"),
    ],
)
def test_a_repository_that_cannot_be_made(hub, folders, fault, message):
    hub.fault("POST", "/repos/create", fault)
    with pytest.raises(HubError, match=message):
        push(folders / "hub", REPO)
    push(folders / "hub", REPO)
    assert hub.store.repos[REPO].files() == contents(folders / "hub")


def test_an_interrupted_upload_goes_on_by_itself(hub, folders):
    hub.fault("PUT", "/large/", Drop())
    push(folders / "hub", REPO)
    assert hub.store.repos[REPO].files() == contents(folders / "hub")


def test_a_large_file_that_has_arrived_is_not_sent_again(hub, folders):
    hub.fault("POST", "/commit/", Status(500, "sorry"))
    with pytest.raises(HubError, match="answered 500"):
        push(folders / "hub", REPO)
    hub.requests.clear()
    push(folders / "hub", REPO)
    assert not [path for method, path in hub.requests if method == "PUT"]


def test_who_may_not_push(hub, folders, monkeypatch):
    push(folders / "hub", REPO)
    with pytest.raises(HubError, match=r"may not write to me/draft \(You don't have the rights|write access"):
        push(folders / "hub", REPO, api=client(hub, STRANGER))
    with pytest.raises(HubError, match="does not accept the token; log in with `hf auth login`, or set HF_TOKEN"):
        push(folders / "hub", REPO, api=client(hub, "hf_nobody"))
    with pytest.raises(HubError, match="me/draft is there already and public; `private` is for new repositories"):
        push(folders / "hub", REPO, private=True)
    with pytest.raises(HubError, match="Repo id must"):
        push(folders / "hub", "not a name")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(HubError, match="no token for the Hub; log in"):
        push(folders / "hub", REPO)


def test_no_network(folders, monkeypatch, tmp_path):
    with server() as running:
        connect(monkeypatch, running.url, tmp_path)
    with pytest.raises(HubError, match="at http://127.0.0.1:.* cannot be reached"):
        push(folders / "hub", REPO)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="offline mode is on; unset HF_HUB_OFFLINE to push"):
        push(folders / "hub", REPO)


def test_the_protocol_that_the_client_prefers(hub, folders, monkeypatch):
    """Xet, which this server does not speak: what hf_xet raises is told in one line too."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    with pytest.raises(HubError, match=r"cannot be reached \(Network error.*404 Not Found.*xet-write-token") as raised:
        push(folders / "hub", REPO)
    assert "\n" not in str(raised.value) and hub.store.repos[REPO].files() == {}


def test_the_command(hub, folders):
    arguments = ["push", str(folders / "hub"), REPO, "--revision", "v1", "--target", str(folders / "target")]
    result = runner.invoke(cli.app, [*arguments, "--dry-run"])
    assert result.exit_code == 0, result.output
    files = contents(folders / "hub")
    assert f"{len(files['config.json']):>14,}  config.json" in result.output
    assert f"{sum(map(len, files.values())):>14,}  bytes in {len(files)} files" in result.output
    assert "nothing was sent to me/draft" in result.output and not hub.requests

    # interrupted by the user while the large file is under way, then run again
    hub.fault("PUT", "/large/", Drop())
    threading.Thread(target=interrupt_at, args=(hub, "/large/"), daemon=True).start()
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has background jobs ignore it
    result = runner.invoke(cli.app, arguments)
    signal.signal(signal.SIGINT, ignored)
    assert result.exit_code == 130 and "interrupted; me/draft has all files or none of them" in result.stderr
    assert hub.store.repos[REPO].files("v1") == {}
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == 0 and result.stdout.endswith(f"/commit/{hub.store.repos[REPO].branches['v1']}\n")
    assert hub.store.repos[REPO].files("v1") == files and hub.store.repos[REPO].files() == {}


def interrupt_at(hub, part):
    """Ctrl-C once a request whose path holds `part` has come."""
    while not any(part in path for _, path in list(hub.requests)):
        time.sleep(0.01)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def test_a_folder_with_faults_is_not_sent(hub, folders, tmp_path):
    result = runner.invoke(cli.app, ["push", str(folders / "draft"), REPO])
    assert result.exit_code == 1 and "README.md is missing" in result.stderr
    assert "checked" not in result.output and not hub.requests
    result = runner.invoke(cli.app, ["push", str(tmp_path / "nothing"), REPO])
    assert result.exit_code == 2 and result.stderr == f"hf-longspec: {tmp_path / 'nothing'}: no such folder\n"
    result = runner.invoke(cli.app, ["push", str(folders / "hub"), "me/no name", "--dry-run"])
    assert result.exit_code == 2 and "Repo id must use alphanumeric chars" in result.stderr and not hub.requests


def test_push_to_hub_of_a_draft(hub, folders):
    draft = LongSpecForCausalLM.from_pretrained(folders / "draft")
    with pytest.raises(ValueError, match='needs the target.*draft.push_to_hub."me/draft", target='):
        draft.push_to_hub(REPO)
    draft.push_to_hub(REPO, target=str(folders / "target"), tags=["tiny"], private=True)
    repo = hub.store.repos[REPO]
    assert repo.private and len(repo.commits) == 2
    assert set(repo.files()) == set(contents(folders / "hub")) - {"LICENSE"}
    card = repo.files()["README.md"].decode()
    assert "- longspec" in card and "- tiny" in card and 'from_pretrained("me/draft", trust_remote_code=True' in card
    # later ones leave card and tokenizer as they are
    draft.set_draft_vocab([1, 2, 3, 4])
    draft.config.tree_shape = (4, 4)
    draft.push_to_hub(REPO, revision="few")
    changed = {name for name, data in repo.files("few").items() if data != repo.files()[name]}
    assert changed == {"config.json", "model.safetensors"}


def test_a_draft_of_nan_is_not_sent(hub, folders):
    draft = LongSpecForCausalLM.from_pretrained(folders / "draft")
    torch.nn.init.constant_(draft.mlp.down_proj.weight, float("nan"))
    with pytest.raises(ValueError, match="a draft is saved with finite weights only, .* in mlp.down_proj.weight"):
        draft.push_to_hub(REPO, target=str(folders / "target"))
    assert REPO not in hub.store.repos
