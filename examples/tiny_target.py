"""A target so small that a CPU trains a draft for it: a Llama of 0.4M weights that learns some Python in a minute.

Its text makes no sense but looks like code, and a draft can learn that look.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, LENGTH, BATCH, RATE, WARM_UP = 512, 128, 8, 5e-3, 20
END = "<|end|>"


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Train a byte-pair tokenizer on `text`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    learner = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=bytes_, show_progress=False
    )
    tokenizer.train_from_iterator([text], learner)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def make_target(folder: Path, text: str, seconds: float) -> None:
    """Train a new model to go on with `text` for `seconds` seconds, and save it with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(text)
    tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95))
    start, step, done = time.monotonic(), 0, 0.0
    while done < 1 or step == 0:
        optimizer.param_groups[0]["lr"] = RATE * min(step / WARM_UP, 1) * (1 - done)
        starts = torch.randint(len(tokens) - LENGTH, (BATCH, 1))
        ids = tokens[starts + torch.arange(LENGTH)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, done = step + 1, (time.monotonic() - start) / seconds
    print(f"a target of {model.num_parameters():,} weights, {step} steps, loss {loss.item():.2f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
