"""The model card of a draft, built from its config, `card.json` and the reports of `hf-longspec evaluate`.

Every number of a card comes from these sources; none is typed by hand. The text is the template `card.md.jinja` beside
this file. Knows no model and no network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation import page
from ..evaluation.summary import ALL, FORMAT, VERSION
from .bare import without_folders

TAGS = ("longspec", "speculative-decoding", "draft-model", "long-context")
# The values of `base_model_relation` on the Hub. None of them fits a draft: a draft's weights do not come from the
# target's weights, and a draft writes no text of its own. So the card leaves the field out and names the relation in
# words.
RELATIONS = ("adapter", "finetune", "merge", "quantized")
SECTIONS = ("Use", "Targets", "How fast", "Training", "Limits", "Citation")


@dataclass(frozen=True)
class Source:
    """The place where a converted draft was published."""

    repo_id: str
    format: str
    note: str


@dataclass(frozen=True)
class About:
    """The facts of a draft that `card.json` holds and an evaluation cannot know.

    base_model: Hub id of the target. base_model_revision: the target's commit that the draft was trained for.
    vocabulary_sha256: the hash of the target's vocabulary (see `vocabulary.py`), None where nobody could read it yet.
    license: the Hub's identifier; "other" needs license_name and license_link. datasets: Hub ids. training: a few
    sentences.
    """

    title: str
    base_model: str
    base_model_revision: str | None
    vocabulary_sha256: str | None
    license: str
    language: list[str]
    tags: list[str]
    datasets: list[str]
    source: Source | None
    training: str
    limits: list[str]
    license_name: str | None = None
    license_link: str | None = None

    @classmethod
    def load(cls, path: Path) -> About:
        """Read `card.json`.

        Raises `ValueError` with one line that names unknown and missing keys, or wrong types.
        """
        data = _object(path, path.read_text(encoding="utf-8"))
        _check_keys(data, cls, str(path))
        if data["source"] is not None:
            if not isinstance(data["source"], dict):
                raise ValueError(f"{path}: expected `source` to be null or an object, got {data['source']!r}")
            _check_keys(data["source"], Source, f"{path}, source")
            data["source"] = Source(**data["source"])
        for name in ("language", "tags", "datasets", "limits"):
            if not isinstance(data[name], list) or not all(isinstance(item, str) for item in data[name]):
                raise ValueError(f"{path}: expected `{name}` to be a list of strings, got {data[name]!r}")
        for name in ("title", "base_model", "license", "training"):
            if not isinstance(data[name], str) or not data[name].strip():
                raise ValueError(f"{path}: expected `{name}` to be a text, got {data[name]!r}")
        if data["license"] == "other" and not (data.get("license_name") and data.get("license_link")):
            raise ValueError(f"{path}: the license 'other' needs `license_name` and `license_link`")
        return cls(**data)


def _object(path: Path, text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def _check_keys(data: Mapping[str, Any], kind: type, place: str) -> None:
    known = {field.name: field.default is MISSING for field in fields(kind)}
    unknown = sorted(set(data) - set(known))
    missing = [name for name, needed in known.items() if needed and name not in data]
    if unknown or missing:
        told = [f"{what} {', '.join(names)}" for what, names in (("unknown", unknown), ("missing", missing)) if names]
        raise ValueError(f"{place}: {'; '.join(told)}; expected {', '.join(known)}")


def draft_card(
    config: Any,
    about: About,
    results: Sequence[Mapping[str, Any]],
    *,
    recipe: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
) -> ModelCard:
    """Return the model card of a draft with this `LongSpecConfig`.

    results: reports of `hf-longspec evaluate` (`report.json`). recipe: how the draft was trained, shown as it is.
    repo_id: where the draft will lie, for the lines of use. Raises `ValueError` for reports of another format, and for
    reports that were made with another vocabulary.
    """
    for report in results:
        if (report.get("format"), report.get("version")) != (FORMAT, VERSION):
            raise ValueError(
                f"expected reports of the format {FORMAT!r}, version {VERSION}, "
                f"got {report.get('format')!r}, version {report.get('version')!r}"
            )
    vocabulary = _vocabulary(about, results)
    results = [without_folders(report) for report in results]
    data = ModelCardData(
        base_model=about.base_model,
        datasets=about.datasets or None,
        eval_results=[result for report in results for result in _eval_results(report)] or None,
        language=about.language or None,
        library_name="transformers",
        license=about.license,
        license_name=about.license_name,
        license_link=about.license_link,
        model_name=about.title if results else None,
        pipeline_tag="text-generation",
        tags=[*TAGS, *about.tags],
    )
    return ModelCard.from_template(
        data,
        template_str=files(__package__).joinpath("card.md.jinja").read_text(encoding="utf-8"),
        config=config,
        trees=[" · ".join(map(str, config.tree_on(torch.device(name)))) for name in ("cuda", "cpu")],
        about=asdict(about),
        vocabulary=vocabulary,
        results=[
            {
                "setting": page.setting_sentence(report),
                "table": page.speed_table(report),
                "made_by": page.made_by(report),
                "draft": report["draft"],
            }
            for report in results
        ],
        explanation=page.explanation(results),
        recipe=None if recipe is None else yaml.safe_dump(dict(recipe), sort_keys=False, width=100).strip(),
        place=repo_id or "path/of/this/repository",
        relations=" · ".join(RELATIONS),
    )


def _vocabulary(about: About, results: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the one vocabulary hash that `card.json` and all reports agree on, None if none of them has one."""
    told = {about.vocabulary_sha256, *(report["target"]["vocabulary_sha256"] for report in results)} - {None}
    if len(told) > 1:
        raise ValueError(f"expected reports and card.json to tell one vocabulary, got {', '.join(sorted(told))}")
    return told.pop() if told else None


def _eval_results(report: Mapping[str, Any]) -> list[EvalResult]:
    """Return τ and the speed-up of each task and context, for the Hub's `model-index`."""
    found = []
    for bucket in report["buckets"]:
        if bucket["task"] == ALL:
            continue
        where = {
            "task_type": "text-generation",
            "dataset_type": bucket["task"],
            "dataset_name": f"{bucket['task']}, context {bucket['context']:,}",
            "dataset_config": f"context-{bucket['context']}, {report['provenance']['device']}",
        }
        accepted = round(bucket["accept_length"], 3)
        found.append(EvalResult(**where, metric_type="accept_length", metric_value=accepted, metric_name="τ"))
        if bucket["speed_up"] is not None:
            faster = round(bucket["speed_up"], 3)
            found.append(EvalResult(**where, metric_type="speed_up", metric_value=faster, metric_name="speed-up"))
    return found


def card_faults(card: ModelCard) -> list[str]:
    """Return what a draft's card lacks, a line each; the list is empty if the card is complete."""
    data = card.data.to_dict()
    faults = []
    expected = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    for name, value in expected.items():
        if data.get(name) != value:
            faults.append(f"metadata: expected {name}: {value}, got {data.get(name)!r}")
    for name in ("base_model", "license", "language"):
        if not data.get(name):
            faults.append(f"metadata: {name} is missing")
    if missing := [tag for tag in TAGS if tag not in (data.get("tags") or [])]:
        faults.append(f"metadata: tags lack {', '.join(missing)}")
    if data.get("base_model_relation", RELATIONS[0]) not in RELATIONS:
        faults.append(f"metadata: base_model_relation is one of {', '.join(RELATIONS)}")
    if data.get("license") == "other" and not (data.get("license_name") and data.get("license_link")):
        faults.append("metadata: the license 'other' needs license_name and license_link")
    if not data.get("model-index"):
        faults.append("metadata: no evaluation results; hand over the report.json of `hf-longspec evaluate`")
    return faults + _text_faults(card.text)


def _text_faults(text: str) -> list[str]:
    sections = _sections(text)
    faults = [f"section {name!r} is missing or empty" for name in SECTIONS if not sections.get(name)]
    if "from_pretrained(" not in sections.get("Use", ""):
        faults.append("section 'Use' has no lines of use")
    if "not known" in sections.get("Targets", ""):
        faults.append("section 'Targets': the hash of the target's vocabulary is not known")
    if "{{" in text or "{%" in text:
        faults.append("the text holds marks of its template")
    return faults


def _sections(text: str) -> dict[str, str]:
    """Return the text below each heading of level two."""
    parts = ("\n" + text).split("\n## ")[1:]
    return {title.strip(): body.strip() for title, _, body in (part.partition("\n") for part in parts)}
