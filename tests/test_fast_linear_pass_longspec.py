"""Which products of a compiled graph go to the kernel of one row. A graph for a GPU is traced without one."""

import shutil

import pytest
import torch
from helpers import interpreted, tiny_draft, tiny_target
from torch import nn
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import linear

from hf_longspec.evaluation.side_by_side import judge
from hf_longspec.modeling import fast_linear_pass_longspec
from hf_longspec.modeling.fast_linear_pass_longspec import OneRowPass, one_row_linear, served


def traced(function, *shapes, dtype=torch.bfloat16, device="cuda", make=torch.empty):
    """The graph of a function of tensors of these shapes."""
    with FakeTensorMode():
        return make_fx(function)(*(make(shape, dtype=dtype, device=device) for shape in shapes))


def product(x, weight):
    return torch.mm(x, weight.permute(1, 0))


def biased(x, weight, bias):
    return torch.addmm(bias, x, weight.permute(1, 0))


def halved(x, weight, bias):
    return torch.addmm(bias, x, weight.permute(1, 0), beta=0.5)


def with_gaps(shape, **options):
    return torch.empty_strided(shape, (80, 1), **options)


def count(module):
    return sum(served(node) is not None for node in module.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_row_by_a_weight_in_16_bits(dtype):
    assert count(traced(product, (1, 64), (48, 64), dtype=dtype)) == 1
    assert count(traced(biased, (1, 64), (48, 64), (48,), dtype=dtype)) == 1


@pytest.mark.parametrize(
    "graph",
    {
        "rows": lambda: traced(product, (2, 64), (48, 64)),
        "format": lambda: traced(product, (1, 64), (48, 64), dtype=torch.float32),
        "device": lambda: traced(product, (1, 64), (48, 64), device="cpu"),
        "weight computed": lambda: traced(lambda x, weight: product(x, weight * 2), (1, 64), (48, 64)),
        "weight laid out otherwise": lambda: traced(torch.mm, (1, 64), (64, 48)),
        "weight with gaps": lambda: traced(product, (1, 64), (48, 64), make=with_gaps),
        "factors": lambda: traced(halved, (1, 64), (48, 64), (48,)),
        "bias of every row": lambda: traced(biased, (1, 64), (48, 64), (1, 48)),
        "bias of one number": lambda: traced(biased, (1, 64), (48, 64), (1,)),
        "batches": lambda: traced(torch.bmm, (2, 4, 64), (2, 64, 48)),
    }.items(),
    ids=lambda item: item[0],
)
def test_nothing_else(graph):
    module = graph[1]()
    before = module.code
    OneRowPass()(module.graph)
    module.recompile()
    assert module.code == before


@interpreted
def test_the_graph_computes_the_same():
    """Traced for a GPU, run in Triton's interpreter."""

    def layers(x, first, bias, second):
        return product(biased(x, first, bias).relu(), second) + product(x, first).sum()

    shapes = [(1, 64), (48, 64), (48,), (70, 48)]
    module = traced(layers, *shapes, dtype=torch.float16)
    OneRowPass()(module.graph)
    module.graph.lint()
    module.recompile()
    targets = [node.target for node in module.graph.nodes]
    assert targets.count(one_row_linear._opoverload) == 3 and torch.ops.aten.mm.default not in targets
    inputs = [torch.randn(shape).to(torch.float16) for shape in shapes]
    torch.testing.assert_close(module(*inputs), layers(*inputs), atol=0.1, rtol=0.01)


def test_the_operator_is_sound():
    checks = ("test_schema", "test_faketensor")
    with_bias = [torch.randn(1, 32), torch.randn(24, 32), torch.randn(24)]
    if not torch.cuda.is_available():
        pytest.importorskip("triton")
    else:
        with_bias = [tensor.cuda() for tensor in with_bias]
    torch.library.opcheck(one_row_linear, with_bias, test_utils=checks)
    torch.library.opcheck(one_row_linear, [*with_bias[:2], None], test_utils=checks)


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the inputs that reach the kernel."""
    from hf_longspec.modeling import fast_triton_linear_longspec

    shapes, own = [], fast_triton_linear_longspec.one_row_linear

    def watched(x, weight, bias):
        shapes.append(tuple(x.shape))
        return own(x, weight, bias)

    monkeypatch.setattr(fast_triton_linear_longspec, "one_row_linear", watched)
    torch._dynamo.reset()
    with fresh_cache():
        yield shapes


@interpreted
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
def test_more_rows_than_one_stay_with_torch(calls, monkeypatch):
    monkeypatch.setattr(fast_linear_pass_longspec, "DEVICE", "cpu")
    model = nn.Linear(32, 24).to(torch.float16).requires_grad_(False)
    options = {"post_grad_custom_pre_pass": OneRowPass()}
    compiled = torch.compile(lambda x: model(x), options=options)
    for rows in (4, 1, 3, 17, 1):
        x = torch.randn(1, rows, 32).to(torch.float16)
        torch.testing.assert_close(compiled(x), linear(x, model.weight, model.bias), atol=0.01, rtol=0.01)
    assert calls == [(1, 32), (1, 32)]


@interpreted
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
def test_errors_come_through(calls, monkeypatch):
    from hf_longspec.modeling import fast_triton_linear_longspec

    def broken(x, weight, bias):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(fast_linear_pass_longspec, "DEVICE", "cpu")
    monkeypatch.setattr(fast_triton_linear_longspec, "one_row_linear", broken)
    model = nn.Linear(32, 24).to(torch.float16).requires_grad_(False)
    options = {"post_grad_custom_pre_pass": OneRowPass()}
    compiled = torch.compile(lambda x: model(x), options=options)
    with pytest.raises(RuntimeError, match="no such kernel"):
        compiled(torch.zeros(1, 32, dtype=torch.float16))


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_text_of_plain_generate_on_a_gpu(family, calls):
    """One token at a time, in bfloat16, with products as exact as cuBLAS's; qwen2 has biases."""
    target = tiny_target(family).to("cuda", torch.bfloat16)
    draft = tiny_draft(target, tree_shape=(), compile_target=True).to("cuda", torch.bfloat16)
    ids = torch.randint(2, 13, (1, 9), generator=torch.Generator().manual_seed(1)).cuda()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    plain, ours = (
        target.generate(**inputs, assistant_model=model, **options)[0, 9:].tolist() for model in (None, draft)
    )
    verdict = judge(target, inputs, plain, ours)
    assert verdict.equal or verdict.tie, verdict
    assert calls
