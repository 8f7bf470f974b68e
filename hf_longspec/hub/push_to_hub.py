"""`draft.push_to_hub`: the upload of a draft in memory to the Hub, for work in progress.

Knows a draft by its `save_pretrained` only. The card written here tells what a draft is and how it is used;
`hf-longspec export` makes a card with measured numbers.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoTokenizer, PreTrainedModel

from .card import TAGS
from .push import commit_folder

_CARD = """---
{{ card_data }}
---

# {{ repo_id.split("/")[-1] }}

A draft for speculative decoding of [{{ target }}](https://huggingface.co/{{ target }}), after
LongSpec ([arXiv 2502.17421](https://arxiv.org/abs/2502.17421)). It writes no text alone; with it, the target writes
the text of plain `generate` in fewer forwards. Not measured yet.

```python
from transformers import AutoModelForCausalLM

target = AutoModelForCausalLM.from_pretrained("{{ target }}", dtype="auto", device_map="auto")
draft = AutoModelForCausalLM.from_pretrained("{{ repo_id }}", trust_remote_code=True, dtype="auto")
output = target.generate(**inputs, assistant_model=draft)
```

Whether the code in here is that of a release: `pip install hf-longspec`, then `hf-longspec verify {{ repo_id }}`.
"""


def push_to_hub(
    self: PreTrainedModel,
    repo_id: str,
    *,
    target: str | None = None,
    commit_message: str = "Upload draft",
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
) -> CommitInfo:
    """Send weights, config and code of this draft, its target's tokenizer (for `pipeline`) and a card, in one commit.

    target: Hub id or folder of the target, for tokenizer and card. A repository that has a card keeps it, so later
    pushes can do without `target`; the first push raises `ValueError` without one. The other arguments are as in
    `PreTrainedModel.push_to_hub`.
    """
    api = HfApi(token=token)
    if target is None and not api.file_exists(repo_id, "README.md"):
        raise ValueError(
            f"the first push to {repo_id} needs the target, whose tokenizer goes along and whom the card names: "
            f'draft.push_to_hub("{repo_id}", target="Hub id of the target")'
        )
    with tempfile.TemporaryDirectory() as folder:
        self.save_pretrained(folder)
        if target is not None:
            AutoTokenizer.from_pretrained(target, token=token).save_pretrained(folder)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        card = _card(repo_id, target, [*TAGS, *(tags or [])], token)
        card.save(Path(folder) / "README.md")
        return commit_folder(
            api,
            folder,
            repo_id,
            message=commit_message,
            description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def _card(repo_id: str, target: str | None, tags: list[str], token: str | None) -> ModelCard:
    """Return the repository's own card with these tags added, or a first card."""
    try:
        card = ModelCard.load(repo_id, token=token)
    except EntryNotFoundError:
        base = None if target is None or Path(target).is_dir() else target
        data = ModelCardData(base_model=base, library_name="transformers", pipeline_tag="text-generation", tags=[])
        card = ModelCard.from_template(data, template_str=_CARD, repo_id=repo_id, target=target)
    known = card.data.tags or []
    card.data.tags = known + [tag for tag in tags if tag not in known]
    return card
