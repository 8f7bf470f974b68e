"""Targets split over two devices, as accelerate splits them; on a CPU, one of the two is made up."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from helpers import CACHE, quick_or_slow, tiny_draft, tiny_target
from observation import differences, observe
from second_device import THERE, second_device
from torch.utils._pytree import tree_leaves, tree_map

from hf_longspec.modeling import fast_engine_longspec
from hf_longspec.modeling.target_longspec import bind

HERE = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # knows real devices only
    with second_device():
        yield


def draft_for(target, **fields):
    return tiny_draft(target, attention_backend="eager", **fields)  # torch's kernels know real devices only


def moved(states, device):
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, states)


def split(target, layers, embedding=HERE, head=HERE, rotary=HERE):
    """`target` with its parts on these devices; each moves there what it is given, as accelerate's hooks do."""
    target.requires_grad_(False)
    model = target.model
    parts = [(model.embed_tokens, embedding), (model.norm, head), (target.lm_head, head), (model.rotary_emb, rotary)]
    for part, device in [*parts, *zip(model.layers, layers, strict=True)]:
        part.to(device)
        for module in part.modules():
            module.register_forward_pre_hook(
                lambda module, args, kwargs, device=device: (moved(args, device), moved(kwargs, device)),
                with_kwargs=True,
            )
    target.register_forward_hook(give_back, with_kwargs=True)
    return target


def give_back(target, args, kwargs, output):
    """The output of a whole target comes to the device of its input."""
    device = next(leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
    for name in ("logits", "hidden_states"):
        if name in output:
            output[name] = moved(output[name], device)


def prompts(batch):
    lengths = (9, 1, 17, 4)[:batch]
    ids = torch.randint(2, 13, (batch, max(lengths)), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def assert_same(target, draft, inputs, **options):
    """All that can be seen of a call, and where it lies."""
    options = {"max_new_tokens": 8, "pad_token_id": 0, "return_dict_in_generate": True} | options
    seen, places = [], []
    for assistant in ({}, {"assistant_model": draft}):

        def play(generate, case):
            output = generate(**inputs, **options)
            places.append([layer.keys.device for layer in output[CACHE].layers if layer.is_initialized])
            cache, output[CACHE] = output[CACHE], None
            case.log += [moved([layer.keys, layer.values], HERE) for layer in cache.layers if layer.is_initialized]

        seen.append(observe(target, play, SimpleNamespace(log=[]), **assistant))
        if seen[-1].error is not None:
            raise seen[-1].error
    assert differences(*seen) == []
    assert places[0] == places[1]


MAPS = {
    "split": {"layers": (HERE, HERE, THERE, THERE), "head": THERE},
    "head beside the embedding": {"layers": (HERE, THERE, THERE, THERE)},
    "embedding there": {"layers": (HERE, HERE, THERE, THERE), "embedding": THERE, "rotary": THERE},
    "there and back": {"layers": (HERE, THERE, HERE, THERE)},
}
QUICK_PLACES = {("split", 3), ("head beside the embedding", 1), ("embedding there", 1), ("there and back", 3)}
PLACES = [
    pytest.param(
        MAPS[name], layer, id=f"{name}-{layer}", marks=() if (name, layer) in QUICK_PLACES else pytest.mark.slow
    )
    for name in MAPS
    for layer in (1, 3)
]


@pytest.mark.parametrize("do_sample", quick_or_slow([False, True], [True]), ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch", quick_or_slow([1, 3], [3]))
@pytest.mark.parametrize("family", quick_or_slow(["mistral", "gemma2", "gemma3_text"], ["mistral", "gemma3_text"]))
def test_families(family, batch, do_sample):
    target = tiny_target(family, tie_word_embeddings=False)
    draft = draft_for(target)
    assert_same(split(target, **MAPS["split"]), draft, prompts(batch), do_sample=do_sample)


@pytest.mark.parametrize("places, layer", PLACES)
def test_the_layer_of_the_draft(places, layer):
    target = split(tiny_target("llama", tie_word_embeddings=False), **places)
    draft = draft_for(target, target_layer=layer)
    assert bind(draft.config, target).device == places["layers"][layer]
    for batch in (1, 3):
        assert_same(target, draft, prompts(batch))
    assert next(draft.parameters()).device == places["layers"][layer]


@pytest.mark.parametrize("drawn", quick_or_slow([False, True], [True]))
@pytest.mark.parametrize("do_sample", quick_or_slow([False, True], [True]), ids=["greedy", "sampled"])
def test_records(monkeypatch, do_sample, drawn):
    monkeypatch.setattr(fast_engine_longspec, "draws_on", lambda device: drawn)
    target = split(tiny_target("llama", tie_word_embeddings=False), **MAPS["split"])
    names = ("logits", "hidden_states") if drawn else ("scores", "logits", "hidden_states")  # scores are the host's
    records = {f"output_{name}": True for name in names} | {"eos_token_id": [5, 11]}
    records |= {"repetition_penalty": 1.3} if drawn else {}
    for layer in (0, 3):
        draft = draft_for(target, target_layer=layer)
        for batch in (1, 3):
            assert_same(target, draft, prompts(batch), do_sample=do_sample, **records)


@pytest.mark.parametrize("places, layer", PLACES)
def test_a_draft_that_reads_the_last_hidden_state(places, layer):
    """Which lies beside the head, and the draft beside its layer."""
    target = split(tiny_target("llama", tie_word_embeddings=False), **places)
    draft = draft_for(target, target_layer=layer, target_hidden_state=True)
    for batch in (1, 3):
        assert_same(target, draft, prompts(batch))
    assert draft.hidden_proj.weight.device == places["layers"][layer]


def test_padding_inside_the_prompt():
    target = split(tiny_target("mistral", tie_word_embeddings=False), **MAPS["split"])
    inputs = prompts(3)
    inputs["attention_mask"][2, 5] = 0
    assert_same(target, draft_for(target), inputs)


def test_tensors_of_two_devices_do_not_meet():
    there = torch.ones(2, 3).to(THERE)
    assert there.device == THERE and (there + torch.arange(3, device=THERE)).tolist() == [[1.0, 2.0, 3.0]] * 2
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        there + torch.ones(3)
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        torch.ones(3)[torch.zeros(1, dtype=torch.long, device=THERE)]
    assert there[torch.tensor([0])].device == THERE  # as on a GPU
