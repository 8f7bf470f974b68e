"""What only a GPU can show: the CUDA kernels of the torch backend and equality under them."""

import pytest
import torch
from helpers import tiny_draft, tiny_target

from hf_longspec.evaluation import side_by_side
from hf_longspec.modeling.attention_longspec import BACKENDS

pytestmark = pytest.mark.gpu
FAMILIES = ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "cohere2", "smollm3", "gpt_oss"]


def prompt_of(length):
    return torch.randint(2, 13, (1, length), generator=torch.Generator().manual_seed(length)).cuda()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("keys", [0, 1, 63, 1000, 4097])
def test_torch_backend_on_cuda(keys, dim, dtype):
    torch.manual_seed(0)
    query = torch.randn(2, 8, 13, dim, device="cuda", dtype=dtype)
    key, value = torch.randn(2, 2, 2, 5000, dim, device="cuda", dtype=dtype)
    key, value = key[:, :, :keys], value[:, :, :keys]
    out, lse = BACKENDS["torch"].prefix(query, key, value, dim**-0.5, None)
    scores = query.double() @ key.double().repeat_interleave(4, 1).transpose(-1, -2) * dim**-0.5
    exact_lse = scores.logsumexp(-1)
    exact = scores.softmax(-1) @ value.double().repeat_interleave(4, 1)
    # the error of a plain computation in the same format
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True) if keys else out
    error = (plain - exact).abs().max() if keys else torch.tensor(0.0)
    assert (out - exact).abs().max() <= 2 * error + 1e-6
    if keys:
        assert (lse - exact_lse).abs().max() <= 1e-3 * exact_lse.abs().max().clamp(min=1)
    else:
        assert bool((lse == float("-inf")).all())


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


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_bfloat16_parts_only_at_ties(family):
    target = tiny_target(family).to("cuda", torch.bfloat16)
    draft = tiny_draft(target, window=8, tree_shape=(4, 8, 8))
    for length in range(5, 25, 4):
        inputs = {"input_ids": prompt_of(length), "attention_mask": torch.ones(1, length, device="cuda").long()}
        runs = [
            side_by_side.run(target, inputs, assistant, max_new_tokens=32, do_sample=False, pad_token_id=0)
            for assistant in (None, draft)
        ]
        verdict = side_by_side.judge(target, inputs, runs[0].tokens, runs[1].tokens)
        assert verdict.equal or verdict.tie, verdict
