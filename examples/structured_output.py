"""JSON by a grammar: the target may write only what a schema allows, and the draft guesses along.

    pip install lm-format-enforcer
    python examples/structured_output.py --text "Ada Lovelace, born 1815, wrote about the Analytical Engine."

A grammar is a rule about the text so far. LongSpec asks it at every node of a path with that node's own text, so the
answer is the one plain `generate` gives under the same grammar, and it is checked against the schema in the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lmformatenforcer import JsonSchemaParser, TokenEnforcer, TokenEnforcerTokenizerData
from pair import load, mean, parser
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

TEXT = (
    "Marie Curie was born in Warsaw in 1867. She moved to Paris, studied physics and mathematics, "
    "and received the Nobel Prize twice: in 1903 in physics and in 1911 in chemistry."
)


class Person(BaseModel):
    name: str = Field(max_length=40)
    born: int = Field(ge=0, le=2100)
    fields: list[str] = Field(min_length=1, max_length=3)


def allowed_tokens(tokenizer: Any, schema: dict[str, Any]) -> Callable[[int, Tensor], list[int]]:
    """Return a `prefix_allowed_tokens_fn`: from a row's number and its text so far to the token ids that may follow.

    lm-format-enforcer 0.11 has such a function too, in a file that transformers 5 can no longer import.
    """
    special, zero = set(tokenizer.all_special_ids), tokenizer.encode("0", add_special_tokens=False)[-1]
    ids = [token for token in range(len(tokenizer)) if token not in special]
    alone = tokenizer.batch_decode([[token] for token in ids])
    behind = [text[1:] for text in tokenizer.batch_decode([[zero, token] for token in ids])]  # keeps a leading space
    pieces = [(token, b, len(b) > len(a)) for token, a, b in zip(ids, alone, behind, strict=True)]

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens).rstrip("\N{REPLACEMENT CHARACTER}")

    data = TokenEnforcerTokenizerData(pieces, decode, tokenizer.eos_token_id, False, len(tokenizer))
    enforcer = TokenEnforcer(data, JsonSchemaParser(schema))
    return lambda row, text: enforcer.get_allowed_tokens(text.tolist()).allowed_tokens


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--text", default=TEXT, help="a text about a person")
    options.add_argument("--max-new-tokens", type=int, default=128, help="tokens to write at most")
    given = options.parse_args()
    target, tokenizer, draft = load(given)

    question = f"{given.text}\n\nWho is this text about? Answer in JSON: name, born (a year), fields (of work)."
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(target.device)
    out = target.generate(
        **prompt,
        assistant_model=draft,
        prefix_allowed_tokens_fn=allowed_tokens(tokenizer, Person.model_json_schema()),
        max_new_tokens=given.max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    written = out.sequences[0, prompt["input_ids"].shape[1] :]
    text = tokenizer.decode(written, skip_special_tokens=True)
    print(text)
    print(f"({len(written)} tokens, τ {mean(out.accept_lengths[0]):.2f})")
    try:
        print("valid:", repr(Person.model_validate_json(text)))
    except ValidationError as error:  # a grammar cannot end a text that --max-new-tokens cuts off
        raise SystemExit(f"not valid by the schema: {error}") from error


if __name__ == "__main__":
    main()
