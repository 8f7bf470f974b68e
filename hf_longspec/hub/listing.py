"""The files of a draft's folder or repository: the names of all, and a folder where code and configs can be read.

Of a repository, only code and configs are downloaded. Nothing is imported from them.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..writing import MachineError, first_line


class Listing(NamedTuple):
    """The files of a draft's folder or repository.

    source: the name as given. revision: the commit of a repository. folder: where code and configs can be read. names:
    all files, with the folders that they are in. linked_out: the files that are links out of the folder.
    linked_folders: links to folders, which are not followed.
    """

    source: str
    revision: str | None
    folder: Path
    names: tuple[str, ...]
    linked_out: tuple[str, ...] = ()
    linked_folders: tuple[str, ...] = ()


def is_code(name: str) -> bool:
    return name.lower().endswith(".py")


def is_config(name: str) -> bool:
    """Tell whether transformers may look for classes in the file.

    Examples: config.json, tokenizer_config.json, config.5.0.0.json.
    """
    base = PurePosixPath(name).name.lower()
    return base.endswith(".json") and "config" in base


def list_files(source: str, revision: str | None = None) -> Listing:
    """List the files of a folder, or of a Hub repository at a branch, tag or commit.

    Raises `ValueError` in one line if there is none, `MachineError` if the Hub cannot be reached.
    """
    if not Path(source).is_dir():
        return _of_repository(source, revision)
    if revision is not None:
        raise ValueError(f"{source} is a folder, which has no revision {revision!r}; it takes a repository of the Hub")
    return _of_folder(source)


def _of_folder(source: str) -> Listing:
    folder = Path(source)
    names, linked_out, linked_folders = [], [], []
    for place, folders, files in os.walk(folder):  # does not follow links
        above = Path(place)
        linked_folders += [_name(folder, above / name) for name in folders if (above / name).is_symlink()]
        names += [_name(folder, above / name) for name in files]
        linked_out += [_name(folder, above / name) for name in files if _leads_out(folder, above / name)]
    return Listing(source, None, folder, *(tuple(sorted(found)) for found in (names, linked_out, linked_folders)))


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _leads_out(folder: Path, path: Path) -> bool:
    """Tell whether a file is a link out of its folder; a download's snapshot may use the blobs beside it."""
    if not path.is_symlink():
        return False
    whole, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    inside = [whole, whole.parents[1] / "blobs"] if whole.parent.name == "snapshots" else [whole]
    return not any(target.is_relative_to(place) for place in inside)


def _of_repository(source: str, revision: str | None) -> Listing:
    if Path(source).is_file():
        raise ValueError(f"{source} is a file; expected the folder of a draft")
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"{source}: no such folder")
    try:
        told = HfApi().model_info(source, revision=revision)
        names = tuple(sorted(file.rfilename for file in told.siblings or ()))
        wanted = [glob.escape(name) for name in names if is_code(name) or is_config(name)]
        # the commit whose names were listed, even if the branch has moved since
        folder = snapshot_download(source, revision=told.sha, allow_patterns=wanted) if wanted else ""
    except OfflineModeIsEnabled as error:
        raise ValueError(f"{source}: no such folder, and offline mode is on; unset HF_HUB_OFFLINE") from error
    except GatedRepoError as error:
        raise ValueError(
            f"{source}: access is granted to some accounts only; `hf auth login` if yours is one"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{source}: no such folder, and no repository on the Hub that you may see") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{source}: no such revision {revision!r}") from error
    except (HTTPError, OSError) as error:
        raise MachineError(f"{source} cannot be read from the Hub: {first_line(error)}") from error
    return Listing(source, told.sha, Path(folder), names)
