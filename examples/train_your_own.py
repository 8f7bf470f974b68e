"""A draft of your own: a recipe, `hf-longspec train`, then `generate` with it.

    pip install '.[train]'
    python examples/train_your_own.py --out my_run                     # five minutes on a CPU
    python examples/train_your_own.py --out my_run --target NAME --text FOLDER --steps 5000 --batch 32    # on a GPU

The default target is a tiny model, made here, and the text is some of Python's own standard library. What matters for
real targets is in hub_configs/*/recipe.yaml and docs/TRAIN.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
import yaml
from pair import mean
from tiny_target import make_target
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_longspec import LongSpecConfig, LongSpecForCausalLM

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "unittest")  # packages of the standard library
PROMPT = "def read(self, size=-1):\n    "


def recipe_for(target: str, texts: list[Path], out: Path, steps: int, batch: int) -> dict[str, Any]:
    """Return the recipe of a run, as a YAML file for `hf-longspec train` holds it."""
    return {
        "target": {"name": target},
        "draft": {"config": {"window": 64, "tree_shape": [4, 4, 4, 4]}},
        "data": {
            "sources": [{"path": str(text), "format": "text", "suffixes": [".py"]} for text in texts],
            "held_out": {"share": 0.1},
            "cache": str(out / "tokens"),
        },
        "signal": {"length": 256, "max_lag": 4},
        "evaluation": {"contexts": [256, 1024], "prompts": 4, "max_new_tokens": 32},
        "trainer": {
            "output_dir": str(out / "run"),
            "max_steps": steps,
            "per_device_train_batch_size": batch,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "cosine",
            "logging_steps": max(steps // 40, 1),
            "eval_strategy": "steps",
            "eval_steps": max(steps // 4, 1),
            "save_steps": max(steps // 4, 1),
        },
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True, help="folder of the run; a second call goes on with it")
    options.add_argument("--target", help="folder or Hub id of the target; default: a tiny one, made in --out")
    options.add_argument(
        "--text", type=Path, help="folder of .py files to learn from; default: some of the standard library"
    )
    options.add_argument("--steps", type=int, default=400, help="steps of training")
    options.add_argument("--batch", type=int, default=8, help="samples a step")
    options.add_argument("--target-seconds", type=float, default=60, help="how long the tiny target is taught")
    given = options.parse_args()

    texts = [given.text] if given.text else [Path(sysconfig.get_path("stdlib")) / name for name in PACKAGES]
    target_name = given.target or str(given.out / "target")
    if given.target is None and not Path(target_name).exists():
        files = sorted(file for text in texts for file in text.rglob("*.py"))
        make_target(Path(target_name), "".join(file.read_text("utf-8") for file in files), given.target_seconds)

    recipe = recipe_for(target_name, texts, given.out, given.steps, given.batch)
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    if code := subprocess.run([sys.executable, "-m", "hf_longspec.cli", "train", str(file)]).returncode:
        raise SystemExit(code)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = AutoModelForCausalLM.from_pretrained(target_name).to(device)
    tokenizer = AutoTokenizer.from_pretrained(target_name)
    trained = LongSpecForCausalLM.from_pretrained(given.out / "run" / "draft")
    untrained = LongSpecForCausalLM(LongSpecConfig.from_target(target.config, tree_shape=trained.config.tree_shape))
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False).to(device)

    def write(**assistant: Any) -> Any:
        torch.manual_seed(0)  # sampled, since so small a model repeats itself under greedy decoding
        limits = {"max_new_tokens": 128, "do_sample": True, "temperature": 0.7, "return_dict_in_generate": True}
        return target.generate(**inputs, **assistant, **limits)

    plain = write()
    for name, draft in (("untrained", untrained), ("trained", trained)):
        out = write(assistant_model=draft)
        same = "the same text" if out.sequences.tolist() == plain.sequences.tolist() else "another text"
        print(f"{name} draft: {mean(out.accept_lengths[0]):.2f} tokens a forward, {same} as plain generate")
    print(tokenizer.decode(out.sequences[0]))


if __name__ == "__main__":
    main()
