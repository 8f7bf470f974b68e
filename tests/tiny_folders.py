"""A tiny pair as folders, for the commands that load models."""

from pathlib import Path

from helpers import tiny_draft, tiny_target
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def tiny_folders(folder: Path) -> Path:
    """Write a byte-level llama, a draft for it, a draft for another target, and a prompt of 40 characters."""
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(sorted(ALPHABET))}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    target = tiny_target("llama", vocab_size=len(ALPHABET))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "target")
    target.save_pretrained(folder / "target")
    tiny_draft(target).save_pretrained(folder / "draft")
    tiny_draft(tiny_target("llama", hidden_size=64)).save_pretrained(folder / "stranger")
    (folder / "prompt.txt").write_text("the quick brown fox jumps over the lazy ")
    return folder
