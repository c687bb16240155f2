"""Files of a source behind URLs: found through fsspec, told apart by size and version, fetched while they are read.

Such a file has a path below `_root()` that stands for its URL; nothing is there. One that is read is fetched into a
temporary folder of the process that reads it: the readers of local files, and their formats, serve for it as well.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbolm.errors import UserError
from turbolm.recipe.sources.base import Bad, BaseSource, Gauge
from turbolm.storage import Remote, StorageError, asked, one_line, open_url

if TYPE_CHECKING:
    from collections.abc import Mapping

# What tells that a file has changed, by the names of fsspec's file systems; a hash of the content before a time. The
# first that there is counts: another order would make other stores.
_VERSIONS = (
    *("ETag", "etag", "blob_id", "md5Hash", "content_md5", "Content-MD5", "Digest"),
    *("LastModified", "last_modified", "Last-Modified", "updated", "mtime"),
)
_MAGIC = "*?["


@dataclass(frozen=True)
class UrlFile:
    """A file behind a URL."""

    url: str
    num_bytes: int
    version: str  # as the service tells it: another one means other content


def _root() -> Path:
    return Path(tempfile.gettempdir()) / "turbolm-urls"


def path_of(url: str) -> Path:
    """The path that stands for a URL."""
    scheme, _, rest = url.partition("://")
    return _root() / scheme / rest.lstrip("/")


def url_of(path: Path) -> str | None:
    """The URL that a path stands for; None for a path of this machine."""
    if not path.is_relative_to(_root()):
        return None
    scheme, *rest = path.relative_to(_root()).parts
    return f"{scheme}://{'/' if scheme == 'file' else ''}{'/'.join(rest)}"


def find_url_files(pattern: str, key: str) -> tuple[UrlFile, ...]:
    """The files that a URL names, or those that match it as a glob, by URL; asked once until `forget_urls`.

    `key` is that of the recipe. Raises UserError where there are none, or one cannot be told from a changed one, and
    StorageError where the service cannot be asked.
    """
    found = _find(pattern, key)
    if isinstance(found, StorageError):
        raise found
    return found


@functools.cache
def _find(pattern: str, key: str) -> tuple[UrlFile, ...] | StorageError:
    has_glob = any(sign in pattern for sign in _MAGIC)
    if has_glob and pattern.startswith(("http://", "https://")):
        raise UserError(f"{key}: {pattern}: a web server lists no files; name them one by one, without * ? or [")
    remote = open_url(pattern, key)
    try:
        found = _told(pattern, key, lambda: asked(lambda: _look(remote, has_glob), pattern))
    except StorageError as error:  # all tries take a minute: this is remembered, too
        return error
    if not has_glob and found[remote.path].get("type") == "directory":
        raise UserError(f"{key}: {pattern} is a folder; name its files, such as {pattern.rstrip('/')}/**/*.jsonl")
    files = [_described(remote, name, info, key) for name, info in found.items() if info.get("type") == "file"]
    if not files:
        raise UserError(f"{key}: no file matches {pattern!r}")
    return tuple(sorted(files, key=lambda file: file.url))


def forget_urls() -> None:
    """Ask again which files there are."""
    _find.cache_clear()


def clear_fetched() -> None:
    """Remove what killed readers of this user have fetched."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_prefix()}*-*"):
        pid = folder.name.removeprefix(_prefix()).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _prefix() -> str:
    return f"turbolm-fetched-{os.geteuid()}-{platform.node()}-"


def read_url(source: BaseSource, path: Path, skip: int, gauge: Gauge) -> Iterator[str | Bad]:
    """`source.read` of any path: one that stands for a URL is fetched first, and messages name the URL."""
    url = url_of(path)
    if url is None:
        yield from source.read(path, skip, gauge)
        return
    with tempfile.TemporaryDirectory(prefix=f"{_prefix()}{os.getpid()}-") as folder:
        local = Path(folder) / path.name
        _fetch(url, local, source.key)
        try:
            for document in source.read(local, skip, gauge):
                if isinstance(document, Bad):
                    document = Bad(document.where.replace(str(local), url), document.reason)
                yield document
        except UserError as error:
            raise UserError(str(error).replace(str(local), url)) from None


def _fetch(url: str, local: Path, key: str) -> None:
    """Fetch a file. Raises UserError where it cannot be read, or changes meanwhile."""
    remote = open_url(url, key)

    def describe() -> UrlFile:
        return _described(remote, remote.path, asked(lambda: _look(remote, False), url)[remote.path], key)

    def fetch() -> None:
        before = describe()
        remote.download(local, before.num_bytes)
        if describe() != before:
            raise UserError(f"{key}: {url} changed while it was read; run `turbolm prepare RECIPE` again")

    try:
        _told(url, key, fetch)
    except OSError as error:
        raise UserError(
            f"{key}: {url} cannot be kept in {local.parent} while it is read: {error.strerror or error}; "
            "set TMPDIR to a folder with more room"
        ) from None


def _look(remote: Remote, has_glob: bool) -> dict[str, dict[str, Any]]:
    remote.fs.invalidate_cache()
    found = remote.fs.glob(remote.path, detail=True) if has_glob else {remote.path: remote.fs.info(remote.path)}
    return {str(name): info for name, info in found.items()}


def _described(remote: Remote, name: str, info: Mapping[str, Any], key: str) -> UrlFile:
    scheme, _, place = remote.url.partition("://")
    where, below = place.partition("/")[0], name.partition("/")[2]
    # Azure's container@account, of which a name has the container alone
    url = f"{scheme}://{where}/{below}" if "@" in where else str(remote.fs.unstrip_protocol(name))
    rest = url.partition("://")[2].removeprefix("/").split("/")
    if any(part in ("", ".", "..") for part in rest):
        raise UserError(
            f"{key}: {url!r} has an empty part (//), or one that is . or .., which no path of this machine can have; "
            "give the file another name, or leave it out"
        )
    version = next((f"{name} {info[name]}" for name in _VERSIONS if info.get(name)), None)
    if info.get("size") is None or version is None:
        missing = "its size" if info.get("size") is None else "an ETag, a hash or the time of its last change"
        raise UserError(
            f"{key}: {url}: the server does not tell {missing}, so that a change of the file would go unnoticed; "
            "download it and name its path"
        )
    return UrlFile(url, int(info["size"]), version)


def _told(url: str, key: str, action: Any) -> Any:
    """What `action` returns. Raises UserError with one line where the service cannot be read."""
    try:
        return action()
    except FileNotFoundError:
        raise UserError(f"{key}: there is no {url}") from None
    except StorageError as error:
        raise StorageError(f"{key}: {one_line(error)}; check the network and the credentials") from None
