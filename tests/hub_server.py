"""A Hub on the loopback device, for the real huggingface_hub client: enough of its protocol to push, load and fail.

    with HubServer(users={"hf_me": "me"}) as hub:
        hub.fault("POST", "/commit/", Status(500, "try later"))   # the next such request fails, the one after does not

Another process asks for a fault by `POST /faults` with `["GET", "/cdn/", "Status", 500, "try later"]`.
The repositories are in hub_store.py, the answers in hub_routes.py. Large files go by git-LFS: clients must be told
`HF_HUB_DISABLE_XET=1`, since they do not ask the server whether it speaks Xet.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from hub_routes import Reply, Request, route
from hub_store import Refused, Store


class Status(NamedTuple):
    """Answer with this error instead, and do nothing."""

    status: int
    message: str
    code: str | None = None


class Drop(NamedTuple):
    """End the connection before an answer, and do nothing."""


class Lose(NamedTuple):
    """Do what the request asks for, and end the connection before the answer."""


class Cut(NamedTuple):
    """End the connection after half of the answer's body."""


class Shorten(NamedTuple):
    """Answer with half of the file as a body that is whole by its own length."""


class Damage(NamedTuple):
    """Change one byte: of the request's body, or, where it has none, of the answer's body."""

    position: int = 0


Fault = Status | Drop | Lose | Cut | Shorten | Damage
FAULTS = {kind.__name__: kind for kind in (Status, Drop, Lose, Cut, Shorten, Damage)}


class HubServer:
    """The server, its repositories (`store`), the faults still to come and the requests so far."""

    def __init__(self, users: dict[str, str]):
        self.store = Store(users)
        self.requests: list[tuple[str, str]] = []
        self.faults: list[tuple[str, str, Fault]] = []
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            def answer(self) -> None:
                self.serve(hub)

            do_GET = do_HEAD = do_POST = do_PUT = answer

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def fault(self, method: str, part: str, fault: Fault) -> None:
        """Let `fault` happen to the next request by `method` whose path holds `part`."""
        with self.lock:
            self.faults.append((method, part, fault))

    def next_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            self.requests.append((method, path))
            for entry in self.faults:
                if entry[0] == method and entry[1] in path:
                    self.faults.remove(entry)
                    return entry[2]
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: `HubServer.requests` has all requests."""

    def serve(self, hub: HubServer) -> None:
        path = urlsplit(self.path).path
        fault = hub.next_fault(self.command, path)
        if isinstance(fault, Drop):
            self.close_connection = True
            return
        body = self.body()
        if path == "/faults":
            wanted_method, part, kind, *told = json.loads(body)
            hub.fault(wanted_method, part, FAULTS[kind](*told))
            return self.reply(Reply(200, b"", {}), None)
        if isinstance(fault, Damage) and body:
            body = damaged(body, fault.position)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        try:
            if isinstance(fault, Status):
                raise Refused(fault.status, fault.code, fault.message)
            user = None if path.startswith(("/large/", "/cdn/")) else hub.store.user(token)
            with hub.lock:
                reply = route(hub, Request(self.command, path, body, self.headers, user))
        except Refused as refused:
            told = {"X-Error-Message": refused.message} | ({"X-Error-Code": refused.code} if refused.code else {})
            reply = Reply(refused.status, json.dumps({"error": refused.message}).encode(), told)
        if isinstance(fault, Lose):
            self.close_connection = True
            return
        self.reply(reply, fault)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def reply(self, reply: Reply, fault: Fault | None) -> None:
        body = reply.body
        if isinstance(fault, Damage) and self.command == "GET":
            body = damaged(body, fault.position)
        if isinstance(fault, Shorten):
            body = body[: len(body) // 2]
        self.send_response(reply.status)
        for name, value in ({"Content-Length": str(len(body))} | reply.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if isinstance(fault, Cut):
            body, self.close_connection = body[: len(body) // 2], True
        if self.command != "HEAD":
            self.wfile.write(body)


def damaged(body: bytes, position: int) -> bytes:
    return body[:position] + bytes([body[position] ^ 0xFF]) + body[position + 1 :]
