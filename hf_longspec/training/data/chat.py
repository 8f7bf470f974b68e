"""Chats as token ids, by the target's own chat template, and a mask of the tokens that an assistant wrote.

Where the template marks the assistant's text ({% generation %}), transformers returns the mask. Where it does not, the
chat is rendered up to each of the assistant's turns, and once more with the turn: what the second text adds to the
first is the turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}  # names in ShareGPT's files
Messages = list[dict[str, Any]]


class BadRow(ValueError):
    """Refusal of a row that cannot be used; the message is the reason."""


def messages_of(value: Mapping[str, Any], field: str, answer_field: str | None) -> Messages:
    """Return a row's messages as chat templates want them: `role` and `content`. Raises `BadRow` for any other row."""
    given = value.get(field)
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
        if answer_field is not None:
            answer = value.get(answer_field)
            if not isinstance(answer, str):
                raise BadRow(f"expected a string in {answer_field!r}, got {type(answer).__name__}")
            given.append({"role": "assistant", "content": answer})
    if not isinstance(given, list) or not given:
        raise BadRow(f"expected a list of messages in {field!r}, got {'none' if not given else type(given).__name__}")
    return [_message(message, place) for place, message in enumerate(given)]


def _message(message: Any, place: int) -> dict[str, Any]:
    if isinstance(message, Mapping) and "from" in message and "value" in message:
        message = {"role": ROLES.get(message["from"], message["from"]), "content": message["value"]}
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise BadRow(f"message {place} has no role")
    if not isinstance(message.get("content"), str):
        raise BadRow(f"message {place} has no text")
    return {key: value for key, value in message.items() if value is not None}


class ChatEncoder:
    """Encode chats with one tokenizer, by its chat template or another one. Raises `ValueError` if there is none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None):
        if template is None:
            template = tokenizer.get_chat_template() if tokenizer.chat_template else None
        if template is None:
            raise ValueError(f"`kind: chat` needs a chat template, {tokenizer.name_or_path} has none")
        self.tokenizer, self.template = tokenizer, template
        self.marked = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None

    def encode(self, messages: Messages) -> list[int]:
        """Return the token ids of a chat. Raises `BadRow` where the template refuses the chat."""
        return self._tokenize(self._render(messages, add_generation_prompt=False))["input_ids"]

    def prompt(self, messages: Messages) -> list[int]:
        """Return the token ids up to where the assistant answers the last turn that is not its own."""
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise BadRow("no turn to answer")
        return self._tokenize(self._render(messages, add_generation_prompt=True))["input_ids"]

    def encode_with_mask(self, messages: Messages) -> tuple[list[int], np.ndarray]:
        """Return the token ids, and a mask (L,) of the tokens that the assistant wrote, ends of turns included."""
        if not any(message["role"] == "assistant" for message in messages):
            raise BadRow("no turn of an assistant")
        if self.marked:
            options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
            encoded = self._template(messages, **options)
            return encoded["input_ids"], np.asarray(encoded["assistant_masks"], dtype=bool)
        text = self._render(messages, add_generation_prompt=False)
        encoded = self._tokenize(text, offsets=True)
        starts, ends = np.asarray(encoded["offset_mapping"]).reshape(-1, 2).T
        mask = np.zeros(len(starts), dtype=bool)
        for begin, end in self._spans(messages, text):
            mask |= (starts >= begin) & (starts < end) & (ends > starts)
        return encoded["input_ids"], mask

    def _spans(self, messages: Messages, text: str) -> list[tuple[int, int]]:
        """Return where in `text` the assistant's turns stand: (start, end) in characters."""
        spans = []
        for place, message in enumerate(messages):
            if message["role"] != "assistant" or place == 0:  # a first turn answers nothing
                continue
            before = self._render(messages[:place], add_generation_prompt=True)
            until = self._render(messages[: place + 1], add_generation_prompt=False)
            if not (until.startswith(before) and text.startswith(until.rstrip())):
                raise ValueError(
                    f"the chat template of {self.tokenizer.name_or_path} writes a turn otherwise once others follow, "
                    "so the assistant's tokens cannot be told: mark them in the template with {% generation %}, "
                    "or use `loss: all`"
                )
            spans.append((len(before), len(until.rstrip())))  # white space behind a turn is the template's
        return spans

    def _render(self, messages: Messages, add_generation_prompt: bool) -> str:
        return self._template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    def _template(self, messages: Messages, **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, chat_template=self.template, **options)
        except TemplateError as error:
            raise BadRow(f"the chat template refuses it: {error}") from None

    def _tokenize(self, text: str, offsets: bool = False) -> Any:
        """Tokenize a rendered chat; the template has written the special tokens already."""
        if offsets and not self.tokenizer.is_fast:
            raise ValueError(
                f"`loss: assistant` needs a fast tokenizer or a template with {{% generation %}}, "
                f"{self.tokenizer.name_or_path} has neither"
            )
        return self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=offsets, verbose=False)
