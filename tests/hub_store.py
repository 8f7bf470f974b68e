"""Repositories as the Hub keeps them, in memory: commits, branches, tags, large files by their SHA-256.

Knows no HTTP. A request that a client may not make, or makes in vain, raises `Refused`, which names the Hub's status
and code.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

LARGE = (".safetensors", ".bin")  # LFS keeps these, whatever their size
LARGE_SIZE = 5_000_000


class Refused(Exception):
    """An error as answer: HTTP status, the Hub's error code if it has one, a message."""

    def __init__(self, status: int, code: str | None, message: str):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Blob(NamedTuple):
    data: bytes
    large: bool

    @property
    def oid(self) -> str:
        """Return the Hub's ETag: the SHA-256 of a large file, git's SHA-1 of another."""
        if self.large:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


class Commit(NamedTuple):
    oid: str
    parent: str | None
    message: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """One model repository; `members` are the users who see it if it is private, and get its files if it is gated."""

    owner: str
    private: bool
    gated: bool = False
    members: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.members.add(self.owner)
        attributes = Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", large=False)
        self.commit("main", "initial commit", {".gitattributes": attributes})

    def commit(self, branch: str, message: str, files: dict[str, Blob]) -> Commit:
        """Move `branch` to a new commit that holds exactly `files`."""
        parent = self.branches.get(branch)
        told = repr((parent, message, sorted((path, blob.oid) for path, blob in files.items()), len(self.commits)))
        new = Commit(hashlib.sha1(told.encode()).hexdigest(), parent, message, files)
        self.commits[new.oid] = new
        self.branches[branch] = new.oid
        return new

    def at(self, revision: str) -> Commit:
        """Return the commit named by a branch, a tag or its own name. Raises `Refused` for any other name."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[oid]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Return contents by path, without the file that the Hub itself adds."""
        found = {path: blob.data for path, blob in self.at(revision).files.items()}
        found.pop(".gitattributes")
        return found


@dataclass
class Store:
    """All repositories by id, large files by SHA-256, users by token."""

    users: dict[str, str]
    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)

    def user(self, token: str | None) -> str | None:
        """Return the user with this token, None without a token. Raises `Refused` for an unknown token."""
        if token is not None and token not in self.users:
            raise Refused(401, None, "Invalid credentials in Authorization header")
        return None if token is None else self.users[token]

    def create(self, repo_id: str, user: str | None, private: bool) -> Repo:
        if user is None:
            raise Refused(401, None, "Invalid username or password.")
        if repo_id.split("/")[0] != user:
            raise Refused(403, None, f"You don't have the rights to create a model under the namespace {repo_id}")
        if repo_id in self.repos:
            raise Refused(409, None, "You already created this model repo")
        self.repos[repo_id] = Repo(user, private)
        return self.repos[repo_id]

    def readable(self, repo_id: str, user: str | None, *, files: bool = False) -> Repo:
        """Return a repository that this user may see, and with `files` download. Raises `Refused` for others."""
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and user not in repo.members):
            raise Refused(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if files and repo.gated and user not in repo.members:
            raise Refused(
                401 if user is None else 403, "GatedRepo", f"Access to model {repo_id} is restricted; ask for access"
            )
        return repo

    def writable(self, repo_id: str, user: str | None) -> Repo:
        repo = self.readable(repo_id, user)
        if user is None:
            raise Refused(401, None, "Invalid username or password.")
        if user != repo.owner:
            raise Refused(403, None, "you must use huggingface token with write access to this repository")
        return repo

    def receive(self, oid: str, data: bytes) -> None:
        """Keep a large file, unless it comes under another name than its own SHA-256."""
        if hashlib.sha256(data).hexdigest() == oid:
            self.large[oid] = data

    def verify(self, oid: str, size: int) -> None:
        if len(self.large.get(oid, b"")) != size or oid not in self.large:
            raise Refused(422, None, f"the SHA-256 or the size of the uploaded file is not {oid}, {size} bytes")

    def apply(self, repo: Repo, branch: str, lines: list[dict]) -> Commit:
        """Apply a commit as the client sends it, whole or not at all: a header, then one operation a line."""
        head = repo.at(branch)
        if branch not in repo.branches:
            raise Refused(400, None, f"{branch} is no branch")
        files, message = dict(head.files), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", head.oid) != head.oid:
                    raise Refused(412, None, "The branch has moved since parentCommit")
            elif line["key"] == "file":
                files[value["path"]] = Blob(value["content"], large=False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.large:
                    raise Refused(400, None, f"{value['path']} points to a file that was not uploaded")
                files[value["path"]] = Blob(self.large[value["oid"]], large=True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refused(400, None, f"this server does not know the operation {line['key']}")
        return repo.commit(branch, message, files)


def is_large(path: str, size: int) -> bool:
    return path.endswith(LARGE) or size > LARGE_SIZE
