"""Hybrid attention of a round against dense attention over prefix and tree, and the switch to it and back."""

import threading
from types import SimpleNamespace

import pytest
import torch
from helpers import CACHE, commit, interpreted, tiny_draft, tiny_target
from reference_attention import assert_as_good_as_plain
from serials import add
from transformers import AttentionInterface, AutoConfig, DynamicCache, LlamaForCausalLM

from hf_longspec.modeling.cache_longspec import SpeculativeCache
from hf_longspec.modeling.fast_choose_longspec import load_backend
from hf_longspec.modeling.hybrid_attention_longspec import Round, hybrid_attention
from hf_longspec.modeling.interface_longspec import attending, register, switched
from hf_longspec.modeling.tree_longspec import ancestor_mask, node_depths

BACKENDS = ("eager", "torch", pytest.param("triton", marks=interpreted))
PARENTS = [0, 0, 0, 1, 1, 3, 5, 6]
DEPTHS = [0, 1, 1, 2, 2, 3, 4, 5]
HEADS, KV_HEADS, DIM = 4, 2, 16
STAGES = 3  # that a round's attention is made of: over the prefix, over the tree, their merge
SLIDING, FULL = 0, 1  # the layers of a Gemma 2 of two layers


def random_states(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(1, KV_HEADS, tokens, DIM).to(dtype) for _ in range(2))


def lineage(node: int) -> set[int]:
    return {node} if node == 0 else {node} | lineage(PARENTS[node])


def seen(prefix: int, padding: int, window: int | None) -> torch.Tensor:
    """(1, T, prefix + T) bool: what each node may look at, from the positions of all tokens."""
    positions = list(range(prefix)) + [prefix + depth for depth in DEPTHS]
    mask = torch.zeros(1, len(PARENTS), len(positions), dtype=torch.bool)
    for node, depth in enumerate(DEPTHS):
        for index, position in enumerate(positions):
            in_line = index >= padding if index < prefix else (index - prefix) in lineage(node)
            mask[0, node, index] = in_line and (window is None or prefix + depth - position < window)
    return mask


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layer, keeps_all", [(FULL, False), (SLIDING, False), (SLIDING, True)])
@pytest.mark.parametrize("prefix, padding", [(1, 0), (20, 0), (20, 4)])
@pytest.mark.parametrize("window", [2, 5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter multiplies no bfloat16
@pytest.mark.parametrize("sinks", [False, True])
def test_round_is_dense_attention(backend, layer, keeps_all, prefix, padding, window, dtype, sinks):
    config = AutoConfig.for_model("gemma2", num_hidden_layers=2, sliding_window=window)
    cache = SpeculativeCache(config, DynamicCache() if keeps_all else DynamicCache(config=config), 30, len(PARENTS))
    text = [random_states(prefix, dtype) for _ in range(2)]
    for index in (SLIDING, FULL):
        cache.update(*text[index], index)
    cache.hide_padding((torch.arange(prefix) >= padding).long()[None])
    ancestors = ancestor_mask(torch.tensor([PARENTS]), 5)
    assert node_depths(ancestors).tolist() == [DEPTHS]
    cache.begin_round(node_depths(ancestors))
    query = torch.randn(1, HEADS, len(PARENTS), DIM).to(dtype)
    key, value = cache.update(*random_states(len(PARENTS), dtype), layer)

    state = Round(cache, ancestors, load_backend(backend), seen=set())
    options = {"sinks": torch.randn(HEADS)} if sinks else {}
    out, weights = hybrid_attention(
        state, SimpleNamespace(layer_idx=layer), query, key, value, None, 0.3, s_aux=options.get("sinks")
    )
    assert weights is None and state.seen == {layer}
    assert out.dtype == dtype and out.is_contiguous()
    key, value = torch.cat([text[layer][0], key], 2), torch.cat([text[layer][1], value], 2)
    mask = seen(prefix, padding, window if layer == SLIDING else None)
    assert_as_good_as_plain((out.transpose(1, 2),), query, key, value, 0.3, mask=mask, stages=STAGES, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layer, keeps_all", [(FULL, False), (SLIDING, False), (SLIDING, True)])
@pytest.mark.parametrize("window", [2, 5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("holes", [False, True])
def test_round_of_rows_of_different_lengths_is_dense_attention(backend, layer, keeps_all, window, dtype, holes):
    """Three rows of other prompts, parents and lengths; each against dense attention over its own text alone."""
    config = AutoConfig.for_model("gemma2", num_hidden_layers=2, sliding_window=window)
    past = DynamicCache() if keeps_all else DynamicCache(config=config)
    cache = SpeculativeCache(config, past, 30, len(PARENTS), batch=3, lead=20)
    mask = torch.tensor([[1] * 12, [0] * 4 + [1] * 8, [0] * 11 + [1]])
    if holes:
        mask[0, 3] = mask[1, 6:8] = 0
    seen_by_row = [[index for index, real in enumerate(row) if real] for row in mask.tolist()]
    texts = [torch.randn(2, 3, KV_HEADS, 12, DIM).to(dtype) for _ in range(2)]  # keys and values of each layer
    for index in (SLIDING, FULL):
        cache.update(*texts[index], index)
    cache.hide_padding(mask)
    held = [[texts[index][:, row] for row in range(3)] for index in (SLIDING, FULL)]  # (2, K, length, D)
    parents = [PARENTS, [0, 0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 0, 0, 0]]
    depths = [DEPTHS, list(range(8)), [0] + [1] * 7]
    ancestors = ancestor_mask(torch.tensor(parents), 7)
    assert node_depths(ancestors).tolist() == depths
    for counts in ([3, 6, 0], [0, 7, 1], [0, 0, 0]):
        cache.begin_round(node_depths(ancestors))
        for index in (SLIDING, FULL):
            tree = torch.randn(2, 3, KV_HEADS, len(PARENTS), DIM).to(dtype)
            if index == layer:
                shown = tree
            else:
                add(cache, tree, index)
            # the accepted path: nodes 0, 1, 3, … of each row's own tree
            paths = [[0, 1, 3, 5, 6, 7], list(range(8)), [0, 1]]
            paths = [path[:count] for path, count in zip(paths, counts, strict=True)]
            behind = [torch.cat([held[index][row], tree[:, row][:, :, paths[row]]], dim=2) for row in range(3)]
            before, held[index] = held[index], behind
            if index == layer:
                shown_behind = before
        query = torch.randn(3, HEADS, len(PARENTS), DIM).to(dtype)
        state = Round(cache, ancestors, load_backend(backend), seen=set())
        out, _ = hybrid_attention(state, SimpleNamespace(layer_idx=layer), query, *shown, None, 0.3)
        assert out.shape == (3, len(PARENTS), HEADS, DIM) and out.dtype == dtype and out.is_contiguous()
        for row in range(3):
            length = shown_behind[row].shape[2]
            key, value = torch.cat([shown_behind[row], shown[:, row]], dim=2)[:, None]
            visible = torch.zeros(1, len(PARENTS), length + len(PARENTS), dtype=torch.bool)
            for node, depth in enumerate(depths[row]):
                near = [index for index in range(length) if layer == FULL or length + depth - index < window]
                visible[0, node, [i for i in near if i >= 12 or i in seen_by_row[row]]] = True
                other = node
                while layer == FULL or depth - depths[row][other] < window:
                    visible[0, node, length + other] = True
                    if other == 0:
                        break
                    other = parents[row][other]
            inputs = query[row : row + 1], key, value, 0.3
            assert_as_good_as_plain((out[row : row + 1].transpose(1, 2),), *inputs, mask=visible, stages=STAGES)
        steps = max(1, *counts)
        padded = torch.tensor([path + [0] * (steps - len(path)) for path in paths])
        commit(cache, padded, torch.tensor(counts), counts)


@pytest.mark.parametrize("scaling", [None, 0.1])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_scaling_and_softcap_are_honoured(scaling, softcap):
    config = AutoConfig.for_model("gemma2", num_hidden_layers=2, sliding_window=5)
    cache = SpeculativeCache(config, DynamicCache(config=config), 30, len(PARENTS))
    text = random_states(9, torch.float32)
    for index in (SLIDING, FULL):
        cache.update(*text, index)
    ancestors = ancestor_mask(torch.tensor([PARENTS]), 5)
    cache.begin_round(node_depths(ancestors))
    query = torch.randn(1, HEADS, len(PARENTS), DIM)
    for layer, window in ((SLIDING, 5), (FULL, None)):
        tree = cache.update(*random_states(len(PARENTS), torch.float32), layer)
        state = Round(cache, ancestors, load_backend("eager"), seen=set())
        module = SimpleNamespace(layer_idx=layer)
        out, _ = hybrid_attention(state, module, query, *tree, None, scaling=scaling, softcap=softcap)
        key, value = (torch.cat([before, behind], 2) for before, behind in zip(text, tree, strict=True))
        inputs = (query, key, value, DIM**-0.5 if scaling is None else scaling)
        options = {"mask": seen(9, 0, window), "softcap": softcap, "stages": STAGES}
        assert_as_good_as_plain((out.transpose(1, 2),), *inputs, **options)


# --- the switch ----------------------------------------------------------------------------------------------------

IDS = torch.tensor([[3, 5, 7, 2, 11, 4, 9, 8]])
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize(
    "family, implementation",
    [("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa"), ("gemma2", "eager"), ("gpt_oss", "eager")],
)
@torch.no_grad()
def test_outside_a_round_the_targets_own_attention_runs(family, implementation):
    target = tiny_target(family)
    target.set_attn_implementation(implementation)
    for mask in (None, PADDED):
        expected = target(IDS, attention_mask=mask).logits
        with switched(target):
            assert target.config._attn_implementation == register(implementation) != implementation
            assert torch.equal(target(IDS, attention_mask=mask).logits, expected)
        assert target.config._attn_implementation == implementation


@torch.no_grad()
def test_attention_function_of_the_users_own_is_kept():
    def constant(module, query, key, value, attention_mask, **kwargs):
        return torch.full_like(query, 0.25).transpose(1, 2), None

    AttentionInterface.register("constant", constant)
    target = tiny_target("llama")
    default = target(IDS).logits
    target.set_attn_implementation("constant")
    expected = target(IDS).logits
    assert not torch.equal(expected, default)
    with switched(target):
        assert torch.equal(target(IDS).logits, expected)
    assert target.config._attn_implementation == "constant"


def test_last_of_several_users_restores_the_name():
    target, other = tiny_target("llama"), tiny_target("llama")
    first, second = switched(target), switched(target)
    first.__enter__(), second.__enter__()
    assert other.config._attn_implementation == "sdpa"
    first.__exit__(None, None, None)
    assert target.config._attn_implementation == register("sdpa")
    second.__exit__(None, None, None)
    assert target.config._attn_implementation == "sdpa"


def test_name_is_restored_after_an_exception():
    target = tiny_target("llama")
    with pytest.raises(RuntimeError, match="in between"), switched(target):
        raise RuntimeError("in between")
    assert target.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_round_of_one_thread_is_not_seen_by_another():
    target = tiny_target("llama")
    expected = target(IDS).logits
    results = []

    def read():
        with torch.no_grad():
            results.append(target(IDS).logits)

    with switched(target), attending(Round(cache=None, ancestors=None, backend=None, seen=set()).attend):
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
        with pytest.raises(AttributeError, match="NoneType"):
            target(IDS)  # this thread is in the round, and its state is empty
    assert torch.equal(results[0], expected)
    assert torch.equal(target(IDS).logits, expected)


def test_name_is_registered_once():
    name = register("sdpa")
    function = AttentionInterface()[name]
    assert register("sdpa") == name
    assert AttentionInterface()[name] is function


# --- the name of the cache -----------------------------------------------------------------------------------------

OLD_NAME = "past_key_values"  # which transformers 5.24 still takes, with a warning
renamed = pytest.mark.skipif(CACHE == OLD_NAME, reason="the cache has one name before transformers 5.24")


class BothNames(LlamaForCausalLM):
    """A target written for transformers before and after 5.24; what it is given under the two names is in `given`."""

    def forward(self, input_ids=None, past_key_values=None, cache=None, **kwargs):
        self.given.append((past_key_values, cache))
        return super().forward(input_ids, **{CACHE: past_key_values if cache is None else cache}, **kwargs)


@pytest.mark.parametrize(
    "names",
    [(CACHE,), pytest.param((OLD_NAME,), marks=renamed), pytest.param((CACHE, OLD_NAME), marks=renamed)],
    ids=" and ".join,
)
@pytest.mark.parametrize("both", [False, True], ids=["a forward of one name", "a forward of both"])
@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
def test_every_forward_gets_our_cache_under_one_name(names, both):
    target = tiny_target("llama")
    if both:
        target.__class__ = BothNames
    target.given, draft = [], tiny_draft(target)
    given = []
    target.register_forward_pre_hook(
        lambda module, args, inputs: given.append({n: inputs.get(n) for n in ("cache", OLD_NAME)}), with_kwargs=True
    )
    held = []
    for assistant in ({}, {"assistant_model": draft}):
        caches = {name: DynamicCache(config=target.config) for name in names}
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        target.given.clear(), given.clear()
        text = target.generate(IDS, **caches, **options, **assistant)
        used, *unused = caches.values()  # of two, the one of the new name
        assert used.get_seq_length() == text.shape[1] - 1 and not any(cache.get_seq_length() for cache in unused)
        held.append((text, *(states for layer in used.layers for states in (layer.keys, layer.values))))
    for plain, ours in zip(*held, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert {name for inputs in given for name, cache in inputs.items() if cache is not None} == {CACHE}
    assert {type(inputs[CACHE]) for inputs in given} == {SpeculativeCache}
    caches = [cache for cache in sum(target.given, ()) if cache is not None]
    assert {type(cache) for cache in caches} == ({SpeculativeCache} if both else set())
