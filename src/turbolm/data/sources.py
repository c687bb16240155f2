"""Read the documents of a recipe's sources, one after the other and in an order that never changes.

A null text is an empty document. Files are read as a stream wherever their format allows.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from turbolm.errors import UserError
from turbolm.recipe.data import (
    DatasetsSource,
    JsonlSource,
    ParquetSource,
    Source,
    StdlibSource,
    TextSource,
)

_PARQUET_ROWS = 256  # decoded at a time; a row may be megabytes
# Folders of the standard library that some distributions leave out, move, add, or fill with their build's settings.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


Place = tuple[int, int]  # (a file of the source, how many of its documents come before): where a document begins


def iter_documents(sources: Sequence[Source]) -> Iterator[tuple[int, str]]:
    """Every document as (index of its source, text), sources in the recipe's order and files sorted by path."""
    num_documents = 0
    for number, source in enumerate(sources):
        for text in Reader(source):
            num_documents += 1
            yield number, text
    if not num_documents:
        raise no_documents()


class Reader:
    """Iterates over the texts of one source, files sorted by path, from `start` on.

    Skipping what comes before `start` costs far less than reading it: whole files are not opened, lines are not parsed,
    row groups are not decoded. Raises UserError where a file cannot be read.
    """

    def __init__(self, source: Source, start: Place = (0, 0)):
        self.place = start  # of the next document
        self._source = source
        self._files = [Path(source.path)] if isinstance(source, DatasetsSource) else list_files(source)
        self._gauge = _Gauge()

    def __iter__(self) -> Iterator[str]:
        read = _READERS[self._source.type]
        first, skip = self.place
        for number in range(first, len(self._files)):
            row = skip if number == first else 0
            self._gauge.share = lambda: 0.0
            for text in read(self._source, self._files[number], row, self._gauge):
                row += 1
                self.place = number, row
                yield text

    @property
    def share_of_file(self) -> float:
        """How much of the file at `place` has been read, 0 to 1."""
        return self._gauge.share() if self.place[1] else 0.0


class SourceSizes:
    """How much of all sources lies before a place, for progress: in bytes on disk, whatever the format."""

    def __init__(self, sources: Sequence[Source]):
        self._sizes: list[list[int]] = []
        for source in sources:
            sizes = [path.stat().st_size for path in list_files(source)]
            self._sizes.append([sum(sizes)] if isinstance(source, DatasetsSource) else sizes)
        self._before = [0]  # bytes of the sources before each one
        for sizes in self._sizes:
            self._before.append(self._before[-1] + sum(sizes))
        # A data set from the hub has no size that is known beforehand.
        self.known = all(map(sum, self._sizes))
        self.num_bytes = self._before[-1]

    def share(self, source: int, place: Place, share_of_file: float = 0.0) -> float:
        """The share, 0 to 1, of all bytes that come before; 0 where the size of a source is not known."""
        if not self.known:
            return 0.0
        sizes, file = self._sizes[source], place[0]
        this = sizes[file] * share_of_file if file < len(sizes) else 0
        return float((self._before[source] + sum(sizes[:file]) + this) / self.num_bytes)


def no_documents() -> UserError:
    """What to raise where all sources together have none."""
    return UserError("The sources hold no documents at all (data.sources)")


class _Gauge:
    """Tells how much of a file has been read; each reader sets `share`."""

    share: Callable[[], float] = staticmethod(lambda: 0.0)


def list_files(source: Source) -> list[Path]:
    """The files of a source, sorted by path; none for a data set that comes from the hub."""
    if isinstance(source, StdlibSource):
        return _stdlib_files()
    if isinstance(source, DatasetsSource):
        folder = Path(source.path).expanduser()
        return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    files: set[Path] = set()
    for pattern in source.path:
        files |= _match(pattern)
    return sorted(files)


def _match(pattern: str) -> set[Path]:
    path = Path(pattern).expanduser()
    if path.is_file():  # its name may hold characters that mean something in a glob
        return {path}
    if path.is_dir():
        raise UserError(f"data.sources: {pattern} is a folder; name its files, such as {Path(pattern) / '**' / '*'}")
    found = {Path(name) for name in glob.glob(str(path), recursive=True, include_hidden=False)}
    files = {name for name in found if name.is_file()}
    if not files:
        raise UserError(f"data.sources: no file matches {pattern!r} (looked in {Path.cwd()})")
    return files


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_STDLIB and not name.startswith("config-")]
        files += [Path(folder, n) for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata")]
    if not files:
        raise UserError(f"The standard library in {root} has no source files; use another source (data.sources)")
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _read_stdlib(source: StdlibSource, path: Path, skip: int, gauge: _Gauge) -> Iterator[str]:
    content = _read_bytes(path) if not skip else b""
    gauge.share = lambda: 1.0
    try:
        text = content.decode()
    except UnicodeDecodeError:
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
            text = content.decode(encoding)
        except (SyntaxError, UnicodeDecodeError):
            return  # a file that is broken on purpose
    if not skip:
        yield text


def _read_text(source: TextSource, path: Path, skip: int, gauge: _Gauge) -> Iterator[str]:
    gauge.share = lambda: 1.0
    if skip:
        return
    try:
        yield _read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise _bad_encoding(path, error.start) from None


def _read_jsonl(source: JsonlSource, path: Path, skip: int, gauge: _Gauge) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(_lines(path, gauge), start=1):
        where, start, offset = f"{path}:{number}", offset, offset + len(line)
        if not line.strip():
            continue
        if skip:
            skip -= 1
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise _bad_encoding(path, start + error.start) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}")
        if source.field not in row:
            raise _missing_field(where, source.field, row)
        yield _text(row[source.field], where, source.field)


def _lines(path: Path, gauge: _Gauge) -> Iterator[bytes]:
    from zstandard import ZstdError

    try:
        with path.open("rb", buffering=1 << 20) as file:
            num_bytes = max(1, path.stat().st_size)
            gauge.share = lambda: 1.0 if file.closed else file.tell() / num_bytes
            if path.suffix == ".gz":
                yield from gzip.GzipFile(fileobj=file)
            else:
                yield from _zstd_lines(file) if path.suffix == ".zst" else file
    except (OSError, EOFError, zlib.error, ZstdError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _zstd_lines(file: Any) -> Iterator[bytes]:
    """Lines of a file of zstd frames. The library's own reader takes a file that is cut off for a complete one."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)  # as `zstd --long=31` needs
    frame, rest = None, b""
    while compressed := file.read(1 << 18):
        while compressed:
            frame = frame or decompressor.decompressobj()
            *lines, rest = (rest + frame.decompress(compressed)).split(b"\n")
            yield from (line + b"\n" for line in lines)
            compressed = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("the file ends inside a zstd frame")
    if rest:
        yield rest


def _read_parquet(source: ParquetSource, path: Path, skip: int, gauge: _Gauge) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        # With a buffer a row group is read page by page, so that one which is as large as its file costs no memory.
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20) as file:
            if source.field not in file.schema_arrow.names:
                raise _missing_field(path, source.field, file.schema_arrow.names)
            counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            group, row = 0, 0  # the first row group to read, and its first row
            while group < len(counts) and row + counts[group] <= skip:
                group, row = group + 1, row + counts[group]
            num_rows = max(1, sum(counts))
            gauge.share = lambda: row / num_rows
            for number in range(group, len(counts)):  # one call for all of them would keep what it has read of each
                for batch in file.iter_batches(
                    _PARQUET_ROWS, row_groups=[number], columns=[source.field], use_threads=False
                ):
                    for value in batch.column(0).to_pylist():
                        row += 1
                        if row > skip:
                            yield _text(value, f"{path}: row {row}", source.field)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as parquet: {error}") from None


def _read_datasets(source: DatasetsSource, path: Path, skip: int, gauge: _Gauge) -> Iterator[str]:
    where = f"data set {source.path}"
    rows: Any = _load_dataset(source, where)
    columns: list[str] | None = getattr(rows, "column_names", None)  # not known of every stream
    if columns and source.field not in columns:
        raise _missing_field(where, source.field, columns)
    number = skip
    if hasattr(rows, "__len__"):
        num_rows = max(1, len(rows))
        gauge.share = lambda: number / num_rows
    try:
        for row in rows.skip(skip) if skip else rows:
            number += 1
            if source.field not in row:
                raise _missing_field(where, source.field, row)
            yield _text(row[source.field], f"{where}: row {number}", source.field)
    except (OSError, ValueError, RuntimeError) as error:  # a stream reads as it goes
        raise UserError(f"{where} cannot be read: {type(error).__name__}: {error}") from None


def _load_dataset(source: DatasetsSource, where: str) -> Any:
    import datasets

    folder = Path(source.path).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            saved = datasets.load_from_disk(str(folder))
            if not isinstance(saved, datasets.DatasetDict):
                return saved
            if source.split not in saved:
                raise UserError(f"{where} has no split {source.split!r}; it has {', '.join(map(str, saved))}")
            return saved[source.split]
        return datasets.load_dataset(
            str(folder) if folder.exists() else source.path,
            source.name,
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from None


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _text(value: object, where: str, field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: field {field!r} has half a surrogate pair at character {error.start}") from None
    return value


def _missing_field(where: str | Path, field: str, fields: Iterable[str]) -> UserError:
    return UserError(f"{where}: there is no field {field!r}; the fields are {', '.join(sorted(fields)) or '(none)'}")


def _bad_encoding(path: Path, offset: int) -> UserError:
    return UserError(f"{path}: not UTF-8 at byte {offset}; convert it first, for example with iconv")


_READERS: dict[str, Callable[[Any, Path, int, _Gauge], Iterator[str]]] = {
    "stdlib": _read_stdlib,
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "datasets": _read_datasets,
}
