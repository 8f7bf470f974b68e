"""Converted drafts against the equations of the published ones, written out in `published_layer.py`.

Tolerances: twice what the same equations err in float32, measured against float64.
"""

import copy

import pytest
import torch
from helpers import CACHE
from published_format import DRAFTS, TARGETS, random_weights, tiny, write_checkpoint, write_config
from published_layer import WINDOW, PublishedLayer
from test_candidate_generator_longspec import Session
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from hf_longspec import LongSpecForCausalLM
from hf_longspec.evaluation.tiny_models import randomized
from hf_longspec.hub.convert import convert

TREE = (4, 16, 16, 16, 16)  # of the paper


class Pair:
    """A tiny target of a family, a published checkpoint for it, and the draft made from that."""

    def __init__(self, name: str, folder):
        self.config = tiny(TARGETS[name])
        self.weights = random_weights(self.config)
        its_config = AutoConfig.from_pretrained(write_config(folder / "target", self.config))
        self.target = randomized(lambda: AutoModelForCausalLM.from_config(its_config, dtype=torch.float32), 0)
        source = write_checkpoint(folder / "published", self.config, self.weights, pickled=True)
        convert(str(source), str(folder / "target"), folder / "draft", "float32")
        self.draft = LongSpecForCausalLM.from_pretrained(folder / "draft")

    def layer(self, dtype: torch.dtype, angles: torch.dtype | None = None) -> PublishedLayer:
        return PublishedLayer(self.weights, self.config, dtype, angles or dtype)

    @torch.no_grad()
    def read(self, tokens: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Embeddings of the tokens, and the keys and values of the target's last layer, (T, K, D)."""
        target, ids = copy.deepcopy(self.target).to(dtype), torch.tensor([tokens])
        layer = target(ids, **{CACHE: DynamicCache()})[CACHE].layers[-1]
        return target.get_input_embeddings()(ids)[0], tuple(s[0].transpose(0, 1) for s in (layer.keys, layer.values))


@pytest.fixture(params=DRAFTS)
def pair(request, tmp_path):
    return Pair(request.param, tmp_path)


def assert_as_close(ours, rough, fine):
    """No further from `fine` than twice what the equations themselves are in our arithmetic, `rough`."""
    scale = fine.abs().max().item()
    allowed = 2 * (rough - fine).abs().max().item() + 4 * torch.finfo(torch.float32).eps * scale
    assert allowed < 1e-3 * scale  # a tolerance that would let another equation pass is none
    assert (ours - fine).abs().max().item() <= allowed


@pytest.mark.parametrize("lag", [1, 2, 4])
@torch.no_grad()
def test_layer_over_a_text(pair, lag):
    """In float64, but for angles, which transformers and we work out in float32."""
    tokens = torch.randint(101, (40,)).tolist()
    embeds, target_states = pair.read(tokens, torch.float64)
    rough = pair.layer(torch.float64, angles=torch.float32).text(embeds, target_states, lag)
    fine = pair.layer(torch.float64).text(embeds, target_states, lag)

    draft, at = copy.deepcopy(pair.draft).double(), torch.arange(len(tokens))[None]
    angles, half = draft.angles(at), pair.layer(torch.float64, angles=torch.float32)
    back = at.T - at

    def self_attend(query, key, value):
        out = half.attend(*(states[0].transpose(0, 1) for states in (query, key, value)), back >= 0)
        return out.view(len(tokens), -1, half.dim).transpose(0, 1)[None]

    def cross_attend(query):
        query = half.rotate(query[0].transpose(0, 1), at[0])
        return half.attend(query, *target_states, back >= lag).view(len(tokens), -1, half.dim).transpose(0, 1)[None]

    ours = draft.layer(embeds[None], angles, self_attend, cross_attend)[0]
    assert_as_close(ours, rough, fine)


@torch.no_grad()
def test_window_and_trees(pair):
    """A prompt longer than the window is read, trees of the paper's shape grow, one path is accepted, and again."""
    text = torch.randint(101, (WINDOW + 40,)).tolist()
    assert (pair.draft.config.window, pair.draft.config.tree_on(torch.device("cuda"))) == (WINDOW, TREE)
    pair.draft.config.tree_shape = TREE
    session = Session(pair.target, pair.draft, [text])
    for accepted in ([7, 8, 9], [3], None):
        check_window(pair, session)
        check_tree(pair, session)
        if accepted is not None:
            session.commit([accepted], len(accepted))


def check_window(pair, session):
    text = session.texts[0][:-1]
    rough, fine = (published(pair, text, dtype) for dtype in (torch.float32, torch.float64))
    held = torch.arange(len(text) - WINDOW, len(text))
    window = session.generator.window
    for name in ("keys", "values"):
        ours = getattr(window, name)[0, :, held % WINDOW].transpose(0, 1)
        assert_as_close(ours, getattr(rough, name)[held], getattr(fine, name)[held])


def check_tree(pair, session):
    """The logits of each level, for the tree that our generator grew."""
    logits, head = [], pair.target.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, output: logits.append(output[0]))
    tree = session.grow()
    hook.remove()
    text, start = session.texts[0], 0
    layers = [published(pair, text[:-1], dtype) for dtype in (torch.float32, torch.float64)]
    for depth, ours in enumerate(logits):
        nodes = slice(start, start + len(ours))
        tokens, parents = tree.tokens[0, nodes], tree.parents[0, nodes] if depth else None
        found = []
        for layer in layers:
            dtype = layer.keys.dtype
            embeds = pair.target.get_input_embeddings()(tokens).to(dtype)
            hidden = layer.level(embeds, depth, parents)
            found.append(hidden @ head.weight.to(dtype).T)
        assert_as_close(ours, *found)
        start = nodes.stop
    assert [len(level) for level in logits] == [1, 4, 16, 16, 16]


def published(pair, tokens, dtype):
    layer = pair.layer(dtype)
    layer.prefill(*pair.read(tokens, dtype))
    return layer


@torch.no_grad()
def test_text_is_plain_generates(pair):
    ids = torch.randint(3, 101, (1, 20))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = pair.target.generate(ids, **options)
    assert torch.equal(pair.target.generate(ids, assistant_model=pair.draft, **options), plain)
