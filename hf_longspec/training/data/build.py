"""From the section `data` of a recipe to the samples of training and of the held-out split."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from .section import DataSection


class Sample(TypedDict):
    """Whole documents, or pieces of long ones, side by side in a sample of L tokens. All are (L,) on the CPU.

    input_ids: int64.
    document_ids: int64, 0, 1, … from left to right; tokens see only tokens of the same number. What fills a sample up
        behind its last document has a number of its own, one more than the last.
    positions: int64, 0, 1, … within each document (piece), and within the filling.
    loss_mask: bool; True where token t is one to learn *to predict*, from the tokens before it in its document. So the
        row t-1 of the logits counts where `loss_mask[t]`. Never True for the first token of a document or the filling.
    """

    input_ids: Tensor
    document_ids: Tensor
    positions: Tensor
    loss_mask: Tensor


def build_datasets(
    section: DataSection, tokenizer: PreTrainedTokenizerBase, length: int, seed: int
) -> tuple[Dataset[Sample] | IterableDataset[Sample], Dataset[Sample]]:
    """Samples of `length` tokens: (train, held_out).

    `train` is a map-style dataset (`len`, `[i]`, reads memory-mapped tokens only), or an `IterableDataset` with
    `streaming`. It is already shuffled and mixed: run it in order, `train_sampling_strategy="sequential"`. Sample i of
    epoch e is a function of (section, seed, e, i) alone, for any number of workers, so skipping resumes exactly.
    `train.set_epoch(e)` chooses the epoch; accelerate's data loaders call it. An epoch has as many samples as the
    sources hold; sources seen less often by their weight go on in the next epoch where they stopped.
    Streams skip by reading, and are refused with more than one worker.

    `held_out` is map-style, in fixed order, the same for any seed; empty where nothing is held out.
    Both have `summary`: a dict for JSON with the counts of rows, documents, tokens, what was left out and why, and the
    bad rows by name.

    With several processes, let one go first (`TrainingArguments.main_process_first`): it writes the cache.
    Raises `ValueError`: one line that names the file, row or key at fault.
    """
    raise NotImplementedError
