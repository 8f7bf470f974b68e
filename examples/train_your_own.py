"""A draft for text of your own: a recipe, `hf-longspec train`, and what the draft has learned.

    pip install '.[train]'
    python examples/train_your_own.py --out my_run                                 # some minutes of a CPU
    python examples/train_your_own.py --out my_run --text FOLDER --suffix .md      # your text
    python examples/train_your_own.py --out my_run --target NAME --text FOLDER --steps 5000 --batch 32    # on a GPU

The default target is SmolLM2-135M-Instruct. Its draft in hub_configs/ has learned Python and English prose; here it
goes on with the C++ headers that come with torch. A draft for another target begins with random weights, unless
--init names a draft for it, and needs a GPU and much more text. What matters then is in hub_configs/*/recipe.yaml and
docs/TRAIN.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from pair import DRAFT, mean
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_longspec import LongSpecForCausalLM
from hf_longspec.demo.weights import smollm2_folder
from hf_longspec.training.checkpoints import last_complete
from hf_longspec.training.learning_curve import curve, read_log

HEADERS = Path(torch.__file__).parent / "include" / "torch" / "csrc"
PROMPT = "#pragma once\n\n#include <c10/core/Device.h>\n#include <string>\n\nnamespace torch {\n"


def recipe_for(given: argparse.Namespace, target: str, init: str | None) -> dict[str, Any]:
    """Return the recipe of a run, as a YAML file for `hf-longspec train` holds it."""
    reads = {"config": {"target_hidden_state": True, "initializer_range": 0.01}} if init is None else {"init": init}
    return {
        "target": {"name": target, "dtype": "float32"},
        "draft": reads | {"vocab": 8192},  # the most frequent tokens of the text: fewer rows of the LM head to read
        "data": {
            "sources": [{"path": str(given.text), "format": "text", "suffixes": [given.suffix]}],
            "held_out": {"share": 0.1},
            "long_documents": "full",
            "cache": str(given.out / "tokens"),
        },
        "signal": {"length": 256, "max_lag": 5},
        "evaluation": {"contexts": [256], "prompts": given.prompts, "max_new_tokens": 40, "loss_samples": 4},
        "trainer": {
            "output_dir": str(given.out / "run"),
            "max_steps": given.steps,
            "per_device_train_batch_size": given.batch,
            # muon takes half as many steps, but its steps are bfloat16: slow on most CPUs
            "optim": "muon" if torch.cuda.is_available() else "adamw_torch",
            "learning_rate": 3e-3 if init is None else 5e-4,
            "weight_decay": 0.1,
            "adam_beta2": 0.95,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 4,
            "logging_steps": max(given.steps // 40, 1),
            "eval_strategy": "steps",
            "eval_on_start": True,
            "eval_steps": given.steps,
            "save_steps": max(given.steps // 4, 1),
        },
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True, help="folder of the run; a second call goes on with it")
    options.add_argument("--target", help="folder or Hub id of the target; default: SmolLM2-135M-Instruct")
    options.add_argument("--init", help="a draft to go on with; default: that of the default target, or none")
    options.add_argument("--text", type=Path, default=HEADERS, help="folder to learn from; default: torch's headers")
    options.add_argument("--suffix", default=".h", help="of the files in --text; default: .h")
    options.add_argument("--steps", type=int, default=60, help="steps of training")
    options.add_argument("--batch", type=int, default=4, help="samples of 256 tokens a step")
    options.add_argument("--prompts", type=int, default=8, help="held-out prompts to measure the draft on")
    given = options.parse_args()

    target_name = given.target or str(smollm2_folder())
    init = given.init or (str(DRAFT) if given.target is None else None)
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_for(given, target_name, init), sort_keys=False), encoding="utf-8")
    if code := subprocess.run([sys.executable, "-m", "hf_longspec.cli", "train", str(file)]).returncode:
        raise SystemExit(code)

    checkpoint = last_complete(given.out / "run")
    assert checkpoint is not None
    steps, lengths = curve(read_log(checkpoint), "eval_accept_length")
    for step, length in zip(steps, lengths, strict=True):
        print(f"after {step} steps: {length:.2f} tokens a forward, on text that the draft has not seen")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = AutoModelForCausalLM.from_pretrained(target_name, dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(target_name)
    draft = LongSpecForCausalLM.from_pretrained(given.out / "run" / "draft")
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False).to(device)
    limits = {"max_new_tokens": 64, "do_sample": False, "return_dict_in_generate": True}
    plain = target.generate(**inputs, **limits)
    out = target.generate(**inputs, assistant_model=draft, **limits)
    same = "the same text" if out.sequences.tolist() == plain.sequences.tolist() else "another text"
    print(f"{mean(out.accept_lengths[0]):.2f} tokens a forward, {same} as plain generate:")
    print(tokenizer.decode(out.sequences[0]))


if __name__ == "__main__":
    main()
