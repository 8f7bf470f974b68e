"""The families of transformers that LongSpec serves, found by trials on tiny random models.

A trial runs in float32, greedily and sampled under one seed, on trees and on a chain, with prompts shorter and longer
than every window: `generate(assistant_model=draft)` has to write the text of plain `generate`, and to leave the random
generator in the same state. `tiny_models` makes the targets.
"""

from __future__ import annotations

import io
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from hf_longspec import LongSpecConfig, LongSpecForCausalLM
from hf_longspec.modeling.configuration_longspec import layer_kinds

from .tiny_models import FAILURES, VOCAB, NotBuildable, one_line, randomized, tiny_model
from .tiny_overrides import RELEASED

NEW_TOKENS = 24
WIDE_TREE = (13, 80, 80)  # every next token, and about half of the pairs, since random drafts are seldom right
LEAST_EFFECT = 0.01  # on the next token of a token in the context: below it, wrong attention might not show
GREEDY: dict[str, Any] = {"do_sample": False, "no_repeat_ngram_size": 3}  # else small models repeat themselves
SAMPLED: dict[str, Any] = {"do_sample": True, "top_k": 0}


class Setting(NamedTuple):
    """One comparison of `generate` with and without the draft; length: number of the prompt's tokens."""

    length: int
    tree: tuple[int, ...]
    backend: str
    options: dict[str, Any]


SETTINGS = (
    Setting(3, WIDE_TREE, "auto", SAMPLED),
    Setting(29, WIDE_TREE, "eager", SAMPLED),
    Setting(29, (4, 8, 8, 8), "auto", GREEDY),
    Setting(2, (4, 8, 8, 8), "eager", GREEDY),
    Setting(9, (1, 1, 1, 1), "auto", GREEDY),
    Setting(17, (1, 1, 1, 1), "auto", SAMPLED),
)


class Result(str, Enum):
    served = "served"
    refused = "refused"
    no_decoder = "no text decoder"
    not_buildable = "not buildable"
    wrong = "WRONG"


class Trial(NamedTuple):
    """The result for one family; reason: empty where the family is served in all that was tried."""

    family: str
    model: str
    attention: str
    result: Result
    reason: str = ""


class Different(Exception):
    """The error for a draft that changed the text, or what the random generator draws next."""


def try_families(families: Iterable[str]) -> Iterator[Trial]:
    """Yield one `Trial` a family, in order."""
    for family in families:
        yield try_family(family)


def try_family(family: str) -> Trial:
    """Try a family, and each of its `RELEASED` models; one that goes otherwise than the family is named."""
    trial = try_model(family)
    for release in RELEASED.get(family, ()):
        other = try_model(family, release)
        if other.result is trial.result:
            kinds = f"{trial.attention}, {other.attention}".split(", ")
            trial = trial._replace(attention=", ".join(dict.fromkeys(kinds)))
        else:
            reason = f"{release} is {other.result.value}: {other.reason}"
            trial = trial._replace(reason=f"{trial.reason}; {reason}" if trial.reason else reason)
        if other.result is Result.wrong:
            trial = trial._replace(result=Result.wrong)
    return trial


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what tiny models print and warn of, and leave the random generator as it was."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@quiet()
def try_model(family: str, release: str = "") -> Trial:
    """Build a tiny model of `family`, or of one of its `RELEASED` ones, and try it with a random draft."""
    try:
        target = tiny_model(family, release=release)
    except NotBuildable as error:
        return Trial(family, "", "", Result.not_buildable, str(error))
    name, attention = type(target).__name__, attention_kinds(target.config)
    if not target.can_generate():
        return Trial(family, name, attention, Result.no_decoder, "the class has no `generate`")
    if "Diffusion" in name:
        return Trial(family, name, attention, Result.no_decoder, "it does not write one token after the other")
    try:
        texts = [write(target, setting) for setting in SETTINGS]
        effect = context_effect(target)
    except FAILURES as error:  # plain `generate` fails
        if refusal := refused_by_config(target.config):
            return Trial(family, name, attention, Result.refused, refusal)
        reason = f"plain generate: {one_line(error)}"
        return Trial(family, name, attention, Result.not_buildable, reason)
    try:
        compare(target, texts)
    except Different as error:
        return Trial(family, name, attention, Result.wrong, str(error))
    except FAILURES as error:  # the draft is refused, or crashes
        result = Result.refused if is_refusal(error) else Result.wrong
        return Trial(family, name, attention, result, one_line(error))
    if effect < LEAST_EFFECT:
        reason = f"nothing is shown: a token of the context changes the next one's probabilities by {effect:.1e} only"
        return Trial(family, name, attention, Result.not_buildable, reason)
    return Trial(family, name, attention, Result.served)


def compare(target: PreTrainedModel, texts: list[tuple[list[int], float]]) -> None:
    """Raise `Different` unless a draft leaves unchanged the `texts` that `target` writes alone by `SETTINGS`.

    Also raises `Different` where the comparison would prove nothing, since no guess of the draft was accepted.
    """
    config = LongSpecConfig.from_target(target.config, window=8)
    draft = randomized(lambda: LongSpecForCausalLM(config), seed=1)
    for setting, text in zip(SETTINGS, texts, strict=True):
        draft.config.tree_shape, draft.config.attention_backend = setting.tree, setting.backend
        lengths: list[int] = []
        written = write(target, setting, draft, lengths)
        if written[0] != text[0]:
            place = [ours == theirs for ours, theirs in zip(written[0], text[0], strict=True)].index(False)
            where = f"prompt of {setting.length}, tree {setting.tree}"
            raise Different(f"another token at {place} of {NEW_TOKENS}, {where}")
        if written[1] != text[1]:
            raise Different(f"the random generator was left in another state, tree {setting.tree}")
        if setting.tree is WIDE_TREE and max(lengths, default=0) < 3:
            raise Different(f"no round accepted more than {max(lengths, default=0)} tokens of tree {setting.tree}")


def write(
    target: PreTrainedModel, setting: Setting, draft: Any = None, accept_lengths: list[int] | None = None
) -> tuple[list[int], float]:
    """Return the tokens that `target` writes by `setting`, and what the random generator draws next."""
    assistant = {} if draft is None else {"assistant_model": draft}
    torch.manual_seed(7)
    out = target.generate(
        prompt(setting.length),
        max_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        **setting.options,
        **assistant,
    )
    if accept_lengths is not None:
        accept_lengths += out.accept_lengths[0]
    return out.sequences[0, -NEW_TOKENS:].tolist(), float(torch.rand(1))


@torch.no_grad()
def context_effect(target: PreTrainedModel) -> float:
    """Return how much the next token's probabilities change with a token before the last one, in 0..1."""
    ids = prompt(9)
    other = ids.clone()
    other[0, 6] = 2 + (other[0, 6] - 1) % (VOCAB - 2)
    here, there = (target(text, use_cache=False).logits[0, -1].softmax(dim=-1) for text in (ids, other))
    return float((here - there).abs().sum() / 2)


def prompt(length: int) -> Tensor:
    """Return (1, length) token ids, none of them special."""
    return torch.randint(2, VOCAB, (1, length), generator=torch.Generator().manual_seed(length))


def is_refusal(error: Exception) -> bool:
    """Tell whether an error is a clear answer: our own `ValueError`, or one that `generate` raises itself."""
    if not isinstance(error, ValueError):
        return False
    origin = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return origin.stem.endswith("_longspec") or origin.parent.name == "generation"


def refused_by_config(config: PreTrainedConfig) -> str:
    """Return why no draft can be made for a target with this config; empty if a draft can be made."""
    try:
        LongSpecConfig.from_target(config)
    except ValueError as error:
        return one_line(error)
    return ""


def attention_kinds(config: PreTrainedConfig) -> str:
    """Return the kinds of layers of a model in one line, in the order in which they first appear."""
    text = config.get_text_config(decoder=True)
    try:
        kinds = layer_kinds(text)
    except (ValueError, AttributeError):
        try:
            kinds = [type(layer).__name__ for layer in DynamicCache(config=text).layers]
        except (ValueError, AttributeError):
            kinds = []
        kinds = getattr(text, "layer_types", None) or kinds
    return ", ".join(dict.fromkeys(kinds))
