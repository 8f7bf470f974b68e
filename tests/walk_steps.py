"""The steps of the random walk: the fields of a call, and how a seed draws them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from helpers import VOCAB
from walk_options import OUTPUTS, PROCESSORS, REFUSED, SAMPLERS, STOPS

FAMILIES = ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "phi3 with longrope", "cohere2", "gpt_oss"]
FAMILIES += ["granite", "exaone4", "smollm3", "glm4", "stablelm", "gpt_neox", "qwen3_moe", "starcoder2"]
TREES = [(), (1,), (1, 1, 1, 1), (2, 3), (4, 8, 8), (3, 1, 9)]
FULL_TREES = [(13, 60), (13, 100, 30), (13, 40, 40, 20)]  # hold every next token, so that paths are accepted
COPIES = [0, 1, 3, 6, 24]


@dataclass(frozen=True)
class Step:
    """One call of `generate`.

    attention: the target's attention implementation; lengths: tokens of each prompt; holes: indices that the mask
    hides; mask: whether a mask is passed where none is needed; prefix: tokens in a cache passed in; only_new: whether
    just the tokens behind the prefix are passed; repeats: num_return_sequences; asked: an option LongSpec refuses.
    """

    seed: int = 0
    family: str = "llama"
    attention: str | None = None
    tree: tuple[int, ...] | str = (13, 60)
    verify_tokens: int | None = None
    copy_tokens: int | None = None
    window: int = 8
    target_layer: int | None = None
    backend: str = "auto"
    lengths: tuple[int, ...] = (9,)
    pads: int = 0
    holes: tuple[int, ...] = ()
    mask: bool = False
    positions: int | None = None
    prompt: str = "ids"
    cache: str = "none"
    prefix: int = 0
    only_new: bool = False
    chunk: int | None = None
    new_tokens: int = 14
    sampler: str = "greedy"
    processors: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    eos: tuple[int, ...] = ()
    outputs: tuple[str, ...] = ("dict",)
    streamer: bool = False
    repeats: int = 1
    asked: str = ""

    def __str__(self) -> str:
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        told = [f"{f.name}={own[f.name]!r}" for f in fields(self) if own[f.name] != f.default]
        return f"Step({', '.join(told)})"


def draw(seed: int) -> Step:
    """Draw the step of a seed: fields keep their defaults more often than not, so that options meet in small sets."""
    dice = random.Random(seed)
    batch = dice.choice([1, 1, 1, 1, 1, 2, 3, 4])
    lengths = tuple(dice.choice([1, 2, 5, 9, 9, 17]) for _ in range(batch))
    width = max(lengths)

    def seldom(value: Callable[[], Any], otherwise: Any, chance: float = 0.3) -> Any:
        return value() if dice.random() < chance else otherwise

    def some(names: Any, most: int) -> tuple[str, ...]:
        return tuple(sorted(dice.sample(sorted(names), dice.randint(0, most))))

    kind = dice.choice(["none", "none", "passed", "without config", "prefix"])
    prompt = dice.choice(["ids"] * 6 + ["embeds", "ids and embeds"])
    outputs = ("dict", *some(set(OUTPUTS) - {"dict"}, 2)) if dice.random() < 0.8 else ()
    sampler = dice.choice(["greedy", "greedy", *SAMPLERS])
    eos = tuple(dice.sample(range(2, VOCAB), dice.choice([0, 0, 1, 1, 3])))
    processors = some(set(PROCESSORS) - (set() if eos else {"exponential_decay_length_penalty"}), 2)
    trees = dice.choice([["auto"], TREES, TREES, FULL_TREES, FULL_TREES, FULL_TREES])
    copies = seldom(lambda: dice.choice(COPIES), None)
    if (copies or trees == ["auto"]) and dice.random() < 0.4:  # something to copy
        processors = tuple(sorted({*processors[:1], "a cycle"}))
    return Step(
        seed=seed,
        family=dice.choice(FAMILIES),
        attention=seldom(lambda: "eager", None),
        tree=dice.choice(trees),
        verify_tokens=seldom(lambda: dice.choice([1, 2, 7, 40]), None, 0.2),
        copy_tokens=copies,
        window=dice.choice([1, 3, 8, 64]),
        target_layer=seldom(lambda: dice.randrange(4), None, 0.2),
        backend=dice.choice(["auto", "eager"]),
        lengths=lengths,
        pads=seldom(lambda: dice.choice([1, 4, 9]), 0, 0.2),
        holes=seldom(lambda: tuple(sorted(dice.sample(range(width), min(2, width - 1)))), (), 0.15),
        mask=dice.random() < 0.3,
        positions=seldom(lambda: dice.choice([0, 3, 20]), None, 0.1),
        prompt=prompt,
        cache=kind,
        prefix=dice.randint(1, width - 1) if kind == "prefix" and width > 1 else 0,
        only_new=kind == "prefix" and dice.random() < 0.3,
        chunk=seldom(lambda: dice.choice([1, 4, 8]), None, 0.2) if prompt == "ids" else None,
        new_tokens=dice.choice([1, 2, 5, 14, 14, 30, 30]),
        sampler=sampler,
        processors=processors,
        stops=some(STOPS, 1),
        eos=eos,
        outputs=outputs,
        streamer=dice.random() < 0.3,
        repeats=dice.choice([1] * 8 + [2, 3]) if sampler != "greedy" else 1,
        asked=seldom(lambda: dice.choice(sorted(REFUSED)), "", 0.06),
    )
