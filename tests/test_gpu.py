"""What only a GPU can show: the CUDA kernels of the torch backend and equality under them."""

import copy

import pytest
import torch
from helpers import tiny_draft, tiny_target
from reference_attention import spans_of

from hf_longspec.modeling.attention_longspec import Prefix
from hf_longspec.modeling.fast_choose_longspec import load_backend
from hf_longspec.modeling.sampling_longspec import Noise

pytestmark = pytest.mark.gpu
FAMILIES = ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "cohere2", "smollm3", "gpt_oss"]


def prompt_of(length):
    return torch.randint(2, 13, (1, length), generator=torch.Generator().manual_seed(length)).cuda()


def batch_of(*lengths, seed=0):
    """Prompts of these lengths, padded to the left, as a tokenizer gives them."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = torch.randint(2, 13, (length,), generator=generator)
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids.cuda(), "attention_mask": mask.cuda()}


def assert_as_good_as_flash(out, lse, query, key, value, spans):
    """Each row against float64; it may err twice as much as torch's own attention over that row's keys alone."""
    assert out.shape == query.shape and lse.shape == query.shape[:3] and lse.dtype == torch.float32
    scale, group = query.shape[-1] ** -0.5, query.shape[1] // key.shape[1]
    for row, (start, end) in enumerate(spans):
        single = slice(row, row + 1)
        if start == end:
            assert not out[single].any() and bool((lse[single] == float("-inf")).all())
            continue
        queries, keys, values = query[single], key[single, :, start:end], value[single, :, start:end]
        scores = queries.double() @ keys.double().repeat_interleave(group, 1).transpose(-1, -2) * scale
        exact, exact_lse = scores.softmax(-1) @ values.double().repeat_interleave(group, 1), scores.logsumexp(-1)
        # the error of a plain computation in the same format
        plain = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, enable_gqa=True)
        error = (plain - exact).abs().max()
        assert (out[single] - exact).abs().max() <= 2 * error + 1e-6
        assert (lse[single] - exact_lse).abs().max() <= 1e-3 * exact_lse.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("keys", [0, 1, 63, 1000, 4097])
def test_torch_backend_on_cuda(keys, dim, dtype):
    torch.manual_seed(0)
    query = torch.randn(2, 8, 13, dim, device="cuda", dtype=dtype)
    key, value = torch.randn(2, 2, 2, 5000, dim, device="cuda", dtype=dtype)
    spans = [(0, keys)] * 2
    out, lse = load_backend("torch").prefix_attention(
        query, Prefix(key, value, spans_of(spans, query.device), None), dim**-0.5, None
    )
    assert_as_good_as_flash(out, lse, query, key, value, spans)


RAGGED = {
    "lengths": [(0, 4097), (0, 1), (0, 1000), (0, 63)],
    "padded to the left": [(0, 1500), (1499, 1500), (37, 1500), (1000, 1500)],
    "both": [(5, 4097), (0, 130), (64, 65), (4000, 5000)],
    "an empty one": [(0, 700), (9, 9), (3, 128), (0, 0)],
    "all are empty": [(0, 0), (9, 9), (5000, 5000), (1, 1)],
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("spans", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_torch_backend_with_rows_of_different_spans(kv_heads, spans, dim, dtype):
    """What a row may not see is a token that would draw all attention to itself, and a value that would show."""
    torch.manual_seed(0)
    query = torch.randn(4, 8, 13, dim, device="cuda", dtype=dtype)
    key, value = torch.randn(2, 4, kv_heads, 5000, dim, device="cuda", dtype=dtype)
    for row, (start, end) in enumerate(spans):
        hidden = torch.ones(5000, dtype=torch.bool, device="cuda")
        hidden[start:end] = False
        key[row, :, hidden] *= 100
        value[row, :, hidden] = 1000
    prefix = load_backend("torch").prefix_attention
    out, lse = prefix(query, Prefix(key, value, spans_of(spans, query.device), None), dim**-0.5, None)
    assert_as_good_as_flash(out, lse, query, key, value, spans)
    for row, span in enumerate(spans):  # whatever the other rows hold
        single = slice(row, row + 1)
        alone = spans_of([span], query.device)
        over = prefix(query[single], Prefix(key[single], value[single], alone, None), dim**-0.5, None)
        assert_as_good_as_flash(*over, query[single], key[single], value[single], [span])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_a_kernel_is_told_of_spans_serves_every_layer(dtype):
    """Made once a round, for stores of one shape; another shape is another entry."""
    torch.manual_seed(0)
    host = [(5, 900), (0, 130)]
    spans = spans_of(host, torch.device("cuda"))
    for slots, kv_heads in ((1000, 2), (1000, 2), (1256, 2), (1000, 4)):
        query = torch.randn(2, 8, 13, 64, device="cuda", dtype=dtype)
        key, value = torch.randn(2, 2, kv_heads, slots, 64, device="cuda", dtype=dtype)
        out, lse = load_backend("torch").prefix_attention(query, Prefix(key, value, spans, None), 0.125, None)
        assert_as_good_as_flash(out, lse, query, key, value, host)
    assert len(spans.memo) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_equals_plain_generate(family):
    target = tiny_target(family).cuda()
    draft = tiny_draft(target, window=8)
    for shape in [(), (1, 1, 1), (4, 16, 16, 16)]:
        draft.config.tree_shape = shape
        for length in (1, 29):
            for options in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8}):
                options = options | {"max_new_tokens": 24, "pad_token_id": 0}
                torch.manual_seed(3)
                plain = target.generate(prompt_of(length), **options)
                torch.manual_seed(3)
                ours = target.generate(prompt_of(length), assistant_model=draft, **options)
                assert plain.tolist() == ours.tolist(), (shape, length, options)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_equals_plain_generate_for_a_batch(family):
    """Eight prompts of other lengths; rows end at other steps; the device draws, with each row's text."""
    target = tiny_target(family).cuda()
    draft = tiny_draft(target, window=8)
    inputs = batch_of(9, 1, 17, 4, 30, 2, 12, 7)
    samplers = [{"do_sample": False}, {"do_sample": True, "temperature": 0.8}]
    samplers += [{"do_sample": do_sample, "repetition_penalty": 1.3} for do_sample in (False, True)]
    for shape in [(), (1, 1, 1), (4, 16, 16, 16)]:
        draft.config.tree_shape = shape
        for options in samplers:
            for ends in ({}, {"eos_token_id": [5, 11]}):
                options = options | ends | {"max_new_tokens": 24, "pad_token_id": 0}
                torch.manual_seed(3)
                plain, after = target.generate(**inputs, **options), torch.cuda.get_rng_state()
                torch.manual_seed(3)
                ours = target.generate(**inputs, assistant_model=draft, **options)
                assert plain.tolist() == ours.tolist(), (shape, options)
                assert torch.equal(torch.cuda.get_rng_state(), after), (shape, options)


@pytest.mark.parametrize("batch, vocab", [(1, 13), (4, 1001), (8, 151_936), (3, 50_257)])
def test_noise_is_the_stream_of_multinomial_on_cuda(batch, vocab):
    logits = 3 * torch.randn(5, batch, vocab, device="cuda")
    torch.cuda.manual_seed(1)
    expected, states = [], [torch.cuda.get_rng_state()]
    for step in logits:
        expected.append(torch.multinomial(step.softmax(-1), 1)[:, 0].tolist())
        states.append(torch.cuda.get_rng_state())
    for left in range(6):
        torch.cuda.set_rng_state(states[0])
        noise = Noise(batch, logits.device)
        for step, tokens in enumerate(expected):
            drawn = noise.at(list(range(batch)), [step] * batch, vocab)
            assert (logits[step].softmax(-1) / drawn).argmax(-1).tolist() == tokens
        noise.rewind(left)
        assert torch.equal(torch.cuda.get_rng_state(), states[left])


@torch.no_grad()
def assert_parts_only_at_a_tie(target, plain, ours):
    """Two texts (L,) on one prompt: where they part, the two tokens are as near as the format rounds there.

    How far it rounds is measured against the same weights in float64; each token's logit may be off by that, twice.
    """
    if plain.tolist() == ours.tolist():
        return
    place = int((plain != ours).nonzero()[0])
    exact = copy.deepcopy(target).double()(plain[None, :place]).logits[0, -1]
    error = (exact - target(plain[None, :place]).logits[0, -1].double()).abs().max()
    assert (exact[plain[place]] - exact[ours[place]]).abs() <= 4 * error, f"parted at {place} without a tie"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_half_precision_parts_only_at_ties(family, dtype):
    target = tiny_target(family).to("cuda", dtype)
    draft = tiny_draft(target, window=8, tree_shape=(4, 8, 8))
    options = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
    for length in range(5, 25, 4):
        plain = target.generate(prompt_of(length), **options)
        ours = target.generate(prompt_of(length), assistant_model=draft, **options)
        assert_parts_only_at_a_tie(target, plain[0], ours[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_half_precision_of_a_batch_parts_only_at_ties(family, dtype):
    target = tiny_target(family).to("cuda", dtype)
    draft = tiny_draft(target, window=8, tree_shape=(4, 8, 8))
    lengths = (9, 3, 17, 5, 30, 2, 12, 7)
    inputs = batch_of(*lengths)
    options = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
    plain = target.generate(**inputs, **options)
    ours = target.generate(**inputs, assistant_model=draft, **options)
    assert plain.shape == ours.shape
    for row, length in enumerate(lengths):
        real = slice(max(lengths) - length, None)
        assert_parts_only_at_a_tie(target, plain[row, real], ours[row, real])
