"""The upload of a folder to the Hub in one commit, and the errors of Hub and network in one line.

Retrying is always right: the commit comes last, and large files that have arrived are not sent again.
"""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..writing import first_line


class HubError(Exception):
    """The error for a Hub that cannot be used as asked; the message is one line for the user."""


def push(
    folder: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool = False,
    message: str = "Upload LongSpec draft",
    api: HfApi | None = None,
) -> CommitInfo:
    """Upload all files of `folder`, unchecked (see `hub_faults`), to `repo_id`, created if there is none.

    revision: a branch, created if there is none. private: whether a new repository is private. Raises `HubError`,
    after which the repository holds what it held before.
    """
    api = api or HfApi()
    if not (api.token or get_token()):
        raise HubError("no token for the Hub; log in with `hf auth login`, or set HF_TOKEN")
    try:
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise HubError(f"{repo_id} is there already and public; `private` is for new repositories")
        return commit_folder(api, folder, repo_id, message=message, revision=revision)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise HubError(told(error, repo_id, api.endpoint)) from error


def commit_folder(
    api: HfApi,
    folder: str | Path,
    repo_id: str,
    *,
    message: str,
    description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Put all files of `folder` into a repository that exists, by one commit: it gets all of them, or none.

    The branch `revision` is created if there is none. `upload_folder` might split a folder into several commits.
    Raises `ValueError` for a repository of another model, whose config and weights the draft's would replace.
    """
    check_is_for_drafts(api, repo_id)
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return api.create_commit(
        repo_id,
        [CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in files],
        commit_message=message,
        commit_description=description,
        revision=revision,
        create_pr=create_pr,
    )


def check_is_for_drafts(api: HfApi, repo_id: str) -> None:
    """Raise `ValueError` if the main branch of a repository holds a model that is no draft."""
    if not api.file_exists(repo_id, "config.json"):
        return
    kind = json.loads(Path(api.hf_hub_download(repo_id, "config.json")).read_text(encoding="utf-8")).get("model_type")
    if kind not in (None, "longspec"):
        raise ValueError(f"{repo_id} holds a model of type {kind!r}; a draft needs a repository of its own")


def told(error: BaseException, repo_id: str, endpoint: str) -> str:
    """Return one line that says what went wrong.

    Raises `error` again if it is no error of the Hub, the network or the disk.
    """
    if isinstance(error, RuntimeError):
        if not isinstance(error.__cause__, (HTTPError, OSError)):
            raise error
        return f"{first_line(error)} {told(error.__cause__, repo_id, endpoint)}"
    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on; unset HF_HUB_OFFLINE to push"
    if isinstance(error, HfHubHTTPError):
        return _refused(error, repo_id, endpoint)
    if isinstance(error, (HTTPError, ConnectionError)):
        return f"the Hub at {endpoint} cannot be reached ({first_line(error)}); run the same command again"
    return first_line(error)


def _refused(error: HfHubHTTPError, repo_id: str, endpoint: str) -> str:
    status, said = error.response.status_code, error.server_message or ""
    if isinstance(error, GatedRepoError):
        return f"access to {repo_id} is restricted; ask for it at {endpoint}/{repo_id}"
    if status == 401:
        return f"the Hub does not accept the token; log in with `hf auth login`, or set HF_TOKEN ({said})"
    if status == 403:
        return f"this token may not write to {repo_id} ({said})"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such revision ({said})"
    if isinstance(error, RepositoryNotFoundError):
        return f"the Hub has no repository {repo_id} that this token may see"
    return f"the Hub answered {status} ({said or first_line(error)}); run the same command again"
