"""compile_target: the target's layers through torch.compile, with the text of plain `generate`."""

import shutil
import threading

import pytest
import torch
from helpers import quick_or_slow, tiny_draft, tiny_target
from torch._dynamo.utils import counters

from hf_longspec.modeling.fast_compiled_longspec import compiled_layers, decoder_layers

# on a CPU torch.compile writes C++
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
PROMPT_IDS = torch.tensor([[3, 5, 7, 2, 11, 4, 9]])
OPTIONS = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)


@pytest.fixture(autouse=True)
def compiled_anew():
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def compiled_pair(family, **overrides):
    target = tiny_target(family, **overrides)
    return target, tiny_draft(target, window=8, tree_shape=(2, 3), compile_target=True)


@pytest.mark.parametrize("family", quick_or_slow(["llama", "gemma2"], ["llama"]))
def test_text_of_plain_generate(family):
    target, draft = compiled_pair(family)
    prompts = torch.cat([PROMPT_IDS, PROMPT_IDS.flip(1)])
    expected = target.generate(prompts, **OPTIONS)
    assert torch.equal(target.generate(prompts, assistant_model=draft, **OPTIONS), expected)
    compiled = graphs()
    assert compiled > 0
    assert torch.equal(target.generate(prompts, assistant_model=draft, **OPTIONS), expected)
    assert graphs() == compiled, "the second call met nothing new"
    assert not any("forward" in vars(layer) for layer in decoder_layers(target))


@pytest.mark.slow
def test_layers_share_what_is_compiled():
    counts = []
    for layers in (2, 4):
        torch._dynamo.reset()
        counters.clear()
        target, draft = compiled_pair("llama", num_hidden_layers=layers)
        target.generate(PROMPT_IDS, assistant_model=draft, **OPTIONS)
        counts.append(graphs())
    assert counts[0] == counts[1]


def test_hooks_between_calls_are_heard():
    target, draft = compiled_pair("llama")
    before = target.generate(PROMPT_IDS, assistant_model=draft, **OPTIONS)
    hook = target.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: -3 * output)
    expected = target.generate(PROMPT_IDS, **OPTIONS)
    assert not torch.equal(expected, before)
    assert torch.equal(target.generate(PROMPT_IDS, assistant_model=draft, **OPTIONS), expected)
    hook.remove()
    assert torch.equal(target.generate(PROMPT_IDS, assistant_model=draft, **OPTIONS), before)


def test_other_threads_and_errors():
    """Another thread runs the layers' own code meanwhile; and after an error they are as they were."""
    target = tiny_target("llama")
    expected, seen = target(PROMPT_IDS).logits, []

    def elsewhere():
        before = graphs()
        seen.append((target(PROMPT_IDS).logits, graphs() - before))

    with pytest.raises(KeyError, match="stop"), compiled_layers(target):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        raise KeyError("stop")
    assert torch.equal(seen[0][0], expected) and seen[0][1] == 0
    assert not any("forward" in vars(layer) for layer in decoder_layers(target))


def test_what_cannot_be_compiled_is_refused():
    target, draft = compiled_pair("llama")
    target.model.layers[0].compile(backend="eager")
    with pytest.raises(ValueError, match="compile_target=True cannot be had here: it is compiled already; use False"):
        target.generate(PROMPT_IDS, assistant_model=draft, **OPTIONS)
    with pytest.raises(ValueError, match="`compile_target` must be True or False, got 'yes'"):
        tiny_draft(target, compile_target="yes")
