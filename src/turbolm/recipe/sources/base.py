"""The base of every kind of source: its settings, traits, files and `read`."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import Field, PrivateAttr

from turbolm.errors import UserError
from turbolm.recipe.fields import Before, Name, Paths, Positive, Section, StagedWeight
from turbolm.recipe.paths import PATH_RULE, use_path
from turbolm.storage import is_url

if TYPE_CHECKING:
    from turbolm.recipe.sources.urls import UrlFile


class Unusable(Exception):
    """The reason why a document cannot be used; the caller adds its position."""


@dataclass(frozen=True)
class Bad:
    """Returned by `read` instead of a document that cannot be used."""

    where: str  # file and line, or row
    reason: str


class Gauge:
    """The share of a file that has been read, 0 to 1; `read` sets `share`."""

    share: Callable[[], float] = staticmethod(lambda: 0.0)


class BaseSource(Section):
    """Base of every source, with the settings for mixtures."""

    label: Name | None = Field(None, description="what reports call this source; default: its type and number")
    weight: StagedWeight | None = Field(
        None,
        description="share of the tokens, relative to other sources; a mapping such as {0%: 3, 80%: 1} changes it "
        "over the budget; without weights every document is read once per epoch",
    )
    min_tokens: Annotated[Positive | None, Before(None)] = Field(
        None, description="leave out documents of fewer tokens, such as 16k for long ones only"
    )

    _key: str = PrivateAttr("data.sources")
    reads_all_files_at_once: ClassVar[bool] = False  # `read` is called once, without a file
    empty_files_are_odd: ClassVar[bool] = False  # a file of 0 bytes has no document: a failed download may leave one

    @property
    def key(self) -> str:
        """The key of the recipe that messages name."""
        return self._key

    def under(self, key: str) -> Self:
        """Return the same source for messages that name another key."""
        source = self.model_copy()
        source._key = key
        return source

    @property
    def has_urls(self) -> bool:
        """Whether any of its files is behind a URL."""
        return False

    def files(self) -> list[Path]:
        """Return its files, in the fixed order in which they are read; none for a hub source."""
        raise NotImplementedError

    def read(self, path: Path, skip: int, gauge: Gauge) -> Iterator[str | Bad]:
        """Yield the documents of a file after the first `skip`, which are skipped quickly; null is an empty text.

        Import heavy libraries inside. Sets `gauge.share`. Raises UserError for a file that cannot be read.
        """
        raise NotImplementedError

    def parts(self, path: Path) -> list[tuple[int, int]]:
        """Return documents and bytes of each part of a file, if `read` can skip parts without decoding them."""
        return []

    def listing(self) -> list[tuple[str, int, int | str]]:
        """Return name, size in bytes and modification time (ns) of its files: a change makes another token store.

        Of a file behind a URL: its version, as the service tells it.
        """
        return [(str(path), status.st_size, status.st_mtime_ns) for path, status in self.stats()]

    def stats(self) -> list[tuple[Path, os.stat_result]]:
        """Return its files and their `stat`. Raises UserError."""
        return [(path, stat_file(path, self.key)) for path in self.files()]


class FileSource(BaseSource):
    """Base of sources of files that a recipe names by path or pattern."""

    path: Paths = Field(
        description=f"a path, a glob (`**` allowed), a URL (s3://, gs://, az://, hf://, https://) or a list of them; "
        f"in paths {PATH_RULE}"
    )

    @property
    def has_urls(self) -> bool:
        """Whether any of its files is behind a URL."""
        return any(map(is_url, self.path))

    def files(self) -> list[Path]:
        """Return its files: those of this machine sorted by path, then paths that stand for URLs (`urls`).

        Raises UserError if a pattern matches none.
        """
        from turbolm.recipe.sources.urls import path_of

        return [*self._local_files(), *(path_of(url) for url in self._url_files())]

    def stats(self) -> list[tuple[Path, os.stat_result]]:
        """Return its files and their `stat`; of a file behind a URL it has the size alone. Raises UserError."""
        from turbolm.recipe.sources.urls import path_of

        local = [(path, stat_file(path, self.key)) for path in self._local_files()]
        sizes = ((path_of(url), file.num_bytes) for url, file in self._url_files().items())
        return local + [(path, os.stat_result((stat.S_IFREG, 0, 0, 1, 0, 0, size, 0, 0, 0))) for path, size in sizes]

    def listing(self) -> list[tuple[str, int, int | str]]:
        """Return name, size in bytes and modification time (ns), or version, of its files."""
        local = [(path, stat_file(path, self.key)) for path in self._local_files()]
        return [
            *((str(path), status.st_size, status.st_mtime_ns) for path, status in local),
            *((url, file.num_bytes, file.version) for url, file in self._url_files().items()),
        ]

    def _url_files(self) -> dict[str, UrlFile]:
        from turbolm.recipe.sources.urls import find_url_files

        found = {file.url: file for pattern in filter(is_url, self.path) for file in find_url_files(pattern, self.key)}
        return dict(sorted(found.items()))

    def _local_files(self) -> list[Path]:
        # A link, another spelling or another pattern may name the same file, which is read once. Size and time are
        # compared too: inode numbers of some network file systems are not unique.
        names: dict[tuple[int, ...], Path] = {}
        for pattern in self.path:
            if is_url(pattern):
                continue
            for path, status in _match(pattern, self.key):
                identity = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
                others = [names[identity]] if identity in names else []
                names[identity] = min([path, *others], key=lambda name: (len(name.parts), name))
        return sorted(names.values())


def _match(pattern: str, key: str) -> list[tuple[Path, os.stat_result]]:
    path = use_path(pattern, key)
    if path.is_dir():
        raise UserError(f"{key}: {pattern} is a folder; name its files, such as {Path(pattern) / '**' / '*'}")
    # A file name may contain glob characters.
    names = [path] if path.is_file() else map(Path, glob.glob(str(path), recursive=True, include_hidden=False))
    files = [(name, status) for name in names if stat.S_ISREG((status := stat_file(name, key)).st_mode)]
    if not files:
        raise UserError(f"{key}: no file matches {pattern!r} (looked in {Path.cwd()})")
    return files


def stat_file(path: Path, key: str) -> os.stat_result:
    """Return the `stat` of a file that `key` names. Raises UserError."""
    try:
        return path.stat()
    except OSError as error:
        where = f"{path}, a link to {os.readlink(path)}," if path.is_symlink() else path
        raise UserError(f"{key}: {where} cannot be read: {error.strerror}") from None


def text_of(value: object, field: str) -> str:
    """Return the text in a field. Raises Unusable."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Unusable(f"field {field!r} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Unusable(f"field {field!r} has half a surrogate pair at character {error.start}") from None
    return value


def no_field(field: str, fields: Iterable[str]) -> str:
    """Return the message for a document or file without the field."""
    return f"there is no field {field!r}; the fields are {', '.join(sorted(fields)) or '(none)'}"


def not_utf8(error: UnicodeDecodeError) -> str:
    """Return the message after the position of the byte."""
    byte = error.object[error.start]
    return f"(0x{byte:02x}) is not UTF-8; text in Latin-1 or Windows-1252 must be saved as UTF-8"
