"""What `import hf_longspec` loads, and that drafts are known to transformers whichever package is imported first."""

import subprocess
import sys

import pytest
from helpers import quick_or_slow

from hf_longspec import LongSpecConfig, LongSpecForCausalLM


def fresh(code: str) -> str:
    """The output of `code` in an interpreter of its own."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("module", ["hf_longspec", "hf_longspec.cli"])
def test_import_is_cheap(module):
    loaded = fresh(f"import sys, {module}; print(*sys.modules)").split()
    assert module in loaded
    assert not {"torch", "transformers", "numpy", "rich"} & set(loaded)


@pytest.mark.slow
def test_training_on_packed_tokens_needs_no_datasets():
    """A GPU machine without a network is fed arrays; it may have neither of these packages."""
    fresh("import sys; sys.modules['datasets'] = sys.modules['pyarrow'] = None; import hf_longspec.training.run")


def test_public_names():
    import hf_longspec

    assert set(hf_longspec.__all__) <= set(dir(hf_longspec))
    assert hf_longspec.LongSpecConfig is LongSpecConfig
    with pytest.raises(AttributeError, match="has no attribute 'Missing'"):
        _ = hf_longspec.Missing


QUICK = ["from transformers import AutoConfig, AutoModelForCausalLM; import hf_longspec"]
OTHERS = [
    "import hf_longspec; from transformers import AutoConfig, AutoModelForCausalLM",
    "import hf_longspec; from transformers import GenerationMixin, pipeline, AutoConfig, AutoModelForCausalLM",
    "import transformers, hf_longspec; from transformers import AutoConfig, AutoModelForCausalLM",
    "from hf_longspec import LongSpecConfig; from transformers import AutoConfig, AutoModelForCausalLM",
]


@pytest.mark.parametrize("imports", quick_or_slow([*QUICK, *OTHERS], QUICK))
def test_auto_classes_know_drafts(tmp_path, imports):
    """Without trust_remote_code, as `pipeline(assistant_model="repo-id")` loads an assistant."""
    small = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    LongSpecForCausalLM(LongSpecConfig(vocab_size=32, **small)).save_pretrained(tmp_path)
    code = f"""
import sys
{imports}
assert not any(type(finder).__name__ == "AutoConfigWatcher" for finder in sys.meta_path)
config = AutoConfig.from_pretrained({str(tmp_path)!r})
draft = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, config=config)
print(type(config).__module__, type(draft).__module__, type(AutoConfig.for_model("longspec")).__name__)
"""
    configuration, modeling = "hf_longspec.modeling.configuration_longspec", "hf_longspec.modeling.modeling_longspec"
    assert fresh(code) == f"{configuration} {modeling} LongSpecConfig"


@pytest.mark.slow
def test_auto_model_without_a_config(tmp_path):
    small = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    LongSpecForCausalLM(LongSpecConfig(vocab_size=32, **small)).save_pretrained(tmp_path)
    code = f"""
import hf_longspec
from transformers import AutoModelForCausalLM
draft = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
print(type(draft) is hf_longspec.LongSpecForCausalLM)
"""
    assert fresh(code) == "True"
