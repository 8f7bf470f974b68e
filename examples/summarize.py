"""Summaries of several long documents in one batch: prompts of different lengths, each row at its own pace.

    python examples/summarize.py                           # the pages in docs/
    python examples/summarize.py report.txt minutes.txt    # your own files

Shorter prompts are padded on the left, as for plain `generate`. Each row goes on by as many tokens as it accepts and
ends by itself; τ is told row by row.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pair import load, mean, parser

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("documents", type=Path, nargs="*", help="text files, UTF-8; default: three pages of docs/")
    options.add_argument("--max-document-tokens", type=int, default=2000, help="read only so many of each")
    options.add_argument("--max-new-tokens", type=int, default=96, help="longest summary, in tokens")
    options.add_argument("--compare", action="store_true", help="do it by plain generate too, and compare")
    given = options.parse_args()
    target, tokenizer, draft = load(given)

    files = given.documents or [DOCS / name for name in ("CLIENTS.md", "LOG.md", "HOW_IT_WORKS.md")]
    chats = []
    for file in files:
        tokens = tokenizer(file.read_text(encoding="utf-8")).input_ids[: given.max_document_tokens]
        question = f"{tokenizer.decode(tokens)}\n\nSummarize the text above in three sentences."
        chats.append([{"role": "user", "content": question}])
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(target.device)

    def write(**assistant: Any) -> tuple[Any, float]:
        start = time.perf_counter()
        limit = {"max_new_tokens": given.max_new_tokens, "do_sample": False}
        out = target.generate(**inputs, **assistant, **limit, return_dict_in_generate=True)
        return out, time.perf_counter() - start

    out, seconds = write(assistant_model=draft)
    length = inputs["input_ids"].shape[1]
    summaries = tokenizer.batch_decode(out.sequences[:, length:], skip_special_tokens=True)
    for file, mask, lengths, summary in zip(
        files, inputs["attention_mask"], out.accept_lengths, summaries, strict=True
    ):
        print(f"{file.name}: {int(mask.sum())} tokens of prompt, {1 + sum(lengths)} written, τ {mean(lengths):.2f}")
        print(f"{summary.strip()}\n")
    print(f"{len(files)} documents in {seconds:.1f} s with the draft")
    if given.compare:
        plain, plain_seconds = write()
        others = tokenizer.batch_decode(plain.sequences[:, length:], skip_special_tokens=True)
        same = sum(ours == other for ours, other in zip(summaries, others, strict=True))
        print(f"{plain_seconds:.1f} s by plain generate; {same} of {len(files)} texts are the same")


if __name__ == "__main__":
    main()
