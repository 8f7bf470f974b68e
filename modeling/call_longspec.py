"""Call: what all rounds of one call of `generate` have in common, and the roots that move on from round to round."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .backends_longspec import Backend
from .cache_longspec import SpeculativeCache
from .candidate_generator_longspec import LongSpecCandidateGenerator
from .clock_longspec import PhaseClock
from .fingerprint_longspec import fingerprint, has_hooks, plain
from .prefill_longspec import Start
from .rope_switch_longspec import RopeSwitch
from .text_longspec import Text
from .tree_longspec import Level, TokenTree
from .workspace_longspec import Workspace


class Roots(NamedTuple):
    """The newest token of each row: on the device, kept up to date in place.

    stump: it alone as a tree; positions: (B,), where it stands; axes: (axes, B), how far each axis of a target's
    positions (mrope) is from the last one, None with one axis; stopped: (B,) bool, whether the row has stopped;
    hidden: (B, hidden), the target's last hidden state at the token before it, None if the draft does not read it.
    """

    stump: TokenTree
    positions: Tensor
    axes: Tensor | None
    stopped: Tensor
    hidden: Tensor | None

    @classmethod
    def of(cls, text: Text, start: Start) -> Roots:
        device = start.root_positions.device
        stump = TokenTree(*Level.of_root(torch.tensor(text.newest, device=device)), levels=0)
        stopped = torch.tensor(text.stopped, device=device)
        return cls(stump, start.root_positions.clone(), start.axes, stopped, start.hidden)

    @property
    def tokens(self) -> Tensor:
        """(B,), a view."""
        return self.stump.tokens[:, 0]

    def update(self, text: Text) -> None:
        """To what the host knows of the text; it does not know positions."""
        self.tokens.copy_(torch.tensor(text.newest))
        self.stopped.copy_(torch.tensor(text.stopped))


class Call(NamedTuple):
    """What all rounds of a call have in common. extras: what every forward of the target gets, see `step_inputs`."""

    target: PreTrainedModel
    text: Text
    cache: SpeculativeCache
    generator: LongSpecCandidateGenerator
    backend: Backend
    rope_switch: RopeSwitch
    clock: PhaseClock
    roots: Roots
    extras: dict[str, Any]

    @property
    def mark(self) -> tuple[Any, ...]:
        """All that a captured round has taken as it was, but for what a workspace keeps."""
        target, draft, cache = self.target, self.generator.draft, self.cache
        options = {name: value for name, value in vars(draft.config).items() if name not in ("cuda_graphs", "profile")}
        return (
            weakref.ref(target),
            object() if has_hooks(target) or has_hooks(draft) else None,  # equal to nothing: each call is captured
            fingerprint(target),
            plain(vars(target.config)),
            plain(vars(target.config.get_text_config(decoder=True))),
            fingerprint(draft),
            plain(options),
            (self.backend.name, plain(self.generator.head_rows)),
            [(type(layer), layer.window, plain((layer.keys, layer.values))) for layer in cache.owners],
            (cache.tree_size, self.text.batch, self.text.padding),
            plain(self.extras),
            torch.is_inference_mode_enabled(),
        )


def settle(
    workspace: Workspace,
    roots: Roots,
    extras: dict[str, Any],
    cache: SpeculativeCache,
    generator: LongSpecCandidateGenerator,
) -> tuple[Roots, dict[str, Any]]:
    """Move all tensors of a call that rounds read or write, and that do not lie there yet, into its workspace."""
    cache.bounds_on(roots.positions.device)
    for holder in (cache, generator, generator.window):
        vars(holder).update(workspace.settle(type(holder).__name__, _tensors_in(vars(holder))))
    return workspace.settle("roots", roots), extras | workspace.settle("extras", _tensors_in(extras))


def _tensors_in(values: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
