"""A hub of one dataset on this machine: the addresses that huggingface_hub asks for, with faults to switch on."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

REPO = "lab/pairs"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Fault:
    """What the next `times` requests of a kind meet: a status, or `bytes_sent` of the content and then a broken connection."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    bytes_sent: int | None = None
    end: str = "cut"  # or "reset", or "stall"
    times: int = 1_000_000


@dataclass
class Hub:
    """`files` as listed; `served` overrides the bytes that a path really answers with."""

    files: dict[str, bytes] = field(default_factory=dict)
    served: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, Fault] = field(default_factory=dict)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    url: str = ""
    closing: threading.Event = field(default_factory=threading.Event)

    def ranges(self) -> list[str | None]:
        """Range of every request for content, None for a whole file."""
        return [span for kind, span in self.requests if kind == "resolve"]


def in_lfs(path: str) -> bool:
    return not path.endswith(".md")


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))

    def _answer(self, body: bytes) -> None:
        address = urlsplit(self.path)
        api = address.path.startswith("/api/")
        repo, _, rest = address.path.removeprefix("/api").removeprefix("/datasets/").partition("/")
        name, _, rest = rest.partition("/")
        kind, _, rest = rest.partition("/")
        kind = {"": "info", "revision": "info"}.get(kind, kind)
        revision, _, path = rest.partition("/")
        path = unquote(path)
        self.hub.requests.append((kind, self.headers.get("Range")))
        self.hub.tokens.append(self.headers.get("Authorization"))
        fault = self.hub.faults.get(kind)
        if fault and fault.times > 0:
            fault.times -= 1
            if fault.status != 200:
                return self._send(fault.status, b"{}", fault.headers)
        else:
            fault = None
        if f"{repo}/{name}" != REPO:
            return self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("", "main", "v1", COMMIT):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if not api:
            return self._content(path, fault)
        if kind == "info":
            return self._json({"id": REPO, "sha": COMMIT, "siblings": [], "tags": []})
        if kind == "paths-info":
            return self._json([entry for path in parse_qs(body.decode())["paths"] for entry in self._entries(path)])
        listed = [entry for p in self.hub.files if p.startswith(f"{path}/" if path else "") for entry in self._entries(p)]
        return self._json(listed) if listed else self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

    def _entries(self, path: str) -> list[dict[str, object]]:
        if path not in self.hub.files:
            folder = any(p.startswith(f"{path}/") for p in self.hub.files)
            return [{"type": "directory", "path": path, "oid": "0" * 40}] if folder else []
        data = self.hub.files[path]
        entry: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
        if in_lfs(path):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return [entry]

    def _content(self, path: str, fault: Fault | None) -> None:
        if path not in self.hub.files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = self.hub.served.get(path, self.hub.files[path])
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        if not fault or fault.bytes_sent is None:
            return self._send(206 if start else 200, data[start:], headers)
        self._head(206 if start else 200, len(data) - start, headers)
        self.wfile.write(data[start : start + fault.bytes_sent])
        self.wfile.flush()
        if fault.end == "stall":
            self.hub.closing.wait()
        if fault.end == "reset":
            # A reset overtakes bytes that the reader has not taken yet.
            self.hub.closing.wait(0.3)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        if fault.end == "reset":
            self.connection.close()

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self._head(status, len(data), headers)
        self.wfile.write(data)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
