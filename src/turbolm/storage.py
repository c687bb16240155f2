"""Files behind URLs (s3://, gs://, az://, hf://, https://, file://), through fsspec: retried, and whole or refused.

Credentials come from where each service's own client looks for them (environment, profile, the machine's role), never
from a recipe. Torch-free, and fsspec is imported when a URL is opened.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Timer
from typing import Any, TypeVar
from urllib.parse import urlsplit

from turbolm.errors import RunError, UserError
from turbolm.files import sha256_file, write_atomic
from turbolm.redaction import holds_secret, redact

T = TypeVar("T")
_NEVER = Event()
_SCHEMES = ("file", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf", "https", "http")
_AZURE = ("az", "abfs", "abfss")  # container@account names a place, not a user
_URL = re.compile(r"([a-z][a-z0-9+]*)://(.+)")
_VARIABLE = re.compile(r"\$(?:[A-Za-z_]|\{)")
# Waits between tries, in seconds: a cut connection is back at once, a throttled or restarted service within a minute.
RETRY_SEC = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
_ASK_SEC = 60.0  # after the first try of a question no other one begins: a wrong endpoint is told within two minutes
_QUIET_SEC = 10.0  # of a wait that nobody needs to be told of
_CONNECT_SEC, _SILENT_SEC = 10, 30  # for a connection, and between the bytes of an answer
_CHUNK_BYTES = 32 * 2**20  # of a download: what a cut connection costs, and the memory of each thread
_MAX_REASON = 200  # characters of a library's message
# A second try would end as the first did
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, TypeError, AttributeError)
_FINAL_NAMES = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "OfflineModeIsEnabled")


class StorageError(UserError):
    """What a URL names cannot be read or written, after all tries; one line."""


def is_url(text: str) -> bool:
    """Whether a path of a recipe is a URL."""
    return _URL.fullmatch(text) is not None


def check_url(url: str) -> str:
    """Return the URL. Raises ValueError for one that cannot be opened from a recipe, or that spells out a secret."""
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError(f"expected a URL such as s3://bucket/folder or file:///folder, got {url!r}")
    if match[1] not in _SCHEMES:  # fsspec has more, such as archives within files, that break in their own ways
        schemes = ", ".join(f"{scheme}://" for scheme in _SCHEMES)
        raise ValueError(f"expected a URL of {schemes}, got {url!r}")
    user, at, _ = urlsplit(url).netloc.rpartition("@")
    if at and (match[1] not in _AZURE or ":" in user) or holds_secret(url):
        raise ValueError(
            "the URL holds credentials, but a recipe is copied to the run directory and the model card; leave them to "
            "the environment or the service's own configuration"
        )
    if _VARIABLE.search(url):
        raise ValueError(f"expected a URL written out: $NAME is replaced in paths of this machine alone, got {url!r}")
    if match[1] == "file" and not match[2].startswith("/"):
        raise ValueError(f"expected an absolute path, such as file:///folder, got {url!r}")
    return url


@dataclass(frozen=True)
class Remote:
    """A file or folder behind a URL: `path` is its name in the file system `fs`; `url` is for messages."""

    fs: Any
    path: str
    url: str

    def at(self, *names: str) -> Remote:
        """What has this name below it."""
        below = "/".join(names)
        return replace(self, path=f"{self.path}/{below}", url=f"{self.url}/{below}")

    def info(self) -> dict[str, Any] | None:
        """Size and what else the service tells; None where there is nothing. Raises StorageError."""

        def ask() -> dict[str, Any] | None:
            self.fs.invalidate_cache()
            try:
                return dict(self.fs.info(self.path))
            except FileNotFoundError:
                return None

        return asked(ask, self.url)

    def names(self) -> list[str]:
        """The names in a folder; none if there is no such folder. Raises StorageError."""

        def look() -> list[str]:
            self.fs.invalidate_cache()
            try:
                found = self.fs.ls(self.path, detail=False)
            except FileNotFoundError:
                return []
            return sorted({str(name).rstrip("/").rsplit("/", 1)[-1] for name in found})

        return asked(look, self.url)

    def read(self) -> bytes | None:
        """The content of a small file; None if there is none. Raises StorageError."""

        def get() -> bytes | None:
            try:
                return bytes(self.fs.cat_file(self.path))
            except FileNotFoundError:
                return None

        return asked(get, self.url)

    def read_json(self) -> dict[str, Any] | None:
        """A JSON object; None if there is none, or if it is cut short. Raises StorageError."""
        content = self.read()
        try:
            value = json.loads(content) if content is not None else None
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None

    def write(self, content: bytes) -> None:
        """Write a small file. Raises StorageError."""
        try:
            asked(lambda: self._put(content), self.url)
        except FileNotFoundError as error:  # there is no such bucket
            raise StorageError(f"{self.url}: {one_line(error)}") from None

    def write_json(self, value: object) -> None:
        """Write a JSON value, and read it back. Raises StorageError."""
        content = (json.dumps(value, indent=1) + "\n").encode()
        self.write(content)
        if self.read() != content:
            raise StorageError(f"{self.url}: what was written is not what is read back")

    def upload(self, local: Path, num_bytes: int) -> None:
        """Copy a file there, and check its size. Raises StorageError, and OSError where the local file is at fault."""

        def put() -> None:
            if local.stat().st_size != num_bytes:  # a hash has been compared, so this is another file by now
                raise FileNotFoundError(f"{local} changed while it was copied")
            self.fs.put_file(str(local), self.path)
            found = int(self.fs.info(self.path)["size"])
            if found != num_bytes:
                raise OSError(f"{found} bytes arrived instead of {num_bytes}")

        retried(put, self.url)

    def download(self, local: Path, num_bytes: int, ended: Event = _NEVER) -> None:
        """Copy it to a local file, whose bytes from an interrupted download are kept.

        Raises StorageError, also soon after `ended` is set, and OSError.
        """
        local.parent.mkdir(parents=True, exist_ok=True)
        with local.open("ab") as file:
            if file.tell() > num_bytes:
                file.truncate(0)
            while (start := file.seek(0, os.SEEK_END)) < num_bytes:
                end = min(start + _CHUNK_BYTES, num_bytes)
                file.write(retried(lambda start=start, end=end: self._chunk(start, end), self.url, ended))  # type: ignore[misc]

    def download_checked(self, local: Path, described: dict[str, Any], ended: Event = _NEVER) -> str | None:
        """`download`, and compare size and SHA-256 with what a manifest says; returns what is wrong, or None.

        A file that differs is fetched once more before it is given up: the part of an earlier download may be at
        fault. Raises StorageError and OSError.
        """
        for _ in range(2):
            try:
                self.download(local, described["bytes"], ended)
            except FileNotFoundError:
                return "missing"
            if sha256_file(local) == described["sha256"]:
                return None
            local.unlink()
        return "content differs (SHA-256)"

    def remove(self) -> None:
        """Remove it and all below; nothing there is fine. Raises StorageError."""

        def drop() -> None:
            self.fs.invalidate_cache()
            try:
                self.fs.rm(self.path, recursive=True)
            except FileNotFoundError:
                pass

        asked(drop, self.url)

    def _put(self, content: bytes) -> None:
        if "file" in self.fs.protocol:
            write_atomic(Path(self.path), content, durable=True)
        else:  # object stores show a file when it is complete
            self.fs.pipe_file(self.path, content)

    def _chunk(self, start: int, end: int) -> bytes:
        content = bytes(self.fs.cat_file(self.path, start=start, end=end))
        if len(content) != end - start:
            raise OSError(f"{len(content)} bytes came instead of {end - start}")
        return content


def in_parallel(call: Callable[[Any], object], items: Iterable[Any], num_threads: int) -> None:
    """Call it with every item; after an error or a request to stop no further one is begun."""
    with ThreadPoolExecutor(num_threads) as pool:
        jobs = [pool.submit(call, item) for item in items]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def download_all(remote: Remote, files: Mapping[str, dict[str, Any]], folder: Path, num_threads: int) -> list[str]:
    """Download files below `remote` into a folder as `download_checked` does, in parallel; returns all problems.

    What an interrupted call has fetched stays. Raises StorageError and OSError.
    """
    ended = Event()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            jobs = {
                name: pool.submit(remote.at(name).download_checked, folder / name, file, ended)
                for name, file in files.items()
            }
            return [f"{remote.url}/{name}: {problem}" for name, job in jobs.items() if (problem := job.result())]
        except BaseException:  # a request to stop, too
            ended.set()
            pool.shutdown(cancel_futures=True)
            raise


def open_url(url: str, key: str) -> Remote:
    """The place that a URL names; asks nothing of the service yet. Raises UserError for the recipe's `key`."""
    import fsspec

    url = url.rstrip("/")
    scheme = url.partition("://")[0]
    try:
        fs, path = fsspec.core.url_to_fs(url, **_options(scheme))
    except ImportError as error:
        raise UserError(
            f"{key}: {url} needs a package that is not installed ({one_line(error)}); "
            "install it with: pip install 'turbolm[storage]'"
        ) from None
    except ValueError as error:
        raise UserError(f"{key}: {url}: {one_line(error)}") from None
    if scheme == "s3":
        fs.retries = 1  # `retried` tries again; within a try, the client of the service does
    return Remote(fs, str(path).rstrip("/"), url)


def _options(scheme: str) -> dict[str, Any]:
    """The options of a file system: nothing listed is remembered, and no connection is waited for without end."""
    if scheme == "file":
        return {"auto_mkdir": True}
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme == "s3":
        retries = {"mode": "standard", "max_attempts": 3}
        options["config_kwargs"] = {"retries": retries, "connect_timeout": _CONNECT_SEC, "read_timeout": _SILENT_SEC}
    if scheme in ("http", "https"):
        from aiohttp import ClientTimeout

        limits = ClientTimeout(total=None, sock_connect=_CONNECT_SEC, sock_read=_SILENT_SEC)
        options["client_kwargs"] = {"timeout": limits}
    return options


def asked(action: Callable[[], T], url: str) -> T:
    """`retried` for a question with a short answer: it ends soon, and a line tells of a wait that others may notice.

    Raises StorageError, and FileNotFoundError at once.
    """
    line = f"turbolm: waiting for {url}; if this lasts, check the network and the endpoint (such as AWS_ENDPOINT_URL)"
    timer = Timer(_QUIET_SEC, lambda: print(line, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        return retried(action, url, limit_sec=_ASK_SEC)
    finally:
        timer.cancel()


def retried(action: Callable[[], T], url: str, ended: Event = _NEVER, limit_sec: float = math.inf) -> T:
    """What `action` returns, tried again with growing waits until `ended` is set by another thread.

    No try begins more than `limit_sec` after the first. Raises StorageError, and FileNotFoundError at once.
    """
    began = time.monotonic()
    for wait_sec in (*RETRY_SEC, None):
        if ended.is_set():
            raise StorageError(f"{url}: interrupted")
        try:
            return action()
        except FileNotFoundError:
            raise
        except Exception as error:  # whatever fsspec's many libraries raise for a connection
            is_late = time.monotonic() - began > limit_sec
            is_final = isinstance(error, _FINAL) or type(error).__name__ in _FINAL_NAMES
            if wait_sec is None or is_late or is_final:
                raise StorageError(f"{url}: {type(error).__name__}: {one_line(error)}") from None
        ended.wait(wait_sec * random.uniform(0.5, 1.0))
    raise AssertionError


def one_line(error: BaseException) -> str:
    """The message of an error without secrets; that of a library is cut, as some hold whole answers of a server."""
    text = redact(" ".join(str(error).split()))
    return text if isinstance(error, (UserError, RunError)) else text[:_MAX_REASON]
