"""A draft's folder where nothing but torch, transformers and safetensors is: `python tests/round_trip.py 5.17 5.24`.

Makes a fresh environment for each release of transformers that is named, loads there by remote code what `export` and
`save_pretrained` have written here, and compares: the texts with those of plain `generate` there, and texts and accept
lengths with those here. Needs a package index, and a minute or two an environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

DRAFTS = ("hub", "saved")  # as `export` and as `save_pretrained` write it
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.5, "top_k": 0},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
}


def write(folder: Path) -> dict[str, Any]:
    """Write a target and its drafts to a folder, and return what they write here."""
    from hub_folders import hub_folders
    from transformers import AutoModelForCausalLM

    from hf_longspec import LongSpecForCausalLM

    hub_folders(folder)
    target = AutoModelForCausalLM.from_pretrained(folder / "target")
    draft = LongSpecForCausalLM.from_pretrained(folder / "draft")
    draft.save_pretrained(folder / "saved")
    return {name: texts(target, draft) for name in DRAFTS}


def texts(target: Any, draft: Any) -> dict[str, Any]:
    """Return each call's texts, which must be those of plain `generate`, and its accept lengths."""
    import torch

    ids = torch.arange(2, 22)[None]
    written = {}
    for name, options in CALLS.items():
        options = options | {"max_new_tokens": 24, "pad_token_id": 0, "return_dict_in_generate": True}
        torch.manual_seed(0)
        plain = target.generate(ids, **options).sequences
        torch.manual_seed(0)
        out = target.generate(ids, assistant_model=draft, **options)
        assert torch.equal(out.sequences, plain), f"{name}: {out.sequences.tolist()}, plain {plain.tolist()}"
        written[name] = [out.sequences.tolist(), out.accept_lengths]
    return written


def read(folder: Path) -> dict[str, Any]:
    """Load the drafts of a folder by remote code, use them as a program would, and return what they write."""
    import importlib.util
    import pickle

    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    assert not importlib.util.find_spec("hf_longspec"), "this environment was to hold no hf_longspec"
    target, written = AutoModelForCausalLM.from_pretrained(folder / "target"), {}
    for name in DRAFTS:
        draft = AutoModelForCausalLM.from_pretrained(folder / name, trust_remote_code=True, attn_implementation="sdpa")
        assert type(draft).__module__.startswith("transformers_modules."), type(draft)
        assert type(AutoModel.from_pretrained(folder / name, trust_remote_code=True)) is type(draft)
        written[name] = texts(target, draft)
        assert texts(target, pickle.loads(pickle.dumps(draft))) == written[name]
    tokenizer = AutoTokenizer.from_pretrained(folder / "hub", trust_remote_code=True)
    assert tokenizer("the fox").input_ids == AutoTokenizer.from_pretrained(folder / "target")("the fox").input_ids
    return written


def read_at(version: str, folder: Path, place: Path) -> dict[str, Any]:
    """Run `read` in a fresh environment with a release of transformers."""
    import torch

    venv.create(place, with_pip=True)
    python = str(place / "bin" / "python")
    held = f"torch=={torch.__version__.split('+')[0]}"
    own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(place / "modules")}
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PIP_CONSTRAINT", "PYTHONPATH")
    } | own
    install = [python, "-m", "pip", "install", "--quiet", held, f"transformers=={version}.*", "safetensors"]
    subprocess.run(install, check=True, env=environment)
    command = [python, "-W", "error::FutureWarning:transformers", __file__, "--read", str(folder)]
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(versions: list[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        here = write(Path(scratch) / "pair")
        for version in versions:
            found = read_at(version, Path(scratch) / "pair", Path(scratch) / version)
            if found != here:
                sys.exit(f"transformers {version}: expected {json.dumps(here)}, got {json.dumps(found)}")
            print(f"transformers {version}: the texts of plain generate, texts and accept lengths as here")


if __name__ == "__main__":
    if sys.argv[1] == "--read":
        print(json.dumps(read(Path(sys.argv[2]))))
    else:
        main(sys.argv[1:])
