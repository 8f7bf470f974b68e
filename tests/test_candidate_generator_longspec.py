"""Tree growth against a beam search over the draft's distribution, each node's recomputed for its whole text.

`Reference` knows no tree and no cache: it runs the draft's layer, written out again in plain torch, over the text from
its first token to the node, with the target's keys and values of that text's prefix. The draft's own window is checked
against lists of tokens in plain Python.
"""

import copy
import functools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from helpers import CACHE, VOCAB, commit, tiny_draft, tiny_target
from serials import DIM, HEADS, serials_in, states, states_of_rows
from transformers import DynamicCache

from hf_longspec.modeling.cache_longspec import SpeculativeCache
from hf_longspec.modeling.candidate_generator_longspec import DraftWindow, LongSpecCandidateGenerator
from hf_longspec.modeling.fast_choose_longspec import load_backend
from hf_longspec.modeling.hybrid_attention_longspec import Round
from hf_longspec.modeling.interface_longspec import attending, switched
from hf_longspec.modeling.tree_longspec import TreeForm, ancestor_mask, node_depths

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
        past = self.target(torch.tensor([prefix]), **{CACHE: DynamicCache()})[CACHE]
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
    """A generator and the target's cache, fed as the decoding loop feeds them; `texts` include the roots.

    Shorter texts are padded to the left, all by `padding` more.
    """

    @torch.no_grad()
    def __init__(self, target, draft, texts: list[list[int]], backend: str = "eager", padding: int = 0):
        self.target, self.draft, self.texts = target, draft, texts
        self.bound, self.backend = draft.bind(target), load_backend(backend)
        config, batch = target.config, len(texts)
        nodes = 1 + sum(draft.config.tree_shape)
        self.cache = SpeculativeCache(config, DynamicCache(config=config), 200, nodes, batch=batch, lead=200)
        self.generator = LongSpecCandidateGenerator(
            draft, self.bound, self.backend, batch, tuple(draft.config.tree_shape)
        )
        prompt = padding + max(map(len, texts)) - 1
        pads = torch.tensor([prompt - len(text) + 1 for text in texts])
        ids = torch.tensor([[0] * (prompt - len(text) + 1) + text[:-1] for text in texts])
        mask = (torch.arange(prompt) >= pads[:, None]).long()
        self.cache.hide_padding(mask)
        positions = (torch.arange(prompt) - pads[:, None]).clamp(min=0)
        target(ids, attention_mask=mask, position_ids=positions, **{CACHE: self.cache})
        self.generator.fill_window(self.bound.embed(ids), self.root_position - 1, mask.bool())

    @property
    def root_position(self) -> torch.Tensor:
        return torch.tensor([len(text) - 1 for text in self.texts])

    @torch.no_grad()
    def grow(self, levels: int | None = None):
        roots = torch.tensor([text[-1] for text in self.texts])
        form = TreeForm(self.generator.shape[:levels], verified=self.draft.config.verify_tokens)
        return self.generator.grow(roots, self.root_position, self.cache, form)

    @torch.no_grad()
    def commit(self, accepted: list[list[int]], steps: int) -> None:
        """Each row's root and `accepted` tokens but the last become prefix, the last the next root; none: it rests.

        The target reads them as trees that are chains.
        """
        rows = [[text[-1], *new][: len(new)] for text, new in zip(self.texts, accepted, strict=True)]
        tokens = torch.tensor([row + [0] * (steps - len(row)) for row in rows])
        emitted = [len(row) for row in rows]
        counts, step = torch.tensor(emitted), torch.arange(steps)
        positions = self.root_position[:, None] + step
        self.generator.advance(tokens, positions, step < counts[:, None])
        chain = (step - 1).clamp(min=0).expand(len(rows), -1)
        self.cache.begin_round(step.expand(len(rows), -1))
        state = Round(self.cache, ancestor_mask(chain, steps), self.backend, set())
        with switched(self.target), attending(state.attend):
            self.target(tokens, position_ids=positions, **{CACHE: self.cache})
        commit(self.cache, step.expand(len(rows), -1), counts, emitted)
        for text, new in zip(self.texts, accepted, strict=True):
            text += new


def random_text(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(length)]


def assert_is_beam_search(
    tree, text: list[int], shape: tuple[int, ...], references: list[Reference], row: int = 0
) -> None:
    """Every node's score in a row is right, and no better node was left out of its level.

    references: in float32 and in float64; twice their distance is what float32 arithmetic may err.
    """
    tokens, parents, scores = (values[row].tolist() for values in (tree.tokens, tree.parents, tree.scores))
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


def check_rounds(
    family: str, prompt: int | list[int], rounds: int, backend: str = "eager", padding: int = 0, **fields
) -> None:
    """Beam search in every row of a batch of prompts so long, round after round, each row at its own pace."""
    prompts = [prompt] if isinstance(prompt, int) else prompt
    rng = random.Random(prompts[0])
    target, draft = models(family, **fields)
    references = [Reference(family, target, draft, dtype) for dtype in (torch.float32, torch.float64)]
    texts = [random_text(length + 1, seed) for seed, length in enumerate(prompts)]
    session = Session(target, draft, texts, backend, padding)
    shape = draft.config.tree_shape
    for _ in range(rounds):
        tree = session.grow()
        accepted = []
        for row, text in enumerate(session.texts):
            assert_is_beam_search(tree, text, shape, references, row)
            node, path = rng.randrange(tree.tokens.shape[1]), []
            while node:
                path.insert(0, int(tree.tokens[row, node]))
                node = int(tree.parents[row, node])
            rests = len(prompts) > 1 and rng.random() < 0.2
            accepted.append([] if rests else [*path, rng.randrange(VOCAB)])
        session.commit(accepted, len(shape) + 1)


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
@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("padding", [0, 3])
def test_backends_and_padding(family, backend, padding):
    """Padding shifts a token's place in the cache against its position."""
    check_rounds(family, prompt=9, rounds=2, backend=backend, padding=padding, tree_shape=(3, 3))


def test_draft_with_a_final_norm():
    check_rounds("llama", prompt=9, rounds=1, tree_shape=(3, 3), final_norm=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_growth_is_beam_search_in_every_row(family):
    check_rounds(family, prompt=[11, 2, 7], rounds=2, tree_shape=(3, 4, 4))


@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("window", [1, 3, 8, 64])
def test_rows_shorter_and_longer_than_the_window(window, backend):
    check_rounds("llama", [30, 1, 9], rounds=3, backend=backend, window=window, tree_shape=(2, 3, 2, 2))


@pytest.mark.parametrize("family", ["llama", "mistral", "smollm3"])
def test_sequences_of_a_batch_do_not_meet(family):
    """Four texts of other lengths, each as alone, also when they have gone on at their own pace."""
    target, draft = models(family, tree_shape=(4, 8, 8))
    texts = [random_text(length, seed) for seed, length in enumerate((12, 3, 29, 12))]
    together = Session(target, draft, [text[:] for text in texts])
    alone = [Session(target, draft, [text[:]]) for text in texts]
    rng = random.Random(0)
    for _ in range(4):
        trees = together.grow()
        for row, session in enumerate(alone):
            tree = session.grow()
            assert torch.equal(trees.tokens[row], tree.tokens[0])
            assert torch.equal(trees.parents[row], tree.parents[0])
            torch.testing.assert_close(trees.scores[row], tree.scores[0])
        accepted = [[rng.randrange(VOCAB) for _ in range(rng.randrange(5))] for _ in texts]
        together.commit(accepted, steps=4)
        for session, new in zip(alone, accepted, strict=True):
            session.commit([new], steps=4)
    assert len(set(together.cache.lengths)) > 2


def test_padding_within_and_behind_a_prompt_is_counted_as_positions_are():
    """A user's mask with holes: tokens are counted back from the last one, and what falls below zero is forgotten."""
    target, draft = models("llama", tree_shape=(3,), window=8)
    session = Session(target, draft, [random_text(7), random_text(7, 1)])
    window = session.generator.window
    embeds = session.bound.embed(torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]]))
    window.keys.zero_()
    session.generator.fill_window(embeds, torch.tensor([1, 3]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).bool())
    assert window.first.tolist() == [0, 0]
    written = window.keys[:, 0, : window.window].abs().sum(-1) > 0
    assert written.tolist() == [[slot < 2 for slot in range(8)], [slot < 4 for slot in range(8)]]


def test_a_row_that_is_all_padding_in_the_window_shows_nothing():
    target, draft = models("llama", tree_shape=(3,), window=4)
    session = Session(target, draft, [random_text(7), random_text(7, 1)])
    embeds = session.bound.embed(torch.tensor([[5, 6, 7, 8], [0, 0, 0, 0]]))
    session.generator.fill_window(embeds, torch.tensor([9, 0]), torch.tensor([[True] * 4, [False] * 4]))
    ancestry = torch.ones(2, 1, 1, dtype=torch.bool)
    roots = torch.tensor([10, 1])
    seen = session.generator.window.mask(roots[:, None], roots, ancestry)[:, 0]
    # tokens 7, 8 and 9 in slots 3, 0 and 1; position 6 is out of reach
    assert seen.tolist() == [[True, True, False, True, False, True], [False] * 5 + [True]]


def test_fewer_levels_are_the_same_tree_cut_off():
    target, draft = models("llama", tree_shape=(4, 8, 8))
    session = Session(target, draft, [random_text(12)])
    full = session.grow()
    for levels, nodes in ((0, 1), (1, 5), (2, 13), (3, 21), (9, 21)):
        tree = session.grow(levels)
        assert tree.tokens.tolist() == [full.tokens[0, :nodes].tolist()]
        assert tree.parents.tolist() == [full.parents[0, :nodes].tolist()]


def test_levels_that_are_not_grown_do_not_turn_queries():
    """longrope has other frequencies from the first position beyond its switch on, for all that are asked with it."""
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [9.0] * 8}
    target = tiny_target("phi3", hidden_size=64, original_max_position_embeddings=16, rope_parameters=rope)
    draft = tiny_draft(target, tree_shape=(4, 8, 8, 8))
    session = Session(target, draft, [random_text(14)])  # the root stands at 13, level 3 at 16
    whole, cut = session.grow(), session.grow(3)
    draft.config.tree_shape = (4, 8, 8)
    short = Session(target, draft, session.texts).grow()
    assert cut.tokens.tolist() == short.tokens.tolist() and cut.scores.tolist() == short.scores.tolist()
    assert whole.scores[:, :21].tolist() != short.scores.tolist()


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
    session.commit([[3]], steps=1)
    assert session.grow().tokens.tolist() == [[3]]


@pytest.mark.parametrize("tree_shape", [(), (3,), (4, 8, 8)])
def test_state_is_as_large_as_announced_whatever_the_context(tree_shape):
    target, draft = models("llama", tree_shape=tree_shape, window=8)
    for length in (2, 9, 150):
        session = Session(target, draft, [random_text(length)])
        session.grow()
        assert session.generator.window.nbytes == draft.state_bytes
        session = Session(target, draft, [random_text(length), random_text(2), random_text(5)])
        session.grow()
        assert session.generator.window.nbytes == 3 * draft.state_bytes


# --- the draft's window ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("window", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("prompt", [1, 4, 30])
@pytest.mark.parametrize("padding", [0, 3, 29])
def test_life_of_a_draft_window(window, prompt, padding, seed):
    """Two texts that grow at their own pace, the second's prompt shorter; row b's token p has number 1000·b + p."""
    rng = random.Random(seed)
    tree_size, ends = 6, [prompt, max(prompt - padding, 1)]
    store = DraftWindow(window, tree_size, (2, HEADS, DIM), torch.float32, torch.device("cpu"))
    size = store.nbytes
    assert size == store.keys.untyped_storage().nbytes() + store.values.untyped_storage().nbytes()

    firsts = [max(end - window, 0) for end in ends]
    back = min(window, prompt)
    positions = torch.tensor([range(end - back, end) for end in ends])
    serials = [[1000 * row + p for p in positions[row].tolist()] for row in range(2)]
    store.write(*states_of_rows(serials), positions, positions >= 0)
    store.first = torch.tensor(firsts)
    for _ in range(10):
        parents = [[0] + [rng.randrange(node) for node in range(1, tree_size)] for _ in range(2)]
        ancestry = ancestor_mask(torch.tensor(parents), tree_size)
        depths = node_depths(ancestry)
        tree = [[1000 * row + 500 + node for node in range(tree_size)] for row in range(2)]
        cut = rng.randrange(tree_size + 1)
        for start, end in ((0, cut), (cut, tree_size)):
            store.write_nodes(*states_of_rows([row[start:end] for row in tree]), start)
        roots = torch.tensor(ends)
        mask = store.mask(roots[:, None] + depths, roots, ancestry)
        for row in range(2):
            for node in range(tree_size):
                position = ends[row] + int(depths[row, node])
                slots = mask[row, node]
                seen = serials_in(store.keys[row : row + 1, :, slots], store.values[row : row + 1, :, slots])
                near = [1000 * row + p for p in range(firsts[row], ends[row]) if p > position - window]
                above = [tree[row][other] for other in range(tree_size) if ancestry[row, node, other]]
                assert sorted(seen) == near + above
        counts = [rng.randrange(7) for _ in range(2)]  # none: a row that rests
        steps = max(*counts, 1) + rng.randrange(2)
        positions = roots[:, None] + torch.arange(steps)
        real = torch.arange(steps) < torch.tensor(counts)[:, None]
        tokens = [[1000 * row + ends[row] + step for step in range(steps)] for row in range(2)]
        store.write(*states_of_rows(tokens), positions, real)
        ends = [end + count for end, count in zip(ends, counts, strict=True)]
        assert store.nbytes == size


def test_draft_window_keeps_the_newest_tokens_in_whatever_order_they_are_written():
    """A scatter may write in any order, so no two tokens may go to one slot."""
    store = DraftWindow(2, 1, (1, HEADS, DIM), torch.float32, torch.device("cpu"))
    positions = [14, 13, 12, 11, 10]
    store.write(*states(positions), torch.tensor([positions]), torch.ones(1, 5, dtype=torch.bool))
    assert serials_in(store.keys[:, :, :2], store.values[:, :, :2]) == [14, 13]
