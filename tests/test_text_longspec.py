"""Text: who may write how much, where rows end and what lies behind, by hand and against plain decoding's rules."""

import random

import pytest
import torch
from tables import begin_text, emit_to
from transformers import GenerationConfig, LogitsProcessorList, MaxLengthCriteria, StoppingCriteria
from transformers.generation import EosTokenCriteria, StoppingCriteriaList, TemperatureLogitsWarper

from hf_longspec.modeling.text_longspec import LEAD, LEAST_LEAD, Text

VOCAB, EOS, PAD, NODES = 7, 5, 3, 10
PROMPTS = [[1, 2], [4, 2], [6, 1]]


class StopStrings(StoppingCriteria):
    """Stands in for the criterion of stop strings, by its class's name: it stops a row behind its first 4."""

    def __call__(self, ids, scores, **kwargs):
        return (ids[:, 2:] == 4).any(dim=1)


StopStrings.__name__, StopStrings.__module__ = "StopStringCriteria", "transformers.generation.stopping_criteria"


class Mine(StoppingCriteria):
    def __call__(self, ids, scores, **kwargs):
        return torch.zeros(len(ids), dtype=torch.bool)


class Reader:
    def put(self, value):
        pass


def make_text(*criteria, prompts=PROMPTS, processors=(), new_tokens=40, streamer=None, options=None, **sizes) -> Text:
    config = GenerationConfig(**(options or {}))
    config._pad_token_tensor = torch.tensor(PAD)
    stops = StoppingCriteriaList([MaxLengthCriteria(len(prompts[0]) + new_tokens), *criteria])
    sizes = {"nodes": NODES, "vocab": VOCAB} | sizes
    return begin_text(torch.tensor(prompts), LogitsProcessorList(processors), stops, config, streamer, **sizes)


def eos() -> EosTokenCriteria:
    return EosTokenCriteria(torch.tensor([EOS]))


def put(text: Text, tokens: dict[int, int]) -> list[int]:
    """One step in which the target would have `tokens`, {row: token}, written. Returns what was."""
    logits = torch.nn.functional.one_hot(torch.tensor(list(tokens.values())), VOCAB).float()
    return emit_to(text, list(tokens), logits)


def put_all(text: Text, row: int, tokens: list[int]) -> None:
    for token in tokens:
        put(text, {row: token})


# --- who goes with whom ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, together",
    [
        ({}, False),
        ({"prompts": PROMPTS[:1]}, True),
        ({"streamer": Reader()}, True),
        ({"together": True}, True),
        ({"criteria": [eos()]}, False),
        ({"criteria": [eos(), StopStrings()]}, False),
        ({"criteria": [Mine()]}, True),
        ({"criteria": [type("Sub", (EosTokenCriteria,), {})(torch.tensor([EOS]))]}, True),
        ({"processors": [TemperatureLogitsWarper(0.5)]}, False),
        ({"processors": [type("Sub", (TemperatureLogitsWarper,), {})(0.5)]}, True),
        ({"processors": [TemperatureLogitsWarper(0.5), lambda ids, scores: scores]}, True),
    ],
)
def test_rows_go_together_where_something_needs_it(arguments, together):
    arguments = dict(arguments)
    assert make_text(*arguments.pop("criteria", ()), **arguments).together is together


@pytest.mark.parametrize("can_draw", [False, True])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("criteria", [[], [eos()], [Mine()]])
@pytest.mark.parametrize("processors", [[], [TemperatureLogitsWarper(0.5)]])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]])
def test_who_picks_the_tokens(prompts, processors, criteria, do_sample, can_draw):
    options = {"options": {"do_sample": do_sample}, "can_draw": can_draw}
    plan = make_text(*criteria, prompts=prompts, processors=processors, **options).sampler.plan
    known, largest = not any(isinstance(criterion, Mine) for criterion in criteria), not processors and not do_sample
    assert plan.by_argmax is largest
    assert plan.drawn is (can_draw and known and not largest)
    assert plan.draws_ahead is (do_sample and known and (can_draw or len(prompts) > 1))
    assert plan.on_host is (known and (can_draw or largest))


@pytest.mark.parametrize("drawn", [False, True])
def test_a_large_vocabulary_shortens_the_lead(drawn):
    """No more noise is held than a quarter of a gigabyte, or that of some rounds; nothing is held without sampling."""
    for vocab, batch, lead in ((VOCAB, 3, LEAD + NODES), (151_936, 8, 55), (262_144, 40, LEAST_LEAD)):
        prompts = [[1, 2]] * batch
        for do_sample in (False, True):
            options = {"options": {"do_sample": do_sample}, "can_draw": drawn}
            text = make_text(prompts=prompts, vocab=vocab, processors=[TemperatureLogitsWarper(0.5)], **options)
            assert text.lead == (lead if do_sample else LEAD + NODES)
            assert LEAST_LEAD == text.lead or text.lead * batch * vocab * 4 <= 2**28 or not do_sample


# --- ends and padding ------------------------------------------------------------------------------------------------


def test_a_finished_row_is_padded_up_to_the_others():
    text = make_text(eos())
    assert put(text, {0: 1, 1: 2, 2: 6}) == [1, 2, 6]
    assert text.stopped == [False] * 3 and not text.finished
    assert put(text, {0: 1, 1: EOS, 2: 6}) == [1, EOS, 6]
    assert text.stopped == [False, True, False] and text.pad == PAD and text.ends == [None, 4, None]
    assert put(text, {0: 1, 1: 4, 2: 6}) == [1, PAD, 6], "a finished row writes padding, whatever the target says"
    assert put(text, {0: EOS, 2: 1}) == [EOS, 1] and not text.finished
    assert put(text, {2: EOS}) == [EOS]
    assert text.ends == [6, 4, 7] and text.lengths == [6, 5, 7] and text.newest == [EOS, PAD, EOS]
    assert not text.finished and text.room() == [1, 2, 0], "somebody will see the cache"
    put_all(text, 1, [0, 0])
    assert not text.finished
    put_all(text, 0, [0])
    assert text.finished and text.room() == [0, 0, 0]
    assert text.sequences.tolist() == [
        [1, 2, 1, 1, 1, EOS, PAD],
        [4, 2, 2, EOS, PAD, PAD, PAD],
        [6, 1, 6, 6, 6, 1, EOS],
    ]


def test_a_finished_row_writes_no_padding_that_nobody_sees():
    text = make_text(eos(), keeps_cache=False)
    put(text, {0: 1, 1: EOS, 2: 6})
    assert text.room() == [LEAD + NODES, 0, LEAD + NODES]
    put(text, {0: EOS, 2: 6})
    put(text, {2: EOS})
    assert text.finished and text.lengths == [4, 3, 5]
    assert text.sequences.tolist() == [[1, 2, 1, EOS, PAD], [4, 2, EOS, PAD, PAD], [6, 1, 6, 6, EOS]]


@pytest.mark.parametrize("name", ["scores", "logits", "hidden_states"])
def test_a_finished_row_goes_on_for_the_records(name):
    asked = {f"output_{name}": True, "return_dict_in_generate": True}
    assert make_text(eos(), keeps_cache=False, options=asked).keeps_tails
    assert not make_text(eos(), keeps_cache=False).keeps_tails


def test_without_an_end_of_text_a_stopped_row_writes_on():
    """Plain `generate` pads only where a criterion has an EOS token."""
    text = make_text(StopStrings(), keeps_cache=False)
    put(text, {0: 1, 1: 4, 2: 6})
    assert text.ends == [None, 3, None] and text.pad is None and text.keeps_tails
    assert put(text, {0: 4, 1: 6, 2: 6}) == [4, 6, 6]
    put(text, {2: 4})
    assert text.ends == [4, 3, 5] and not text.finished
    put(text, {0: 1, 1: 2})
    assert text.finished and text.sequences.tolist() == [[1, 2, 1, 4, 1], [4, 2, 4, 6, 2], [6, 1, 6, 6, 4]]


def test_a_row_ends_once():
    """The first length at which a criterion says so, though it goes on saying so."""
    text = make_text(StopStrings())
    put_all(text, 0, [1, 4, 4, 1])
    assert text.ends == [4, None, None] and text.lengths == [6, 2, 2]


# --- room and lead ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keeps_cache", [False, True])
def test_room_of_rows_that_part(keeps_cache):
    text = make_text(eos(), keeps_cache=keeps_cache)
    lead = LEAD + NODES
    assert text.lead == lead and text.room() == [lead] * 3
    put_all(text, 0, [1] * 30)
    put_all(text, 2, [1] * 7)
    assert text.room() == [lead - 30, lead, lead - 7]
    text.lead = 30
    assert text.room() == [0, 30, 23], "no row gets further ahead of the slowest"
    put_all(text, 1, [1, EOS])
    if keeps_cache:
        # the furthest row is at 32: up to there the padding behind 4 may come; 4 is now the slowest that writes
        assert text.room()[1] == 28
    else:
        assert text.room() == [7, 0, 30]  # 9 is the slowest


def test_room_where_rows_go_together_is_for_any_path():
    text = make_text(eos(), Mine())
    put(text, {0: 1, 1: EOS, 2: 1})
    assert text.room() == [LEAD + NODES] * 3
    put(text, {0: EOS, 1: 1, 2: EOS})
    assert text.finished and text.room() == [0, 0, 0]


@pytest.mark.parametrize("keeps_cache", [False, True])
@pytest.mark.parametrize("lead", [1, 4, 30])
@pytest.mark.parametrize("stops", ["end of text", "stop strings", "none"])
def test_no_row_that_moves_is_further_ahead_than_the_lead(stops, lead, keeps_cache):
    """The fast rows write all they may, the slow one a token a round: what is kept for it is bounded by the lead."""
    criteria = {"end of text": [eos()], "stop strings": [StopStrings()], "none": []}[stops]
    text = make_text(*criteria, new_tokens=60, keeps_cache=keeps_cache, options={"do_sample": True})
    text.lead = lead
    rng, rounds = random.Random(lead), 0
    while not text.finished and rounds < 500:
        rounds += 1
        for row, room in enumerate(text.room()):
            for _ in range(min(max(room, 0), (1, 6, 8)[row])):
                if text.ends[row] is not None and not text.keeps_tails:
                    break
                # the slow row ends soon, and has a long way to go behind its end
                end = row == 0 and text.lengths[0] == 5
                put_logits = torch.full((1, VOCAB), -float("inf"))
                put_logits[0, (4 if stops == "stop strings" else EOS) if end else rng.choice([1, 2, 6])] = 0.0
                emit_to(text, [row], put_logits)
        moves = [
            length
            for length, stop in zip(text.lengths, text.ends, strict=True)
            if stop is None or (text.keeps_tails and length < max(text.lengths))
        ]
        assert max(text.lengths) - min(moves, default=max(text.lengths)) <= lead
        assert len(text.sampler.noise.draws) <= lead
    assert text.finished and text.ends == [62 if stops == "none" else 6, 62, 62]
    assert min(text.lengths) == 62 or not text.keeps_tails


def test_no_draw_is_kept_that_no_row_needs():
    text = make_text(eos(), keeps_cache=False, options={"do_sample": True})
    noise = text.sampler.noise
    certain = {token: torch.eye(VOCAB)[token : token + 1].log() for token in (1, EOS)}
    for _ in range(9):
        emit_to(text, [0], certain[1])
    assert len(noise.draws) == 9 and noise.first == 0, "two rows are at their first step"
    for row in (1, 2):
        emit_to(text, [row], certain[1])
    assert noise.first == 1 and len(noise.draws) == 8
    emit_to(text, [1], certain[EOS])
    emit_to(text, [2], certain[EOS])
    assert noise.first == 9 and noise.draws == [], "finished rows need none"
    emit_to(text, [0], certain[1])
    state = torch.get_rng_state()
    text.sampler.rewind(text.slowest)
    assert torch.equal(torch.get_rng_state(), state)


def test_after_a_failure_the_generator_stands_where_the_slowest_row_does():
    """So does the cache, which is cut to it."""
    text = make_text(eos(), options={"do_sample": True})
    torch.manual_seed(0)
    certain = {token: torch.eye(VOCAB)[token : token + 1].log() for token in (1, EOS)}
    for row, count in enumerate((7, 2, 4)):
        for _ in range(count):
            emit_to(text, [row], certain[1])
    with pytest.raises(RuntimeError, match="probability tensor"):
        emit_to(text, [0], torch.full((1, VOCAB), float("nan")))
    text.sampler.rewind(text.slowest)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    for _ in range(2):
        torch.multinomial(torch.ones(3, VOCAB), 1)
    assert torch.equal(torch.get_rng_state(), state)


# --- what the rows hold ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_rows_in_any_order_hold_what_was_written_to_them(seed):
    """Far beyond the room the text begins with; each step, criteria are asked about each row at its own length."""

    asked: list[tuple[int, ...]] = []

    class Asked(StopStrings):
        """Known by its name, so that rows part."""

        def __call__(self, ids, scores, **kwargs):
            asked.extend(tuple(row) for row in ids.tolist())
            return torch.zeros(len(ids), dtype=torch.bool)

    Asked.__name__, Asked.__module__ = StopStrings.__name__, StopStrings.__module__
    text = make_text(Asked(), new_tokens=400)
    assert not text.together
    rng, rows = random.Random(seed), [list(prompt) for prompt in PROMPTS]
    for step in range(300):
        some = sorted(rng.sample(range(3), rng.randrange(1, 4))) if step else [0, 1, 2]  # as a prefill does
        tokens = {row: rng.randrange(VOCAB) for row in some}
        assert put(text, tokens) == list(tokens.values())
        for row, token in tokens.items():
            rows[row].append(token)
        assert sorted(asked) == sorted(tuple(rows[row]) for row in some)
        asked.clear()
        assert text.lengths == [len(row) for row in rows] and text.newest == [row[-1] for row in rows]
        assert text.steps == [len(row) - 2 for row in rows]
    longest = max(map(len, rows))
    held = text.sequences
    assert held.shape == (3, longest) and held.dtype == torch.int64
    for row, expected in enumerate(rows):
        assert held[row, : len(expected)].tolist() == expected
        assert text.ids([row]).tolist() == [expected]


def test_sequences_can_be_viewed():
    text = make_text()
    put(text, {0: 1, 1: 2, 2: 6})
    assert text.sequences.view(-1).tolist() == [1, 2, 1, 4, 2, 2, 6, 1, 6]


def test_an_impossible_distribution_raises_as_multinomial_does():
    text = make_text(options={"do_sample": True})
    logits = torch.zeros(3, VOCAB)
    logits[1] = float("nan")
    with pytest.raises(RuntimeError) as error:  # noqa: PT011
        torch.multinomial(logits.softmax(-1), 1)
    with pytest.raises(RuntimeError, match="probability tensor contains either") as ours:
        emit_to(text, [0, 1, 2], logits)
    assert str(ours.value) == str(error.value)
    assert text.lengths == [2, 2, 2]
