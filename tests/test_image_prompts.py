"""Prompts with images: the tensors a processor would give, for tiny models of vision-language families."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from helpers import tiny_draft
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, DynamicCache, PreTrainedModel

from hf_longspec.evaluation.tiny_models import _merged, randomized, tiny_fields
from hf_longspec.evaluation.tiny_overrides import OVERRIDES

VOCAB, IMAGE, START, END, VIDEO = 24, 20, 21, 22, 23
LAST_WORD = 19
TREE = (VOCAB, 40)  # every next token: each round accepts at least one guess


class Vision(NamedTuple):
    """How a family takes images: fields of its config, and what each image is in a prompt.

    tokens: image tokens; shape: of one image's pixels; grid: of a family that is told it; marked: the name of the
    token types that mark image tokens; nested: pixels are (B, images, …).
    """

    config: dict[str, Any]
    tokens: int
    shape: tuple[int, ...]
    grid: tuple[int, int, int] | None = None
    marked: str | None = None
    nested: bool = False


QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
GLM_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": 18,
    "video_end_token_id": 19,
}
TEXT = {"text_config": {"vocab_size": VOCAB}}
GRID = {"grid": (1, 4, 6), "tokens": 6, "marked": "mm_token_type_ids"}
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
        marked="token_type_ids",
    ),
    "paligemma": Vision({"image_token_index": IMAGE, "vision_config": {"image_size": 28}}, 4, (3, 28, 28)),
    "internvl": Vision({"image_token_id": IMAGE, "vision_config": {"image_size": (56, 56)}}, 4, (3, 56, 56)),
    "idefics3": Vision({"image_token_id": IMAGE, "vision_config": {"patch_size": 8}}, 4, (3, 32, 32), nested=True),
    "smolvlm": Vision({"image_token_id": IMAGE, "vision_config": {"patch_size": 8}}, 4, (3, 32, 32), nested=True),
}


def tiny_vision_model(family: str, **fields: Any) -> PreTrainedModel:
    kind = CONFIG_MAPPING[family]
    config = _merged(tiny_fields(kind()), OVERRIDES.get(family, {}))
    config = kind(**_merged(_merged(config, TEXT), FAMILIES[family].config | fields))
    model = randomized(lambda: AutoModelForImageTextToText.from_config(config, dtype=torch.float32), seed=0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def image_prompts(family: str, *texts: tuple[int, ...], seed: int = 0) -> dict[str, torch.Tensor]:
    """Prompts of one image a number: so many words before the first image, then behind each; padded to the left."""
    vision = FAMILIES[family]
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
    pixels = torch.randn(images, *vision.shape, generator=generator)
    if vision.grid is not None:
        inputs |= {"pixel_values": pixels.flatten(0, 1), "image_grid_thw": torch.tensor([vision.grid] * images)}
    else:
        inputs["pixel_values"] = pixels.unflatten(0, (len(rows), -1)) if vision.nested else pixels
    if vision.marked:
        inputs[vision.marked] = (ids == IMAGE).long()
    return inputs


def write(target: PreTrainedModel, inputs: dict, draft: Any = None, **options: Any) -> Any:
    torch.manual_seed(5)
    options = {"max_new_tokens": 16, "suppress_tokens": [0, IMAGE, START, END, VIDEO]} | options
    assistant = {} if draft is None else {"assistant_model": draft}
    out = target.generate(**inputs, **options, **assistant, return_dict_in_generate=True, output_logits=True)
    return out, torch.rand(1)


def assert_same(target: PreTrainedModel, draft: Any, inputs: dict, **options: Any) -> Any:
    plain, after = write(target, inputs, **options)
    ours, then = write(target, inputs, draft, **options)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    assert then == after
    for pair in zip(ours.logits, plain.logits, strict=True):  # a position that is wrong shows here first
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)
    assert max(length for row in ours.accept_lengths for length in row) > 1
    return ours


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def target(family):
    return tiny_vision_model(family)


@pytest.fixture
def draft(target):
    return tiny_draft(target, window=8, tree_shape=TREE)


SAMPLERS = [{"do_sample": False}, {"do_sample": True, "top_k": 0}]


@pytest.mark.parametrize("options", SAMPLERS, ids=["greedy", "sampled"])
def test_one_prompt(target, draft, family, options):
    first = assert_same(target, draft, image_prompts(family, (3, 5)), **options)
    other = assert_same(target, draft, image_prompts(family, (3, 5)) | pixels_of(family, 1), **options)
    assert not torch.allclose(first.logits[0], other.logits[0], atol=0.01)  # the image is seen
    assert_same(target, draft, image_prompts(family, (0, 1, 12), seed=2), **options)


def pixels_of(family, seed, *texts):
    return {"pixel_values": image_prompts(family, *(texts or ((3, 5),)), seed=seed)["pixel_values"]}


@pytest.mark.parametrize("options", SAMPLERS, ids=["greedy", "sampled"])
def test_a_batch(target, draft, family, options):
    assert_same(target, draft, image_prompts(family, (3, 5), (1, 2)), **options)
    assert_same(target, draft, image_prompts(family, (0, 9, 1), (4, 2, 3), seed=1), **options)
