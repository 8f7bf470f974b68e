"""The optimizer of `trainer.optim: muon`: Muon for matrices, AdamW for gains and biases, with one learning rate.

Muon (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982) makes each step of a matrix nearly orthogonal; docs/LOG.md
says how many steps Muon saves a draft. torch's `Muon` takes matrices only, and `Trainer` wants one optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import TrainingArguments


class MuonAdamW(Optimizer):
    """Muon for matrices and AdamW for all other parameters, with steps of equal size.

    Muon's steps are scaled to the size that AdamW steps would have at this learning rate. Weight decay is for matrices
    only.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
    ):
        every = list(parameters)
        matrices, others = ([x for x in every if (x.dim() == 2) == wanted] for wanted in (True, False))
        self.parts: list[Optimizer] = []
        if matrices:
            self.parts.append(Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.parts.append(AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=0.0))
        # schedules look up the first learning rate among the defaults
        super().__init__([group for part in self.parts for group in part.param_groups], {"lr": lr})
        self._share_groups()

    def _share_groups(self) -> None:
        """Share the groups of the parts, so that a schedule that writes to a group writes to the group of its part."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()


def make_muon(model: nn.Module, args: TrainingArguments, sharded: bool) -> MuonAdamW:
    """Make the optimizer for the trained parameters of `model`. Raises `ValueError` for `sharded` matrices."""
    if sharded:
        raise ValueError("trainer.optim: muon needs whole matrices, which DeepSpeed and FSDP shard; use adamw_torch")
    return MuonAdamW(
        (x for x in model.parameters() if x.requires_grad),
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )
