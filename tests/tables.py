"""A "target" that is a table over five tokens, random trees over it, and its texts written with and without trees."""

import itertools
import random
from types import SimpleNamespace

import torch
from transformers import GenerationConfig, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper

from hf_longspec.modeling.fast_engine_longspec import FastEngine
from hf_longspec.modeling.sampling_longspec import Plan, Sampler
from hf_longspec.modeling.text_longspec import Text
from hf_longspec.modeling.tree_longspec import TokenTree, TreeForm, ancestor_mask, node_depths
from hf_longspec.modeling.verification_longspec import Verified, accept, along_walk, emit, step_by_step, walk

VOCAB = 5
PROMPT = [3, 1]
PAD = 0
NODES = 20  # of the largest tree
TABLE = 2.0 * torch.randn(VOCAB, VOCAB, VOCAB, generator=torch.Generator().manual_seed(5))


def walk_row(tree, logits, text):
    """Return the nodes that `accept` goes through in the first row."""
    return walk_rows(tree, logits, text)[0]


def walk_rows(tree, logits, text, hidden_states=None):
    """Return the nodes that `accept` goes through in each row, as in the decoding loop: a row without room rests."""
    paths = [[0] if room else [] for room in text.room()]
    extend(tree, logits, text, paths, hidden_states)
    return paths


def extend(tree, logits, text, paths, hidden_states=None):
    """Extend the text as a round does once the target has seen the tree."""
    ancestors = ancestor_mask(tree.parents, tree.levels)
    verified = Verified(ancestors, node_depths(ancestors), logits, hidden_states)
    sampler = text.sampler
    if sampler.plan.drawn:
        sampler.vocab = logits.shape[-1]  # as the first token, which the host picks, leaves it
        _, walks = text.engine.draw(drawing_call(text), tree, verified)
        accept(text, paths, along_walk(walks, verified, text))
    elif sampler.plan.by_argmax:
        tokens = logits.argmax(dim=-1)
        if text.padding is not None:
            tokens = tokens.masked_fill(torch.tensor(text.stopped)[:, None], text.padding)
        walks = walk(tree, ancestors, verified.depths, tokens).on_host()
        accept(text, paths, along_walk(walks, verified, text))
    else:
        accept(text, paths, step_by_step(tree, verified, sampler, text))
    sampler.forget(text.slowest)


def drawing_call(text):
    """Return what a fast engine asks of a call to draw its tokens; nothing is cached but the roots are missing."""
    ends = torch.tensor(text.lengths) - 1
    form = TreeForm((1,) * NODES)
    return SimpleNamespace(
        text=text,
        sampler=text.sampler,
        cache=SimpleNamespace(lengths=ends.tolist(), bounds_on=lambda device: (torch.zeros_like(ends), ends)),
        chooser=SimpleNamespace(deepest=NODES, ladder=[form]),
        form=form,
        backend=SimpleNamespace(draw=None),
        roots=SimpleNamespace(stopped=torch.tensor(text.stopped), written=None),
    )


def begin_text(
    ids: torch.Tensor,
    processors,
    criteria,
    config,
    streamer=None,
    *,
    nodes,
    vocab,
    keeps_cache=True,
    together=False,
    can_draw=False,
) -> Text:
    """Begin a text as the decoding loop does; `text.sampler` picks its tokens, or `text.engine`, if it can draw."""
    do_sample, options = config.do_sample, {"together": together or streamer is not None, "can_draw": can_draw}
    plan = Plan.of(processors, criteria, do_sample, len(ids), **options)
    text = Text(ids, criteria, config, streamer, plan, nodes=nodes, vocab=vocab, keeps_cache=keeps_cache)
    text.sampler, text.engine = Sampler(processors, do_sample, plan, len(ids), ids.device), FastEngine(ids.device)
    return text


def emit_to(text: Text, rows: list[int], logits: torch.Tensor) -> list[int]:
    """Write one step of some rows; then the sampler forgets what no row needs, as it does after a round."""
    tokens = emit(text, text.sampler, rows, logits)
    text.sampler.forget(text.slowest)
    return tokens


def table_logits(tokens: list[int], table: torch.Tensor = TABLE) -> torch.Tensor:
    """Return the target's logits (vocab,) for the token behind `tokens`."""
    return table[tokens[-2], tokens[-1]]


def node_logits(tree: TokenTree, ids: list[int], table: torch.Tensor = TABLE) -> torch.Tensor:
    """Return the target's logits (1, T, vocab) at every node of a tree whose root is the last of `ids`."""
    tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
    paths = [ids]
    for node in range(1, len(tokens)):
        paths.append(paths[parents[node]] + [tokens[node]])
    return torch.stack([table_logits(path, table) for path in paths])[None]


def make_tree(tokens: list[int], parents: list[int]) -> TokenTree:
    return TokenTree(torch.tensor([tokens]), torch.tensor([parents]), torch.zeros(1, len(tokens)), len(tokens))


def random_tree(root: int, rng: random.Random) -> TokenTree:
    """Make any tree at all: siblings may carry the same token, and most nodes are bad guesses."""
    nodes = rng.choice([1, 2, 4, 9, NODES])
    return make_tree(
        [root] + [rng.randrange(VOCAB) for _ in range(nodes - 1)], [0] + [rng.randrange(n) for n in range(1, nodes)]
    )


def make_text(
    new_tokens: int,
    processors: list = (),
    do_sample: bool = False,
    streamer=None,
    criteria: list = (),
    prompts: list[list[int]] = (PROMPT,),
    keeps_cache: bool = True,
    can_draw: bool = False,
    **options,
) -> Text:
    config = GenerationConfig(do_sample=do_sample, **options)
    config._pad_token_tensor = torch.tensor(PAD)
    stops = StoppingCriteriaList([MaxLengthCriteria(len(prompts[0]) + new_tokens), *criteria])
    ids = torch.tensor(list(prompts))
    sizes = {"nodes": NODES, "vocab": VOCAB, "keeps_cache": keeps_cache, "can_draw": can_draw}
    return begin_text(ids, LogitsProcessorList(processors), stops, config, streamer, **sizes)


def write(text: Text, seed: int, table: torch.Tensor = TABLE) -> list[int]:
    """Run rounds over random trees until the text is finished, and return the new tokens."""
    rng = random.Random(seed)
    while not text.finished:
        ids = text.sequences[0].tolist()
        tree = random_tree(ids[-1], rng)
        path = walk_row(tree, node_logits(tree, ids, table), text)
        emitted = text.sequences[0, len(ids) :].tolist()
        assert path[0] == 0 and len(path) == len(emitted)
        assert [int(tree.tokens[0, node]) for node in path[1:]] == emitted[:-1]
        assert all(int(tree.parents[0, node]) == parent for parent, node in itertools.pairwise(path))
    text.sampler.rewind(text.slowest)
    return text.sequences[0, len(PROMPT) :].tolist()


def write_plainly(
    new_tokens: int, processors: list = (), do_sample: bool = False, table: torch.Tensor = TABLE
) -> list[int]:
    """Return the new tokens of decoding by one token at a time."""
    ids = list(PROMPT)
    for _ in range(new_tokens):
        scores = LogitsProcessorList(processors)(torch.tensor([ids]), table_logits(ids, table)[None].clone())
        ids.append(int(torch.multinomial(scores.softmax(-1), 1) if do_sample else scores.argmax()))
    return ids[len(PROMPT) :]


PROCESSORS = {
    "none": [],
    "temperature, top-k": [TemperatureLogitsWarper(0.7), TopKLogitsWarper(3)],
    "repetition penalty": [RepetitionPenaltyLogitsProcessor(1.7)],
}


def logits_that_pick(*choices: int) -> torch.Tensor:
    """Return logits (1, T, vocab) whose argmax at node i is `choices[i]`."""
    return torch.nn.functional.one_hot(torch.tensor([choices]), VOCAB).float()


class EveryOutcome:
    """A stand-in for `torch.multinomial` that takes the sampler through every sequence of outcomes, run after run."""

    def __init__(self):
        self.script: list[int] = []
        self.taken: list[int] = []
        self.weight = 1.0  # probability of the outcomes of this run

    def __call__(self, probabilities, num_samples):
        assert probabilities.shape == (1, VOCAB) and num_samples == 1
        step = len(self.taken)
        choice = self.script[step] if step < len(self.script) else 0
        self.taken.append(choice)
        self.weight *= probabilities[0, choice].item()
        return torch.tensor([[choice]])

    def next_run(self) -> bool:
        """Move on to the next sequence, as an odometer does, and return whether there is one."""
        script = self.taken
        while script and script[-1] == VOCAB - 1:
            script.pop()
        if script:
            script[-1] += 1
        self.script, self.taken, self.weight = script, [], 1.0
        return bool(script)


class Recorder:
    """A streamer that is a stopping criterion too, and notes what it is shown."""

    def __init__(self):
        self.streamed, self.texts = [], []

    def put(self, token):
        self.streamed.append(token.tolist())

    def __call__(self, ids, scores, **kwargs):
        self.texts.append(ids[0].tolist())
        return torch.zeros(1, dtype=torch.bool)
