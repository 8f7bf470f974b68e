"""Noise against `torch.multinomial`, the table of processors against what each does, how the host picks a token.

The criteria that become numbers are checked against the criteria themselves.
"""

import random

import pytest
import torch
from tables import Recorder, make_text
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import EosTokenCriteria, logits_process, stopping_criteria

from hf_longspec.modeling import sampling_longspec
from hf_longspec.modeling.sampling_longspec import (
    IMPOSSIBLE,
    Noise,
    Plan,
    Sampler,
    Stops,
    are_by_row,
    are_criteria_by_row,
    largest,
)

CPU = torch.device("cpu")
AHEAD = Plan(together=False, by_argmax=False, drawn=False, draws_ahead=True, on_host=False)
SHAPES = [(1, 5), (2, 13), (4, 1001), (1, 151_936), (3, 50_257)]


def probabilities(batch: int, vocab: int, step: int) -> torch.Tensor:
    """(B, vocab), some of them zero."""
    logits = 3 * torch.randn(batch, vocab, generator=torch.Generator().manual_seed(step))
    return logits.masked_fill(logits < -3, -float("inf")).softmax(-1)


# --- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch, vocab", SHAPES)
def test_noise_is_the_stream_of_multinomial(batch, vocab):
    """Step by step the same tokens; and undone up to any step, the generator stands where `multinomial` leaves it."""
    steps = 6
    expected, states = [], [torch.get_rng_state()]
    for step in range(steps):
        expected.append(torch.multinomial(probabilities(batch, vocab, step), 1)[:, 0].tolist())
        states.append(torch.get_rng_state())
    for left in range(steps + 1):
        torch.set_rng_state(states[0])
        noise = Noise(batch, CPU)
        rows = list(range(batch))
        for step in range(steps):
            drawn = noise.at(rows, [step] * batch, vocab)
            assert (probabilities(batch, vocab, step) / drawn).argmax(-1).tolist() == expected[step]
        noise.rewind(left)
        assert torch.equal(torch.get_rng_state(), states[left])
    assert len({state.numpy().tobytes() for state in states}) == steps + 1, "every step must move the generator"


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_noise_does_not_follow_the_default_format(default):
    """`multinomial` draws in the format of its probabilities, which are float32 whatever the default."""
    expected = torch.multinomial(probabilities(2, 1001, 0), 1)[:, 0].tolist()
    torch.manual_seed(0)
    torch.set_default_dtype(default)
    try:
        drawn = Noise(2, CPU).at([0, 1], [0, 0], 1001)
    finally:
        torch.set_default_dtype(torch.float32)
    assert drawn.dtype == torch.float32 and (probabilities(2, 1001, 0) / drawn).argmax(-1).tolist() == expected


@pytest.mark.parametrize("batch, vocab", [(1, 7), (4, 13)])
@pytest.mark.parametrize("seed", range(3))
def test_rows_at_their_own_steps_get_the_draws_of_those_steps(batch, vocab, seed):
    torch.manual_seed(seed)
    draws = [torch.empty(batch, vocab).exponential_(1) for _ in range(60)]
    torch.manual_seed(seed)
    noise, rng = Noise(batch, CPU), random.Random(seed)
    at = [0] * batch
    while max(at) < 50:
        rows = sorted(rng.sample(range(batch), rng.randrange(1, batch + 1)))
        got = noise.at(rows, [at[row] for row in rows], vocab)
        assert torch.equal(got, torch.stack([draws[at[row]][row] for row in rows]))
        noise.draw_until(max(at) + rng.randrange(5), vocab)
        for row in rows:
            at[row] += 1
        if rng.random() < 0.5:
            noise.forget(min(at))
            assert noise.first == min(at)
            assert len(noise.draws) == len(noise.states) <= max(at) - min(at) + 6
    noise.rewind(max(at))
    after = torch.rand(3)
    torch.manual_seed(seed)
    for _ in range(max(at)):
        torch.empty(batch, vocab).exponential_(1)
    assert torch.equal(torch.rand(3), after)


def test_nothing_is_drawn_before_it_is_needed():
    noise, before = Noise(2, CPU), torch.get_rng_state()
    noise.rewind(0)
    assert noise.draws == [] and torch.equal(torch.get_rng_state(), before)
    noise.at([0, 1], [0, 2], 5)
    assert len(noise.draws) == 3
    state = torch.get_rng_state()
    noise.at([0, 1], [1, 2], 5)
    assert torch.equal(torch.get_rng_state(), state), "a draw that is held was drawn again"


@pytest.mark.parametrize("size", [4, 7])
def test_noise_in_a_ring_is_the_same(size):
    """Draws that were made before it, too; each lies at its step modulo the size, and stays while it is held."""
    torch.manual_seed(0)
    draws = [torch.empty(2, 5).exponential_(1) for _ in range(20)]
    after = torch.get_rng_state()
    torch.manual_seed(0)
    noise, ring = Noise(2, CPU), torch.full((size, 2, 5), float("nan"))
    noise.at([0, 1], [1, 0], 5)
    noise.keep_in(ring)
    for slowest in range(20 - size + 1):
        noise.forget(slowest)
        noise.draw_until(slowest + size - 1, 5)
        for step in range(slowest, slowest + size):
            assert torch.equal(ring[step % size], draws[step])
            assert torch.equal(noise.at([1], [step], 5), draws[step][1:])
        if slowest == 9:  # the next call's rounds of another shape
            ring = torch.empty(size, 2, 5)
            noise.keep_in(ring)
    assert torch.equal(torch.get_rng_state(), after)
    noise.rewind(18)
    assert torch.equal(torch.empty(2, 5).exponential_(1), draws[18])


def test_a_ring_taken_over_in_place():
    """Noise that already lies in it stays where it is."""
    noise, ring = Noise(1, CPU), torch.empty(3, 1, 5)
    noise.keep_in(ring)
    noise.draw_until(4, 5)
    noise.forget(3)
    held = [draw.clone() for draw in noise.draws]
    noise.keep_in(ring)
    assert torch.equal(ring[3 % 3], held[0]) and torch.equal(ring[4 % 3], held[1])


# --- kinds of processors and criteria --------------------------------------------------------------------------------

VOCAB = 13
EOS = 3
# One of each kind that transformers has and the tables name, with options that make it do something.
MADE = {
    "EpsilonLogitsWarper": lambda make: make(0.05),
    "EtaLogitsWarper": lambda make: make(0.2),
    "InfNanRemoveLogitsProcessor": lambda make: make(),
    "LogitNormalization": lambda make: make(),
    "MinPLogitsWarper": lambda make: make(0.2),
    "SuppressTokensLogitsProcessor": lambda make: make([2, 7]),
    "TemperatureLogitsWarper": lambda make: make(0.7),
    "TopHLogitsWarper": lambda make: make(0.4),
    "TopKLogitsWarper": lambda make: make(4),
    "TopPLogitsWarper": lambda make: make(0.7),
    "TypicalLogitsWarper": lambda make: make(0.6),
    "ExponentialDecayLengthPenalty": lambda make: make((1, 1.4), EOS, 4),
    "ForcedBOSTokenLogitsProcessor": lambda make: make(5),
    "ForcedEOSTokenLogitsProcessor": lambda make: make(9, EOS),
    "MinLengthLogitsProcessor": lambda make: make(9, EOS),
    "MinNewTokensLengthLogitsProcessor": lambda make: make(4, 3, EOS),
    "NoBadWordsLogitsProcessor": lambda make: make([[5], [2, 6], [7, 1]]),
    "NoRepeatNGramLogitsProcessor": lambda make: make(2),
    "RepetitionPenaltyLogitsProcessor": lambda make: make(1.7),
    "SequenceBiasLogitsProcessor": lambda make: make([[[5], -3.0], [[2, 6], 4.0], [[7], 2.0]]),
    "SuppressTokensAtBeginLogitsProcessor": lambda make: make([2, 7], 8),
    "WatermarkLogitsProcessor": lambda make: make(VOCAB, "cpu"),
}


def processor(name: str) -> LogitsProcessor:
    return MADE[name](getattr(logits_process, name))


def random_inputs(batch: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (batch, length), generator=generator)
    return ids, 2 * torch.randn(batch, VOCAB, generator=generator)


def test_the_tables_name_what_this_transformers_has():
    assert set(MADE) == sampling_longspec._BY_ROW
    assert all(are_by_row([processor(name)]) for name in MADE)
    assert are_by_row([]) and are_criteria_by_row([])


@pytest.mark.parametrize("name", sorted(MADE))
def test_processors_by_row_keep_nothing_and_mix_no_rows(name):
    """Each row alone, in any order, by a fresh processor, is what it is in the batch by one used before."""
    used, acted = processor(name), False
    for length in (1, 6, 8, 9, 12):
        ids, logits = random_inputs(4, length, seed=length)
        scores = used(ids, logits.clone())
        acted |= not torch.equal(scores, logits)
        for row in (2, 0, 3, 1):
            alone = slice(row, row + 1)
            for one in (used, processor(name)):
                assert torch.equal(one(ids[alone], logits[alone].clone()), scores[alone])
    assert acted or name == "InfNanRemoveLogitsProcessor"


def test_what_is_unknown_or_a_subclass_keeps_rows_together():
    class Mine(LogitsProcessor):
        pass

    class Tempered(logits_process.TemperatureLogitsWarper):
        pass

    TopKLogitsWarper = type("TopKLogitsWarper", (LogitsProcessor,), {})  # the name alone says nothing
    known = processor("TopKLogitsWarper")
    for unknown in (Mine(), Tempered(0.7), TopKLogitsWarper(), lambda ids, scores: scores):
        for processors in ([unknown], [known, unknown], [unknown, known]):
            assert not are_by_row(processors)


def test_a_penalty_with_a_length_for_each_row_keeps_rows_together():
    penalty = processor("RepetitionPenaltyLogitsProcessor")
    for length, by_row in ((None, True), (3, True), (torch.tensor([3, 1]), False)):
        penalty.prompt_ignore_length = length
        assert are_by_row([penalty]) is by_row


def test_criteria_by_row():
    known = [
        stopping_criteria.MaxLengthCriteria(9),
        stopping_criteria.MaxTimeCriteria(9.0),
        stopping_criteria.EosTokenCriteria(torch.tensor([2])),
    ]
    assert are_criteria_by_row(known)

    class Mine(StoppingCriteria):
        pass

    class Timed(MaxTimeCriteria):
        pass

    for unknown in (Mine(), Timed(9.0), stopping_criteria.ConfidenceCriteria(0.5), lambda ids, scores: False):
        assert not are_criteria_by_row([*known, unknown])


# --- the sampler -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("do_sample", [False, True])
def test_pick_of_rows_at_their_own_steps(do_sample):
    """Each row's token is what plain decoding picks for it at its step, its own text alone in view."""
    processors = LogitsProcessorList([processor("RepetitionPenaltyLogitsProcessor"), processor("TopKLogitsWarper")])
    texts = [random_inputs(1, length, seed=length)[0] for length in (4, 9, 6)]
    _, logits = random_inputs(3, 1, seed=0)
    torch.manual_seed(1)
    noise = [torch.empty(3, VOCAB).exponential_(1) for _ in range(8)]
    torch.manual_seed(1)
    sampler = Sampler(processors, do_sample, AHEAD, 3, CPU)
    steps = [2, 7, 4]
    picks = sampler.pick(lambda rows: torch.cat([texts[row] for row in rows]), [0, 1, 2], steps, logits.clone())
    for row, step in enumerate(steps):
        scores = processors(texts[row], logits[row : row + 1].clone())
        assert torch.equal(picks.scores[row : row + 1], scores)
        weights = scores[0] if not do_sample else scores[0].softmax(-1) / noise[step][row]
        assert picks.tokens[row] == weights.argmax()


def test_pick_without_noise_is_multinomial():
    _, logits = random_inputs(4, 1, seed=0)
    state = torch.get_rng_state()
    expected = torch.multinomial(logits.softmax(-1), 1)[:, 0]
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    picks = Sampler(LogitsProcessorList(), True, AHEAD._replace(draws_ahead=False), 4, CPU).pick(
        lambda rows: None, [0, 1, 2, 3], [5] * 4, logits
    )
    assert torch.equal(picks.tokens, expected) and torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_no_distribution_are_found_as_multinomial_finds_them(poison):
    logits = torch.zeros(2, 3, VOCAB)
    logits[1, 2] = poison
    with pytest.raises(RuntimeError, match="probability tensor contains either"):
        torch.multinomial(logits[1, 2].softmax(-1), 1)
    found = largest(logits.softmax(-1), torch.empty(2, 3, VOCAB).exponential_(1)) == IMPOSSIBLE
    assert found.tolist() == [[False, False, False], [False, False, True]]
    picks = Sampler(LogitsProcessorList(), True, AHEAD, 2, CPU).pick(lambda rows: None, [0, 1], [1, 6], logits[:, 2])
    assert (picks.tokens == IMPOSSIBLE).tolist() == [False, True]


# --- criteria as numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "criteria",
    [
        [],
        [MaxLengthCriteria(7)],
        [EosTokenCriteria(3)],
        [EosTokenCriteria([3, 5])],
        [EosTokenCriteria(torch.tensor(4)), MaxLengthCriteria(9), MaxLengthCriteria(6)],
        [EosTokenCriteria(torch.tensor([2, 4])), EosTokenCriteria(5), MaxLengthCriteria(8, 4)],
    ],
)
@pytest.mark.parametrize("seed", range(20))
def test_numbers_say_what_criteria_say(criteria, seed):
    rng = random.Random(seed)
    stops = Stops.of(StoppingCriteriaList(criteria))
    for length in range(1, 12):
        ids = [rng.randrange(7) for _ in range(length)]
        assert stops.at(length, ids[-1]) is bool(StoppingCriteriaList(criteria)(torch.tensor([ids]), None))


def test_other_criteria_are_no_numbers():
    subclass = type("Sub", (EosTokenCriteria,), {})
    for other in (Recorder(), MaxTimeCriteria(9.0), subclass(3)):
        assert Stops.of([MaxLengthCriteria(7), other, EosTokenCriteria(3)]) is None


def test_a_text_asks_criteria_only_where_they_are_no_numbers(monkeypatch):
    asked = []
    monkeypatch.setattr(StoppingCriteriaList, "__call__", lambda *args, **kwargs: asked.append(args) or torch.ones(1))
    make_text(9, criteria=[EosTokenCriteria(3)]).write([0], [1])
    assert not asked
    make_text(9, criteria=[EosTokenCriteria(3), Recorder()]).write([0], [1])
    assert len(asked) == 1


def test_the_user_is_reminded_of_the_models_length_as_in_plain_decoding(monkeypatch):
    """By the criterion itself, at the length at which plain `generate` does it."""
    told = []
    monkeypatch.setattr(stopping_criteria.logger, "warning_once", told.append)
    text = make_text(99, criteria=[MaxLengthCriteria(50, max_position_embeddings=5)])
    for length in range(3, 9):
        text.write([0], [1])
        assert text.lengths == [length] and len(told) == (length > 5)
    assert "maximum length (5)" in told[0]
