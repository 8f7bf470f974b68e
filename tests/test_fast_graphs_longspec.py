"""Fingerprints: the same as long as nothing that a captured forward depends on changes, and no longer."""

import gc
import weakref

import pytest
import torch
from helpers import FAMILIES, tiny_draft, tiny_target
from texts import prompt_of
from torch.testing._internal.two_tensor import TwoTensor

from hf_longspec.modeling.fast_graphs_longspec import fingerprint, has_hooks, location, plain


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_leave_it_as_it_is(family):
    """Else every call would be captured."""
    target = tiny_target(family)
    draft = tiny_draft(target, tree_shape=(2, 2))
    options = {"max_new_tokens": 5, "pad_token_id": 0}
    found = []
    for _ in range(3):
        target.generate(prompt_of(9), assistant_model=draft, **options)
        found.append((fingerprint(target), fingerprint(draft), plain(vars(target.config))))
        target.generate(prompt_of(9), **options)
    assert found[0] == found[1] == found[2]
    target.generate(prompt_of(9), return_dict_in_generate=True, output_hidden_states=True, **options)
    assert not has_hooks(target), "those that transformers leaves do what they say"


def move(layer):
    layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data.clone()


def transpose(layer):
    weight = layer.self_attn.k_proj.weight
    assert weight.shape[0] == weight.shape[1], "only its strides tell"
    weight.data = weight.data.T


def activate(layer):
    layer.self_attn.scaling_of_adapters["other"] = 2.0


CHANGES = {
    "a weight elsewhere": move,
    "a weight read otherwise": transpose,
    "training": lambda layer: layer.mlp.train(),
    "a number": lambda layer: setattr(layer.self_attn, "scaling", 0.3),
    "a switch": lambda layer: setattr(layer.self_attn, "_disabled", True),
    "a list": lambda layer: layer.self_attn.active.append("second"),
    "a value in a dict": activate,
    "a tensor that is no buffer": lambda layer: setattr(layer.self_attn, "mask", torch.zeros(3)),
    "a buffer": lambda layer: layer.register_buffer("mask", torch.zeros(3)),
    "a module": lambda layer: setattr(layer, "extra", torch.nn.Linear(2, 2)),
    "a class": lambda layer: setattr(layer.mlp, "__class__", type("Other", (type(layer.mlp),), {})),
    "a method": lambda layer: setattr(layer.mlp, "forward", lambda x: x),
    "a hook": lambda layer: layer.register_forward_hook(lambda *args: None),
    "a hook before": lambda layer: layer.register_forward_pre_hook(lambda *args: None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(llama, change):
    layer = llama.model.layers[2]
    layer.self_attn.active, layer.self_attn.scaling_of_adapters = ["first"], {"first": 1.0}
    before = fingerprint(llama)
    assert before == fingerprint(llama)
    change(layer)
    assert fingerprint(llama) != before and fingerprint(llama) == fingerprint(llama)


def test_what_is_in_a_weight_does_not_matter(llama):
    before = fingerprint(llama)
    with torch.no_grad():
        llama.model.layers[2].mlp.up_proj.weight.zero_()
    assert fingerprint(llama) == before


def test_hooks_of_others(llama):
    assert not has_hooks(llama)
    hook = llama.model.layers[0].mlp.register_forward_pre_hook(lambda *args: None)
    assert has_hooks(llama)
    hook.remove()
    assert not has_hooks(llama)


def test_weights_that_wrap_others():
    parts = [torch.zeros(3), torch.ones(3)]
    whole = TwoTensor(*parts)
    before = location(whole)
    assert before == location(TwoTensor(*parts)) == (location(parts[0]), location(parts[1]))
    assert location(TwoTensor(parts[0], torch.ones(3))) != before


def test_it_keeps_nothing_alive():
    target = tiny_target("llama")
    target.note, target.tensors = [object(), {3: lambda: None}], (torch.zeros(3), {"x": torch.ones(2)})
    gone = [weakref.ref(part) for part in (target, target.lm_head.weight, target.tensors[0], target.note[1][3])]
    found = fingerprint(target)
    del target
    gc.collect()
    assert [reference() for reference in gone] == [None] * 4 and found
