"""What training reads off the target, and that the draft sees in training what it sees in a decoding round."""

import numpy as np
import pytest
import torch
from helpers import CACHE, tiny_draft, tiny_target
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_longspec.training import distillation, forward
from hf_longspec.training.batch import Batch
from hf_longspec.training.distillation import Distillation
from hf_longspec.training.documents import positions_within, spans_of
from hf_longspec.training.forward import draft_hidden, lagged_states
from hf_longspec.training.positions import anchor_offset_positions
from hf_longspec.training.recipe import Signal
from hf_longspec.training.teacher import read_target, read_target_in_pieces

LENGTH = 21


def plain_positions(batch, length):
    return torch.arange(length).expand(batch, length)


def moved_positions(plain):
    rng = np.random.default_rng(0)
    return torch.stack([anchor_offset_positions(row, 300, 4, rng) for row in plain])


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_oss"])
def test_states_are_those_of_the_plain_model(family):
    target = tiny_target(family)
    layer = tiny_draft(target).config.target_layer
    ids = torch.randint(13, (2, LENGTH))
    states = read_target(target, layer, ids, plain_positions(2, LENGTH))
    with torch.no_grad():
        plain = target(ids, **{CACHE: (cache := DynamicCache())}, output_hidden_states=True)
    torch.testing.assert_close(states.hidden, plain.hidden_states[-1])
    torch.testing.assert_close(states.key, cache.layers[layer].keys)
    torch.testing.assert_close(states.value, cache.layers[layer].values)


def test_positions_that_jump_are_not_taken_for_packed_sequences():
    target = tiny_target("llama")
    ids = torch.randint(13, (2, LENGTH))
    positions = moved_positions(plain_positions(2, LENGTH))
    assert (positions.diff(dim=-1) > 1).any()
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    with torch.no_grad():
        expected = target.model(ids, position_ids=positions, attention_mask=causal).last_hidden_state
    torch.testing.assert_close(read_target(target, 0, ids, positions).hidden, expected)


@pytest.mark.parametrize("piece", [None, 4])
@pytest.mark.parametrize("documents", [1, 2])
def test_the_target_stands_where_the_draft_stands(llama, piece, documents):
    """At the batch's positions, with Anchor-Offset and among documents: rotated keys tell where they stand."""
    ids = torch.randint(13, (2, LENGTH))
    document_ids = torch.arange(LENGTH).mul(documents).div(LENGTH, rounding_mode="floor").long().expand(2, -1)
    positions = moved_positions(positions_within(document_ids))
    distillation = Distillation(llama, tiny_draft(llama, target_layer=0), Signal(), piece=piece)
    batch = Batch(ids, ids, positions, torch.ones(2, dtype=torch.long), document_ids if documents > 1 else None)
    first = llama.model.layers[0]
    with torch.no_grad():
        key = first.self_attn.k_proj(first.input_layernorm(llama.model.embed_tokens(ids))).unflatten(2, (-1, 16))
        cos, sin = llama.model.rotary_emb(key, positions)
    expected, _ = apply_rotary_pos_emb(key.transpose(1, 2), key.transpose(1, 2), cos, sin)
    torch.testing.assert_close(distillation.read(batch).key, expected)


@pytest.mark.parametrize("reads", [False, True], ids=["", "hidden state"])
@pytest.mark.parametrize("family", ["llama", "mistral", "granite", "cohere2"])
@pytest.mark.parametrize("lag", [1, 2, 4])
def test_training_sees_what_a_decoding_step_sees(family, lag, reads):
    """The draft's state for token t at lag d equals a step made by hand, whose target cache ends at t-d."""
    target = tiny_target(family)
    draft = tiny_draft(target, window=5, target_hidden_state=reads)
    bound = draft.bind(target)
    ids, positions = torch.randint(13, (1, LENGTH)), plain_positions(1, LENGTH)
    states = read_target(target, bound.layer, ids, positions)
    with torch.no_grad():
        trained = draft_hidden(draft, bound, Batch(ids, ids, positions, torch.tensor([lag])), states)
        for t in (lag - 1, lag, 6, LENGTH - 1):  # of the first one, nothing is known
            torch.testing.assert_close(decoding_step(target, draft, bound, ids, t, lag)[0, 0], trained[0, t])


def decoding_step(target, draft, bound, ids, t, lag):
    cache = DynamicCache()  # made without a config it keeps the whole past of sliding layers
    read = target(ids[:, : t - lag + 1], **{CACHE: cache}, output_hidden_states=True) if t >= lag else None
    past = cache.layers[bound.layer] if read is not None else None
    first = 0 if states_window(target, bound) is None else max(0, t - states_window(target, bound) + 1)
    window = slice(max(0, t - draft.config.window + 1), t + 1)
    key, value = draft.window_kv(bound.embed(ids[:, window]), torch.arange(LENGTH)[None, window])

    def self_attend(query, own_key, own_value):
        torch.testing.assert_close(own_key, key[:, :, -1:])
        return scaled_dot_product_attention(query, key, value, enable_gqa=True)

    def cross_attend(query):
        query = bound.rotate(query, bound.angles(query, here))
        if past is None or past.keys.shape[2] <= first:
            return torch.zeros_like(query)
        seen = past.keys[:, :, first:], past.values[:, :, first:]
        return scaled_dot_product_attention(query, *seen, enable_gqa=True)

    here = torch.tensor([[t]])
    state = None if read is None else draft.read_hidden_state(read.hidden_states[-1][:, -1:])
    return draft.layer(bound.embed(ids[:, t : t + 1]), draft.angles(here), self_attend, cross_attend, state)


def states_window(target, bound):
    sliding = target.config.model_type == "mistral"  # the only one here whose target layer slides
    return target.config.sliding_window if sliding else None


def test_lagged_states_are_those_of_earlier_tokens_of_the_same_document():
    """Drawn by hand: two rows, of which the second holds documents of two and of three tokens; 0 is no state."""
    hidden = torch.tensor([[1.0, 2, 3, 4, 5], [6, 7, 8, 9, 10]])[:, :, None]
    documents = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 1, 1]])
    whole = lagged_states(hidden, torch.tensor([1, 2]))[..., 0]
    assert whole.tolist() == [[0, 1, 2, 3, 4], [0, 0, 6, 7, 8]]
    assert lagged_states(hidden, torch.tensor([1, 1]), documents)[..., 0].tolist() == [
        [0, 1, 2, 3, 4],
        [0, 6, 0, 8, 9],
    ]
    assert lagged_states(hidden, torch.tensor([4, 2]), documents)[..., 0].tolist() == [
        [0, 0, 0, 0, 1],
        [0, 0, 0, 0, 8],
    ]
    assert not lagged_states(hidden, torch.tensor([5, 9]), documents).any()


def test_a_document_without_states_teaches_finite_gradients(llama):
    """At most tokens nothing is known: zeros go through a norm."""
    draft = tiny_draft(llama, target_hidden_state=True)
    bound = draft.bind(llama)
    ids, positions = torch.randint(13, (1, 3)), plain_positions(1, 3)
    states = read_target(llama, bound.layer, ids, positions)
    draft_hidden(draft, bound, Batch(ids, ids, positions, torch.tensor([2])), states).sum().backward()
    grads = [draft.hidden_proj.weight.grad, draft.hidden_layernorm.weight.grad]
    assert all(grad.isfinite().all() and grad.any() for grad in grads)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("piece", [1, 5, 21, 30])
def test_a_target_reads_in_pieces_what_it_reads_at_once(family, piece):
    target = tiny_target(family)
    layer = tiny_draft(target).config.target_layer
    ids, positions = torch.randint(13, (2, LENGTH)), moved_positions(plain_positions(2, LENGTH))
    whole = read_target(target, layer, ids, positions)
    pieces = read_target_in_pieces(target, layer, ids, positions, piece)
    assert pieces.window == whole.window
    torch.testing.assert_close(pieces[:3], whole[:3])


DOCUMENTS = torch.tensor([[0] * 8 + [1] * 1 + [2] * 12, [0] * 21])


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("way", ["masks", "spans", "pieces"])
@pytest.mark.parametrize("reads", [False, True], ids=["", "hidden state"])
def test_documents_side_by_side_are_as_if_each_were_alone(family, way, reads, monkeypatch):
    """Target and draft, at Anchor-Offset positions."""
    target = tiny_target(family, attn_implementation="eager" if family in ("gpt_oss", "gemma2") else "sdpa")
    draft = tiny_draft(target, window=5, target_hidden_state=reads)
    if way != "masks":
        monkeypatch.setattr(forward, "LONGEST_MASKED", 0)
        monkeypatch.setattr(distillation, "LONGEST_MASKED", 0)
    together = Distillation(target, draft, Signal(), piece=4 if way == "pieces" else None)
    ids, positions = torch.randint(13, (2, LENGTH)), moved_positions(positions_within(DOCUMENTS))
    spans = spans_of(DOCUMENTS)
    batch = Batch(ids, ids, positions, torch.tensor([2, 3]), DOCUMENTS, spans)
    states = together.read(batch if way != "masks" else batch._replace(spans=()))
    with torch.no_grad():
        hidden = draft_hidden(draft, together.bound, batch, states)
        for row, start, end in spans:
            one = slice(row, row + 1), slice(start, end)
            alone = read_target(target, together.bound.layer, ids[one], positions[one])
            torch.testing.assert_close(states.hidden[one], alone.hidden)
            torch.testing.assert_close(states.key[one[0], :, one[1]], alone.key)
            by_itself = Batch(ids[one], ids[one], positions[one], torch.tensor([2 + row]))
            torch.testing.assert_close(hidden[one], draft_hidden(draft, together.bound, by_itself, alone))


def test_an_attention_without_masks_is_refused_for_documents_in_short_samples(llama, draft):
    llama.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="expected `target.attn_implementation` sdpa, .* got flash_attention_2"):
        Distillation(llama, draft, Signal()).read(Batch(DOCUMENTS, DOCUMENTS, DOCUMENTS, torch.ones(2), DOCUMENTS))


def test_a_draft_for_another_target_is_refused(llama):
    with pytest.raises(ValueError, match="hidden_size: draft has 64, target has 32"):
        Distillation(llama, tiny_draft(tiny_target("llama", hidden_size=64)), Signal())
