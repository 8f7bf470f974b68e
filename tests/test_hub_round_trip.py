"""From a folder to the Hub and back: pushed over HTTP, loaded by its name in fresh processes, used by `generate`."""

import json
import os
import subprocess
import sys

import pytest
from full_disk import full_disk
from hub_folders import REPO, STRANGER, client, connect, environment, hub_folders, server

from hf_longspec.hub.export import load_draft
from hf_longspec.hub.push import push
from hf_longspec.writing import MachineError

pytestmark = pytest.mark.slow  # each starts processes of its own

# What a stranger runs: none of our packages, only names on the Hub. The first argument is a list of steps: a fault
# that the server is asked for, or None, and options of loading. Of each it tells the class's module, tokens, accept
# lengths, a weight and the tokenizer's size; or the error's class and its first line.
STRANGERS_PROCESS = """
import importlib.abc, json, os, sys, urllib.request
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("hf_longspec", "modeling"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
target = AutoModelForCausalLM.from_pretrained("me/target")
options = {"max_new_tokens": 20, "pad_token_id": 0, "do_sample": False, "return_dict_in_generate": True}
ids = torch.arange(2, 12)[None]
told = [target.generate(ids, **options).sequences.tolist()]
for fault, where in json.loads(sys.argv[1]):
    if fault is not None:
        urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/faults", json.dumps(fault).encode()).close()
    try:
        draft = AutoModelForCausalLM.from_pretrained("me/draft", trust_remote_code=True, **where)
        tokenizer = AutoTokenizer.from_pretrained("me/draft", trust_remote_code=True, **where)
    except Exception as error:
        told.append([type(error).__name__, str(error).strip().splitlines()[0]])
        continue
    out = target.generate(ids, assistant_model=draft, **options)
    weight = draft.mlp.up_proj.weight[0, 0].item()
    told.append([type(draft).__module__, out.sequences.tolist(), out.accept_lengths, weight, len(tokenizer)])
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
    """What `STRANGERS_PROCESS` tells: tokens without a draft, and of each step."""
    command = [sys.executable, "-I", "-c", STRANGERS_PROCESS, json.dumps(steps)]
    told = os.environ | environment(url, home, **changes)
    done = subprocess.run(command, capture_output=True, text=True, env=told, cwd=home, timeout=300)
    assert done.returncode == 0, done.stderr
    plain, *steps = json.loads(done.stdout.splitlines()[-1])
    return plain, steps


def update(folders, tmp_path):
    """Another draft of the same shape, pushed into the repository; its commit, and the weight that is told."""
    draft = load_draft(str(folders / "draft"))
    draft.mlp.up_proj.weight.data.mul_(-0.5)
    draft.save_pretrained(tmp_path / "newer")
    return push(tmp_path / "newer", REPO).oid, draft.mlp.up_proj.weight[0, 0].item()


def test_load_update_pin_and_go_offline(hub, folders, tmp_path):
    old, old_weight = hub.store.repos[REPO].branches["main"], weight_of(folders)
    plain, [[module, tokens, accepted, weight, vocabulary]] = stranger(hub.url, tmp_path, (None, {}))
    assert module == f"transformers_modules.me.draft.{old}.modeling_longspec" and vocabulary == 256
    assert tokens == plain and weight == old_weight
    assert sum(accepted[0]) == 19  # the prompt's own forward wrote the first of 20

    new, new_weight = update(folders, tmp_path)
    client(hub).create_tag(REPO, tag="v1", revision=old)
    revisions = [(None, {}), (None, {"revision": old}), (None, {"revision": "v1"})]
    _, told = stranger(hub.url, tmp_path, *revisions)
    assert [step[3] for step in told] == [new_weight, old_weight, old_weight]
    assert [step[0].split(".")[3] for step in told] == [new, old, old]
    assert [step[1] for step in told] == [plain] * 3

    hub.__exit__()
    _, told = stranger(hub.url, tmp_path, *revisions, (None, {"revision": "v2"}), HF_HUB_OFFLINE="1")
    assert [step[3] for step in told[:3]] == [new_weight, old_weight, old_weight]
    assert [step[1] for step in told[:3]] == [plain] * 3
    assert told[3][0] == "OSError", told[3]


def weight_of(folders):
    return load_draft(str(folders / "draft")).mlp.up_proj.weight[0, 0].item()


# What goes wrong once, what the caller is told of it (nothing, where the client tries again by itself), and what the
# second call needs: a file of the right length and wrong bytes is taken for whole, so only the caller can refuse it.
DOWNLOADS = [
    (["HEAD", "/draft/resolve/", "Status", 404, "gone", "RepoNotFound"], "OSError", {}),
    (["HEAD", "/draft/resolve/", "Status", 500, "sorry"], None, {}),
    (["GET", "/draft/resolve/", "Cut"], None, {}),
    (["GET", "/draft/resolve/", "Shorten"], "OSError", {}),
    (["GET", "/draft/resolve/", "Damage"], "OSError", {"force_download": True}),
    (["GET", "/cdn/", "Status", 403, "expired"], "OSError", {}),
    (["GET", "/cdn/", "Cut"], None, {}),
    (["GET", "/cdn/", "Shorten"], "OSError", {}),
    (["GET", "/cdn/", "Damage"], "SafetensorError", {"force_download": True}),
]


def test_faults_of_downloads_and_of_access(hub, folders, tmp_path):
    """Each fault once, each with a cache of its own, and the same call again; then a gated repository."""
    steps = []
    for number, (fault, _, again) in enumerate(DOWNLOADS):
        cache = {"cache_dir": str(tmp_path / str(number))}
        steps += [(fault, cache), (None, cache | again)]
    plain, told = stranger(hub.url, tmp_path, *steps)
    weight = weight_of(folders)
    for (fault, error, _), first, second in zip(DOWNLOADS, told[::2], told[1::2], strict=True):
        assert first[0] == error if error else first[1] == plain, (fault, first)
        assert second[1] == plain and second[3] == weight, (fault, second)
    assert not hub.faults

    hub.store.repos[REPO].gated = True
    _, told = stranger(hub.url, tmp_path, (None, {"token": False}), (None, {"token": STRANGER}), (None, {}))
    assert [step[0] for step in told[:2]] == ["OSError"] * 2 and all("gated repo" in step[1] for step in told[:2])
    assert told[2][1] == plain  # what was refused before is not remembered


def test_a_disk_that_is_full(hub, tmp_path):
    """As the commands load it: one line, which blames the machine; and the same again when there is room."""
    with full_disk(3000), pytest.raises(MachineError, match=f"^draft {REPO} cannot be loaded: .*File too large$"):
        load_draft(REPO)
    assert load_draft(REPO).config.model_type == "longspec"
