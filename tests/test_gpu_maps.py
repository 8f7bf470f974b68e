"""Targets whose layers lie on two GPUs, as `device_map="auto"` splits them."""

import pytest
import torch
from helpers import CACHE, tiny_draft, tiny_target
from transformers.utils import logging

from hf_longspec.modeling.target_longspec import bind

pytestmark = pytest.mark.gpu
FAMILIES = ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_oss"]
SAMPLERS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8},
    "processed": {"do_sample": True, "repetition_penalty": 1.3},
}


def device_map(embedding, layers, head, rotary=0):
    """Of a target of four layers: one GPU for each of its parts."""
    places = {"model.embed_tokens": embedding, "model.norm": head, "model.rotary_emb": rotary, "lm_head": head}
    return places | {f"model.layers.{index}": device for index, device in enumerate(layers)}


MAPS = {
    "split": device_map(0, (0, 0, 1, 1), 1),
    "head beside the embedding": device_map(0, (0, 1, 1, 1), 0),
    "embedding on the second": device_map(1, (0, 0, 1, 1), 0, rotary=1),
    "there and back": device_map(0, (0, 1, 0, 1), 0),
}


def two_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    return pytest.importorskip("accelerate")


def split_target(family, places):
    accelerate = two_gpus()
    target = tiny_target(family, tie_word_embeddings=False)
    return accelerate.dispatch_model(target, places, skip_keys=target._skip_keys_device_placement)


def prompts(batch, device="cuda:0"):
    lengths = (9, 1, 17, 4)[:batch]
    ids = torch.randint(2, 13, (batch, max(lengths)), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


def write(target, inputs, **options):
    torch.manual_seed(3)
    out = target.generate(**inputs, max_new_tokens=24, pad_token_id=0, return_dict_in_generate=True, **options)
    return out, [torch.cuda.get_rng_state(index) for index in range(2)]


def assert_same(target, draft, inputs, **options):
    plain, random = write(target, inputs, **options)
    ours, after = write(target, inputs, assistant_model=draft, **options)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    assert ours.sequences.device == plain.sequences.device
    assert all(torch.equal(*states) for states in zip(random, after, strict=True))
    for name in ("scores", "logits"):
        if getattr(plain, name) is not None:
            torch.testing.assert_close(getattr(ours, name), getattr(plain, name), rtol=1e-4, atol=1e-4)
    if plain.hidden_states is not None:
        torch.testing.assert_close(ours.hidden_states, plain.hidden_states, rtol=1e-3, atol=1e-3)
    for layer, theirs in zip(ours[CACHE].layers, plain[CACHE].layers, strict=True):
        torch.testing.assert_close(layer.keys, theirs.keys, rtol=1e-3, atol=1e-3)  # of the same device, too


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, batch, sampler):
    target = split_target(family, MAPS["split"])
    for shape in [(), (1, 1, 1), (4, 16, 16)]:
        draft = tiny_draft(target, tree_shape=shape)
        for ends in ({}, {"eos_token_id": [5, 11]}):
            assert_same(target, draft, prompts(batch), **sampler, **ends)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("places", MAPS.values(), ids=MAPS)
def test_layer_of_the_draft_on_each_device(places, layer, sampler):
    target = split_target("llama", places)
    draft = tiny_draft(target, target_layer=layer)
    assert bind(draft.config, target).device == torch.device("cuda", places[f"model.layers.{layer}"])
    for batch in (1, 4):
        for device in ("cuda:0", "cuda:1"):
            assert_same(target, draft, prompts(batch, device), **sampler)
        assert next(draft.parameters()).device == bind(draft.config, target).device


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
def test_records(batch, do_sample):
    target = split_target("llama", MAPS["split"])
    records = {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    for layer in (0, 3):
        assert_same(target, tiny_draft(target, target_layer=layer), prompts(batch), do_sample=do_sample, **records)


def test_goes_without_cuda_graphs(caplog):
    target = split_target("llama", MAPS["split"])
    draft = tiny_draft(target)
    logging.set_verbosity_warning()
    logging.warning_once.cache_clear()
    assert_same(target, draft, prompts(1), do_sample=False)
    assert "LongSpec runs without CUDA graphs: accelerate's hooks" in caplog.text
    draft.config.cuda_graphs = True
    with pytest.raises(ValueError, match="cuda_graphs=True cannot be had here: accelerate's hooks"):
        target.generate(**prompts(1), assistant_model=draft)
