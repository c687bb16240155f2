"""A Hugging Face hub of a few files on 127.0.0.1: the requests that `huggingface_hub` makes of the real one."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
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
    is_private: bool = False

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
    writers: set[str] = field(default_factory=set)  # tokens that may write
    large: dict[str, bytes] = field(default_factory=dict)  # large files by SHA-256, whether in a commit or not yet
    cut_after: int | None = None  # bytes of the next large file, after which the connection is closed

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

    def do_POST(self) -> None:
        self._receive()

    def do_PUT(self) -> None:
        self._receive()

    def _receive(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path, length = self.path.partition("?")[0], int(self.headers.get("Content-Length", 0))
        hub.requests.append((self.command, path, self.headers.get("Authorization")))
        if self.command == "PUT" and hub.cut_after is not None:
            self.rfile.read(hub.cut_after)
            hub.cut_after = None
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        code, headers, body = _store(hub, path, self.rfile.read(length), token)
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

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
        info = {
            "id": name,
            "modelId": name,
            "sha": commit,
            "private": repository.is_private,
            "siblings": siblings,
            "tags": [],
        }
        return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
    if repository.is_gated:
        return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b""
    data = files.get("/".join(rest[2:]))
    if data is None:
        return 404, {"X-Error-Code": "EntryNotFound"}, b""
    return 200, {"X-Repo-Commit": commit, "ETag": f'"{_etag(data)}"'}, data


def _store(hub: Hub, path: str, body: bytes, token: str) -> _Answer:
    """Take what a push sends: a repository, how files are sent, large files, and the commit of all."""
    if path.startswith("/large/"):
        hub.large[hashlib.sha256(body).hexdigest()] = body
        return 200, {}, b""
    if path == "/api/validate-yaml":
        return _json({"errors": [], "warnings": []})
    if token not in hub.writers:
        return _json({"error": "this token may not write"}, 403)
    if path == "/api/repos/create":
        asked = json.loads(body)
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        exists = name in hub.repositories
        repository = hub.create(name)
        if not exists:
            repository.is_private = asked.get("visibility") == "private"
            repository.commit({})
        return _json({"url": f"{hub.url}/{name}"}, 409 if exists else 200)
    if path.endswith(".git/info/lfs/objects/batch"):
        return _json({"transfer": "basic", "objects": [_upload_of(hub, one) for one in json.loads(body)["objects"]]})
    name, _, rest = path.removeprefix("/api/models/").partition("/preupload/")
    if rest:
        files = [one["path"] for one in json.loads(body)["files"]]
        modes = {file: "lfs" if file.endswith(".safetensors") else "regular" for file in files}
        return _json({"files": [{"path": one, "uploadMode": modes[one], "shouldIgnore": False} for one in files]})
    name = name.partition("/commit/")[0]
    repository = hub.repositories[name]
    files = dict(repository.commits[repository.branches["main"]])
    for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = hub.large[value["oid"]]
        elif line["key"] == "deletedFile":
            del files[value["path"]]
    commit = repository.commit(files)
    return _json({"commitUrl": f"{hub.url}/{name}/commit/{commit}", "commitOid": commit})


def _upload_of(hub: Hub, one: dict[str, Any]) -> dict[str, Any]:
    name = one["oid"]
    upload = {"actions": {"upload": {"href": f"{hub.url}/large/{name}"}}}
    return {"oid": name, "size": one["size"], **({} if name in hub.large else upload)}


def _json(value: Any, code: int = 200) -> _Answer:
    return code, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
