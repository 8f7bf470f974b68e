"""Prompts with images: the tensors a processor would give, for tiny models of vision-language families."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from helpers import CACHE, quick_or_slow, tiny_draft
from observation import Seen, differences, observe
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, DynamicCache, PreTrainedModel

from hf_longspec.evaluation.tiny_models import _merged, randomized, tiny_fields
from hf_longspec.evaluation.tiny_overrides import OVERRIDES

VOCAB, IMAGE, START, END, VIDEO = 24, 20, 21, 22, 23
SPECIAL = [0, IMAGE, START, END, VIDEO]
LAST_WORD = 19
TREE = (VOCAB, 40)  # every next token: each round accepts at least one guess


class Vision(NamedTuple):
    """How a family takes images: fields of its config, and what each image is in a prompt.

    tokens: image tokens; shape: of one image's pixels; grid: of a family that is told it; marked: the names of the
    token types that mark image tokens; nested: pixels are (B, images, …); beside: more to say of each image.
    """

    config: dict[str, Any]
    tokens: int
    shape: tuple[int, ...]
    grid: tuple[int, int, int] | None = None
    marked: tuple[str, ...] = ()
    nested: bool = False
    beside: dict[str, Any] = {}


MEDIA_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
QWEN_IDS = MEDIA_IDS | {"vision_start_token_id": START, "vision_end_token_id": END}
GLM_IDS = {
    **MEDIA_IDS,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": 18,
    "video_end_token_id": 19,
}
TEXT = {"text_config": {"vocab_size": VOCAB}}
GRID = {"grid": (1, 4, 6), "tokens": 6, "marked": ("mm_token_type_ids",)}
FAMILIES = {
    "llava": Vision({"image_token_index": IMAGE, "vision_config": {"image_size": 28}}, 4, (3, 28, 28)),
    "qwen2_vl": Vision(QWEN_IDS, shape=(24, 3 * 2 * 14 * 14), **GRID),
    "qwen2_5_vl": Vision(QWEN_IDS | {"vision_config": {"out_hidden_size": 32}}, shape=(24, 3 * 2 * 14 * 14), **GRID),
    "qwen3_vl": Vision(
        QWEN_IDS | {"vision_config": {"num_position_embeddings": 16}}, shape=(24, 3 * 2 * 16 * 16), **GRID
    ),
    "glm4v": Vision(GLM_IDS | {"vision_config": {"out_hidden_size": 64}}, shape=(24, 3 * 2 * 14 * 14), **GRID),
    "gemma3": Vision(
        {"image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END, "mm_tokens_per_image": 4},
        4,
        (3, 32, 32),
        marked=("token_type_ids",),
    ),
    "paligemma": Vision({"image_token_index": IMAGE, "vision_config": {"image_size": 28}}, 4, (3, 28, 28)),
    "internvl": Vision({"image_token_id": IMAGE, "vision_config": {"image_size": (56, 56)}}, 4, (3, 56, 56)),
    "idefics3": Vision({"image_token_id": IMAGE, "vision_config": {"patch_size": 8}}, 4, (3, 32, 32), nested=True),
    "smolvlm": Vision({"image_token_id": IMAGE, "vision_config": {"patch_size": 8}}, 4, (3, 32, 32), nested=True),
}
# In which other turns, embeddings or copies of a prompt fail in some version of transformers.
MORE = {
    "gemma4": Vision(
        {
            "image_token_id": IMAGE,
            "boi_token_id": START,
            "eoi_token_id": END,
            "video_token_id": VIDEO,
            "text_config": {"vocab_size_per_layer_input": VOCAB},
            "vision_config": {"patch_size": 4, "pooling_kernel_size": 2},
        },
        4,
        (16, 3 * 4 * 4),
        marked=("mm_token_type_ids",),
        beside={"image_position_ids": [[x, y] for x in range(4) for y in range(4)]},
    ),
    "ernie4_5_vl_moe": Vision(
        GLM_IDS, 6, (24, 3 * 14 * 14), (1, 4, 6), marked=("mm_token_type_ids", "moe_mm_token_type_ids")
    ),
    # gets no positions from `generate`
    "exaone4_5": Vision(QWEN_IDS | {"vision_config": {"out_hidden_size": 32}}, 6, (24, 3 * 2 * 14 * 14), (1, 4, 6)),
}


def tiny_vision_model(family: str, **fields: Any) -> PreTrainedModel:
    kind = CONFIG_MAPPING[family]
    config = _merged(tiny_fields(kind()), OVERRIDES.get(family, {}))
    config = kind(**_merged(_merged(config, TEXT), (FAMILIES | MORE)[family].config | fields))
    model = randomized(lambda: AutoModelForImageTextToText.from_config(config, dtype=torch.float32), seed=0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def image_prompts(family: str, *texts: tuple[int, ...], seed: int = 0) -> dict[str, torch.Tensor]:
    """Prompts of one image a number: so many words before the first image, then behind each; padded to the left."""
    vision = (FAMILIES | MORE)[family]
    generator = torch.Generator().manual_seed(seed)
    rows, images = [], 0
    for words in texts:
        ids: list[int] = []
        for index, count in enumerate(words):
            if index > 0:
                ids += [START, *[IMAGE] * vision.tokens, END]
                images += 1
            ids += torch.randint(2, LAST_WORD - 1, (count,), generator=generator).tolist()
        rows.append(ids)
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    inputs |= {name: (ids == IMAGE).long() for name in vision.marked}
    if not images:
        return inputs
    inputs |= {name: torch.tensor([value] * images) for name, value in vision.beside.items()}
    pixels = torch.randn(images, *vision.shape, generator=generator)
    if vision.grid is not None:
        inputs |= {"pixel_values": pixels.flatten(0, 1), "image_grid_thw": torch.tensor([vision.grid] * images)}
    else:
        inputs["pixel_values"] = pixels.unflatten(0, (len(rows), -1)) if vision.nested else pixels
    return inputs


def next_turn(inputs: dict, sequences: torch.Tensor, new: dict) -> dict:
    """The prompt `new` behind a conversation, all of whose ids are passed, but no image that the cache knows."""
    grown = sequences.shape[1] - inputs["input_ids"].shape[1]
    per_token = {"attention_mask": 1, "mm_token_type_ids": 0, "moe_mm_token_type_ids": 0, "token_type_ids": 0}
    joined = {name: value for name, value in new.items() if name not in per_token}
    joined["input_ids"] = torch.cat([sequences, new["input_ids"]], dim=1)
    for name, written in per_token.items():
        if name in inputs:
            answer = torch.full((len(sequences), grown), written)
            joined[name] = torch.cat([inputs[name], answer, new[name]], dim=1)
    return joined


def assert_same(target: PreTrainedModel, draft: Any, *turns: dict, **options: Any) -> Seen:
    """Texts, logits, caches and random numbers are those of plain `generate`, turn after turn with one cache."""
    options = {"max_new_tokens": 8, "suppress_tokens": SPECIAL, "do_sample": True, "top_k": 0} | options
    options |= {"return_dict_in_generate": True, "output_logits": True}

    def play(generate: Any, case: SimpleNamespace) -> None:
        cache, inputs, sequences = DynamicCache(config=target.config.get_text_config()), {}, None
        for turn in turns:
            inputs = turn if sequences is None else next_turn(inputs, sequences, turn)
            sequences = generate(**inputs, **{CACHE: cache}, **options).sequences

    plain = observe(target, play, SimpleNamespace(log=[]))
    if plain.error is not None:
        raise plain.error
    ours = observe(target, play, SimpleNamespace(log=[]), assistant_model=draft)
    assert differences(plain, ours) == []
    assert max(length for row in ours.accept_lengths for length in row) > 1
    return ours


# One that makes its embeddings alone, one that has positions on three axes, one whose image tokens see each other, one
# whose pixels are nested; one that gets no positions from `generate`.
QUICK = {"llava", "qwen2_5_vl", "gemma3", "idefics3", "exaone4_5"}


@pytest.fixture(params=quick_or_slow(FAMILIES, QUICK))
def family(request):
    return request.param


@pytest.fixture
def target(family):
    return tiny_vision_model(family)


@pytest.fixture
def draft(target):
    return tiny_draft(target, window=8, tree_shape=TREE)


def test_images_are_seen(target, draft, family):
    inputs = image_prompts(family, (3, 5))
    other = inputs | {"pixel_values": image_prompts(family, (3, 5), seed=1)["pixel_values"]}
    first, second = (assert_same(target, draft, each).calls[0]["output"]["logits"][0] for each in (inputs, other))
    assert not torch.allclose(first, second, atol=0.01)


@pytest.mark.parametrize("family", quick_or_slow([*FAMILIES, *MORE], QUICK))
@pytest.mark.parametrize("do_sample", quick_or_slow([False, True], [True]), ids=["greedy", "sampled"])
def test_prompts(target, draft, family, do_sample):
    assert_same(target, draft, image_prompts(family, (3, 5)), do_sample=do_sample)
    assert_same(target, draft, image_prompts(family, (0, 1, 12), seed=1), do_sample=do_sample)
    assert_same(target, draft, image_prompts(family, (3, 5), (1, 2)), do_sample=do_sample)
    assert_same(target, draft, image_prompts(family, (0, 9, 1), (4, 2, 3), seed=2), do_sample=do_sample)


# families with several axes of positions; the first in the quick run
AXES = ["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "glm4v", "ernie4_5_vl_moe"]


@pytest.mark.parametrize("family", quick_or_slow([name for name in AXES if name in (*FAMILIES, *MORE)], AXES[:1]))
def test_axes_that_differ_at_the_end_of_a_prompt_differ_for_ever(target, draft, family):
    """The prompt ends on an image's last token, or its user gave positions: each axis goes on from its own."""
    whole = image_prompts(family, (3, 0))
    by_token = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"}
    cut = {name: value[:, :-1] if name in by_token else value for name, value in whole.items()}
    assert cut["input_ids"][0, -1] == IMAGE
    assert_same(target, draft, cut)
    ids = cut["input_ids"].masked_fill(cut["input_ids"] > LAST_WORD, 3)
    steps = torch.arange(ids.shape[1])
    own = torch.stack([steps, 2 * steps, 3 * steps])[:, None]
    assert_same(target, draft, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": own})


def test_many_texts_of_one_prompt(target, draft, family):
    assert_same(target, draft, image_prompts(family, (3, 5)), num_return_sequences=3)


def test_next_turns(target, draft, family):
    for rows in (1, 2):
        first = image_prompts(family, *[(3, 5), (1, 2)][:rows])
        text = image_prompts(family, *[(4,)] * rows, seed=1)
        assert_same(target, draft, first, text, text)


# transformers counts the images of the whole text where they have grids, but is given the grids of the new ones
@pytest.mark.parametrize(
    "family", quick_or_slow([name for name, vision in FAMILIES.items() if vision.grid is None], QUICK)
)
def test_next_turn_with_an_image(target, draft, family):
    for rows in (1, 2):
        first = image_prompts(family, *[(3, 5), (1, 2)][:rows])
        assert_same(target, draft, first, image_prompts(family, *[(2, 4)] * rows, seed=1))


def test_only_the_first_forward_gets_the_images(target, draft, family):
    told = []
    hook = target.register_forward_pre_hook(
        lambda module, args, kwargs: told.append({name for name, value in kwargs.items() if value is not None}),
        with_kwargs=True,
    )
    inputs = image_prompts(family, (3, 5))
    target.generate(**inputs, max_new_tokens=8)
    plain = told.copy()
    target.generate(**inputs, assistant_model=draft, max_new_tokens=8)  # probes a target with this hook
    told.clear()
    target.generate(**inputs, assistant_model=draft, max_new_tokens=8)
    hook.remove()
    assert told[0] == plain[0] and told[0] & {"pixel_values", "mm_encoder_outputs"}
    assert len(told) > 2 and all(names <= plain[1] for names in told[1:])


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_image_tokens_that_are_no_words(family):
    """Their number is beyond the vocabulary, so that there is no embedding of them."""
    target = tiny_vision_model(family, image_token_index=VOCAB + 1)
    inputs = image_prompts(family, (3, 5), (1, 2))
    inputs["input_ids"][inputs["input_ids"] == IMAGE] = VOCAB + 1
    assert_same(target, tiny_draft(target, window=8, tree_shape=TREE), inputs)


def test_embeddings(target, draft, family):
    """As a user gives them who put the images into the text himself."""
    inputs = image_prompts(family, (3, 5), (1, 2))
    words = target.get_input_embeddings()
    embeds = words(inputs["input_ids"]).detach()
    embeds[inputs["input_ids"] == IMAGE] = torch.randn(int((inputs["input_ids"] == IMAGE).sum()), embeds.shape[-1])
    mask = inputs["attention_mask"]
    if family in ("gemma3", "paligemma"):
        with pytest.raises(ValueError, match="doesn't have its forwarding implemented"):
            assert_same(target, draft, {"inputs_embeds": embeds, "attention_mask": mask})
        return
    assert_same(target, draft, {"inputs_embeds": embeds, "attention_mask": mask})
    assert_same(target, draft, inputs | {"inputs_embeds": words(inputs["input_ids"]).detach()})
