"""target_longspec's hidden state: for a draft that reads it the text stays, and each round is given the right vector.

Wrong vectors would change no text, only how much is accepted; so the vectors that `grow` is given are compared with
the hidden states that a plain forward of the target over the text has at the token before each root.
"""

import json
import sys
import threading

import pytest
import torch
import transformers
from helpers import CACHE, quick_or_slow, tiny_draft, tiny_target
from packaging import version
from pairs import assert_same
from test_positions_longspec import phi3_with_switch_at
from texts import prompt_of
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from hf_longspec import LongSpecConfig, LongSpecForCausalLM
from hf_longspec.evaluation.tiny_models import tiny_model
from hf_longspec.modeling.candidate_generator_longspec import LongSpecCandidateGenerator
from hf_longspec.modeling.target_longspec import catching
from hf_longspec.training.batch import Batch
from hf_longspec.training.distillation import Distillation
from hf_longspec.training.forward import draft_hidden
from hf_longspec.training.recipe import Signal
from hf_longspec.training.teacher import read_target

TREE = (13, 60, 60)  # of 13 tokens: some guess is right nearly always
OPTIONS = {"max_new_tokens": 24, "pad_token_id": 0}
# peft asks transformers under a name that is going out of use
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def reading_draft(target, **fields):
    return tiny_draft(target, **{"window": 8, "tree_shape": TREE, "target_hidden_state": True} | fields)


def prompts(*lengths):
    """Rows of so many tokens, padded on the left."""
    ids = torch.cat([prompt_of(max(lengths), seed=row) for row in range(len(lengths))])
    mask = (torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


class Grown:
    """What `grow` was given in each round (roots, their positions, hidden states), and the tree it made."""

    def __init__(self, monkeypatch):
        self.rounds, grow = [], LongSpecCandidateGenerator.grow

        def watched(generator, root, position, cache, form, hidden=None, written=None):
            given = [None if tensor is None else tensor.clone() for tensor in (root, position, hidden)]
            tree = grow(generator, root, position, cache, form, hidden, written)
            self.rounds.append((*given, tree))
            return tree

        monkeypatch.setattr(LongSpecCandidateGenerator, "grow", watched)

    @torch.no_grad()
    def assert_right(self, target, sequences, lengths, rounds=2):
        """sequences: the rows of a call, prompts of `lengths` padded on the left; at least so many rounds of each."""
        prompt = max(lengths)
        assert len(self.rounds) >= rounds, "too few rounds: nothing is tested"
        for roots, positions, hidden, _ in self.rounds:
            for row, length in enumerate(lengths):
                text, position = sequences[row : row + 1, prompt - length :], positions[row]
                assert text[0, position] == roots[row]
                before = target(text[:, :position], output_hidden_states=True).hidden_states[-1]
                if before.dim() > 3:  # gemma3n lists what it later makes one of
                    before = target.get_decoder()(text[:, :position]).last_hidden_state
                torch.testing.assert_close(hidden[row], before[0, -1], rtol=1e-4, atol=1e-4)
        return self.rounds


@pytest.fixture
def grown(monkeypatch):
    return Grown(monkeypatch)


def generate(target, draft, **options):
    """Greedy text of several rounds, of which some wrote several tokens; equal to that of plain `generate`."""
    plain = target.generate(**OPTIONS | {"do_sample": False} | options)
    options = OPTIONS | {"do_sample": False, "assistant_model": draft, "return_dict_in_generate": True} | options
    out = target.generate(**options)
    assert out.sequences.tolist() == plain.tolist()
    assert max(map(max, out.accept_lengths)) >= 2, "too little was accepted: the test would prove nothing"
    return out.sequences


@pytest.mark.parametrize(
    "family",
    quick_or_slow(
        ["llama", "mistral", "gemma2", "gemma3_text", "gpt_oss", "granite", "cohere2", "gpt_neox", "smollm3"],
        ["llama", "mistral", "gemma3_text", "gpt_neox"],
    ),
)
def test_each_round_is_given_what_the_target_made_of_the_token_before_the_root(family, grown):
    target = tiny_target(family)
    lengths = (9, 1, 17, 4)
    text = generate(target, reading_draft(target), **prompts(*lengths))
    grown.assert_right(target, text, lengths)


@pytest.mark.parametrize("family", ["opt", "gemma3n_text", "qwen2_5_vl"])
def test_families_whose_decoder_is_elsewhere_or_unlike_others(family, grown):
    """Inside of another one, with several states of a token, beside an image tower."""
    target = tiny_model(family)
    text = generate(target, reading_draft(target, tree_shape=(13, 100)), input_ids=prompt_of(9))
    grown.assert_right(target, text, (9,))


@pytest.mark.parametrize("returns", ["text", "cache"])
def test_rows_that_stop_early(llama, grown, returns):
    """They rest, or go on with padding where somebody sees the cache; the others move on."""
    lengths = (9, 6, 9, 3)
    inputs = prompts(*lengths) | OPTIONS | {"assistant_model": reading_draft(llama), "eos_token_id": [4, 7]}
    if returns == "cache":
        inputs["return_dict_in_generate"] = True
    out = llama.generate(**inputs)
    text = out.sequences if returns == "cache" else out
    plain = llama.generate(**prompts(*lengths) | OPTIONS | {"eos_token_id": [4, 7]})
    assert text.tolist() == plain.tolist()
    ends = {int((row[9:] != 0).sum()) for row in text}
    assert len(ends) > 2 and max(ends) - min(ends) > 3, "the rows stop too close to each other"
    grown.assert_right(llama, text, lengths)


class Memory(LogitsProcessor):
    """Asked once for each token in order: picks are made along the path, one by one."""

    def __init__(self):
        self.asked = 0

    def __call__(self, input_ids, scores):
        self.asked += 1
        return scores - (self.asked % 3) * torch.nn.functional.one_hot(input_ids[:, -1], scores.shape[1])


class Streamer:
    def __init__(self):
        self.put, self.ended = [].append, False

    def end(self):
        self.ended = True


@pytest.mark.parametrize("lengths", [(7,), (9, 4)], ids=str)
def test_tokens_that_are_picked_one_by_one(llama, grown, lengths):
    texts = []
    for assistant in ({}, {"assistant_model": reading_draft(llama)}):
        options = OPTIONS | {"logits_processor": LogitsProcessorList([Memory()])} | assistant
        options |= {"streamer": Streamer()} if len(lengths) == 1 else {}
        texts.append(llama.generate(**prompts(*lengths), **options))
    assert texts[0].tolist() == texts[1].tolist()
    rounds = grown.assert_right(llama, texts[1], lengths)
    assert len(rounds) < 23, "one token a round: nothing is tested"


@pytest.mark.parametrize("lengths", [(8,), (9, 1, 17)], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_sampling(family, grown, lengths):
    target = tiny_target(family)
    inputs, texts = prompts(*lengths), []
    for assistant in ({}, {"assistant_model": reading_draft(target)}):
        torch.manual_seed(7)
        texts.append(target.generate(**inputs, **OPTIONS, do_sample=True, temperature=0.8, **assistant))
        texts.append(torch.rand(1))
    assert texts[0].tolist() == texts[2].tolist() and texts[1] == texts[3]
    grown.assert_right(target, texts[2], lengths)


@pytest.mark.parametrize("family", quick_or_slow(["llama", "mistral", "gemma3_text"], ["gemma3_text"]))
def test_chunked_prefill_and_prompts_given_as_embeddings(family, grown):
    target = tiny_target(family)
    draft = reading_draft(target)
    for size in (1, 8, 28, 29, 30):
        grown.rounds.clear()
        text = generate(target, draft, input_ids=prompt_of(29), prefill_chunk_size=size)
        grown.assert_right(target, text, (29,))
    grown.rounds.clear()
    embeds = target.get_input_embeddings()(prompt_of(29)).detach()
    rest = target.generate(inputs_embeds=embeds, assistant_model=draft, do_sample=False, **OPTIONS)
    assert rest[0].tolist() == text[0, 29:].tolist()
    grown.assert_right(target, text, (29,))


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_a_cache_passed_in_is_continued_over_turns(family, grown):
    """The last forward of the prompt is over its new tokens only."""
    target = tiny_target(family)
    draft = reading_draft(target)
    chats = []
    for assistant in ({}, {"assistant_model": draft}):
        cache, ids, texts = DynamicCache(config=target.config), prompt_of(7), []
        for turn in range(3):
            grown.rounds.clear()
            options = OPTIONS | {"max_new_tokens": 9, "attention_mask": torch.ones_like(ids)}  # no token is padding
            texts.append(target.generate(ids, **{CACHE: cache}, **options, **assistant))
            if assistant:
                grown.assert_right(target, texts[-1], (ids.shape[1],))
            ids = torch.cat([texts[-1], prompt_of(3, seed=turn)[:, turn:]], dim=1)
        chats.append([text.tolist() for text in texts])
    assert chats[0] == chats[1]


@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.18"),
    reason="transformers 5.17 forgets the text at the switch: what it reads then is not the whole text",
)
@pytest.mark.parametrize("length", [5, 14, 15, 16, 17, 24])
def test_longrope_across_its_switch(length, grown):
    """Where all of the text is read anew, so is the state; the roots beside the switch have no levels below them."""
    target = phi3_with_switch_at(16)
    draft = reading_draft(target)
    assert_same(target, draft, prompt_of(length), do_sample=True)
    grown.rounds.clear()
    text = target.generate(prompt_of(length), assistant_model=draft, **OPTIONS)
    assert text.tolist() == target.generate(prompt_of(length), **OPTIONS).tolist()
    grown.assert_right(target, text, (length,))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (4, 16, 16, 16, 16)], ids=str)
@pytest.mark.parametrize("size", [None, 2, 7])
def test_trees_of_other_shapes(llama, grown, shape, size):
    """Of those that are pruned, other nodes are kept than have been grown."""
    draft = reading_draft(llama, tree_shape=shape, verify_tokens=size)
    text = llama.generate(prompt_of(9), assistant_model=draft, **OPTIONS)
    assert text.tolist() == llama.generate(prompt_of(9), **OPTIONS).tolist()
    grown.assert_right(llama, text, (9,))


def test_no_guesses_no_states(llama, monkeypatch):
    draft = reading_draft(llama, tree_shape=())
    monkeypatch.setattr(type(llama.model), "register_forward_hook", None)  # nobody may ask for one
    assert_same(llama, draft, prompt_of(9))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "cohere2"])
def test_a_round_guesses_as_it_was_trained_to(family, grown):
    """Chains: the guess at depth d is the best of those that training makes at lag d of the same tokens."""
    target = tiny_target(family)
    draft = reading_draft(target, tree_shape=(1, 1, 1))
    bound = draft.bind(target)
    text = target.generate(prompt_of(9), assistant_model=draft, **OPTIONS)
    guesses = set()
    for _, position, _, tree in grown.assert_right(target, text, (9,)):
        ids = torch.cat([text[:, :position], tree.tokens], dim=1)
        positions = torch.arange(ids.shape[1])[None]
        states = read_target(target, bound.layer, ids, positions)
        for depth in (1, 2, 3):
            hidden = draft_hidden(draft, bound, Batch(ids, ids, positions, torch.tensor([depth])), states)
            logits = bound.logits(hidden)[0, position + depth - 1]
            assert logits.argmax() == tree.tokens[0, depth]
            guesses.add(int(tree.tokens[0, depth]))
    assert len(guesses) > 3, "the draft always guesses the same: nothing is tested"


def test_guesses_depend_on_the_state(llama, grown, monkeypatch):
    """Nothing that is grown from another state is the same."""
    draft = reading_draft(llama, tree_shape=(2, 3))
    llama.generate(prompt_of(9), assistant_model=draft, **OPTIONS)
    trees = [tree.tokens.tolist() for *_, tree in grown.rounds]
    grown.rounds.clear()
    read = LongSpecForCausalLM.read_hidden_state
    monkeypatch.setattr(LongSpecForCausalLM, "read_hidden_state", lambda self, hidden: read(self, hidden.flip(-1)))
    llama.generate(prompt_of(9), assistant_model=draft, **OPTIONS)
    assert [tree.tokens.tolist() for *_, tree in grown.rounds][:3] != trees[:3]


@pytest.mark.parametrize("lengths", [(9,), (9, 1, 17)], ids=str)
def test_graphs(captures, llama, lengths, monkeypatch):
    """Replayed, the hook does not run; what it caught is where the graph leaves it. And calls differ in length."""
    draft, given = reading_draft(llama), []
    read = LongSpecForCausalLM.read_hidden_state

    def noted(self, hidden):
        given.append(hidden)  # a replay writes the next round's into the same memory
        return read(self, hidden)

    monkeypatch.setattr(LongSpecForCausalLM, "read_hidden_state", noted)
    for more in (0, 4):
        inputs = prompts(*(length + more for length in lengths))
        plain = llama.generate(**inputs, **OPTIONS)
        assert llama.generate(**inputs, assistant_model=draft, **OPTIONS).tolist() == plain.tolist()
        last = {hidden.data_ptr(): hidden for hidden in given}
        assert len(last) == 1, "the state has moved: a graph would read the old one"
    assert captures == [True] * (1 if len(lengths) == 1 else 4), "the second call captures nothing anew"
    out = llama.generate(**inputs, assistant_model=draft, return_dict_in_generate=True, **OPTIONS)
    alone = reading_draft(llama, cuda_graphs=False)
    expected = llama.generate(**inputs, assistant_model=alone, return_dict_in_generate=True, **OPTIONS)
    assert out.accept_lengths == expected.accept_lengths, "guesses from wrong states are accepted less often"


def hooks(target):
    return [len(module._forward_hooks) for module in target.modules()]


class Raising(LogitsProcessor):
    def __init__(self, at):
        self.at = at

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == self.at:
            raise KeyError("a user's fault")
        return scores


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_target_is_left_without_hooks(family):
    target = tiny_target(family)
    draft, before = reading_draft(target), hooks(target)
    plain = target.generate(prompt_of(9), **OPTIONS)
    assert target.generate(prompt_of(9), assistant_model=draft, **OPTIONS).tolist() == plain.tolist()
    assert hooks(target) == before
    for at in (9, 10, 14):
        with pytest.raises(KeyError, match="a user's fault"):
            processors = LogitsProcessorList([Raising(at)])
            target.generate(prompt_of(9), assistant_model=draft, logits_processor=processors, **OPTIONS)
        assert hooks(target) == before
    for failing in (target.model.layers[2].mlp, target.lm_head, draft.mlp):
        calls = iter(range(100))

        def fails(module, args, calls=calls):
            if next(calls) == 3:
                raise RuntimeError("out of memory")

        hook = failing.register_forward_pre_hook(fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            target.generate(prompt_of(9), assistant_model=draft, **OPTIONS)
        hook.remove()
        assert hooks(target) == before
    assert target.generate(prompt_of(9), assistant_model=draft, **OPTIONS).tolist() == plain.tolist()


def test_a_hook_of_the_users_comes_first(llama, grown):
    """What it makes of the state is what the LM head and the draft read."""

    def change(module, args, output):
        output.last_hidden_state = -2 * output.last_hidden_state

    hook = llama.model.register_forward_hook(change)
    draft = reading_draft(llama)
    text = llama.generate(prompt_of(9), assistant_model=draft, **OPTIONS)
    assert text.tolist() == llama.generate(prompt_of(9), **OPTIONS).tolist()
    hook.remove()
    for _, position, hidden, _ in grown.rounds:
        with torch.no_grad():
            state = llama.model(text[:, :position]).last_hidden_state[0, -1]
        torch.testing.assert_close(hidden[0], -2 * state, rtol=1e-4, atol=1e-4)


@pytest.fixture
def eager_switching():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_threads_on_one_target(family, eager_switching, grown):
    """Two texts of two drafts and one of none, all at once: each reads what its own thread's forwards leave."""
    target = tiny_target(family)
    lengths, texts = (5, 17, 30), [None] * 3
    drafts = [reading_draft(target), reading_draft(target, window=5, seed=3), None]
    alone = [target.generate(prompt_of(length), **OPTIONS).tolist() for length in lengths]

    def write(index):
        found = [target.generate(prompt_of(n), assistant_model=drafts[index], **OPTIONS) for n in lengths]
        texts[index] = [text.tolist() for text in found]

    threads = [threading.Thread(target=write, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [alone] * 3
    assert hooks(target) == [0] * len(hooks(target))
    assert len(grown.rounds) > 10
    with torch.no_grad():
        states = [target(torch.tensor(text), output_hidden_states=True).hidden_states[-1][0] for text in alone]
    for _, position, hidden, _ in grown.rounds:  # of any of the texts
        candidates = torch.stack([text[position - 1][0] for text in states if position <= len(text)])
        assert (candidates - hidden).abs().amax(-1).min() < 1e-4


def test_only_what_is_asked_for_and_this_threads_is_caught(llama):
    with catching(llama, False) as nothing:
        assert nothing is None and hooks(llama) == [0] * len(hooks(llama))
    with torch.no_grad(), catching(llama, True) as caught:
        thread = threading.Thread(target=llama, args=(prompt_of(3),))
        thread.start()
        thread.join()
        with pytest.raises(ValueError, match="expected a target that calls its decoder as a module"):
            caught.every()
        llama(prompt_of(5))
    assert caught.every().shape == (1, 5, 32) and caught.of_last_token().shape == (1, 32)
    with torch.no_grad():
        expected = llama(prompt_of(5), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(caught.every(), expected)


@pytest.mark.parametrize("compiled", quick_or_slow(["target.forward", "target", "decoder"], ["decoder"]))
def test_a_target_that_a_user_has_compiled(compiled, grown):
    """And used before: what was compiled without a hook never runs one, unless torch looks for hooks anew. Either the
    text and the states are right, or the call is refused."""
    torch._dynamo.reset()
    target = tiny_target("llama", num_hidden_layers=2)
    options = OPTIONS | {"max_new_tokens": 8}
    plain = target.generate(prompt_of(9), **options).tolist()
    if compiled == "target.forward":
        target.forward = torch.compile(target.forward, backend="eager")
    else:
        (target if compiled == "target" else target.model).compile(backend="eager")
    assert target.generate(prompt_of(9), **options).tolist() == plain
    draft, before = reading_draft(target, tree_shape=(4,)), hooks(target)
    try:
        text = target.generate(prompt_of(9), assistant_model=draft, **options)
    except ValueError as refusal:
        assert "expected a target that calls its decoder as a module" in str(refusal)
    else:
        assert text.tolist() == plain
        grown.assert_right(tiny_target("llama", num_hidden_layers=2), text, (9,))
    assert hooks(target) == before


@pytest.mark.parametrize("inference_first", [True, False])
def test_under_inference_mode_and_then_not(llama, grown, inference_first):
    draft = reading_draft(llama)
    plain = llama.generate(prompt_of(9), **OPTIONS).tolist()
    for mode in (inference_first, not inference_first, inference_first):
        grown.rounds.clear()
        with torch.inference_mode(mode):
            text = llama.generate(prompt_of(9), assistant_model=draft, **OPTIONS)
        assert text.tolist() == plain
        grown.assert_right(llama, text, (9,))


def test_a_target_of_another_dtype(llama, grown):
    llama.to(torch.float64)
    draft = reading_draft(llama)
    text = generate(llama, draft, input_ids=prompt_of(9))
    assert draft.dtype == torch.float64
    grown.assert_right(llama, text, (9,))


def test_adapters_on_target_and_draft(llama, grown):
    peft = pytest.importorskip("peft")
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    wrapped = peft.get_peft_model(llama, peft.LoraConfig(**lora)).eval()
    text = generate(wrapped, reading_draft(llama), input_ids=prompt_of(9))
    grown.assert_right(wrapped, text, (9,))
    with wrapped.disable_adapter():
        grown.rounds.clear()
        assert generate(wrapped, reading_draft(llama), input_ids=prompt_of(9)).tolist() != text.tolist()
    adapted = peft.get_peft_model(reading_draft(llama), peft.LoraConfig(**lora | {"target_modules": ["hidden_proj"]}))
    grown.rounds.clear()
    generate(wrapped, adapted.eval(), input_ids=prompt_of(9))
    grown.assert_right(wrapped, text, (9,))


def test_saved_and_loaded(llama, tmp_path, grown):
    draft = reading_draft(llama)
    draft.save_pretrained(tmp_path)
    again = LongSpecForCausalLM.from_pretrained(tmp_path)
    assert again.config.target_hidden_state is True
    assert {"hidden_proj.weight", "hidden_layernorm.weight"} <= set(again.state_dict())
    torch.testing.assert_close(again.state_dict(), draft.state_dict(), rtol=0, atol=0)
    assert "target_longspec.py" in {path.name for path in tmp_path.glob("*.py")}
    rounds = []
    for each in (draft, again):
        grown.rounds.clear()
        generate(llama, each, input_ids=prompt_of(9))
        rounds.append([tree.tokens.tolist() for *_, tree in grown.rounds])
    assert rounds[0] == rounds[1]


def test_a_draft_from_before_there_was_the_field(llama, tmp_path):
    tiny_draft(llama).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["target_hidden_state"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    draft, info = LongSpecForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert draft.config.target_hidden_state is False
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not any("hidden_" in name for name in draft.state_dict())
    assert_same(llama, draft, prompt_of(9))


def test_state_bytes_counts_one_vector(llama):
    config = LongSpecConfig.from_target(llama.config, window=8, tree_shape=(4, 8))
    without = LongSpecForCausalLM(config).state_bytes
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        assert reading_draft(llama, tree_shape=(4, 8)).to(dtype).state_bytes == without * size // 4 + 32 * size


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_the_field_is_true_or_false(llama, value):
    message = rf"`target_hidden_state` must be True or False, got {value!r}"
    with pytest.raises(ValueError, match=message):
        LongSpecConfig.from_target(llama.config, target_hidden_state=value)


def test_the_field_set_on_a_draft_without_the_weights(llama):
    draft = tiny_draft(llama)
    draft.config.target_hidden_state = True
    with pytest.raises(ValueError, match="`target_hidden_state` is False, as the draft was made .* got True"):
        llama.generate(prompt_of(9), assistant_model=draft, **OPTIONS)
    with pytest.raises(ValueError, match="`target_hidden_state` is False, as the draft was made .* got True"):
        Distillation(llama, draft, Signal())


def test_the_field_put_out(llama, grown):
    """To see what it gives: the same draft without what it reads."""
    draft = reading_draft(llama)
    draft.config.target_hidden_state = False
    assert_same(llama, draft, prompt_of(9))
    assert all(hidden is None for _, _, hidden, _ in grown.rounds)
