"""Target, tokenizer and draft that a recipe names, loaded whole on each process even where training is sharded."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TorchAoConfig,
    TrainingArguments,
)

from hf_longspec.modeling.configuration_longspec import LongSpecConfig
from hf_longspec.modeling.modeling_longspec import LongSpecForCausalLM, not_finite

from ..evaluation.room import positions_of
from ..loading import loading
from .data.fields import suggestion
from .recipe import Draft, Recipe, Target


def load_target(target: Target, device: torch.device) -> PreTrainedModel:
    """Load the target in eval mode, without gradients. Raises `ValueError` or `OSError` for what cannot be loaded."""
    options: dict[str, Any] = {"dtype": target.dtype, "attn_implementation": target.attn_implementation}
    if target.quantization is not None:
        options |= {"quantization_config": quantization_config(target.quantization), "device_map": {"": device}}
    with loading("target", target.name):
        model = AutoModelForCausalLM.from_pretrained(
            target.name, revision=target.revision, trust_remote_code=target.trust_remote_code, **options
        )
    if target.quantization is None and getattr(model, "quantization_method", None) is None:
        model = model.to(device)
    if target.adapter is not None:
        from peft import PeftModel

        with loading("adapter", target.adapter):
            model = PeftModel.from_pretrained(model, target.adapter)
    return model.eval().requires_grad_(False)


def load_tokenizer(target: Target) -> PreTrainedTokenizerBase:
    with loading("tokenizer", target.name):
        return AutoTokenizer.from_pretrained(
            target.name, revision=target.revision, trust_remote_code=target.trust_remote_code
        )


def quantization_config(name: str) -> Any:
    if name.startswith("bitsandbytes"):
        four = name.endswith("4bit")
        return BitsAndBytesConfig(
            load_in_4bit=four, load_in_8bit=not four, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16"
        )
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    return TorchAoConfig(Int4WeightOnlyConfig() if name.endswith("int4") else Int8WeightOnlyConfig())


def make_draft(draft: Draft, target: PreTrainedModel, device: torch.device) -> LongSpecForCausalLM:
    """Make the draft in float32: load it from `init`, or draw random weights by torch's generator."""
    check_fields(LongSpecConfig, draft.config, "recipe.draft.config")
    if draft.init is None:
        model = LongSpecForCausalLM(LongSpecConfig.from_target(target.config, **draft.config))
    else:
        with loading("draft", draft.init):
            try:
                model = LongSpecForCausalLM.from_pretrained(draft.init, dtype=torch.float32, **draft.config)
            except RuntimeError as error:  # see `loading`: here the recipe states another shape
                if "ignore_mismatched_sizes" not in str(error):
                    raise
                raise ValueError(f"recipe.draft.config: {draft.config} does not fit the weights") from error
        if name := not_finite(model.state_dict()):
            raise ValueError(f"draft {draft.init}: expected finite weights to go on with, got others in {name}")
    return model.to(device, torch.float32)


def with_lora(draft: LongSpecForCausalLM, fields: dict[str, Any]) -> Any:
    """Return the draft with a new adapter; only the adapter is trained."""
    from peft import LoraConfig, get_peft_model

    check_fields(LoraConfig, fields, "recipe.draft.lora")
    return get_peft_model(draft, LoraConfig(**fields))


def check_fields(cls: type, values: Mapping[str, Any], where: str) -> None:
    """Raise `ValueError` for a key that is no field of the dataclass `cls`."""
    known = {item.name: item for item in dataclasses.fields(cls) if item.init}
    if unknown := [key for key in values if key not in known]:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}{suggestion(unknown[0], known)}")


def check_lengths(recipe: Recipe, config: LongSpecConfig) -> None:
    """Raise `ValueError` where a recipe wants more positions than the target has."""
    most = positions_of(config)
    wanted = {"signal.length": recipe.signal.length, "signal.max_position": recipe.signal.max_position or 0}
    if recipe.evaluates:
        wanted["evaluation.contexts"] = recipe.evaluation.length + recipe.evaluation.max_new_tokens
    for name, length in wanted.items():
        if most is not None and length > most:
            raise ValueError(f"recipe.{name}: the target has {most} positions, got {length} tokens")


def check_vocab(draft: Draft, config: LongSpecConfig) -> None:
    """Raise `ValueError` where `vocab` is more than the target's tokens, or less than the draft's tree wants."""
    fitting = copy.deepcopy(config)
    fitting.draft_vocab_size = draft.vocab
    try:
        fitting.check()
    except ValueError as error:
        raise ValueError(f"recipe.draft.vocab: {error}") from None


@contextmanager
def whole_on_every_process(args: TrainingArguments) -> Iterator[None]:
    """Let `from_pretrained` load whole weights; ZeRO-3 would shard them, FSDP would leave them empty on most ranks."""
    from transformers.integrations import deepspeed

    sharded = args.deepspeed_plugin
    variable = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.pop(variable, None)
    if sharded is not None:
        deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if sharded is not None:
            deepspeed.set_hf_deepspeed_config(sharded.hf_ds_config)
        if before is not None:
            os.environ[variable] = before
