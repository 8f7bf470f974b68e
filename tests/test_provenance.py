"""Where a figure comes from."""

import os
import subprocess
import sys

import torch
import transformers

from hf_longspec.provenance import commit, provenance


def test_provenance(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/any/place/hf-longspec", "bench", "text", "--draft", "my draft"])
    told = provenance(torch.device("cpu"))
    assert told["command"] == "hf-longspec bench text --draft 'my draft'"
    assert told["device"].startswith("CPU, ") and told["torch"] == torch.__version__
    assert told["transformers"] == transformers.__version__
    assert told["python"].split(".")[:2] == [str(part) for part in sys.version_info[:2]]


def test_commit(tmp_path):
    assert commit(tmp_path) is None

    def git(*arguments):
        options = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *options, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    git("init")
    assert commit(tmp_path) is None  # a checkout without a commit
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    head = git("rev-parse", "HEAD").stdout.strip()
    os.utime(tmp_path / "file", (0, 0))  # git would note in its index that the file is the same
    index = (tmp_path / ".git" / "index").read_bytes()
    assert len(head) == 40 and commit(tmp_path) == head
    assert (tmp_path / ".git" / "index").read_bytes() == index
    (tmp_path / "file").write_text("two")
    assert commit(tmp_path) == head + "+"
