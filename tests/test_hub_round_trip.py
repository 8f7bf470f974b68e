"""From a folder to the Hub and back: pushed over HTTP, loaded by its name in fresh processes, used by `generate`."""

import json
import subprocess
import sys

import pytest
import torch
from hub_folders import REPO, STRANGER, client, connect, contents, environment, hub_folders, server
from hub_server import Cut, Damage, Drop, Shorten, Status

from hf_longspec.hub.export import load_draft
from hf_longspec.hub.push import push

# What a stranger runs: no package of ours, only names on the Hub. A step a line of the first argument; each gives its
# tokens, the class's module and the accept lengths, or the error's class and first line.
STRANGERS_PROCESS = """
import importlib.abc, json, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("hf_longspec", "modeling"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
torch.set_num_threads(1)
target = AutoModelForCausalLM.from_pretrained("me/target")
ids = torch.arange(2, 12)[None]
options = {"max_new_tokens": 20, "pad_token_id": 0, "do_sample": False, "return_dict_in_generate": True}
told = [target.generate(ids, **options).sequences.tolist()]
for step in json.loads(sys.argv[1]):
    try:
        draft = AutoModelForCausalLM.from_pretrained("me/draft", trust_remote_code=True, **step)
        out = target.generate(ids, assistant_model=draft, **options)
        tokenizer = AutoTokenizer.from_pretrained("me/draft", trust_remote_code=True, **step)
        weight = draft.mlp.up_proj.weight[0, 0].item()
        told.append([type(draft).__module__, out.sequences.tolist(), out.accept_lengths, weight, len(tokenizer)])
    except Exception as error:
        told.append([type(error).__name__, str(error).strip().splitlines()[0]])
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return hub_folders(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def hub(monkeypatch, tmp_path_factory, folders):
    """With the target and the draft in their repositories."""
    with server() as running:
        connect(monkeypatch, running.url, tmp_path_factory.mktemp("unused"))
        push(folders / "target", "me/target")
        push(folders / "hub", REPO)
        yield running


def stranger(url, home, *steps, **changes):
    """What `STRANGERS_PROCESS` prints: plain tokens, then of each step."""
    command = [sys.executable, "-I", "-c", STRANGERS_PROCESS, json.dumps(steps)]
    environ = environment(url, home, **changes)
    done = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=home, timeout=300)
    assert done.returncode == 0, done.stderr
    plain, *told = json.loads(done.stdout.splitlines()[-1])
    return plain, told, done.stderr


def update(folders, tmp_path):
    """Another draft of the same shape, pushed into the repository; the first weight of its MLP."""
    draft = load_draft(str(folders / "draft"))
    draft.mlp.up_proj.weight.data.mul_(-0.5)
    draft.save_pretrained(tmp_path / "newer")
    return push(tmp_path / "newer", REPO).oid, draft.mlp.up_proj.weight[0, 0].item()


def test_load_pin_update_and_go_offline(hub, folders, tmp_path):
    old_weight = load_draft(str(folders / "draft")).mlp.up_proj.weight[0, 0].item()
    old = hub.store.repos[REPO].branches["main"]
    plain, [first], _ = stranger(hub.url, tmp_path, {})
    module, tokens, accepted, weight, vocabulary = first
    assert module == f"transformers_modules.me.draft.{old}.modeling_longspec" and vocabulary == 256
    assert tokens == plain and sum(accepted[0]) == 20 and weight == old_weight

    new, new_weight = update(folders, tmp_path)
    client(hub).create_tag(REPO, tag="v1", revision=old)
    _, told, _ = stranger(hub.url, tmp_path, {}, {"revision": old}, {"revision": "v1"})
    assert [step[3] for step in told] == [new_weight, old_weight, old_weight]
    assert [step[0].split(".")[3] for step in told] == [new, old, old]
    assert [step[1] for step in told] == [plain] * 3

    hub.__exit__()
    _, told, _ = stranger(hub.url, tmp_path, {}, {"revision": old}, {"revision": "v2"}, HF_HUB_OFFLINE="1")
    assert [step[3] for step in told[:2]] == [new_weight, old_weight] and [step[1] for step in told[:2]] == [plain] * 2
    assert told[2][0] == "OSError" and "v2" not in told[1]


def test_who_may_not_load(hub, folders, tmp_path):
    """Gated: the page is there for all, its files for members. The target, which is open, loads for everyone."""
    hub.store.repos[REPO].gated = True
    for token, message in (("", "gated repo"), (STRANGER, "gated repo"), ("hf_me", None)):
        _, [told], _ = stranger(hub.url, tmp_path, {}, HF_TOKEN=token)
        if message is None:
            assert told[0].startswith("transformers_modules.")  # what was refused before is not remembered
        else:
            assert told[0] == "OSError" and message in told[1]


FAULTS = [
    ("HEAD", "/draft/resolve/", Status(500, "sorry")),
    ("GET", "/draft/resolve/", Cut()),
    ("GET", "/draft/resolve/", Drop()),
    ("GET", "/draft/resolve/", Shorten()),
    ("HEAD", "/draft/resolve/", Status(404, "gone", "RepoNotFound")),
]


def test_each_fault_of_a_download_once(hub, folders, tmp_path):
    """Each in an own cache: an error or none, and then the same call gives the draft."""
    weights = [
        ("GET", "/cdn/", Cut()),
        ("GET", "/cdn/", Shorten()),
        ("GET", "/cdn/", Damage(0)),
    ]
    ...
