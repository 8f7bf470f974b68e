"""Which products of a compiled graph go to our kernels, and together. A graph for a GPU is traced without one."""

import shutil

import pytest
import torch
from helpers import interpreted, tiny_draft, tiny_target
from torch import nn
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from hf_longspec.evaluation.side_by_side import judge
from hf_longspec.modeling import fast_linear_pass_longspec
from hf_longspec.modeling.fast_linear_pass_longspec import LinearPass, groups, linears


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


def together(x, *weights):
    return [product(x, weight) for weight in weights]


def layers_of_three_axes(x, first, second):
    """Each makes rows of x by itself, as `nn.Linear` does."""
    return product(x.view(-1, 64), first), product(x.view(-1, 64), second)


def in_groups(function, *shapes, **options):
    """The numbers of products that are computed together."""
    return [len(group) for group in groups(traced(function, *shapes, **options).graph)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_row_by_a_weight_in_16_bits(dtype):
    assert in_groups(product, (1, 64), (48, 64), dtype=dtype) == [1]
    assert in_groups(biased, (1, 64), (48, 64), (48,), dtype=dtype) == [1]


@pytest.mark.parametrize("rows", [1, 2, 64, 96])
def test_products_of_one_input(rows):
    x, weight, alone = (rows, 64), (48, 64), [1] * (rows == 1)
    assert in_groups(together, x, weight, (70, 64)) == [2]
    assert in_groups(together, x, weight, (70, 64), weight) == [3]
    assert in_groups(together, x, *[weight] * 4) == [3, *alone]
    assert in_groups(together, x, *[weight] * 5) == [3, 2]
    assert in_groups(layers_of_three_axes, (1, *x), weight, weight) == [2]
    assert in_groups(lambda x, w, v, bias: (biased(x, w, bias), product(x, v)), x, weight, weight, (48,)) == 2 * alone
    assert in_groups(lambda x, w, v: (product(x, w), product(x + 1, v)), x, weight, weight) == 2 * alone
    assert in_groups(lambda x, w, v: (product(x, w), product(x.view(-1, 32), v)), x, weight, (48, 32)) == alone


@pytest.mark.parametrize(
    "graph",
    {
        "rows of a product alone": lambda: traced(product, (2, 64), (48, 64)),
        "many rows": lambda: traced(together, (97, 64), (48, 64), (48, 64)),
        "format": lambda: traced(product, (1, 64), (48, 64), dtype=torch.float32),
        "device": lambda: traced(product, (1, 64), (48, 64), device="cpu"),
        "weight computed": lambda: traced(lambda x, weight: product(x, weight * 2), (1, 64), (48, 64)),
        "weight laid out otherwise": lambda: traced(torch.mm, (1, 64), (64, 48)),
        "weight with gaps": lambda: traced(product, (1, 64), (48, 64), make=with_gaps),
        "bias computed": lambda: traced(lambda x, w, bias: biased(x, w, bias * 2), (1, 64), (48, 64), (48,)),
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
    LinearPass()(module.graph)
    module.recompile()
    assert module.code == before


@interpreted
@pytest.mark.parametrize("rows, alone", [(1, 1), (5, 0)])
def test_the_graph_computes_the_same(rows, alone):
    """Traced for a GPU, run in Triton's interpreter."""

    def layers(x, first, bias, second, third):
        left, right = biased(x, first, bias), biased(x, third, bias)
        gate, up = layers_of_three_axes(x, first, third)
        return product((left + gate).relu(), second) + (right * up).sum()

    shapes = [(rows, 64), (48, 64), (48,), (70, 48), (48, 64)]
    module = traced(layers, *shapes, dtype=torch.float16)
    LinearPass()(module.graph)
    module.graph.lint()
    module.recompile()
    targets = [node.target for node in module.graph.nodes]
    assert targets.count(linears._opoverload) == 2 + alone and targets.count(torch.ops.aten.mm.default) == 1 - alone
    inputs = [torch.randn(shape).to(torch.float16) for shape in shapes]
    torch.testing.assert_close(module(*inputs), layers(*inputs), atol=0.5, rtol=0.01)


@pytest.mark.parametrize("rows", [1, 3, 97])
def test_the_operator_is_sound(rows):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and rows <= 96:
        pytest.importorskip("triton")
    x, *weights = (torch.randn(shape, device=device) for shape in ((rows, 32), (24, 32), (8, 32)))
    biases = [torch.randn(24, device=device), torch.randn(8, device=device)]
    for some in (biases, []):
        torch.library.opcheck(linears, (x, weights, some), test_utils=("test_schema", "test_faketensor"))


@pytest.fixture
def calls(monkeypatch):
    """The rows and the numbers of weights that reach the kernels."""
    from hf_longspec.modeling import fast_triton_linear_longspec

    seen, own = [], fast_triton_linear_longspec.linears

    def watched(x, weights, biases):
        seen.append((x.shape[0], len(weights)))
        return own(x, weights, biases)

    monkeypatch.setattr(fast_triton_linear_longspec, "linears", watched)
    torch._dynamo.reset()
    with fresh_cache():
        yield seen


class Gated(nn.Module):
    """The layer behind attention of most families; bias: in the first two of its products."""

    def __init__(self, bias):
        super().__init__()
        self.gate, self.up = nn.Linear(32, 24, bias=bias), nn.Linear(32, 24, bias=bias)
        self.down = nn.Linear(24, 32, bias=False)
        self.to(torch.float16).requires_grad_(False)

    def forward(self, x):
        return self.down(self.gate(x).relu() * self.up(x))


def compiled_on_a_cpu(model, monkeypatch):
    monkeypatch.setattr(fast_linear_pass_longspec, "DEVICE", "cpu")
    return torch.compile(lambda x: model(x), options={"post_grad_custom_pre_pass": LinearPass()})


@interpreted
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
@pytest.mark.parametrize(
    "numbers, expected",
    [  # the second number of rows but 1 makes the graph of all that follow
        ((4, 1, 3, 17, 97, 1), [(4, 2), (1, 2), (1, 1), (3, 2), (17, 2), (1, 2), (1, 1)]),
        ((4, 100, 17), [(4, 2)]),
    ],
    ids=["few rows", "many rows"],
)
@pytest.mark.parametrize("bias", [False, True])
def test_any_number_of_rows(calls, monkeypatch, numbers, expected, bias):
    model = Gated(bias)
    compiled = compiled_on_a_cpu(model, monkeypatch)
    for rows in numbers:
        x = torch.randn(1, rows, 32).to(torch.float16)
        torch.testing.assert_close(compiled(x), model(x), atol=0.01, rtol=0.01)
    assert calls == expected


@interpreted
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
def test_errors_come_through(calls, monkeypatch):
    from hf_longspec.modeling import fast_triton_linear_longspec

    def broken(x, weights, biases):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(fast_triton_linear_longspec, "linears", broken)
    compiled = compiled_on_a_cpu(Gated(bias=False), monkeypatch)
    with pytest.raises(RuntimeError, match="no such kernel"):
        compiled(torch.zeros(1, 1, 32, dtype=torch.float16))


@pytest.mark.gpu
@pytest.mark.parametrize("tree_shape, rows", [((), 1), ((2, 3), 6)], ids=["one row", "a tree"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_text_of_plain_generate_on_a_gpu(family, tree_shape, rows, calls):
    """In bfloat16, with products as exact as cuBLAS's; qwen2 has biases."""
    target = tiny_target(family).to("cuda", torch.bfloat16)
    draft = tiny_draft(target, tree_shape=tree_shape, compile_target=True).to("cuda", torch.bfloat16)
    ids = torch.randint(2, 13, (1, 9), generator=torch.Generator().manual_seed(1)).cuda()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    plain, ours = (
        target.generate(**inputs, assistant_model=model, **options)[0, 9:].tolist() for model in (None, draft)
    )
    verdict = judge(target, inputs, plain, ours)
    assert verdict.equal or verdict.tie, verdict
    assert {(rows, 2), (rows, 3)} <= set(calls)
