"""Chats: the template's tokens, and which of them the assistant wrote."""

import numpy as np
import pytest
from byte_tokenizer import FORGETFUL, MARKED, TEMPLATE, byte_tokenizer, ids

from hf_longspec.training.data.chat import BadRow, ChatEncoder, messages_of

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "a:b "},
    {"role": "user", "content": "é"},
    {"role": "assistant", "content": "ü"},
]
PARTS = [
    ("<turn>u:hi<end>\n<turn>a:", 0),
    ("a:b <end>", 1),
    ("\n<turn>u:é<end>\n<turn>a:", 0),
    ("ü<end>", 1),
    ("\n", 0),
]


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_the_assistants_tokens_with_and_without_marks(template):
    encoder = ChatEncoder(byte_tokenizer(template))
    assert encoder.marked == (template is MARKED)
    found, mask = encoder.encode_with_mask(CHAT)
    assert found == encoder.encode(CHAT) == ids("".join(text for text, _ in PARTS))
    assert mask.tolist() == np.concatenate([[bool(mine)] * len(ids(text)) for text, mine in PARTS]).tolist()


def test_another_template_than_the_tokenizers():
    """Also where the tokenizer has none; `<turn>` is the tokenizer's BOS."""
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    for own in (None, TEMPLATE):
        tokenizer = byte_tokenizer(own)
        tokenizer.bos_token = "<turn>"
        found, mask = ChatEncoder(tokenizer, template).encode_with_mask(CHAT[:2])
        assert found == ids("<turn>hia:b ") and mask.tolist() == [False] * 3 + [True] * 3 + [False]
        assert ChatEncoder(tokenizer, template).prompt(CHAT[:2]) == ids("<turn>hi")


def test_an_answer_without_a_question_is_not_learned():
    _, mask = ChatEncoder(byte_tokenizer()).encode_with_mask(CHAT[1:])
    assert mask.nonzero()[0].tolist() == list(range(len(mask) - 1 - len(ids("ü<end>")), len(mask) - 1))


def test_a_template_whose_turns_change_later():
    encoder = ChatEncoder(byte_tokenizer(FORGETFUL))
    assert encoder.encode_with_mask(CHAT[:2])[1].sum() == len(ids("a:b <end>"))
    thinking = [CHAT[0], {"role": "assistant", "content": "think|so"}, *CHAT[2:]]
    with pytest.raises(ValueError, match=r"cannot be told: mark them in the template with \{% generation %\}, or use"):
        encoder.encode_with_mask(thinking)


def test_prompts_end_where_the_assistant_begins():
    encoder = ChatEncoder(byte_tokenizer())
    assert encoder.prompt(CHAT) == encoder.prompt(CHAT[:3]) == ids("".join(text for text, _ in PARTS[:3]))
    with pytest.raises(BadRow, match="no turn to answer"):
        encoder.prompt([CHAT[1]])


def test_what_is_no_chat():
    encoder = ChatEncoder(byte_tokenizer())
    with pytest.raises(BadRow, match="the chat template refuses it: no role tool"):
        encoder.encode([{"role": "tool", "content": "x"}])
    with pytest.raises(BadRow, match="no turn of an assistant"):
        encoder.encode_with_mask(CHAT[:1])
    with pytest.raises(ValueError, match="`kind: chat` needs a chat template, .* has none"):
        ChatEncoder(byte_tokenizer(None))


def test_forms_of_rows():
    pair = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert messages_of({"m": pair}, "m", None) == pair
    assert messages_of({"q": "q", "a": "a"}, "q", "a") == pair
    assert messages_of({"q": "q"}, "q", None) == pair[:1]
    shared = [{"from": "human", "value": "q", "weight": None}, {"from": "gpt", "value": "a"}]
    assert messages_of({"c": shared}, "c", None) == pair


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "expected a list of messages in 'm', got none"),
        ({"m": []}, "expected a list of messages in 'm', got none"),
        ({"m": 3}, "expected a list of messages in 'm', got int"),
        ({"m": ["x"]}, "message 0 has no role"),
        ({"m": [{"content": "x"}]}, "message 0 has no role"),
        ({"m": [{"role": "user", "content": None}]}, "message 0 has no text"),
        ({"m": "q", "a": 1}, "expected a string in 'a', got int"),
    ],
)
def test_bad_rows(value, message):
    with pytest.raises(BadRow, match=message):
        messages_of(value, "m", "a")
