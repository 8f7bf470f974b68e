"""The hash that tells two vocabularies apart, over all tokens and their ids.

A draft writes token ids, so it serves any target whose tokenizer gives the same ids to the same tokens: its own
target, a fine-tune of that target, a quantized copy. Knows tokenizers only.
"""

from __future__ import annotations

import hashlib

from transformers import PreTrainedTokenizerBase


def vocabulary_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of the vocabulary in hexadecimal.

    The hash is over lines `id<tab>token` in the order of ids, in UTF-8, added tokens included.
    """
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        # A byte-level token may hold half a surrogate pair, which UTF-8 alone refuses.
        digest.update(f"{number}\t{token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
