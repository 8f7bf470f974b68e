"""Every family of transformers as docs/SUPPORT.md tells of it; made anew by `hf-longspec support`."""

import functools
import inspect
import itertools
import re
from pathlib import Path

import pytest
import torch
import transformers
from full_disk import full_disk
from helpers import CACHE, quick_or_slow, tiny_draft
from transformers import CONFIG_MAPPING, DynamicCache, LlamaForCausalLM, PreTrainedConfig
from transformers.configuration_utils import ALLOWED_LAYER_TYPES
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from typer.testing import CliRunner

from hf_longspec import LongSpecForCausalLM, cli
from hf_longspec.evaluation import families as trials_of
from hf_longspec.evaluation import tiny_models
from hf_longspec.evaluation.families import Result, Trial, context_effect, try_families, try_family, try_model
from hf_longspec.evaluation.support_table import read_results, support_table
from hf_longspec.evaluation.tiny_models import LAYERS, VOCAB, NotBuildable, families, tiny_config, tiny_model
from hf_longspec.evaluation.tiny_overrides import RELEASED
from hf_longspec.modeling.target_longspec import attention_module

PAGE = (Path(__file__).parent.parent / "docs" / "SUPPORT.md").read_text(encoding="utf-8")
TABLE = read_results(PAGE)
MADE_WITH = PAGE.split("transformers ")[2].split(",")[0]
KNOWN = [family for family in families() if family in TABLE]
SERVED = [family for family in KNOWN if TABLE[family] is Result.served]
REFUSED = [family for family in KNOWN if TABLE[family] is Result.refused]


# `make test` tries one family for each path through the code: the kinds of its layers, how its queries turn, where its
# positions come from, by what its embeddings, logits and scores are scaled. `make test-all` tries all.
PATHS = {
    "llama": "full layers; halves of all dimensions turn; positions of `generate`; nothing is scaled",
    "mistral": "sliding layers only, so that the draft reads one of them",
    "gemma2": "embeddings scaled inside of their module; scores capped in the attention, and after the head",
    "gemma3_text": "frequencies by the type of layer",
    "gemma3n_text": "layers that share keys and values; queries turned alone; several hidden states of a token",
    "gemma4_text": "wider heads in full layers, a part of whose frequencies is nought; a scale of each layer",
    "smollm3": "a layer says itself that it does not turn",
    "exaone4": "full layers that do not turn beside sliding ones, by the family's name",
    "flint": "full layers that never turn, by the family's name; sinks beside a window",
    "muse_glimmer": "no turn in layers whose own theta is 0; normed embeddings; a cap behind the head",
    "cohere_compass": "no turn in types of layers without parameters; three axes in the others",
    "cohere2_vision": "logits are multiplied; a text model inside of another",
    "glm4": "interleaved pairs of a part of the dimensions",
    "gpt_neox": "halves of a part of the dimensions; a K/V head a query head",
    "gpt_oss": "one angle a pair, stretched by yarn; sinks; experts",
    "granite": "embeddings multiplied behind their module; logits are divided",
    "qwen2_5_vl": "three axes of positions; text positions made by the model",
    "glm4v": "three axes; interleaved pairs of a part of the dimensions",
    "opt": "no rotation, but a table of absolute positions, read by mask or position",
    "moss_transcribe_diarize": "full and sliding layers that turn alike; gets no positions, and counts for itself",
    "whisper": "counts for itself, in a table; the decoder of a pair",
}
# and one for each refusal
REFUSALS = {
    "gpt_neo": "attends without the attention interface",
    "mamba": "no cache of keys and values",
    "deepseek_v3": "latent attention",
    "mimo_v2_flash": "values narrower than keys",
    "bart": "its decoder takes no positions",
    "t5gemma2": "has an encoder",
    "jetmoe": "attends to other keys than it caches",
    "llama4_text": "attends in chunks",
    "rwkv": "has no attention heads",
    "doge": "makes masks of its own",
}
TRIED = quick_or_slow(SERVED, PATHS)
RELEASES = [(family, name) for family in SERVED for name in RELEASED.get(family, ()) if name != "opt-350m"]


def trial(family: str) -> Trial:
    return next(iter(try_families([family])))


def skip_unless_buildable(result: Trial) -> None:
    """Other versions of transformers have other defaults, and cannot make a tiny model of each one's."""
    if result.result is Result.not_buildable and transformers.__version__ != MADE_WITH:
        pytest.skip(f"{result.family}: {result.reason}")


@pytest.mark.parametrize("family", TRIED)
def test_served_family_is_served(family):
    result = try_model(family)
    skip_unless_buildable(result)
    assert result.result is Result.served, result.reason


@pytest.mark.parametrize("released", quick_or_slow(RELEASES, [("exaone4", "EXAONE-4.0-1.2B")]), ids=" as ".join)
def test_released_model_is_served(released):
    result = try_model(*released)
    skip_unless_buildable(result)
    assert result.result is Result.served, result.reason


def test_a_released_model_that_goes_otherwise_than_its_family_is_named(monkeypatch):
    """The embeddings of opt-350m are half as wide as its hidden states."""
    monkeypatch.setattr(trials_of, "SETTINGS", trials_of.SETTINGS[:1])
    result = trial("opt")
    assert result.result is Result.served
    assert result.reason == "opt-350m is refused: LongSpec needs embeddings of width 32, got 'opt' with 16"


@pytest.mark.parametrize("result, reason", [(Result.served, ""), (Result.wrong, "Mixtral-8x7B is WRONG: odd")])
def test_a_released_model_that_is_wrong_makes_its_family_wrong(result, reason, monkeypatch):
    models = {
        "": Trial("mixtral", "M", "sliding", Result.served),
        "Mixtral-8x7B": Trial("mixtral", "M", "full", result, "odd" if reason else ""),
    }
    monkeypatch.setattr(trials_of, "try_model", lambda family, release="": models[release])
    kinds = "sliding" if reason else "sliding, full"
    assert try_family("mixtral") == Trial("mixtral", "M", kinds, result, reason)


@pytest.mark.parametrize("family", quick_or_slow(REFUSED, REFUSALS))
def test_refused_family_is_refused(family):
    """By a `ValueError`: what else a call ends in counts as WRONG."""
    result = try_model(family)
    skip_unless_buildable(result)
    assert result.result is Result.refused, result.reason


@pytest.mark.skipif(transformers.__version__ != MADE_WITH, reason=f"the table is of transformers {MADE_WITH}")
def test_table_knows_every_family():
    assert set(TABLE) == set(families())


def test_table_is_of_every_older_family():
    assert len(KNOWN) > 200
    assert len(SERVED) >= 130  # at the older end of the range
    assert {TABLE[family] for family in PATHS} == {Result.served}
    assert {TABLE[family] for family in REFUSALS} == {Result.refused}
    assert Result.wrong not in TABLE.values()


COUNT_FOR_THEMSELVES = ["exaone4_5", "hyperclovax_vision_v2", "moss_transcribe_diarize", "whisper"]


@pytest.mark.parametrize("family", ["llama", *[family for family in COUNT_FOR_THEMSELVES if family in SERVED]])
def test_a_padded_batch(family):
    """Some targets get no positions from `generate` and count the padding too."""
    target = tiny_model(family)
    draft = tiny_draft(target, tree_shape=(VOCAB, 40))
    inputs = {"input_ids": torch.tensor([[0, 0, 0, 5, 7, 2], [3, 5, 7, 2, 11, 4]])}
    inputs["attention_mask"] = (inputs["input_ids"] > 0).long()
    for do_sample in (False, True):
        outputs = []
        for assistant in ({}, {"assistant_model": draft}):
            torch.manual_seed(3)
            options = {"max_new_tokens": 12, "do_sample": do_sample, "return_dict_in_generate": True}
            outputs.append(target.generate(**inputs, **assistant, **options, output_logits=True))
        assert outputs[0].sequences.tolist() == outputs[1].sequences.tolist()
        torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=1e-4, atol=1e-4)


class Query:
    """An attention function that keeps the query it is given."""

    def __call__(self, module, query, key, value, *args, **kwargs):
        self.seen = query
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


@pytest.mark.parametrize("family", TRIED)
@torch.no_grad()
def test_query_turns_as_the_targets_own(family, monkeypatch):
    """A draft whose queries turned otherwise would write the same text, but slowly: its guesses would be bad."""
    try:
        target = tiny_model(family)
    except NotBuildable as error:
        skip_unless_buildable(Trial(family, "", "", Result.not_buildable, str(error)))
        raise
    draft = tiny_draft(target)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "keep the query", keep := Query())
    attention = attention_module(target.get_decoder(), draft.config.target_layer)
    calls = []
    attention.register_forward_pre_hook(lambda module, *inputs: calls.append(inputs), with_kwargs=True)
    target.set_attn_implementation("keep the query")
    positions = torch.tensor([[0, 1, 2, 17, 18, 40, 101]])
    target(torch.tensor([[3, 5, 7, 2, 11, 4, 9]]), position_ids=positions, use_cache=False)
    args, kwargs = calls[0]
    attention(*args, **kwargs)
    turned = keep.seen
    bound = draft.bind(target)
    turns = bound.angles(turned, positions)
    if isinstance(angles := kwargs.get("position_embeddings"), tuple):
        attention(*args, **kwargs | {"position_embeddings": (torch.ones_like(angles[0]), torch.zeros_like(angles[1]))})
        torch.testing.assert_close(bound.rotate(keep.seen, turns), turned, rtol=1e-4, atol=1e-4)
    else:  # no rotary embedding, or none in this layer
        assert torch.equal(bound.rotate(turned, turns), turned)


# --- the trial itself ----------------------------------------------------------------------------------------------


def test_a_wrong_verification_shows(monkeypatch):
    """The target sees every tree, but no other text, one position too late."""
    original = LlamaForCausalLM.forward

    def late(self, *args, **kwargs):
        past = kwargs.get(CACHE)
        if past is not None and past.get_seq_length() > 0 and kwargs["input_ids"].shape[1] > 1:
            kwargs["position_ids"] = kwargs["position_ids"] + 1
        return original(self, *args, **kwargs)

    # `generate` reads the signature
    monkeypatch.setattr(LlamaForCausalLM, "forward", functools.wraps(original)(late))
    result = trial("llama")
    assert result.result is Result.wrong and "another token at" in result.reason


def test_a_crash_is_wrong_and_a_refusal_is_not(monkeypatch):
    def crash(*args, **kwargs):
        raise RuntimeError("it broke")

    monkeypatch.setattr(LongSpecForCausalLM, "assisted_decoding", crash)
    assert trial("llama") == Trial("llama", "LlamaForCausalLM", "full", Result.wrong, "RuntimeError: it broke")


def test_nothing_accepted_is_not_served(monkeypatch):
    monkeypatch.setattr(trials_of, "WIDE_TREE", (1,))
    monkeypatch.setattr(trials_of, "SETTINGS", (trials_of.Setting(3, trials_of.WIDE_TREE, "auto", trials_of.SAMPLED),))
    result = try_family("llama")
    assert result.result is Result.wrong and result.reason.endswith("tokens of tree (1,)")


def test_plain_generate_that_fails_is_not_buildable():
    result = trial("blip")  # asks for a picture
    assert result.result is Result.not_buildable and result.reason.startswith("plain generate: ValueError")


def test_no_text_without_context(monkeypatch):
    monkeypatch.setattr(trials_of, "LEAST_EFFECT", 2.0)
    result = trial("llama")
    assert result.result is Result.not_buildable and result.reason.startswith("nothing is shown")
    assert 0.01 < context_effect(tiny_model("llama")) < 1


def test_tiny_config_keeps_what_is_peculiar():
    config = tiny_config("gemma3_text")
    assert config.layer_types == ["sliding_attention", "full_attention"] * 2
    assert (config.vocab_size, config.sliding_window, config.num_hidden_layers) == (VOCAB, 6, LAYERS)
    config = tiny_config("qwen3_vl")
    assert config.text_config.vocab_size == VOCAB <= config.image_token_id
    config = tiny_config("glm4_moe")
    assert (config.n_routed_experts, config.num_experts_per_tok, config.num_key_value_heads) == (4, 2, 2)


# What the source of a family names and its tiny models need not have.
NOT_OF_ITS_TEXT_MODEL = {
    "deepseek_ocr2": "full_attention sliding_attention",  # of the encoder of pictures
    "muse_glimmer": "window_attention",
    "muse_spark": "window_attention",
    "paddleocr_vl": "sliding_attention",  # its config has no window
    "qwen3_omni_moe_thinker": "full_attention sliding_attention",  # of the talker
    "step3p7": "minimax_m3_sparse",  # of another family's config, which it was copied from
}


def lost(family: str) -> list[str]:
    """Return what released models of a family may have, by its source and its defaults, and no tiny model has."""
    default = CONFIG_MAPPING[family]().get_text_config(decoder=True)
    tiny = [tiny_config(family, name).get_text_config(decoder=True) for name in ("", *RELEASED.get(family, ()))]
    text = "".join(path.read_text("utf-8") for path in Path(inspect.getfile(type(default))).parent.glob("*ing_*.py"))
    text += Path(inspect.getfile(type(default))).read_text("utf-8")
    named = set(re.findall(r"[\"'](\w+)[\"']", text)) & set(ALLOWED_LAYER_TYPES)
    named -= set(NOT_OF_ITS_TEXT_MODEL.get(family, "").split())
    missing = sorted((named | kinds(default)) - set().union(*map(kinds, tiny)))
    fields = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    heads = [name for name in fields if name.endswith("head_dim") and all(vars(config).get(name) for config in tiny)]
    for one, other in itertools.combinations(heads, 2):
        if fields[one] != fields[other] and all(vars(config)[one] == vars(config)[other] for config in tiny):
            missing.append(f"{one} other than {other}")
    for name, value in fields.items():
        if value and not re.search(r"token_(id|index)|^tie_|dtype|^architectures|^base_model", name):
            missing += [name] * (not any(vars(config).get(name) for config in tiny))
    missing += sorted(rope_types(default) - set().union(*map(rope_types, tiny)))
    return missing


def kinds(config: PreTrainedConfig) -> set[str]:
    named = {"DynamicLayer": "full_attention", "DynamicSlidingWindowLayer": "sliding_attention"}
    own = [*(vars(config).get("layer_types") or ()), *(vars(config).get("mlp_layer_types") or ())]
    # transformers makes some layers only once the family's modeling file was read
    layers = (
        [] if "minimax_m3_sparse" in own else [type(layer).__name__ for layer in DynamicCache(config=config).layers]
    )
    return {named.get(layer, layer) for layer in layers} | set(own)


def rope_types(config: PreTrainedConfig) -> set[str]:
    parameters = vars(config).get("rope_parameters") or {}
    each = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    return {str(value[name]) for value in each for name in ("rope_type", "type") if name in value}


def test_tiny_models_lose_nothing_of_their_families():
    assert {family: missing for family in SERVED if (missing := lost(family))} == {}


@pytest.mark.parametrize(
    "family, part, name, without, missing",
    [
        ("lfm2", "OVERRIDES", "lfm2", {}, "conv"),
        ("minimax_m3_vl_text", "OVERRIDES", "minimax_m3_vl_text", {}, "minimax_m3_sparse"),
        ("gpt_oss", "OVERRIDES", "gpt_oss", {"layer_types": ["full_attention"] * LAYERS}, "sliding_attention"),
        ("qwen3_moe", "RELEASED", "qwen3_moe", {}, "full_attention"),
        ("afmoe", "OVERRIDES", "afmoe", {"num_experts": 0}, "num_experts"),
        ("mimo_v2_flash", "OVERRIDES", "mimo_v2_flash", {"v_head_dim": 16}, "head_dim other than v_head_dim"),
        ("gpt_oss", "OVERRIDES", "gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "yarn"),
    ],
)
def test_what_a_tiny_model_loses_shows(family, part, name, without, missing, monkeypatch):
    if family not in KNOWN:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    for module in (tiny_models, inspect.getmodule(lost)):
        if hasattr(module, part):
            monkeypatch.setitem(getattr(module, part), name, without)
    assert missing in lost(family)


def test_every_tiny_model_is_the_same_twice():
    first, second = tiny_model("llama"), tiny_model("llama")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_family_that_cannot_be_built_says_why():
    with pytest.raises(NotBuildable, match="MusicgenConfig|text_encoder"):
        tiny_model("musicgen")


# --- the table and the command -------------------------------------------------------------------------------------


def test_table_is_read_as_it_was_written():
    trials = [
        Trial("llama", "LlamaForCausalLM", "full", Result.served),
        Trial("odd", "Odd", "", Result.wrong, "a | b " + "x" * 300),
        Trial("none", "", "", Result.no_decoder, "why"),
    ]
    page = support_table(trials, "the command")
    assert read_results(page) == {trial.family: trial.result for trial in trials}
    assert "3 families: 1 WRONG, 1 served, 1 no text decoder." in page
    assert "\n    the command\n" in page and "a \\| b xxx" in page and "x" * 200 not in page
    assert page.index("## WRONG (1)") < page.index("## served (1)")


def test_command_writes_the_table(tmp_path):
    result = CliRunner().invoke(cli.app, ["support", "--families", "llama, mamba", "--output", str(tmp_path / "S.md")])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "S.md").read_text(encoding="utf-8")
    assert read_results(page) == {"llama": Result.served, "mamba": Result.refused}
    assert f"hf-longspec support --families llama,mamba --output {tmp_path / 'S.md'}" in page
    assert "llama: served" in result.output


def test_command_prints_the_table_and_fails_if_a_family_is_wrong(monkeypatch):
    monkeypatch.setattr(trials_of, "try_family", lambda family: Trial(family, "M", "full", Result.wrong, "odd"))
    result = CliRunner().invoke(cli.app, ["support", "--families", "llama"])
    assert result.exit_code == 1
    assert "| `llama` | M | full | WRONG | odd |" in result.stdout


def test_a_full_disk_leaves_the_table_as_it_was(monkeypatch, tmp_path):
    monkeypatch.setattr(trials_of, "try_family", lambda family: Trial(family, "M", "full", Result.served))
    (tmp_path / "S.md").write_text("before")
    with full_disk(100):
        result = CliRunner().invoke(cli.app, ["support", "--families", "llama", "--output", str(tmp_path / "S.md")])
    assert result.exit_code == 1 and "S.md cannot be written: File too large" in result.stderr
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--families", "llama,lama"], "transformers has no causal language model of the type lama"),
        (["--families", "llama", "--output", "missing/S.md"], "cannot write missing/S.md: no such folder"),
    ],
)
def test_mistakes(options, message):
    result = CliRunner().invoke(cli.app, ["support", *options])
    assert result.exit_code == 2 and message in result.stderr
