"""The settings that must not change within a run: target, draft, prompts, machine and versions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..vocabulary import vocabulary_sha256
from .task import Sample


def pair_settings(
    target_name: str, draft_name: str, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, draft: Any
) -> dict[str, Any]:
    """Return what tells this target and draft from others, and how the two are set."""
    config, parameters = draft.config, list(draft.parameters())
    return {
        "target": {
            "name": target_name,
            "revision": getattr(target.config, "_commit_hash", None),
            "vocabulary_sha256": vocabulary_sha256(tokenizer),
            "dtype": str(target.dtype).removeprefix("torch."),
            "attention": target.config._attn_implementation,
        },
        "draft": {
            "name": draft_name,
            "revision": getattr(config, "_commit_hash", None),
            "sha256": weights_sha256(draft),
            "parameters": sum(parameter.numel() for parameter in parameters),
            "weights_bytes": sum(parameter.nbytes for parameter in parameters),
            "tree": list(config.tree_on(target.device)),
            "verify_tokens": config.verify_tokens,
            "backend": config.attention_backend,
            "cuda_graphs": config.cuda_graphs,
        },
    }


def run_settings(samples: Iterable[Sample], provenance: Mapping[str, Any]) -> dict[str, Any]:
    machine = {name: value for name, value in provenance.items() if name != "command"}
    return {"prompts_sha256": samples_sha256(samples), "made_with": machine}


def weights_sha256(draft: torch.nn.Module) -> str:
    """Return a hash that tells this draft from the same draft after more training."""
    digest = hashlib.sha256()
    for name, weight in sorted(draft.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def samples_sha256(samples: Iterable[Sample]) -> str:
    """Return a hash that tells these prompts, and how long their texts may become, from any others."""
    return hashlib.sha256(repr([tuple(sample) for sample in samples]).encode()).hexdigest()
