"""The target's last hidden state, for drafts that read it (`config.target_hidden_state`).

What the target made of the token before the root holds more of what comes next than one layer's keys and values do:
the LM head chose the root from it. It is caught on its way to the LM head, since no cache has it and asking the target
for hidden states would keep those of all layers and the whole prompt. Knows decoders as modules only.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


class Caught:
    """The last hidden states (B, T, hidden) of this thread's latest forward; `of_last_token` is (B, hidden)."""

    def __init__(self) -> None:
        self.states: Tensor | None = None
        self.thread = threading.get_ident()

    @torch.compiler.disable  # dynamo, in a target that its user compiled, knows no threads
    def catch(self, module: Any, inputs: Any, output: Any) -> None:
        if threading.get_ident() == self.thread:  # others may use the target too
            self.states = output[0]

    def every(self) -> Tensor:
        """Raises `ValueError` if no forward went through the decoder as a module."""
        if self.states is None:
            raise ValueError(
                "this LongSpec draft reads the target's last hidden state (config.target_hidden_state): expected a "
                "target that calls its decoder as a module, got one that does not, such as one compiled before"
            )
        return self.states

    def of_last_token(self) -> Tensor:
        return self.every()[:, -1].clone()  # of a prompt, the rest is let go


@contextmanager
def catching(target: PreTrainedModel, wanted: bool) -> Iterator[Caught | None]:
    """Within it, what the decoder of `target` puts out in this thread is caught, if `wanted`; else it yields None."""
    if not wanted:
        yield None
        return
    caught = Caught()
    hook = target.get_decoder().register_forward_hook(caught.catch)
    try:
        yield caught
    finally:
        hook.remove()
