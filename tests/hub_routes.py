"""The answers of the test Hub: a function for each route, over the repositories of hub_store.py."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote

from hub_store import Blob, Refused, Store, is_large


class Hub(Protocol):
    """What an answer depends on."""

    url: str
    store: Store


class Reply(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]


class Request(NamedTuple):
    method: str
    path: str
    body: bytes
    headers: Any
    user: str | None

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


def answer(value: Any, status: int = 200) -> Reply:
    return Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


def whoami(hub: Hub, request: Request) -> Reply:
    if request.user is None:
        raise Refused(401, None, "Invalid username or password.")
    return answer({"type": "user", "name": request.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})


def create(hub: Hub, request: Request) -> Reply:
    asked = request.json()
    repo_id = f"{asked.get('organization') or request.user}/{asked['name']}"
    private = asked.get("private") or asked.get("visibility") == "private"
    try:
        hub.store.create(repo_id, request.user, bool(private))
    except Refused as refused:
        if refused.status != 409:
            raise
        return answer({"error": refused.message, "url": f"{hub.url}/{repo_id}"}, 409)
    return answer({"url": f"{hub.url}/{repo_id}", "name": repo_id})


def validate(hub: Hub, request: Request) -> Reply:
    return answer({"errors": [], "warnings": []})


def info(hub: Hub, request: Request, repo: str, revision: str = "") -> Reply:
    found = hub.store.readable(repo, request.user)
    commit = found.at(revision or "main")
    return answer(
        {
            "_id": "0",
            "id": repo,
            "modelId": repo,
            "sha": commit.oid,
            "private": found.private,
            "gated": "manual" if found.gated else False,
            "tags": [],
            "siblings": [{"rfilename": path} for path in commit.files],
        }
    )


def tree(hub: Hub, request: Request, repo: str, revision: str, folder: str) -> Reply:
    files = hub.store.readable(repo, request.user).at(revision).files
    below = {path: blob for path, blob in files.items() if not folder or path.startswith(folder + "/")}
    if not below:
        raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision}")
    return answer([_entry(path, blob) for path, blob in below.items()])


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    large = {"lfs": {"oid": blob.oid, "size": len(blob.data), "pointerSize": 130}} if blob.large else {}
    return {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid[:40]} | large


def refs(hub: Hub, request: Request, repo: str) -> Reply:
    found = hub.store.readable(repo, request.user)

    def named(kind: str, table: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in table.items()]

    return answer({"branches": named("heads", found.branches), "converts": [], "tags": named("tags", found.tags)})


def branch(hub: Hub, request: Request, repo: str, name: str) -> Reply:
    found = hub.store.writable(repo, request.user)
    if name in found.branches:
        raise Refused(409, None, f"Reference already exists: refs/heads/{name}")
    found.branches[name] = found.at(request.json().get("startingPoint", "main")).oid
    return answer({})


def tag(hub: Hub, request: Request, repo: str, revision: str) -> Reply:
    found = hub.store.writable(repo, request.user)
    found.tags[request.json()["tag"]] = found.at(revision).oid
    return answer({})


def preupload(hub: Hub, request: Request, repo: str, revision: str) -> Reply:
    files = hub.store.writable(repo, request.user).at(revision).files

    def told(file: dict[str, Any]) -> dict[str, Any]:
        path = file["path"]
        mode = "lfs" if is_large(path, file["size"]) else "regular"
        there = {"oid": files[path].oid} if path in files else {}
        return {"path": path, "uploadMode": mode, "shouldIgnore": False} | there

    return answer({"files": [told(file) for file in request.json()["files"]]})


def commit(hub: Hub, request: Request, repo: str, revision: str) -> Reply:
    found = hub.store.writable(repo, request.user)
    lines = [json.loads(line) for line in request.body.splitlines()]
    for line in lines:
        if line["key"] == "file":
            line["value"]["content"] = base64.b64decode(line["value"]["content"])
    new = hub.store.apply(found, revision, lines)
    return answer({"success": True, "commitOid": new.oid, "commitUrl": f"{hub.url}/{repo}/commit/{new.oid}"})


def batch(hub: Hub, request: Request, repo: str) -> Reply:
    hub.store.writable(repo, request.user)

    def told(file: dict[str, Any]) -> dict[str, Any]:
        oid, size = file["oid"], file["size"]
        if oid in hub.store.large:
            return {"oid": oid, "size": size}
        place = {"upload": {"href": f"{hub.url}/large/{oid}"}, "verify": {"href": f"{hub.url}/verify/{oid}"}}
        return {"oid": oid, "size": size, "actions": place}

    return answer({"transfer": "basic", "objects": [told(file) for file in request.json()["objects"]]})


def receive(hub: Hub, request: Request, oid: str) -> Reply:
    hub.store.receive(oid, request.body)
    return answer({})


def verify(hub: Hub, request: Request, oid: str) -> Reply:
    hub.store.verify(oid, request.json()["size"])
    return answer({})


def resolve(hub: Hub, request: Request, repo: str, revision: str, path: str) -> Reply:
    found = hub.store.readable(repo, request.user, files=True)
    at = found.at(revision)
    if path not in at.files:
        reply = answer({"error": "Entry not found"}, 404)
        return reply._replace(headers=reply.headers | {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": at.oid})
    blob = at.files[path]
    headers = {"X-Repo-Commit": at.oid, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
    if not blob.large:
        return ranged(blob.data, request, headers)
    large = {"X-Linked-ETag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.data))}
    return Reply(
        302, b"", headers | large | {"Location": f"{hub.url.replace('127.0.0.1', 'localhost')}/cdn/{blob.oid}"}
    )


def download(hub: Hub, request: Request, oid: str) -> Reply:
    return ranged(hub.store.large[oid], request, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


def ranged(data: bytes, request: Request, headers: dict[str, str]) -> Reply:
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
    if wanted is None:
        return Reply(200, data, headers)
    first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
    return Reply(206, data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})


MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., Reply]]] = [
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/repos/create", create),
    ("POST", "/api/validate-yaml", validate),
    ("GET", MODEL, info),
    ("GET", MODEL + "/revision/(?P<revision>[^/]+)", info),
    ("GET", MODEL + "/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", tree),
    ("GET", MODEL + "/refs", refs),
    ("POST", MODEL + "/branch/(?P<name>[^/]+)", branch),
    ("POST", MODEL + "/tag/(?P<revision>[^/]+)", tag),
    ("POST", MODEL + "/preupload/(?P<revision>[^/]+)", preupload),
    ("POST", MODEL + "/commit/(?P<revision>[^/]+)", commit),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", batch),
    ("PUT", "/large/(?P<oid>[0-9a-f]{64})", receive),
    ("POST", "/verify/(?P<oid>[0-9a-f]{64})", verify),
    ("GET", "(/datasets)?/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
    ("GET", "/cdn/(?P<oid>[0-9a-f]{64})", download),
]


def route(hub: Hub, request: Request) -> Reply:
    for method, pattern, handler in ROUTES:
        found = re.fullmatch(pattern, request.path)
        if found and (request.method == method or (request.method, method) == ("HEAD", "GET")):
            return handler(hub, request, **{name: unquote(value or "") for name, value in found.groupdict().items()})
    raise Refused(404, None, f"this server does not know {request.method} {request.path}")
