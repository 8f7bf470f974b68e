"""A chat: answers appear as they are written, and each turn reads only what is new.

    python examples/chat.py                                        # type; an empty line ends it
    python examples/chat.py --say "Hello!" --say "Tell me more."   # without a keyboard

The keys and values of the conversation live in one `DynamicCache` that goes from call to call. A chat template may
write an old answer anew, so the cache is cut back to what it has in common with the new prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature

from pair import load, mean, parser
from transformers import DynamicCache, TextStreamer


def said(given: list[str] | None) -> Iterator[str]:
    """Yield what the user says, from the command line or from the keyboard."""
    if given is not None:
        for text in given:
            print(f"you> {text}")
            yield text
        return
    while text := input("you> ").strip():
        yield text


def shared(a: list[int], b: list[int]) -> int:
    """Count the first tokens that two texts have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--say", action="append", metavar="TEXT", help="a turn of yours; repeat for more turns")
    options.add_argument("--max-new-tokens", type=int, default=256, help="longest answer, in tokens")
    given = options.parse_args()
    target, tokenizer, draft = load(given)

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    cache, cached = DynamicCache(config=target.config), []  # cached: the tokens whose keys and values the cache holds
    # as it is called from transformers 5.24 on, and before
    argument = "cache" if "cache" in signature(target.forward).parameters else "past_key_values"
    messages: list[dict[str, str]] = []
    for text in said(given.say):
        messages.append({"role": "user", "content": text})
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(target.device)
        ids = prompt["input_ids"][0].tolist()
        kept = shared(cached, ids)
        if kept < len(cached):
            cache.crop(kept - len(cached))  # a negative length: so many tokens off the cache's end
        out = target.generate(
            **prompt,
            assistant_model=draft,
            **{argument: cache},
            streamer=streamer,
            max_new_tokens=given.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        written = out.sequences[0, len(ids) :].tolist()
        cached = out.sequences[0, : cache.get_seq_length()].tolist()  # all but the newest token
        messages.append({"role": "assistant", "content": tokenizer.decode(written, skip_special_tokens=True)})
        print(f"({kept} tokens from the cache, {len(ids) - kept} read, {len(written)} written,", end=" ")
        print(f"τ {mean(out.accept_lengths[0]):.2f})")


if __name__ == "__main__":
    main()
