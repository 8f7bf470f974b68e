"""target_longspec's draft head: rows of the target's own head, for a draft that guesses among some tokens only.

The text stays the same, and trees hold no other tokens.
"""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from helpers import VOCAB, tiny_draft, tiny_target
from pairs import assert_same

from hf_longspec import LongSpecConfig, LongSpecForCausalLM
from hf_longspec.modeling.candidate_generator_longspec import LongSpecCandidateGenerator

FEW = [7, 2, 12, 3, 9]
PROMPT = torch.tensor([[3, 5, 7, 2, 11, 4, 9]])


def pair_of(family="llama", ids=FEW, **overrides):
    target = tiny_target(family, **overrides)
    draft = tiny_draft(target, tree_shape=(4, 8, 8))
    draft.set_draft_vocab(ids)
    return target, draft


def head_of(target, draft):
    bound = draft.bind(target)
    rows = draft.head_rows(bound)
    return bound.logits if rows is None else lambda hidden: bound.scaled(rows(hidden))


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(
    "family, overrides",
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gemma2", {}),  # caps its logits
        ("cohere", {}),  # scales them
        ("granite", {}),
        ("phi", {}),  # its head has a bias
    ],
)
def test_the_text_is_that_of_plain_generate(family, overrides, do_sample):
    target, draft = pair_of(family, **overrides)
    assert_same(target, draft, PROMPT, do_sample=do_sample)
    assert_same(target, draft, torch.cat([PROMPT, PROMPT.flip(1)]), do_sample=do_sample)


def test_a_vocabulary_of_one_token():
    target, draft = pair_of(ids=[6])
    draft.config.tree_shape = (1, 1)
    assert_same(target, draft, PROMPT)


def test_a_good_vocabulary_is_accepted():
    """A draft that could guess every token, in another order, guesses as before."""
    target, draft = pair_of(ids=torch.randperm(VOCAB))
    lengths = []
    for ids in (draft.draft_vocab, None):
        draft.set_draft_vocab(ids)
        out = target.generate(PROMPT, assistant_model=draft, max_new_tokens=24, return_dict_in_generate=True)
        lengths.append(out.accept_lengths)
    assert lengths[0] == lengths[1] and max(lengths[0][0]) > 1


@pytest.fixture
def trees(monkeypatch):
    """All trees that are grown during a test."""
    trees = []
    grow = LongSpecCandidateGenerator.grow
    monkeypatch.setattr(LongSpecCandidateGenerator, "grow", lambda *args: trees.append(grow(*args)) or trees[-1])
    return trees


def test_guesses_are_scored_as_those_of_the_whole_head(trees):
    """With the scale of the target's logits, which weighs the levels of a tree against each other."""
    target, draft = pair_of("cohere", ids=torch.randperm(VOCAB))
    for ids in (draft.draft_vocab, None):
        draft.set_draft_vocab(ids)
        target.generate(PROMPT, assistant_model=draft, max_new_tokens=9)
    assert len(trees) % 2 == 0
    for few, whole in zip(trees[: len(trees) // 2], trees[len(trees) // 2 :], strict=True):
        torch.testing.assert_close(few.scores, whole.scores)


def test_trees_hold_no_other_tokens(trees):
    target, draft = pair_of()
    target.generate(PROMPT, assistant_model=draft, max_new_tokens=24)
    guessed = torch.cat([tree.tokens[:, 1:].flatten() for tree in trees])
    assert set(guessed.tolist()) == set(FEW)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "phi"])
@torch.no_grad()
def test_logits_are_those_of_the_whole_head(family):
    target, draft = pair_of(family)
    hidden = torch.randn(2, 3, 32)
    torch.testing.assert_close(head_of(target, draft)(hidden), draft.bind(target).logits(hidden)[..., FEW])


# --- what is kept --------------------------------------------------------------------------------------------------


def kept_weight(target, draft):
    head_of(target, draft)
    return draft._head_rows.kept[target.get_output_embeddings()][1].weight


def test_rows_are_gathered_once():
    target, draft = pair_of()
    first = kept_weight(target, draft)
    assert first.shape == (5, 32) and torch.equal(first, target.lm_head.weight[FEW])
    assert kept_weight(target, draft) is first
    draft.to(torch.device("cpu"), torch.float32)
    assert kept_weight(target, draft) is first


@pytest.mark.parametrize("change", ["in place", "another", "dtype", "ids", "ids in place"])
def test_rows_are_gathered_anew_when_something_has_changed(change):
    target, draft = pair_of()
    first, ids = kept_weight(target, draft), FEW
    with torch.no_grad():
        if change == "in place":
            target.lm_head.weight.mul_(2)
        elif change == "another":
            target.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, 32))
        elif change == "dtype":
            target.to(torch.bfloat16)
        elif change == "ids":
            draft.set_draft_vocab(ids := [4, 5])
        else:
            draft.load_state_dict(draft.state_dict() | {"draft_vocab": torch.tensor(ids := [1, 3, 5, 7, 9])})
    second = kept_weight(target, draft)
    assert second is not first and torch.equal(second, target.lm_head.weight[ids])


def test_rows_go_with_the_target_and_with_the_draft():
    target, draft = pair_of()
    of_target = weakref.ref(kept_weight(target, draft))
    del target
    gc.collect()
    assert of_target() is None
    target, draft = pair_of()
    of_draft = weakref.ref(kept_weight(target, draft))
    del draft
    gc.collect()
    assert of_draft() is None


def test_several_targets():
    draft = pair_of()[1]
    for target in (tiny_target("llama", seed=seed) for seed in range(3)):
        assert torch.equal(kept_weight(target, draft), target.lm_head.weight[FEW])
        assert_same(target, draft, PROMPT)


def test_copies_keep_the_vocabulary_and_no_rows():
    target, draft = pair_of()
    kept_weight(target, draft)
    for twin in (copy.deepcopy(draft), pickle.loads(pickle.dumps(draft))):
        assert twin.draft_vocab.tolist() == FEW and not twin._head_rows.kept
        assert_same(target, twin, PROMPT)


def test_state_is_that_of_a_whole_vocabulary():
    target, draft = pair_of()
    assert draft.state_bytes == tiny_draft(target, tree_shape=(4, 8, 8)).state_bytes
    assert set(draft.state_dict()) - set(tiny_draft(target).state_dict()) == {"draft_vocab"}


# --- saved and loaded ----------------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path):
    target, draft = pair_of()
    draft.save_pretrained(tmp_path)
    again = LongSpecForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.config.draft_vocab_size == 5
    assert again.draft_vocab.tolist() == FEW and again.draft_vocab.dtype == torch.int64
    assert_same(target, again, PROMPT)


def test_size_asked_of_a_checkpoint_without_a_vocabulary(tmp_path):
    """The first so many tokens: in most vocabularies they are the most frequent ones."""
    target = tiny_target("llama")
    tiny_draft(target).save_pretrained(tmp_path)
    draft = LongSpecForCausalLM.from_pretrained(tmp_path, draft_vocab_size=6)
    assert draft.draft_vocab.tolist() == [0, 1, 2, 3, 4, 5]
    assert LongSpecForCausalLM.from_pretrained(tmp_path).draft_vocab is None


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids, message",
    [
        ([], "is a row of token ids, got"),
        ([[1, 2]], r"is a row of token ids, got \(1, 2\)"),
        (3, r"is a row of token ids, got \(\)"),
        ([1.0, 2.0], "is a row of token ids, got .* of torch.float32"),
        ([True, False], "is a row of token ids, got .* of torch.bool"),
        ([1, 13], r"token ids in 0\.\.12, got 1\.\.13"),
        ([-1, 3], r"token ids in 0\.\.12, got -1\.\.3"),
        ([4, 5, 4, 5, 6], "has each token once, got 2 more than once"),
    ],
)
def test_wrong_vocabulary(ids, message):
    _, draft = pair_of()
    with pytest.raises(ValueError, match=message):
        draft.set_draft_vocab(ids)
    assert draft.draft_vocab.tolist() == FEW and draft.config.draft_vocab_size == 5


@pytest.mark.parametrize("size", [0, -1, 14, 2.0, True, "all"])
def test_wrong_size(size):
    with pytest.raises(ValueError, match=r"`draft_vocab_size` must be None or in 1\.\.13, got "):
        LongSpecConfig.from_target(tiny_target("llama").config, draft_vocab_size=size, tree_shape=(1,))


def test_tree_wider_than_the_vocabulary():
    target, draft = pair_of(ids=[1, 2, 3])
    message = r"level 1 can have at most 1 parents × 3 tokens = 3 nodes, got 4"
    with pytest.raises(ValueError, match=message):
        target.generate(PROMPT, assistant_model=draft, max_new_tokens=4)


@pytest.mark.parametrize("size", [None, 4])
def test_size_that_is_not_the_vocabularys(size):
    target, draft = pair_of()
    draft.config.draft_vocab_size = size
    with pytest.raises(ValueError, match=rf"`draft_vocab_size` is 5, as draft.set_draft_vocab has it, got {size}"):
        target.generate(PROMPT, assistant_model=draft, max_new_tokens=4)


class OwnLinear(torch.nn.Linear):
    pass


def subclass(target):
    target.lm_head = OwnLinear(32, VOCAB, bias=False)


def forward_of_its_own(target):
    target.lm_head.forward = target.lm_head.forward


@pytest.mark.parametrize(
    "change, found",
    [
        (subclass, r"a test_draft_head_longspec\.OwnLinear"),
        (lambda target: target.lm_head.register_forward_hook(lambda *call: None), "one with hooks"),
        (lambda target: target.lm_head.register_forward_pre_hook(lambda *call: None), "one with hooks"),
        (forward_of_its_own, "one with hooks"),
        (
            lambda target: torch.nn.utils.parametrizations.weight_norm(target.lm_head),
            r"a torch\.nn\.utils\.parametrize\.ParametrizedLinear",
        ),
    ],
)
def test_head_that_is_more_than_its_weight(change, found):
    target, draft = pair_of()
    change(target)
    plain = target.generate(PROMPT, max_new_tokens=8, pad_token_id=0)
    with pytest.raises(ValueError, match=rf"is a plain torch.nn.Linear, got {found}; draft.set_draft_vocab\(None\)"):
        target.generate(PROMPT, assistant_model=draft, max_new_tokens=8)
    draft.set_draft_vocab(None)
    assert target.generate(PROMPT, assistant_model=draft, max_new_tokens=8, pad_token_id=0).tolist() == plain.tolist()


def test_head_of_packed_weights():
    target, draft = pair_of()
    target.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCAB, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="got a weight of torch.int8 on cpu"):
        head_of(target, draft)


@pytest.mark.parametrize("tokens", [3, 11])
def test_a_pruned_head(tokens):
    """Without the rows of the last tokens: a vocabulary of the rest is served, any other is refused by name."""
    target, draft = pair_of()
    target.lm_head = torch.nn.Linear(32, tokens, bias=False)
    draft.set_draft_vocab(range(2, 7))
    draft.config.tree_shape = (2, 4)
    if tokens == 11:
        assert_same(target, draft, PROMPT)
        return
    with pytest.raises(ValueError, match=r"has tokens of the target's LM head, 0\.\.2, got 6"):
        target.generate(PROMPT, assistant_model=draft, max_new_tokens=4)


@pytest.mark.parametrize(
    "adapted, found",
    [
        ({"target_modules": ["lm_head"]}, r"peft\.tuners\.lora\.layer\.Linear"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, r"peft\.utils\.other\.ModulesToSaveWrapper"),
    ],
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_head_of_peft(adapted, found):
    """Its class is called Linear, too."""
    peft = pytest.importorskip("peft")
    target, draft = pair_of()
    wrapped = peft.get_peft_model(target, peft.LoraConfig(r=2, **adapted))
    with pytest.raises(ValueError, match=rf"is a plain torch.nn.Linear, got a {found}; draft.set_draft_vocab\(None\)"):
        wrapped.generate(input_ids=PROMPT, assistant_model=draft, max_new_tokens=4)


def test_no_tree_needs_no_head():
    target, draft = pair_of()
    subclass(target)
    draft.config.tree_shape = ()
    assert_same(target, draft, PROMPT)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 8, 8), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("verify_tokens", [None, 9])
def test_in_cuda_graphs(shape, verify_tokens):
    target, draft = pair_of()
    target, ids = target.cuda(), PROMPT.cuda()
    draft.config.tree_shape, draft.config.verify_tokens = shape, verify_tokens
    assert_same(target, draft, ids)
    first = kept_weight(target, draft)
    assert_same(target, draft, torch.cat([ids, ids.flip(1)]))
    assert kept_weight(target, draft) is first and first.is_cuda
    draft.set_draft_vocab([1, 4, 6, 8, 10, 11])
    assert_same(target, draft, ids)
