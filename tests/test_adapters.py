"""PEFT's adapters on a target, active, switched, disabled or merged: the text is that of the adapted target."""

import pytest
import torch
import transformers
from helpers import tiny_draft, tiny_target
from packaging.version import Version
from texts import OPTIONS, assert_same, prompt_of, texts
from transformers.integrations.peft import MIN_PEFT_VERSION

peft = pytest.importorskip("peft")
# peft asks transformers under a name that is going out of use
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def lora(**options):
    return peft.LoraConfig(**({"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | options))


def test_adapters_switched_disabled_and_merged(llama, draft):
    base = texts(llama)
    wrapped = peft.get_peft_model(llama, lora(target_modules=["v_proj", "embed_tokens", "lm_head"])).eval()
    wrapped.add_adapter("second", lora(target_modules=["k_proj", "down_proj"]))
    wrapped.eval()
    first = assert_same(wrapped, draft)
    wrapped.set_adapter("second")
    second = assert_same(wrapped, draft)
    assert assert_same(wrapped, draft, adapter_names=["default"]) == first
    with wrapped.disable_adapter():
        assert assert_same(wrapped, draft) == base
    assert assert_same(wrapped, draft) == second
    assert len({str(found) for found in (base, first, second)}) == 3, "the adapters change nothing: nothing is tested"
    wrapped.set_adapter("default")
    merged = wrapped.merge_and_unload()
    assert assert_same(merged, draft) == first


def test_an_adapter_for_each_row(llama, draft):
    wrapped = peft.get_peft_model(llama, lora()).eval()
    wrapped.add_adapter("second", lora(target_modules=["k_proj", "down_proj"]))
    wrapped.eval()
    ids, options = prompt_of(9).expand(2, -1), OPTIONS | {"adapter_names": ["default", "second"]}
    plain = wrapped.generate(input_ids=ids, **options).tolist()
    assert wrapped.generate(input_ids=ids, assistant_model=draft, **options).tolist() == plain
    assert plain[0] != plain[1]


def test_graphs_follow_adapters(captures, llama, draft):
    """Switched, disabled, scaled, merged: what was captured before is not played on."""
    base = texts(llama)
    wrapped = peft.get_peft_model(llama, lora()).eval()
    wrapped.add_adapter("second", lora(target_modules=["k_proj", "down_proj"]))
    wrapped.eval()
    count = [0]

    def assert_captured(anew):
        found = assert_same(wrapped, draft)
        assert len(captures) - count[0] == 4 * anew
        count[0] = len(captures)
        return found

    first = assert_captured(True)
    assert assert_captured(False) == first
    wrapped.set_adapter("second")
    second = assert_captured(True)
    with wrapped.disable_adapter():
        assert assert_captured(True) == base
    assert assert_captured(True) == second
    wrapped.set_adapter("default")
    assert assert_captured(True) == first
    layers = [module for module in wrapped.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    for layer in layers:
        layer.set_scale("default", 9.0)
    assert assert_captured(True) != first
    for layer in layers:
        layer.set_scale("default", 1.0)
    wrapped.merge_adapter()
    assert assert_captured(True) == first
    wrapped.unmerge_adapter()
    assert assert_captured(True) == first
    assert all(captures)


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"transformers {transformers.__version__} wants peft {MIN_PEFT_VERSION} for adapters of its own, "
    f"peft {peft.__version__} is installed",
)
def test_adapters_of_transformers_own(llama, draft, tmp_path):
    base = texts(llama)
    llama.add_adapter(lora())
    llama.eval()
    adapted = assert_same(llama, draft)
    assert adapted != base
    llama.save_pretrained(tmp_path / "adapter")
    llama.disable_adapters()
    assert assert_same(llama, draft) == base
    again = tiny_target("llama")
    again.load_adapter(tmp_path / "adapter")
    assert assert_same(again, draft) == adapted


ON = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    "method",
    ["dora", "whole modules", "ia3", "vera", "adaption prompt", "rslora", "tokens", "loha", "lokr", "oft", "hra"]
    + ["fourier", "norms"],
)
def test_other_kinds_of_adapters(method):
    llama = tiny_target("llama", head_dim=8)
    config = {
        "rslora": lambda: lora(use_rslora=True),
        "tokens": lambda: lora(trainable_token_indices=[3, 4, 5, 6]),
        "loha": lambda: peft.LoHaConfig(r=4, **ON),
        "lokr": lambda: peft.LoKrConfig(r=4, **ON),
        "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, **ON),
        "hra": lambda: peft.HRAConfig(r=4, **ON),
        "fourier": lambda: peft.FourierFTConfig(n_frequency=40, scaling=30.0, **ON),
        "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
        "dora": lambda: lora(use_dora=True),
        "whole modules": lambda: lora(modules_to_save=["lm_head", "embed_tokens"]),
        "ia3": peft.IA3Config,
        "vera": lambda: peft.VeraConfig(target_modules=["q_proj"]),
        "adaption prompt": lambda: peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=2, task_type="CAUSAL_LM"),
    }[method]()
    draft = tiny_draft(llama, window=8)
    base = texts(llama)
    wrapped = peft.get_peft_model(llama, config).eval()
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and not name.endswith("modules_to_save.default.weight"):
            torch.nn.init.normal_(parameter, std=0.3)
    assert assert_same(wrapped, draft) != base or method == "whole modules"


def test_adapters_that_read_virtual_tokens_are_refused(llama, draft):
    for kind in (peft.PromptTuningConfig, peft.PrefixTuningConfig):
        wrapped = peft.get_peft_model(tiny_target("llama"), kind(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
        with pytest.raises(ValueError, match="virtual tokens, got a target with PEFT prompt learning"):
            wrapped.generate(input_ids=prompt_of(5), assistant_model=draft, **OPTIONS)
    assert_same(llama, draft)


def test_activated_lora_is_refused_where_the_prompt_invokes_it(llama, draft):
    """It adapts the last tokens of every forward, counted from the end: all of one token, but not of a tree."""
    config = lora(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(llama, config).eval()
    invoking = torch.tensor([[3, 9, 5, 6, 4]])
    with pytest.raises(ValueError, match="does not serve activated LoRA, got a prompt with alora_invocation_tokens"):
        wrapped.generate(input_ids=invoking, assistant_model=draft, **OPTIONS)
    other = torch.tensor([[3, 9, 6, 5, 4]])
    plain = wrapped.generate(input_ids=other, **OPTIONS)
    assert wrapped.generate(input_ids=other, assistant_model=draft, **OPTIONS).tolist() == plain.tolist()


def test_an_adapter_in_training_mode(llama, draft):
    wrapped = peft.get_peft_model(llama, lora(lora_dropout=0.1)).train()
    with pytest.raises(ValueError, match=r"needs target.eval\(\), .* with dropout in 'model.*lora_dropout"):
        wrapped.generate(prompt_of(5), assistant_model=draft, **OPTIONS)
    assert wrapped.training
    assert_same(wrapped.eval(), draft)


def test_an_adapter_on_the_draft(llama, draft):
    assert_same(llama, peft.get_peft_model(draft, lora()).eval())
