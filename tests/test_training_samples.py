"""Samples and batches by their number: order, epochs, positions, lags, labels, documents."""

import pytest
import torch

from hf_longspec.training import batch
from hf_longspec.training.batch import batch_of, without_filling
from hf_longspec.training.loss import IGNORED
from hf_longspec.training.recipe import Signal
from hf_longspec.training.samples import (
    AnchorOffset,
    Collator,
    NumberedSamples,
    NumberedStream,
)

SIGNAL = Signal(length=8, max_lag=3)


def sample(first=0, lengths=(5, 3), learned=None):
    document_ids = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])
    positions = torch.cat([torch.arange(length) for length in lengths])
    mask = positions > 0 if learned is None else torch.tensor(learned, dtype=torch.bool)
    ids = torch.arange(len(positions)) + first
    return {"input_ids": ids, "document_ids": document_ids, "positions": positions, "loss_mask": mask}


class Epochs:
    """A dataset of three samples whose first tokens say epoch and place."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return sample(100 * self.epoch + 10 * index)

    def __iter__(self):
        return (self[index] for index in range(3))


def numbered(kind, count=8, seed=5, signal=SIGNAL):
    return kind(Epochs(), count, AnchorOffset(signal, 50, seed))


@pytest.mark.parametrize("kind", [NumberedSamples, NumberedStream])
def test_samples_count_through_all_epochs(kind):
    first = [(one["number"], int(one["input_ids"][0])) for one in numbered(kind)]
    assert first == list(zip(range(8), [0, 10, 20, 100, 110, 120, 200, 210], strict=True))


def test_a_sample_is_the_same_whenever_it_is_taken():
    every, again = numbered(NumberedSamples), numbered(NumberedSamples)
    stream = list(numbered(NumberedStream))
    for number in (7, 0, 6, 2):
        for name, value in every[number].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(again[number][name]))
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(stream[number][name]))
    assert not torch.equal(every[3]["positions"], numbered(NumberedSamples, seed=6)[3]["positions"])


def test_without_offsets_positions_are_real():
    plain = numbered(NumberedSamples, signal=Signal(length=8, max_lag=3, offset=False))
    assert all(torch.equal(plain[number]["positions"], sample()["positions"]) for number in range(8))


def test_no_sample_at_all_is_refused():
    class Empty(Epochs):
        def __len__(self):
            return 0

        def __iter__(self):
            return iter(())

    with pytest.raises(ValueError, match="the data hold not one sample of the wished length"):
        NumberedSamples(Empty(), 8, AnchorOffset(SIGNAL, 50, 0))
    with pytest.raises(ValueError, match="the data hold not one sample of the wished length"):
        list(NumberedStream(Empty(), 8, AnchorOffset(SIGNAL, 50, 0)))


def test_a_sample_has_a_lag_by_its_number():
    samples = [sample() | {"number": number} for number in range(200)]
    lags = Collator(3, seed=0)(samples)["lags"].tolist()
    assert lags == [int(Collator(3, seed=0)([one])["lags"]) for one in samples], "whatever batch it comes in"
    assert lags != Collator(3, seed=1)(samples)["lags"].tolist()
    assert {lag: 40 < lags.count(lag) for lag in set(lags)} == {1: True, 2: True, 3: True}


def test_labels_by_hand():
    """Documents of five and three tokens, the first of each not learned; in the second row a chat's answer only."""
    labels = batch_of([sample(), sample(10, (8,), learned=[0, 0, 0, 1, 1, 0, 0, 1])]).labels
    no = IGNORED
    assert labels.tolist() == [[1, 2, 3, 4, no, 6, 7, no], [no, no, 13, 14, no, no, 17, no]]
    assert batch_of([sample(20, (4,), learned=[1, 1, 1, 1])]).labels.tolist() == [[21, 22, 23, no]]


def test_documents_are_told_apart_only_where_a_row_has_several(monkeypatch):
    single = batch_of([sample(lengths=(8,)), sample(lengths=(8,))])
    assert single.document_ids is None and single.spans == ()
    several = batch_of([sample(lengths=(8,)), sample()])
    assert several.document_ids.tolist() == [[0] * 8, [0] * 5 + [1] * 3] and several.spans == ()
    monkeypatch.setattr(batch, "LONGEST_MASKED", 7)
    assert batch_of([sample(lengths=(8,)), sample()]).spans == ((0, 0, 8), (1, 0, 5), (1, 5, 8))


def test_filling_is_no_document():
    filled = sample(lengths=(5, 3), learned=[0, 1, 1, 1, 1, 0, 0, 0])
    assert without_filling(filled["document_ids"], filled["loss_mask"]).tolist() == [0] * 8
    assert batch_of([filled]).document_ids is None
    first = sample(lengths=(5, 3), learned=[0, 0, 0, 0, 0, 0, 1, 1])
    assert without_filling(first["document_ids"], first["loss_mask"]).tolist() == [0] * 5 + [1] * 3
