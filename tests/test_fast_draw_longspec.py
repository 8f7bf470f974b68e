"""Drawing on the device: whole calls write what plain `generate` writes, and leave the generator where it leaves it.

On a CPU the engine draws here because it is told to; CUDA graphs are played from tapes, see tapes.py.
"""

import itertools
import random
from types import FunctionType, SimpleNamespace

import pytest
import torch
from helpers import CACHE, VOCAB, interpreted, quick_or_slow, tiny_draft, tiny_target
from observation import differences, observe
from probes import Counting, Stops, Streamed, tiny_tokenizer
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList, WatermarkingConfig
from transformers.generation import logits_process as stock
from tree_cases import rest_slow

from hf_longspec.modeling import copies_longspec, fast_draw_longspec, fast_engine_longspec
from hf_longspec.modeling.fast_draw_longspec import Drawing
from hf_longspec.modeling.fast_engine_longspec import FastEngine
from hf_longspec.modeling.sampling_longspec import largest
from hf_longspec.modeling.verification_longspec import Walk

MAKERS = FunctionType, type
SHAPE = (4, 8, 8)
LENGTHS = (11, 4, 9, 1)


@pytest.fixture
def rounds(monkeypatch):
    """Let the engine draw on the CPU, and return for each round whether it did."""
    found = []
    draw = FastEngine.draw

    def noted(self, *inputs):
        drawn = draw(self, *inputs)
        found.append(drawn is not None)
        return drawn

    whole = FastEngine.round

    def noted_whole(self, call):
        counts = whole(self, call)
        if counts is not None and call.sampler.plan.drawn:
            found.append(counts != [0])
        return counts

    monkeypatch.setattr(FastEngine, "draw", noted)
    monkeypatch.setattr(FastEngine, "round", noted_whole)
    monkeypatch.setattr(fast_engine_longspec, "draws_on", lambda device: True)
    return found


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama", num_hidden_layers=2)


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    """Texts of a few tokens need no room for thousands, through which n-grams are looked for."""
    monkeypatch.setattr(copies_longspec, "ROOM", 128)
    monkeypatch.setattr(fast_draw_longspec, "SPARE", 64)


def inputs_of(batch, lengths=LENGTHS):
    """Prompts of other lengths, padded to the left, of few tokens, so that n-grams come again."""
    ids = torch.randint(2, VOCAB, (batch, max(lengths)), generator=torch.Generator().manual_seed(batch))
    mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:batch, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def assert_same(target, draft, batch=1, seed=3, inputs=None, error=None, **options):
    """Compare all that can be seen of a plain and an assisted call; functions among the options make one, with a log.

    error: what both calls are to raise.
    """
    inputs = inputs_of(batch) if inputs is None else inputs
    options = {"max_new_tokens": 25, "pad_token_id": 0} | inputs | options
    calls = []

    def play(generate, log):
        generate(**{name: value(log) if isinstance(value, MAKERS) else value for name, value in options.items()})

    for assistant in ({}, {"assistant_model": draft}):
        case = SimpleNamespace(log=[])
        calls.append(observe(target, lambda generate, case: play(generate, case.log), case, seed, **assistant))
    assert differences(*calls) == []
    found = calls[1].error
    if error is not None:
        assert error in str(found)
    elif found is not None:
        raise found
    return calls[1]


SAMPLED = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7, "top_k": 0},
    "min_p": {"min_p": 0.1},
    "top_h": {"top_h": 0.5},
    "typical_p": {"typical_p": 0.6},
    "epsilon": {"epsilon_cutoff": 0.05},
    "eta": {"eta_cutoff": 0.1},
    "penalty, top_k and top_p": {"repetition_penalty": 1.3, "top_k": 6, "top_p": 0.8},
    "n-grams": {"no_repeat_ngram_size": 2},
    "sequence bias": {"sequence_bias": [[[5], -3.0], [[2, 6], 4.0], [[7], 2.0], [[6, 2, 3], 9.0]]},
    "renormalized": {"renormalize_logits": True, "top_k": 6},
    "invalid values": {"remove_invalid_values": True},
    "ends": {"eos_token_id": [5, 11], "top_k": 7},
    "returned thrice": {"num_return_sequences": 3, "temperature": 0.8, "eos_token_id": 5},
}
GREEDY = {
    "penalty": {"repetition_penalty": 1.3},
    "n-grams of three": {"no_repeat_ngram_size": 3},
    "min_new_tokens": {"min_new_tokens": 8, "eos_token_id": 5},
    "min_length": {"min_length": 20, "eos_token_id": [5, 3]},
    "bad words": {"bad_words_ids": [[5], [2, 6], [7, 1]]},
    "decay": {"exponential_decay_length_penalty": (3, 1.4), "eos_token_id": 5},
    "forced end": {"forced_eos_token_id": 4, "eos_token_id": 5},
    "forced begin": {"forced_bos_token_id": 4, "repetition_penalty": 1.1},
    "suppressed": {"suppress_tokens": [2, 7]},
    "suppressed at the beginning": {"begin_suppress_tokens": [2, 7], "forced_bos_token_id": 6},
}
ALONE = {name: {"do_sample": True} | options for name, options in SAMPLED.items()}
ALONE |= {f"greedy: {name}": options for name, options in GREEDY.items()}
CASES = list(itertools.product(ALONE, (1, 4), (False, True)))
QUICK = [
    ("plain", 1, True),
    ("top_k", 4, False),
    ("eta", 1, False),
    ("penalty, top_k and top_p", 4, True),
    ("sequence bias", 4, False),
    ("ends", 4, False),
    ("greedy: n-grams of three", 4, False),
    ("greedy: min_new_tokens", 1, True),
    ("greedy: forced end", 1, False),
]


@pytest.mark.parametrize("name, batch, taped", rest_slow(CASES, QUICK))
def test_each_processor_alone(request, target, rounds, name, batch, taped):
    captures = request.getfixturevalue("captures") if taped else []
    draft = tiny_draft(target, tree_shape=SHAPE)
    assert_same(target, draft, batch, **ALONE[name])
    assert rounds and all(rounds)
    whole = batch == 1 and ALONE[name].get("num_return_sequences", 1) == 1
    assert captures == [True] * (1 if whole else 4) * taped


# --- combinations ----------------------------------------------------------------------------------------------------


def combination(seed):
    """Draw a call: batch, shape of the trees, options and whether the device draws."""
    rng = random.Random(seed)
    pick, often, seldom = rng.choice, lambda: rng.random() < 0.6, lambda: rng.random() < 0.2
    options, drawn = {"max_new_tokens": pick([9, 25, 40])}, True
    if often():
        options |= {"repetition_penalty": pick([0.8, 1.1, 1.7])}
    if often():
        options |= {"no_repeat_ngram_size": pick([2, 3, 4])}
    if rng.random() < 0.8:
        options |= {"do_sample": True, "temperature": pick([0.4, 0.8, 1.0, 1.5]), "top_k": pick([0, 0, 4, 8, 50])}
        warpers = {"top_p": [0.5, 0.9], "min_p": [0.05, 0.3], "top_h": [0.5, 0.9], "typical_p": [0.4, 0.9]}
        warpers |= {"epsilon_cutoff": [0.03], "eta_cutoff": [0.1], "renormalize_logits": [True]}
        for name in rng.sample(list(warpers), rng.randrange(3)):
            options[name] = pick(warpers[name])
    if often():
        options["eos_token_id"] = pick([5, [5, 11], [2, 9, 7]])
        ends = {
            "min_new_tokens": [3, 12],
            "min_length": [16],
            "exponential_decay_length_penalty": [(2, 1.2), (9, 0.9)],
        }
        ends |= {"forced_eos_token_id": [4]}
        for name in rng.sample(list(ends), rng.randrange(3)):
            options[name] = pick(ends[name])
    biases = {"bad_words_ids": [[[5], [2, 6], [7, 1]], [[3, 3, 3]]], "suppress_tokens": [[2, 7]]}
    biases |= {"sequence_bias": [[[[5], -3.0], [[2, 6], 4.0], [[6, 2, 3], 9.0]]], "begin_suppress_tokens": [[4, 6]]}
    for name in rng.sample(list(biases), rng.randrange(3)):
        options[name] = pick(biases[name])
    if seldom():
        options["num_return_sequences"] = 2
        options["do_sample"] = True
    if seldom():
        options |= {"stop_strings": ["aba", "fc", "dd"], "tokenizer": tiny_tokenizer()}
    if seldom():
        options["max_time"] = 1000.0
    if seldom():
        options |= {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": seldom()}
    if rng.random() < 0.1:
        options |= {"return_dict_in_generate": True, "output_scores": True}
        drawn = False
    if rng.random() < 0.1 and not options.keys() & {"repetition_penalty"}:
        penalty = stock.RepetitionPenaltyLogitsProcessor(1.4, prompt_ignore_length=pick([3, 11]))
        options["logits_processor"] = LogitsProcessorList([penalty])
    if rng.random() < 0.1:
        options["logits_processor"] = lambda log: LogitsProcessorList([Counting(log)])
        drawn = False
    batch = pick([1, 4])
    if batch == 1 and "num_return_sequences" not in options and seldom():
        options["streamer"] = Streamed
    shape = pick([SHAPE, SHAPE, (), (1, 1, 1, 1), (13,), (2, 3)])
    fields = {"tree_shape": shape} | ({"verify_tokens": 9} if shape == SHAPE and seldom() else {})
    known = {"repetition_penalty", "no_repeat_ngram_size", "logits_processor", "do_sample", *biases}
    known |= {"min_new_tokens", "min_length", "exponential_decay_length_penalty", "forced_eos_token_id"}
    return batch, fields, options, drawn and bool(options.keys() & known)


QUICK_COMBINATIONS = 8


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(first, marks=pytest.mark.slow) for first in range(QUICK_COMBINATIONS, 200, 48))]
)
def test_combinations(target, rounds, first):
    take(target, rounds, range(first, QUICK_COMBINATIONS if first == 0 else first + 48))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 200, 25))
def test_combinations_from_tapes(captures, target, rounds, first):
    take(target, rounds, range(first, first + 25))
    assert all(captures)


def take(target, rounds, seeds):
    """One draft for all, so that what a call leaves meets the next one."""
    draft = tiny_draft(target, tree_shape=SHAPE)
    for seed in seeds:
        batch, fields, options, drawn = combination(seed)
        draft.config.tree_shape, draft.config.verify_tokens = fields["tree_shape"], fields.get("verify_tokens")
        rounds.clear()
        assert_same(target, draft, batch, seed, **options)
        assert rounds == [drawn] * len(rounds) if drawn else not rounds, options


def test_enough_combinations_are_drawn():
    cases = [combination(seed) for seed in range(200)]
    assert sum(drawn for *_, drawn in cases) > 120
    both = [
        options
        for *_, options, drawn in cases
        if drawn and {"repetition_penalty", "no_repeat_ngram_size"} <= options.keys()
    ]
    assert len(both) > 40


# --- calls of other kinds --------------------------------------------------------------------------------------------

CHAINS = [(), (1, 1, 1, 1), (13,)]
PENALTIES = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 3, "do_sample": True}


@pytest.mark.parametrize("family", quick_or_slow(["mistral", "gemma3_text"], ["gemma3_text"]))
def test_sliding_layers(rounds, family):
    target = tiny_target(family)
    draft = tiny_draft(target, tree_shape=SHAPE)
    for batch in (1, 4):
        assert_same(target, draft, batch, eos_token_id=5, **PENALTIES)
    assert rounds and all(rounds)


@pytest.mark.parametrize(
    "shape, batch", rest_slow(itertools.product(CHAINS, (1, 4)), [((), 1), ((1, 1, 1, 1), 4), ((13,), 1)])
)
def test_other_trees(captures, target, rounds, shape, batch):
    draft = tiny_draft(target, tree_shape=shape)
    assert_same(target, draft, batch, eos_token_id=5, **PENALTIES)
    assert rounds and all(rounds) and all(captures)


def test_fewer_tokens_are_verified(target, rounds):
    assert_same(target, tiny_draft(target, tree_shape=(4, 8, 8, 8), verify_tokens=7), 4, **PENALTIES)
    assert rounds and all(rounds)


@pytest.mark.parametrize("options", [{"streamer": Streamed}, {"num_return_sequences": 3}, {"max_time": 1000.0}])
def test_what_else_a_call_may_ask_for(target, rounds, options):
    assert_same(target, tiny_draft(target, tree_shape=SHAPE), 1, eos_token_id=5, **PENALTIES, **options)
    assert rounds and all(rounds)


def test_stop_strings(target, rounds):
    options = {"stop_strings": ["ab", "fc", "dd", "e"], "tokenizer": tiny_tokenizer()}
    for batch in (1, 4):
        seen = assert_same(
            target, tiny_draft(target, tree_shape=SHAPE), batch, temperature=1.5, do_sample=True, **options
        )
        assert seen.calls[0]["output"].shape[1] < 11 + 25
    assert rounds and all(rounds)


def test_rows_that_go_on_with_padding(target, rounds):
    """For records, and for a cache that the user gets."""
    draft = tiny_draft(target, tree_shape=SHAPE)
    records = {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}
    for options in (records, {CACHE: lambda log: DynamicCache(), "return_dict_in_generate": True}):
        seen = assert_same(target, draft, 4, seed=0, eos_token_id=[5, 11], **PENALTIES, **options)
        assert len({row.index(0) for row in seen.calls[0]["output"]["sequences"][:, 11:].tolist() if 0 in row}) > 1
    assert rounds and all(rounds)


@pytest.mark.parametrize("both", [False, True])
def test_prompts_that_are_embedded(target, rounds, both):
    """Without ids the text begins with the answer; its first tokens are those of length one and two."""
    inputs = {"inputs_embeds": target.get_input_embeddings()(inputs_of(1)["input_ids"]).detach()}
    inputs |= {"input_ids": inputs_of(1)["input_ids"]} if both else {}
    draft = tiny_draft(target, tree_shape=SHAPE)
    assert_same(target, draft, inputs=inputs, eos_token_id=5, min_new_tokens=7, **PENALTIES)
    assert_same(target, draft, inputs=inputs, forced_bos_token_id=4, sequence_bias=[[[4, 6], 9.0]])
    assert rounds and all(rounds)


def test_a_text_that_goes_on_in_the_next_call(target, rounds):
    draft, options = tiny_draft(target, tree_shape=SHAPE), {"pad_token_id": 0, **PENALTIES}
    found = []
    for assistant in ({}, {"assistant_model": draft}):
        torch.manual_seed(3)
        ids, cache = inputs_of(1)["input_ids"], DynamicCache()
        for new in (9, 14):
            ids = target.generate(ids, max_new_tokens=new, **{CACHE: cache}, **options, **assistant)
            ids = torch.cat([ids, torch.tensor([[3, 4, 3]])], dim=1)
        found.append((ids.tolist(), torch.rand(1)))
    assert found[0] == found[1] and rounds and all(rounds)


def test_a_penalty_without_the_prompt(target, rounds):
    draft = tiny_draft(target, tree_shape=SHAPE)
    lengths = [0, 11, 14]
    if "torch.Tensor" in str(stock.RepetitionPenaltyLogitsProcessor.__init__.__annotations__):
        lengths.append(torch.tensor([11, 0, 13, 30]))
    for length in lengths:
        penalty = stock.RepetitionPenaltyLogitsProcessor(2.5, prompt_ignore_length=length)
        for batch in (1, 4) if isinstance(length, int) else (4,):
            assert_same(target, draft, batch, logits_processor=LogitsProcessorList([penalty]), eos_token_id=5)
    assert rounds and all(rounds)


def test_scores_that_are_no_distribution(target, rounds):
    """A bias of plus infinity behind a token: plain decoding raises when it comes to it, after as many draws."""
    bias = [[[token, 6], float("inf")] for token in (3, 5, 8)]
    for batch in (1, 4):
        options = {"sequence_bias": bias, "error": "probability tensor contains either"}
        assert_same(target, tiny_draft(target, tree_shape=SHAPE), batch, do_sample=True, **options)
    assert rounds and all(rounds)


@pytest.mark.parametrize(
    "options",
    [
        {"output_scores": True, "return_dict_in_generate": True, "repetition_penalty": 1.3},
        {"output_scores": True, "repetition_penalty": 1.3},
        {"logits_processor": lambda log: LogitsProcessorList([Counting(log)])},
        {"logits_processor": LogitsProcessorList([stock.TopKLogitsWarper(4, filter_value=-50.0)]), "top_k": 0},
        {"watermarking_config": WatermarkingConfig(bias=2.5)},
        {"stopping_criteria": StoppingCriteriaList([lambda ids, scores, **_: ids[:, -1] == 5]), "top_k": 4},
    ],
    ids=["scores", "scores that nobody gets", "unknown", "another filter value", "watermark", "criterion"],
)
def test_what_the_host_picks(target, rounds, options):
    assert_same(target, tiny_draft(target, tree_shape=SHAPE), 4, do_sample=True, **options)
    assert not rounds


def test_what_is_just_the_largest_logit_is_not_drawn(target, rounds):
    assert_same(target, tiny_draft(target, tree_shape=SHAPE), 4)
    assert not rounds


def test_a_cpu_does_not_draw(target, monkeypatch):
    assert not fast_engine_longspec.draws_on(torch.device("cpu")) and fast_engine_longspec.draws_on(
        torch.device("cuda")
    )
    monkeypatch.setattr(FastEngine, "draw", None)
    assert_same(target, tiny_draft(target, tree_shape=SHAPE), 4, **PENALTIES)


def test_an_engine_draws_on_its_own_device_only(monkeypatch):
    """A text elsewhere, beside another part of the target, is the host's."""
    monkeypatch.setattr(fast_engine_longspec, "draws_on", lambda device: True)
    engine = FastEngine(torch.device("cpu"))
    assert engine.draws([], torch.device("cpu")) and not engine.draws([], torch.device("meta"))
    assert not engine.draws([lambda ids, scores: scores], torch.device("cpu"))


# --- what a call leaves for the next one -----------------------------------------------------------------------------


def test_only_the_drawing_is_captured_anew(captures, target, rounds):
    draft = tiny_draft(target, tree_shape=SHAPE)
    options = {"do_sample": True, "min_new_tokens": 5, "eos_token_id": 5, "repetition_penalty": 1.3}
    biased = {"sequence_bias": [[[5], -3.0], [[2, 6], 4.0]]}
    forced = {"forced_eos_token_id": 4, "suppress_tokens": [3]}
    settings = [options, options | {"repetition_penalty": 1.4}, options | biased, options | forced, options]
    for count, setting in enumerate(settings):
        for length, new in ((9, 20), (14, 12)):
            inputs = {"input_ids": inputs_of(1, (length,))["input_ids"]}
            assert_same(target, draft, inputs=inputs, **setting | {"max_new_tokens": new})
            assert captures == [True] * (1 + count), "of the same settings, prompts and lengths are numbers in tensors"
    # other tokens and biases of as many sequences go into the same tensors
    for tokens in (5, [5], 7):
        assert_same(target, draft, **options | {"eos_token_id": tokens})
    assert captures == [True] * 5 and all(rounds)


@pytest.mark.slow
def test_greedy_and_sampled_calls_in_turn(captures, target, rounds):
    draft = tiny_draft(target, tree_shape=SHAPE)
    for batch in (1, 4):
        for do_sample in (True, False, True):
            assert_same(target, draft, batch, repetition_penalty=1.3, do_sample=do_sample)
    assert all(captures) and all(rounds)


@pytest.mark.slow
def test_inside_inference_mode_and_out_of_it(captures, target, rounds):
    draft = tiny_draft(target, tree_shape=SHAPE)
    for inside in (False, True, True, False):
        with torch.inference_mode(inside):
            assert_same(target, draft, **PENALTIES)
    assert captures == [True] * 3 and all(rounds)


def test_nothing_of_an_earlier_call_is_seen(captures, target, rounds):
    """Not in the texts behind their ends, not in the noise, and not among the tokens of a penalty."""
    draft = tiny_draft(target, tree_shape=SHAPE)
    for batch in (1, 4):
        for _ in range(2):
            assert_same(target, draft, batch, eos_token_id=5, **PENALTIES)
            engine = draft._engines.kept
            engine.noise.fill_(float("nan"))
            for tensor in torch.utils._pytree.tree_leaves(engine.drawn.state):
                if isinstance(tensor, torch.Tensor):
                    tensor.fill_(1)
    assert captures == [True] * 5 and all(rounds)


def test_a_call_that_was_cut_off(captures, target, rounds):
    draft = tiny_draft(target, tree_shape=SHAPE)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt, match="stop"):
            target.generate(**inputs_of(1), assistant_model=draft, streamer=Stops(9), max_new_tokens=20, **PENALTIES)
        assert_same(target, draft, **PENALTIES)
    assert all(rounds)


# --- texts that outgrow their buffer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, taped", rest_slow(itertools.product([SHAPE, (13,)], [False, True]), [(SHAPE, False), ((13,), True)])
)
def test_buffers_grow(request, monkeypatch, target, rounds, shape, taped):
    """Also behind a round that has used all noise there is: a tree of all tokens is right every time."""
    captures = request.getfixturevalue("captures") if taped else []
    made, of = [], Drawing.of
    monkeypatch.setattr(Drawing, "of", lambda *inputs: made.append(of(*inputs)) or made[-1])
    monkeypatch.setattr(copies_longspec, "ROOM", 8)
    monkeypatch.setattr(fast_draw_longspec, "SPARE", len(shape) + 1)
    draft = tiny_draft(target, tree_shape=shape)
    for batch in (1, 4):
        made.clear()
        assert_same(target, draft, batch, max_new_tokens=60, **PENALTIES)
        rooms = [drawing.ids.shape[1] for drawing in made]
        assert len(rooms) > 3 and rooms == sorted(set(rooms)) and rooms[-1] >= 11 + 60 - 8
    assert rounds and all(rounds) and all(captures)


# --- kernels that do not know ----------------------------------------------------------------------------------------


@pytest.fixture
def kernel(monkeypatch):
    """Give the backend a stand-in for kernels, which is unsure where `unsure(scores, slots)` says so."""
    calls, resolve = [], fast_engine_longspec.resolve_backend

    class Kernel:
        unsure = staticmethod(lambda scores, slots: torch.zeros_like(slots, dtype=torch.bool))

        def __call__(self, call, tree, verified, drawing):
            penalty, temperature, cuts = drawing.ending
            assert penalty is None and temperature == 1 and cuts is None, "these tests leave all to the processors"
            with monkeypatch.context() as patch:
                patch.setattr(fast_draw_longspec, "pick", self.pick)
                walk = fast_draw_longspec.draw_paths(call, tree, verified, drawing._replace(ending=None))
            counts = walk.accepted.counts.masked_fill((walk.accepted.newest == -2) & ~call.roots.stopped, 0)
            table = torch.cat([walk.table[:, :-1], counts[:, None]], dim=1)
            return Walk(walk.accepted._replace(counts=counts), table)

        def pick(self, scores, drawing, lengths, rows):
            calls.append(len(scores))
            slots = (lengths - drawing.prompt) % len(drawing.noise)
            tokens = largest(scores.softmax(-1), drawing.noise[slots, rows])
            return tokens.masked_fill(self.unsure(scores, slots), -2)

    kernel = Kernel()
    kernel.calls = calls
    monkeypatch.setattr(
        fast_engine_longspec, "resolve_backend", lambda *demand: resolve(*demand)._replace(draw=kernel)
    )
    return kernel


NO_CUTS = PENALTIES | {"top_k": 0}
UNSURE = {
    "at some steps": lambda scores, slots: slots % 3 == 1,
    "of some scores": lambda scores, slots: scores.argmax(-1) < 4,
    "of the last row": lambda scores, slots: torch.arange(len(slots)) == len(slots) - 1,
    "always": lambda scores, slots: slots >= 0,
}
QUICK_UNSURE = [("at some steps", 4, True), ("of some scores", 1, False)]


@interpreted
@pytest.mark.parametrize(
    "unsure, batch, taped", rest_slow(itertools.product(UNSURE, (1, 4), (False, True)), QUICK_UNSURE)
)
def test_the_host_picks_where_kernels_do_not_know(request, monkeypatch, target, rounds, kernel, unsure, batch, taped):
    """The tokens that it picks are in the texts and among the tokens of the penalty when the device draws again."""
    captures = request.getfixturevalue("captures") if taped else []
    monkeypatch.setattr(fast_engine_longspec, "MOST_UNSURE", 1000)
    kernel.unsure = UNSURE[unsure]
    draft = tiny_draft(target, tree_shape=SHAPE)
    for seed in range(2):
        assert_same(target, draft, batch, seed, max_new_tokens=40, eos_token_id=5 if batch > 1 else None, **NO_CUTS)
    assert False in rounds and kernel.calls and all(captures)
    assert (True in rounds) is (unsure in ("at some steps", "of some scores")) or batch > 1


@interpreted
def test_a_token_that_is_on_no_path_need_not_be_known(target, rounds, kernel):
    """Where the walk has left the tree, and behind a row's end."""
    levels = len(SHAPE) + 1
    kernel.unsure = lambda scores, slots: torch.full_like(slots, len(kernel.calls) % levels == 2, dtype=torch.bool)
    assert_same(target, tiny_draft(target, tree_shape=SHAPE), max_new_tokens=40, **NO_CUTS)
    assert rounds.count(True) > rounds.count(False) > 0


@interpreted
@pytest.mark.parametrize("taped", quick_or_slow([False, True], [False]))
def test_kernels_that_are_often_unsure_are_asked_no_more(request, target, rounds, kernel, taped):
    captures = request.getfixturevalue("captures") if taped else []
    most, levels = fast_engine_longspec.MOST_UNSURE, len(SHAPE) + 1
    kernel.unsure = UNSURE["always"]
    draft = tiny_draft(target, tree_shape=SHAPE)
    for _ in range(2):  # each call tries anew
        rounds.clear(), kernel.calls.clear()
        assert_same(target, draft, max_new_tokens=60, **NO_CUTS)
        assert rounds[: most + 1] == [False] * (most + 1) and all(rounds[most + 1 :]) and len(rounds) > most + 3
        assert taped or len(kernel.calls) == (most + 1) * levels
        assert draft._engines.kept.drawing.ending is None
    assert all(captures)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2, "repetition_penalty": 1.3}])
def test_the_kernels_themselves(monkeypatch, target, rounds, options):
    """Those that draw; attention is torch's, which is faster without a GPU."""
    from hf_longspec.modeling.fast_triton_draw_longspec import fused_paths

    resolve = fast_engine_longspec.resolve_backend
    monkeypatch.setattr(
        fast_engine_longspec, "resolve_backend", lambda *demand: resolve(*demand)._replace(draw=fused_paths)
    )
    draft = tiny_draft(target, tree_shape=(2, 2))
    for batch in (1, 4):
        assert_same(target, draft, batch, max_new_tokens=12, do_sample=True, **options)
    assert rounds and all(rounds)
