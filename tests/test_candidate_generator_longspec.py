"""Tree growth against a beam search over the draft's distribution, each node's recomputed for its whole text.

`Reference` knows no tree and no cache: it runs the draft's layer, written out again in plain torch, over the text from
its first token to the node, with the target's keys and values of that text's prefix.
"""

import copy
import functools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from helpers import VOCAB, tiny_draft, tiny_target
from transformers import DynamicCache

from hf_longspec.modeling.attention_longspec import BACKENDS
from hf_longspec.modeling.cache_longspec import SpeculativeCache
from hf_longspec.modeling.candidate_generator_longspec import LongSpecCandidateGenerator, best_children

# How a family turns its queries on the layer the draft looks at, and what it does to embeddings and logits.
FAMILIES = {
    "llama": {"pairs": "half", "act": F.silu},
    "mistral": {"pairs": "half", "act": F.silu, "sliding": 6},
    "gemma": {"pairs": "half", "act": lambda x: F.gelu(x, approximate="tanh"), "embed": math.sqrt(32)},
    "granite": {"pairs": "half", "act": F.silu, "embed": 3.0, "logits": 1 / 2.0},
    "cohere": {"pairs": "interleaved", "act": F.silu, "logits": 0.0625},
    "smollm3": {"pairs": None, "act": F.silu},
}


def models(family: str, **fields):
    target = tiny_target(family)
    draft = tiny_draft(target, **fields)
    for name, parameter in draft.named_parameters():
        if parameter.dim() == 1:  # biases of zero and norms of one would hide their own absence
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return target, draft


def turned(x: torch.Tensor, positions: torch.Tensor, pairs: str | None, theta: float) -> torch.Tensor:
    """RoPE on x (T, heads, D) as a product of complex numbers."""
    if pairs is None:
        return x
    half = x.shape[-1] // 2
    first, second = (x[..., :half], x[..., half:]) if pairs == "half" else (x[..., 0::2], x[..., 1::2])
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions[:, None, None] * frequencies
    product = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles).to(
        torch.complex(first, first)
    )
    stacked = torch.stack([product.real, product.imag], dim=-2 if pairs == "half" else -1)
    return stacked.flatten(-2)


class Reference:
    def __init__(self, family: str, target, draft, dtype: torch.dtype):
        self.family, self.config, self.dtype = FAMILIES[family], draft.config, dtype
        self.target = copy.deepcopy(target).to(dtype)
        self.weights = {name: tensor.to(dtype) for name, tensor in draft.state_dict().items()}

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.config.rms_norm_eps)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """One query (H, D) over key, value (S, K, D), head by head."""
        group = query.shape[0] // key.shape[1]
        heads = []
        for head in range(query.shape[0]):
            scores = key[:, head // group] @ query[head] / math.sqrt(query.shape[1])
            heads.append(scores.softmax(0) @ value[:, head // group])
        return torch.cat(heads)

    @functools.lru_cache(maxsize=2)  # noqa: B019  every node of a tree asks for the same
    def target_keys_and_values(self, prefix: tuple[int, ...]) -> list[torch.Tensor]:
        """Keys and values (prefix, K, D) of the target layer that the draft looks at."""
        past = self.target(torch.tensor([prefix]), past_key_values=DynamicCache()).past_key_values
        layer = past.layers[self.config.target_layer]
        return [states[0].transpose(0, 1) for states in (layer.keys, layer.values)]

    @torch.no_grad()
    def log_probabilities(self, text: list[int], prefix: int) -> torch.Tensor:
        """(vocab,) of what follows `text`, of which the target has read the first `prefix` tokens."""
        config, theta = self.config, self.config.rope_parameters["rope_theta"]
        positions = torch.arange(len(text), dtype=torch.float64)
        x = self.target.get_input_embeddings().weight[text] * self.family.get("embed", 1.0)
        normed = self.norm("input_layernorm", x)
        query, key, value = (
            self.linear(f"self_attn.{name}", normed).unflatten(-1, (-1, config.head_dim))
            for name in ("q_proj", "k_proj", "v_proj")
        )
        query, key = turned(query, positions, "half", theta), turned(key, positions, "half", theta)
        near = slice(max(len(text) - config.window, 0), None)
        x = x[-1] + self.linear("self_attn.o_proj", self.attend(query[-1], key[near], value[near]))

        near = slice(max(len(text) - self.family.get("sliding", 10**9), 0), None)
        key, value = (states[near] for states in self.target_keys_and_values(tuple(text[:prefix])))
        if key.shape[0]:
            query = self.linear("cross_attn.q_proj", self.norm("post_self_attention_layernorm", x))
            query = query.unflatten(-1, (-1, config.head_dim))[None]
            query = turned(query, positions[-1:], self.family["pairs"], theta)[0]
            x = x + self.linear("cross_attn.o_proj", self.attend(query, key, value))
        normed = self.norm("post_cross_attention_layernorm", x)
        gated = self.family["act"](self.linear("mlp.gate_proj", normed)) * self.linear("mlp.up_proj", normed)
        x = x + self.linear("mlp.down_proj", gated)
        if config.final_norm:
            x = self.norm("norm", x)
        logits = F.linear(x, self.target.get_output_embeddings().weight) * self.family.get("logits", 1.0)
        return logits.log_softmax(-1).double()


class Session:
    """A generator and the target's cache, fed as the decoding loop feeds them; `text` includes the root."""

    @torch.no_grad()
    def __init__(self, target, draft, texts: list[list[int]], backend: str = "eager", padding: int = 0):
        self.target, self.draft, self.texts = target, draft, texts
        self.bound = draft.bind(target)
        config = target.config
        self.cache = SpeculativeCache(config, DynamicCache(config=config), 200, 1 + sum(draft.config.tree_shape))
        self.generator = LongSpecCandidateGenerator(draft, self.bound, BACKENDS[backend], batch=len(texts))
        ids = torch.tensor([[0] * padding + text[:-1] for text in texts])
        mask = (torch.arange(ids.shape[1]) >= padding).long().expand(len(texts), -1)
        self.padding = padding
        self.cache.hide_padding(mask)
        positions = (torch.arange(ids.shape[1]) - padding).clamp(min=0).expand(len(texts), -1)
        target(ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache)
        embeds = self.bound.embed(ids[:, padding:])
        self.generator.prefill(embeds, embeds.shape[1] - 1)

    @property
    def root_position(self) -> torch.Tensor:
        return torch.tensor([len(text) - 1 for text in self.texts])

    @torch.no_grad()
    def grow(self, levels: int | None = None):
        roots = torch.tensor([text[-1] for text in self.texts])
        return self.generator.grow(roots, self.root_position, self.cache, levels)

    @torch.no_grad()
    def commit(self, accepted: list[int], steps: int) -> None:
        """The root and the `accepted` tokens but the last become prefix, the last one the next root (one text)."""
        (text,) = self.texts
        tokens = [text[-1], *accepted[:-1]]
        row = torch.tensor([tokens + [0] * (steps - len(tokens))])
        positions = self.root_position[:, None] + torch.arange(steps)
        self.generator.advance(row, positions, torch.arange(steps)[None] < len(tokens))
        mask = (torch.arange(self.cache.length + len(tokens)) >= self.padding).long()[None]
        positions = positions[:, : len(tokens)]
        self.target(torch.tensor([tokens]), attention_mask=mask, position_ids=positions, past_key_values=self.cache)
        text += accepted


def random_text(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(length)]


def assert_is_beam_search(tree, text: list[int], shape: tuple[int, ...], references: list[Reference]) -> None:
    """Every node's score is right, and no better node was left out of its level.

    references: in float32 and in float64; twice their distance is what float32 arithmetic may err.
    """
    tokens, parents, scores = (row[0].tolist() for row in (tree.tokens, tree.parents, tree.scores))
    assert len(tokens) == 1 + sum(shape) and tree.levels == len(shape)
    assert (tokens[0], parents[0], scores[0]) == (text[-1], 0, 0.0)
    paths, exact, start, end = [text], [0.0], 0, 1
    for width in shape:
        rough, fine = (
            [reference.log_probabilities(paths[node], len(text) - 1) for node in range(start, end)]
            for reference in references
        )
        allowed = 2 * max((r - f).abs().max().item() for r, f in zip(rough, fine, strict=True)) * len(shape)
        allowed += 4 * torch.finfo(torch.float32).eps * max(1.0, -min(scores))
        candidates = {
            (node, token): exact[node] + fine[node - start][token].item()
            for node in range(start, end)
            for token in range(VOCAB)
        }
        level = range(end, end + width)
        chosen = [(parents[node], tokens[node]) for node in level]
        assert len(set(chosen)) == width and set(chosen) <= set(candidates)
        for node, pair in zip(level, chosen, strict=True):
            assert scores[node] == pytest.approx(candidates[pair], abs=allowed)
        assert scores[end : end + width] == sorted(scores[end : end + width], reverse=True)
        left_out = [score for pair, score in candidates.items() if pair not in chosen]
        if left_out:
            assert min(candidates[pair] for pair in chosen) >= max(left_out) - 2 * allowed
        exact += [candidates[pair] for pair in chosen]
        paths += [paths[parent] + [token] for parent, token in chosen]
        start, end = end, end + width


def check_rounds(family: str, prompt: int, rounds: int, backend: str = "eager", padding: int = 0, **fields) -> None:
    rng = random.Random(prompt)
    target, draft = models(family, **fields)
    references = [Reference(family, target, draft, dtype) for dtype in (torch.float32, torch.float64)]
    session = Session(target, draft, [random_text(prompt + 1)], backend, padding)
    shape = draft.config.tree_shape
    for _ in range(rounds):
        (text,) = session.texts
        tree = session.grow()
        assert_is_beam_search(tree, text, shape, references)
        node, path = rng.randrange(tree.tokens.shape[1]), []
        while node:
            path.insert(0, int(tree.tokens[0, node]))
            node = int(tree.parents[0, node])
        session.commit([*path, rng.randrange(VOCAB)], len(shape) + 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_growth_is_beam_search(family):
    check_rounds(family, prompt=11, rounds=2, tree_shape=(3, 4, 4))


@pytest.mark.parametrize("prompt", [1, 2, 7, 30])
@pytest.mark.parametrize("window", [1, 2, 3, 8, 64])
def test_window_shorter_and_longer_than_the_text(window, prompt):
    check_rounds("llama", prompt, rounds=3, window=window, tree_shape=(2, 3, 2, 2))


@pytest.mark.parametrize("tree_shape", [(1, 1, 1, 1), (13,), (13, 30, 2), (4, 1, 5)])
def test_tree_shapes(tree_shape):
    check_rounds("llama", prompt=9, rounds=2, tree_shape=tree_shape)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("padding", [0, 3])
def test_backends_and_padding(family, backend, padding):
    """Padding shifts a token's place in the cache against its position."""
    check_rounds(family, prompt=9, rounds=2, backend=backend, padding=padding, tree_shape=(3, 3))


def test_draft_with_a_final_norm():
    check_rounds("llama", prompt=9, rounds=1, tree_shape=(3, 3), final_norm=True)


def test_sequences_of_a_batch_do_not_meet():
    target, draft = models("llama", tree_shape=(4, 8, 8))
    texts = [random_text(12, seed) for seed in range(2)]
    both = Session(target, draft, texts).grow()
    for row, text in enumerate(texts):
        alone = Session(target, draft, [text]).grow()
        assert torch.equal(both.tokens[row], alone.tokens[0])
        assert torch.equal(both.parents[row], alone.parents[0])
        torch.testing.assert_close(both.scores[row], alone.scores[0])


def test_fewer_levels_are_the_same_tree_cut_off():
    target, draft = models("llama", tree_shape=(4, 8, 8))
    session = Session(target, draft, [random_text(12)])
    full = session.grow()
    for levels, nodes in ((0, 1), (1, 5), (2, 13), (3, 21), (9, 21)):
        tree = session.grow(levels)
        assert tree.tokens.tolist() == [full.tokens[0, :nodes].tolist()]
        assert tree.parents.tolist() == [full.parents[0, :nodes].tolist()]


def test_verify_tokens_keeps_the_best_nodes_of_the_whole_tree():
    target, draft = models("llama", tree_shape=(4, 8, 8))
    text = random_text(12)
    full = Session(target, draft, [text]).grow()
    draft.config.verify_tokens = 9
    tree = Session(target, draft, [text]).grow()
    assert tree.tokens.shape == (1, 9)
    assert tree.scores[0].sort().values.tolist() == full.scores[0].sort().values[-9:].tolist()


def test_no_tree_needs_no_draft():
    target, draft = models("llama", tree_shape=())
    for parameter in draft.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    session = Session(target, draft, [random_text(12)])
    assert session.grow().tokens.tolist() == [[session.texts[0][-1]]]
    session.commit([3], steps=1)
    assert session.grow().tokens.tolist() == [[3]]


@pytest.mark.parametrize("tree_shape", [(), (3,), (4, 8, 8)])
def test_state_is_as_large_as_announced_whatever_the_context(tree_shape):
    target, draft = models("llama", tree_shape=tree_shape, window=8)
    for length in (2, 9, 150):
        session = Session(target, draft, [random_text(length)])
        session.grow()
        assert session.generator.window.nbytes == draft.state_bytes


# --- best_children ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes, vocab, width", [(1, 5, 3), (1, 5, 5), (4, 5, 20), (3, 50, 7), (6, 7, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_best_children_against_sorting_everything(nodes, vocab, width, dtype):
    logits = (3 * torch.randn(2, nodes, vocab)).to(dtype)
    scores = -3 * torch.rand(2, nodes)
    tokens, parents, chosen = best_children(logits, scores, width)
    everything = scores.double()[:, :, None] + logits.double().log_softmax(-1)
    units = 4 * torch.finfo(torch.float32).eps * everything.abs().max()
    for row in range(2):
        pairs = list(zip(parents[row].tolist(), tokens[row].tolist(), strict=True))
        assert len(set(pairs)) == width
        own = torch.stack([everything[row, parent, token] for parent, token in pairs])
        assert (chosen[row] - own).abs().max() <= units
        best = everything[row].flatten().sort(descending=True).values[:width]
        assert (chosen[row] - best).abs().max() <= units


def test_impossible_tokens_come_last():
    logits = torch.full((1, 2, 4), -math.inf)
    logits[0, 0, 2] = logits[0, 1, 1] = 0.0
    tokens, parents, scores = best_children(logits, torch.tensor([[-2.0, -1.0]]), 3)
    assert tokens[0, :2].tolist() == [1, 2] and parents[0, :2].tolist() == [1, 0]
    assert scores.tolist() == [[-1.0, -2.0, -math.inf]]


def test_rounding_never_lifts_a_child_above_its_parent():
    """Pruning relies on it: a node may not outrank the parent it hangs on, however sure the draft is."""
    logits = 3 * torch.randn(200, 4, 50)
    logits[..., 7] += 40
    scores = -20 * torch.rand(200, 4)
    _, parents, chosen = best_children(logits, scores, 4)
    assert (chosen <= scores.gather(1, parents)).all()
