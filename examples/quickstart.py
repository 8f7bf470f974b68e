"""LongSpec in one call of `generate`: the same text as without the draft, in less time.

    python examples/quickstart.py
    python examples/quickstart.py --prompt-file my_long_file.py --max-new-tokens 200

Writes on at the end of a long text (default: the demo's, source code of 4,400 tokens), once by plain `generate` and
once with the draft, and says how long either took.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pair import load, mean, parser

from hf_longspec.demo import PROMPT


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--prompt-file", type=Path, default=PROMPT, help="text to go on with, UTF-8")
    options.add_argument("--max-prompt-tokens", type=int, default=8000, help="use only so many, from its end")
    options.add_argument("--max-new-tokens", type=int, default=64, help="tokens to write")
    given = options.parse_args()
    target, tokenizer, draft = load(given)

    inputs = tokenizer(given.prompt_file.read_text(encoding="utf-8"), return_tensors="pt").to(target.device)
    inputs = {name: values[:, -given.max_prompt_tokens :] for name, values in inputs.items()}
    length = inputs["input_ids"].shape[1]
    print(f"a prompt of {length} tokens, {given.max_new_tokens} to write")

    def write(**assistant: Any) -> tuple[list[int], float, Any]:
        start = time.perf_counter()
        out = target.generate(
            **inputs,
            **assistant,
            max_new_tokens=given.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        return out.sequences[0, length:].tolist(), time.perf_counter() - start, out

    plain, plain_seconds, _ = write()
    ours, seconds, out = write(assistant_model=draft)  # the draft is all that changes

    print(tokenizer.decode(ours))
    print(f"\nplain generate {plain_seconds:.1f} s, with the draft {seconds:.1f} s, reading the prompt included")
    print(f"{mean(out.accept_lengths[0]):.2f} tokens a forward of the target (τ); plain generate writes 1")
    same = next((i for i, (a, b) in enumerate(zip(plain, ours, strict=False)) if a != b), len(ours))
    print("the same text" if plain == ours else f"the same text up to token {same}, see docs/USE.md on rounding")


if __name__ == "__main__":
    main()
