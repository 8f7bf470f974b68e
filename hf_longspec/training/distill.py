"""Self-distillation: the target answers prompts, and its answers become training data. Only token ids are kept.

Prompts are answered shard by shard. A shard is a folder that appears when it is whole, and depends on the settings and
its number alone. So after a kill at any moment the same command continues, and ends in the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_longspec.modeling.configuration_longspec import LongSpecConfig
from hf_longspec.modeling.modeling_longspec import LongSpecForCausalLM
from hf_longspec.writing import whole_file, writing

from .data.store import Document, StoreWriter, load_json
from .distill_prompts import Prompt

SETTINGS = "distill.json"


@dataclass(frozen=True)
class Answering:
    """Options for answers; a temperature of 0 is greedy. The target's own generation config sets the rest."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    seed: int = 0
    batch_size: int = 16
    shard_rows: int = 512  # prompts in a shard: the most that a kill can cost

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of `generate`."""
        if not self.temperature:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": True} | sampling


class Part(NamedTuple):
    """One of `parts` processes that share the prompts."""

    number: int
    parts: int

    @property
    def folder(self) -> str:
        return f"part-{self.number}-of-{self.parts}"


def without_guesses(target: PreTrainedModel) -> LongSpecForCausalLM:
    """Make a draft without guesses: `generate` decodes token by token, by our cache, kernels and CUDA graphs.

    The draft's weights are random and never read. Raises `ValueError` for a target that no draft can serve.
    """
    config = LongSpecConfig.from_target(target.config, tree_shape=())
    return LongSpecForCausalLM(config).to(target.device, target.dtype).eval()


def try_once(
    target: PreTrainedModel, prompts: Sequence[Prompt], answering: Answering, draft: LongSpecForCausalLM
) -> None:
    """Generate one token, before anything is written. Raises what `generate` has against target, draft or options.

    Raises `ValueError` for a target whose logits are NaN, of which `generate` would make an answer.
    """
    shortest = min(prompts, key=lambda prompt: len(prompt.ids))
    ids = torch.from_numpy(shortest.ids.astype(np.int64))[None].to(target.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "assistant_model": draft}
    options = replace(answering, max_new_tokens=1, temperature=0.0).options()
    found = target.generate(**inputs, **options, pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    if any(logits.isnan().any() for logits in found.logits):
        raise ValueError(f"the target cannot answer: expected logits that are numbers in {target.dtype}, got NaN")
    answer(target, [shortest.ids], replace(answering, max_new_tokens=1), draft)


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings into `folder`, or compare them with the settings that are there.

    Raises `ValueError` that names the settings that differ, or the files of a folder that is not ours.
    """
    path = folder / SETTINGS
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        if other := sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".")):
            raise ValueError(f"{folder}: expected an empty folder or one with {SETTINGS}, got {', '.join(other[:3])}")
        with whole_file(path) as unfinished:
            unfinished.write_text(json.dumps(settings, indent=1, sort_keys=True), encoding="utf-8")
    theirs, ours = load_json(path), json.loads(json.dumps(settings))
    if changed := sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key)):
        differences = "; ".join(f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} now" for key in changed)
        raise ValueError(f"{folder} holds data of other settings: {differences}. Choose another folder")


def distill(
    target: PreTrainedModel,
    prompts: Sequence[Prompt],
    folder: Path,
    answering: Answering,
    part: Part,
    origin: dict[str, str],
    draft: LongSpecForCausalLM,
) -> dict[str, int]:
    """Answer the prompts of this part, every `part.parts`-th one, except the prompts of finished shards.

    Shards are folders `part-i-of-n/00000`, … that a `tokens` source reads. Returns the counts over the whole part.
    """
    own = list(prompts[part.number :: part.parts])
    place = folder / part.folder
    with writing(place):
        place.mkdir(exist_ok=True)
    for leftover in place.glob(".*.tmp"):
        shutil.rmtree(leftover)
    shards = [own[start : start + answering.shard_rows] for start in range(0, len(own), answering.shard_rows)]
    totals = {"rows": 0, "prompt_tokens": 0, "answer_tokens": 0, "ended": 0, "new_tokens": 0}
    with tqdm(total=len(own), unit=" prompts", mininterval=1, dynamic_ncols=True) as progress:
        for number, rows in enumerate(shards):
            shard = place / f"{number:05d}"
            fresh = not shard.exists()
            if fresh:
                write_shard(target, rows, shard, answering, (part.number, number), origin, draft, progress)
            else:
                progress.update(len(rows))
            summary = load_json(shard / "summary.json")
            for name in ("rows", "prompt_tokens", "answer_tokens", "ended"):
                totals[name] += summary[name]
            totals["new_tokens"] += summary["answer_tokens"] * fresh
    return totals


def write_shard(
    target: PreTrainedModel,
    rows: Sequence[Prompt],
    folder: Path,
    answering: Answering,
    numbers: tuple[int, int],
    origin: dict[str, str],
    draft: LongSpecForCausalLM,
    progress: Any,
) -> None:
    """Answer and write one shard, in the order of its prompts.

    A shard has random numbers of its own: the settings and its number are the seed.
    """
    torch.manual_seed(int(np.random.SeedSequence([answering.seed, *numbers]).generate_state(1)[0]))
    answers: list[np.ndarray] = [np.empty(0, np.int64)] * len(rows)
    for batch in batches(rows, answering.batch_size):
        found = answer(target, [rows[index].ids for index in batch], answering, draft)
        for index, ids in zip(batch, found, strict=True):
            answers[index] = ids
        progress.update(len(batch))
    ends = set(end_ids(target))
    vocabulary = target.config.get_text_config().vocab_size
    with StoreWriter(folder, vocabulary, masked=True) as writer:
        for prompt, ids in zip(rows, answers, strict=True):
            mask = np.repeat([False, True], [len(prompt.ids), len(ids)])
            writer.add(Document(prompt.name, np.concatenate([prompt.ids, ids]).astype(np.uint32), mask))
        counts = {
            "rows": len(rows),
            "prompt_tokens": sum(len(prompt.ids) for prompt in rows),
            "answer_tokens": sum(map(len, answers)),
            "ended": sum(int(ids[-1]) in ends for ids in answers),
        }
        writer.summary = counts | origin


def batches(rows: Sequence[Prompt], size: int) -> Iterator[list[int]]:
    """Group rows of like length, so that little is padded; the longest come first, so that memory fails early.

    Returns the row numbers of each batch.
    """
    order = sorted(range(len(rows)), key=lambda index: (-len(rows[index].ids), index))
    return (order[start : start + size] for start in range(0, len(order), size))


@torch.no_grad()
def answer(
    target: PreTrainedModel, prompts: Sequence[np.ndarray], answering: Answering, draft: LongSpecForCausalLM
) -> list[np.ndarray]:
    """Return what the target writes behind each prompt, up to and including its end token: (tokens,) int64 each."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, longest - len(prompt) :] = 1
    inputs = {"input_ids": ids.to(target.device), "attention_mask": mask.to(target.device)}
    output = target.generate(**inputs, **answering.options(), pad_token_id=0, assistant_model=draft)
    return [until_end(row, end_ids(target)) for row in output[:, longest:].cpu().numpy()]


def end_ids(target: PreTrainedModel) -> list[int]:
    """Return the tokens that end the target's texts."""
    ends = target.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def until_end(ids: np.ndarray, ends: Sequence[int]) -> np.ndarray:
    """Cut off the padding behind the first end token."""
    found = np.flatnonzero(np.isin(ids, ends))
    return ids[: found[0] + 1] if len(found) else ids


def settings_of(answering: Answering, part: Part, target: PreTrainedModel, more: dict[str, Any]) -> dict[str, Any]:
    """Return all settings that the data depends on. The draft is not one: the text is the same with any draft."""
    generation = target.generation_config.to_diff_dict()
    generation.pop("transformers_version", None)
    model = {"dtype": str(target.dtype), "generation_config": generation}
    return asdict(answering) | {"parts": part.parts} | model | more
