"""What tells two vocabularies apart: one hash over all tokens and their ids.

A draft writes token ids, so it serves any target whose tokenizer gives the same ids to the same tokens: the target
itself, a fine-tune of it, a quantized copy. Knows tokenizers only.
"""

from __future__ import annotations

import hashlib

from transformers import PreTrainedTokenizerBase


def vocabulary_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256, in hexadecimal, over lines `id<tab>token` in the order of ids, UTF-8, added tokens included."""
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        # A byte-level token may hold half a surrogate pair, which UTF-8 alone refuses.
        digest.update(f"{number}\t{token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
