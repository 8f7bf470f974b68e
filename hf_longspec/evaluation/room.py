"""The positions of a target, and whether a text fits them. Knows configs only."""

from __future__ import annotations

from typing import Any


def positions_of(config: Any) -> int | None:
    """Return the number of positions of a model with this config; None where the config states none.

    Configs with linear scaling, and most with YaRN, state the number before scaling.
    """
    text = config.get_text_config(decoder=True)
    stated = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    if stated is None:
        return None
    if rope.get("rope_type") == "linear":
        return int(stated * rope["factor"])
    if rope.get("rope_type") == "yarn":
        return max(stated, int(rope.get("original_max_position_embeddings", stated) * rope["factor"]))
    return stated


def check_room(config: Any, context: int, new_tokens: int, what: str = "") -> None:
    """Raise `ValueError` if a context and the new tokens behind it are more than a target can hold.

    what: whose text it is, in words, with a colon.
    """
    positions = positions_of(config)
    if positions is not None and context + new_tokens > positions:
        raise ValueError(
            f"{what}a context of {context} and {new_tokens} new tokens are more than the target's {positions} "
            "positions; ask for a shorter context or for fewer new tokens"
        )
