"""How a benchmark's tokens are picked: the settings that a command names, and those that hold in a call of `generate`.

What is not named is the target's own generation config's, then transformers' default, as in any call of `generate`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

GREEDY: dict[str, Any] = {"do_sample": False}
OWN = "own"
EXAMPLE = "temperature=0.7,top_p=0.8,top_k=20"


class Setting(NamedTuple):
    """A field of `GenerationConfig` that is one value.

    kind: of the value; most: the largest number; neutral: the value that changes nothing; greedy: whether greedy
    decoding heeds it too.
    """

    kind: type
    most: float = math.inf
    neutral: Any = 1.0
    greedy: bool = False

    @property
    def meant(self) -> str:
        if self.kind is bool:
            return "true or false"
        if self.kind is int:
            return "a whole number of at least 0"
        return "a number above 0" if self.most == math.inf else f"a number above 0 and at most {self.most:g}"

    def parse(self, text: str) -> Any:
        """Return the value, or None for another text."""
        if self.kind is bool:
            return {"true": True, "false": False}.get(text.lower())
        try:
            value = self.kind(text)
        except ValueError:
            return None
        least_passed = value >= 0 if self.kind is int else 0 < value < math.inf  # no NaN either
        return value if least_passed and value <= self.most else None


SETTINGS = {
    "do_sample": Setting(bool),
    "temperature": Setting(float),
    "top_k": Setting(int, neutral=0),
    "top_p": Setting(float, most=1),
    "min_p": Setting(float, most=1, neutral=None),
    "top_h": Setting(float, most=1, neutral=None),
    "typical_p": Setting(float, most=1),
    "epsilon_cutoff": Setting(float, most=1, neutral=0.0),
    "eta_cutoff": Setting(float, most=1, neutral=0.0),
    "repetition_penalty": Setting(float, greedy=True),
    "no_repeat_ngram_size": Setting(int, neutral=0, greedy=True),
}


def parse(text: str) -> dict[str, Any]:
    """Parse `"temperature=0.7,top_k=20"` as options of `generate`.

    They sample, unless `do_sample=false` is among them. `"own"` gives no options, so that the target's own generation
    config decides. Raises `ValueError` for a name that is not in `SETTINGS` or comes twice, and for a value that its
    field cannot have.
    """
    if text.strip() == OWN:
        return {}
    options: dict[str, Any] = {"do_sample": True}
    named = set()
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in SETTINGS:
            raise ValueError(f"expected {OWN!r} or settings among {', '.join(SETTINGS)}, as {EXAMPLE}, got {part!r}")
        if name in named:
            raise ValueError(f"expected each setting once, got {name} twice in {text!r}")
        named.add(name)
        options[name] = SETTINGS[name].parse(value)
        if options[name] is None:
            raise ValueError(f"expected {name} to be {SETTINGS[name].meant}, got {value!r}")
    return options


def prepared(
    target: PreTrainedModel, inputs: dict[str, Tensor], options: dict[str, Any]
) -> tuple[GenerationConfig, LogitsProcessorList]:
    """Return the config and the logits processors that `target.generate(**inputs, **options)` decodes with.

    Raises what `generate` raises.
    """

    def decode(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        generation_config: GenerationConfig,
        **others: Any,
    ) -> tuple[GenerationConfig, LogitsProcessorList]:
        return generation_config, logits_processor

    return target.generate(**inputs, **options, custom_generate=decode)


def in_effect(target: PreTrainedModel, options: dict[str, Any]) -> dict[str, Any]:
    """Return the `SETTINGS` that hold in `target.generate(**options)` and change something, `do_sample` always."""
    ids = torch.ones(1, 1, dtype=torch.long, device=target.device)
    one_token = {"input_ids": ids, "attention_mask": ids}
    config, _ = prepared(target, one_token, options | {"max_new_tokens": 1})
    settings = {"do_sample": bool(config.do_sample)}
    for name, setting in SETTINGS.items():
        value = getattr(config, name, None)
        if name in settings or value is None or value == setting.neutral or not (config.do_sample or setting.greedy):
            continue
        settings[name] = value
    return settings


def in_words(settings: dict[str, Any]) -> str:
    """Say `settings`, as of `in_effect`, in one phrase."""
    others = [f"{name}={value}" for name, value in settings.items() if name != "do_sample"]
    return ", ".join(["sampled" if settings["do_sample"] else "greedy", *others])
