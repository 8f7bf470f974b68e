"""A random walk over combinations of options: each step is one call, drawn from a seed, plain and with a draft.

`python tests/walk.py --first 1000 --count 500` goes on with other seeds. A step that fails is made as simple as it can
be and still fails, and printed as a call that repeats it.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from contract_cell import OLD, target_of
from helpers import CACHE, VOCAB, tiny_draft
from observation import Seen, differences, observe
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from walk_options import OUTPUTS, PROCESSORS, REFUSED, SAMPLERS, STOPS, Told, streamer
from walk_steps import Step, draw


class Prompt(NamedTuple):
    ids: Tensor  # (B, L), padded on the left
    mask: Tensor | None


def prompt_of(step: Step) -> Prompt:
    width = max(step.lengths) + step.pads
    generator = torch.Generator().manual_seed(step.seed)
    ids = torch.zeros(len(step.lengths), width, dtype=torch.long)
    for row, length in enumerate(step.lengths):
        ids[row, -length:] = torch.randint(2, VOCAB, (length,), generator=generator)
    mask = (ids != 0).long()
    for hole in step.holes:
        if step.pads + hole < width - 1:
            mask[:, step.pads + hole] = 0
    return Prompt(ids, mask if step.mask or step.only_new or not bool(mask.all()) else None)


def cache_of(step: Step, target: PreTrainedModel, prompt: Prompt) -> DynamicCache | None:
    if step.cache == "none":
        return None
    past = DynamicCache() if step.cache == "without config" else DynamicCache(config=target.config)
    if step.prefix:
        mask = None if prompt.mask is None else prompt.mask[:, : step.prefix]
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            target(prompt.ids[:, : step.prefix], attention_mask=mask, position_ids=positions, **{CACHE: past})
    return past


def options_of(step: Step, target: PreTrainedModel, log: list) -> dict[str, Any]:
    """Return the keyword arguments of `generate`, made anew for each run."""
    prompt = prompt_of(step)
    passed = prompt.ids.shape[1] - (step.prefix if step.only_new else 0)
    told = Told(log, passed if step.prompt != "embeds" else 0)
    options: dict[str, Any] = {"max_new_tokens": step.new_tokens, "pad_token_id": 0}
    if step.prompt != "embeds":
        options["input_ids"] = prompt.ids[:, step.prefix :] if step.only_new else prompt.ids
    if step.prompt != "ids":
        options["inputs_embeds"] = target.get_input_embeddings()(prompt.ids).detach()
    if prompt.mask is not None:
        options["attention_mask"] = prompt.mask
    if step.positions is not None:
        options["position_ids"] = torch.arange(prompt.ids.shape[1]).expand_as(prompt.ids) + step.positions
    if (past := cache_of(step, target, prompt)) is not None:
        options[CACHE] = past
    if step.chunk is not None:
        options["prefill_chunk_size"] = step.chunk
    if step.eos:
        options["eos_token_id"] = list(step.eos)
    if step.streamer:
        options["streamer"] = streamer(told)
    if step.repeats > 1:
        options["num_return_sequences"] = step.repeats
    options |= SAMPLERS.get(step.sampler, {})
    parts = [PROCESSORS[name] for name in step.processors] + [STOPS[name] for name in step.stops]
    for part in parts:
        for name, value in part(told).items():  # lists of processors or of criteria join
            options[name] = options[name] + value if name in options and isinstance(value, list) else value
    for name in step.outputs:
        options |= OUTPUTS[name]
    return options | (REFUSED[step.asked][0] if step.asked else {})


def refusal_of(step: Step) -> str | None:
    """Return a pattern for LongSpec's refusal of this step; None if the step must be served."""
    said = [REFUSED[step.asked][1]] if step.asked else []
    if step.prefix and step.repeats > 1:  # plain `generate` fails in the first layer
        said.append("of the prompts' batch size")
    return "|".join(said) or None


class Case(NamedTuple):
    log: list


def beyond_plain(step: Step) -> bool:
    """Return whether plain `generate` itself gets a step wrong: it reads a prompt twice, and LongSpec refuses."""
    return step.chunk is not None and (step.prompt != "ids" or (OLD and step.prefix > 0))


def look(step: Step, **assistant: Any) -> Seen:
    target = target_of(step.family)
    own = target.config._attn_implementation

    def play(generate: Callable, case: Case) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            generate(**options_of(step, target, case.log))

    target.set_attn_implementation(step.attention or own)
    try:
        return observe(target, play, Case([]), seed=step.seed, **assistant)
    finally:
        target.set_attn_implementation(own)


def draft_of(step: Step) -> Any:
    layer = {} if step.target_layer is None else {"target_layer": step.target_layer}
    tree = {"tree_shape": step.tree, "verify_tokens": step.verify_tokens, "copy_tokens": step.copy_tokens}
    own = {"window": step.window, **tree, **layer}
    return tiny_draft(target_of(step.family), attention_backend=step.backend, **own)


def wrong(step: Step, ours: Seen) -> list[str]:
    """List what is wrong with a call with a draft; empty if all is well."""
    if (refusal := refusal_of(step)) is None:
        return differences(look(step), ours)
    if isinstance(ours.error, ValueError) and re.search(refusal, str(ours.error)):
        return []
    plain = look(step)  # stock may refuse the call before LongSpec is asked
    same = ours.error is not None and repr(ours.error) == repr(plain.error)
    return [] if same else [f"expected a ValueError with {refusal!r}, got {ours.error!r}"]


def with_draft(step: Step) -> Seen:
    return look(step, assistant_model=draft_of(step))


def simplest(step: Step) -> Step:
    """Return the step with each field at its default that can be reset while the step still fails."""
    for field in fields(step):
        if field.name == "seed" or getattr(step, field.name) == field.default:
            continue
        simpler = replace(step, **{field.name: field.default})
        nonsense = simpler.prefix and simpler.cache == "none"
        if nonsense or beyond_plain(simpler) or simpler.prefix >= max(simpler.lengths) + simpler.pads:
            continue
        with contextlib.suppress(Exception):  # some fields only go together
            step = simpler if wrong(simpler, with_draft(simpler)) else step
    return step


def check(step: Step) -> Seen:
    """Return what was seen of the call with a draft.

    Raises `AssertionError`, with a call that repeats the step, if it is not right.
    """
    ours = with_draft(step)
    if found := wrong(step, ours):
        simple = simplest(step)
        call = f"import sys; sys.path.insert(0, 'tests'); from walk import Step, check; check({simple})"
        told = "\n  ".join(wrong(simple, with_draft(simple))[:6])
        raise AssertionError(f'seed {step.seed}: {len(found)} differences; python -c "{call}"\n  {told}')
    return ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    for seed in range(arguments.first, arguments.first + arguments.count):
        if beyond_plain(draw(seed)):
            continue
        try:
            check(draw(seed))
        except AssertionError as error:
            failed += 1
            print(error, flush=True)
    print(f"{arguments.count} steps, {failed} with a difference")


if __name__ == "__main__":
    main()
