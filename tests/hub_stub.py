"""A Hugging Face hub of a few files on 127.0.0.1: the requests that `huggingface_hub` makes of the real one."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Repository:
    """Its commits, and the commit that each branch stands at."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    is_gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Move a branch to a new commit of these files; returns its hash."""
        name = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name

    def commit_folder(self, folder: Path, **more: bytes) -> str:
        """The same with the files of a folder."""
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
        return self.commit({**files, **more})


@dataclass
class Hub:
    """What the server answers from, and what it was asked."""

    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, authorization

    def create(self, name: str, **settings: Any) -> Repository:
        """An empty repository."""
        return self.repositories.setdefault(name, Repository(**settings))

    def environment(self, home: Path) -> dict[str, str]:
        """Variables of a process that knows this hub and keeps its cache in `home`."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        return {**kept, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """A hub that answers while the context is open."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path = self.path.partition("?")[0]
        hub.requests.append((self.command, path, self.headers.get("Authorization")))
        code, headers, body = _look_up(hub, path)
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


_Answer = tuple[int, dict[str, str], bytes]


def _look_up(hub: Hub, path: str) -> _Answer:
    is_api = path.startswith("/api/models/")
    parts = path.removeprefix("/api/models/").strip("/").split("/")
    name, rest = "/".join(parts[:2]), parts[2:]
    repository = hub.repositories.get(name)
    if repository is None:
        return 401, {"X-Error-Code": "RepoNotFound"}, b""  # the real one does not tell what is private
    revision = rest[1] if len(rest) > 1 else "main"
    commit = repository.branches.get(revision, revision)
    if commit not in repository.commits:
        return 404, {"X-Error-Code": "RevisionNotFound"}, b""
    files = repository.commits[commit]
    if is_api and rest[:1] == ["tree"]:
        rows = [{"type": "file", "path": file, "size": len(data), "oid": _etag(data)} for file, data in files.items()]
        return 200, {"Content-Type": "application/json"}, json.dumps(rows).encode()
    if is_api:
        siblings = [{"rfilename": file} for file in files]
        info = {"id": name, "modelId": name, "sha": commit, "private": False, "siblings": siblings, "tags": []}
        return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
    if repository.is_gated:
        return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b""
    data = files.get("/".join(rest[2:]))
    if data is None:
        return 404, {"X-Error-Code": "EntryNotFound"}, b""
    return 200, {"X-Repo-Commit": commit, "ETag": f'"{_etag(data)}"'}, data


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
