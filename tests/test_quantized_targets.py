"""Quantized targets: packages that people use, and the two ways of storing weights that need no package to show."""

import pytest
import torch
from helpers import tiny_draft, tiny_target
from texts import assert_same
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_torchao_weights(llama, draft, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    config = quantization.Int8WeightOnlyConfig()
    llama.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(config), dtype=torch.float32
    )
    quantization.quantize_(llama, config)
    for target in (loaded, llama):
        assert type(target.model.layers[0].self_attn.q_proj.weight.data) is not torch.Tensor
        assert_same(target, draft)
        assert draft.dtype == torch.float32


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bitsandbytes_weights(tmp_path):
    """Four bits: with eight it rounds activations too, so float32 texts may part as those of short formats do."""
    pytest.importorskip("bitsandbytes")
    whole = tiny_target("llama", hidden_size=64, intermediate_size=64)
    whole.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    target = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    assert not target.model.layers[0].self_attn.q_proj.weight.is_floating_point()
    draft = tiny_draft(whole, window=8).to(torch.bfloat16)
    assert_same(target, draft)
    assert draft.dtype == torch.float32


class Packed(torch.nn.Module):
    """A linear layer as GPTQ, AWQ and their like store it: integers and scales in buffers, no parameters."""

    def __init__(self, linear):
        super().__init__()
        scales = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("scales", scales.detach())
        self.register_buffer("qweight", (linear.weight / scales).round().to(torch.int8).detach())

    def forward(self, x):
        return x @ (self.qweight * self.scales).T


class Float8(torch.nn.Module):
    """A linear layer with a float8 weight, as `FineGrainedFP8Config` leaves it."""

    def __init__(self, linear):
        super().__init__()
        self.weight = torch.nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x):
        return x @ self.weight.to(x.dtype).T


@pytest.mark.parametrize("kind", [Packed, Float8])
def test_weights_that_are_no_parameters_or_of_a_storage_format(llama, draft, kind):
    for layer in llama.model.layers:
        for name, module in list(layer.self_attn.named_children()):
            setattr(layer.self_attn, name, kind(module))
    assert_same(llama, draft)
    assert draft.dtype == torch.float32
