"""Read the documents of a recipe's sources, one after the other and in an order that never changes.

A null text is an empty document. Files are read as a stream wherever their format allows.
"""

from __future__ import annotations

import glob
import io
import os
import stat
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from turbolm.data.prepare.bad import Bad, LeftOut, OnBad, Unusable
from turbolm.data.prepare.files import Gauge, read_utf8, split_lines, why_not_parquet
from turbolm.data.prepare.jsonl import array_values, is_array, not_utf8, parse_line
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
_ALL_BAD = 1000  # documents at the beginning of a source: the recipe is wrong then, not the documents
# Folders of the standard library that some distributions leave out, move, add, or fill with their build's settings.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


Place = tuple[int, int]  # (a file of the source, how many of its documents come before): where a document begins


def iter_documents(sources: Sequence[Source], on_bad: OnBad = "refuse") -> Iterator[tuple[int, str]]:
    """Every document as (index of its source, text), sources in the recipe's order and files sorted by path."""
    num_documents = 0
    for number, source in enumerate(sources):
        for text in Reader(source, on_bad=on_bad):
            num_documents += 1
            yield number, text
    if not num_documents:
        raise no_documents()


class Reader:
    """Iterates over the texts of one source, files sorted by path, from `start` on.

    Skipping what comes before `start` costs far less than reading it: whole files are not opened, lines are not parsed,
    row groups are not decoded. With `on_bad` skip, documents that cannot be used are left out and counted in
    `left_out`; a place counts them like others. Raises UserError for such a document otherwise, where a file cannot be
    read, and where a source gives bad documents and no other.
    """

    def __init__(self, source: Source, start: Place = (0, 0), on_bad: OnBad = "refuse"):
        self.place = start  # of the next document
        self.left_out = LeftOut()
        self._has_good = start != (0, 0)
        self._source, self._on_bad = source, on_bad
        self._files = [Path(source.path)] if isinstance(source, DatasetsSource) else list_files(source)
        self._gauge = Gauge()

    def __iter__(self) -> Iterator[str]:
        read = _READERS[self._source.type]
        first, skip = self.place
        for number in range(first, len(self._files)):
            row = skip if number == first else 0
            self._gauge.share = lambda: 0.0
            for text in read(self._source, self._files[number], row, self._gauge):
                row += 1
                self.place = number, row
                if isinstance(text, Bad):
                    self._leave_out(text)
                else:
                    self._has_good = True
                    yield text
        if self.left_out.count and not self._has_good:
            raise self._nothing_but_bad()

    def _leave_out(self, bad: Bad) -> None:
        if self._on_bad == "refuse":
            raise bad.refusal()
        self.left_out.add(bad)
        if self.left_out.count >= _ALL_BAD and not self._has_good:
            raise self._nothing_but_bad()

    def _nothing_but_bad(self) -> UserError:
        label = self._source.label or self._source.type
        return UserError(
            f"data.sources: the first {self.left_out.count} documents of the source {label!r} cannot be used, and none "
            f"before: {self.left_out.first[0]}"
        )

    @property
    def share_of_file(self) -> float:
        """How much of the file at `place` has been read, 0 to 1."""
        return self._gauge.share() if self.place[1] else 0.0


def empty_files(sources: Sequence[Source]) -> list[Path]:
    """The files of JSON lines that have no byte: allowed, and perhaps what a failed download left."""
    files = (path for source in sources if isinstance(source, JsonlSource) for path in list_files(source))
    return [path for path in files if not path.stat().st_size]


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


def list_files(source: Source) -> list[Path]:
    """The files of a source, sorted by path; none for a data set that comes from the hub."""
    if isinstance(source, StdlibSource):
        return _stdlib_files()
    if isinstance(source, DatasetsSource):
        folder = Path(source.path).expanduser()
        return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    # A link, another spelling or another pattern may lead to the same file, which is read once. Size and time as well:
    # inode numbers of some network file systems are not unique.
    names: dict[tuple[int, ...], Path] = {}
    for pattern in source.path:
        for path, status in _match(pattern):
            identity = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
            others = [names[identity]] if identity in names else []
            names[identity] = min([path, *others], key=lambda name: (len(name.parts), name))
    return sorted(names.values())


def _match(pattern: str) -> list[tuple[Path, os.stat_result]]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise UserError(f"data.sources: {pattern} is a folder; name its files, such as {Path(pattern) / '**' / '*'}")
    # The name of a file may hold characters that mean something in a glob.
    names = [path] if path.is_file() else map(Path, glob.glob(str(path), recursive=True, include_hidden=False))
    files = [(name, status) for name in names if stat.S_ISREG((status := _stat(name)).st_mode)]
    if not files:
        raise UserError(f"data.sources: no file matches {pattern!r} (looked in {Path.cwd()})")
    return files


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        where = f"{path}, a link to {os.readlink(path)}," if path.is_symlink() else path
        raise UserError(f"data.sources: {where} cannot be read: {error.strerror}") from None


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_STDLIB and not name.startswith("config-")]
        files += [Path(folder, n) for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata")]
    if not files:
        raise UserError(f"The standard library in {root} has no source files; use another source (data.sources)")
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _read_stdlib(source: StdlibSource, path: Path, skip: int, gauge: Gauge) -> Iterator[str]:
    try:
        content = path.read_bytes() if not skip else b""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
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


def _read_text(source: TextSource, path: Path, skip: int, gauge: Gauge) -> Iterator[str | Bad]:
    gauge.share = lambda: 1.0
    if skip:
        return
    content = b"".join(read_utf8(path, "text", gauge))
    try:
        yield content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield Bad(f"{path}:{line}", f"byte {error.start} of the file {not_utf8(error)}")


def _read_jsonl(source: JsonlSource, path: Path, skip: int, gauge: Gauge) -> Iterator[str | Bad]:
    chunks = read_utf8(path, "JSON lines", gauge)
    first = next(chunks, b"")
    chunks = chain([first], chunks)
    if is_array(first):
        yield from _read_array(source, path, skip, chunks)
        return
    for number, line in enumerate(split_lines(chunks), start=1):
        if not line or line.isspace():
            continue
        if skip:
            skip -= 1
            continue
        try:
            yield _json_text(parse_line(line), source.field)
        except Unusable as reason:
            yield Bad(f"{path}:{number}", str(reason))


def _json_text(row: object, field: str) -> str:
    if not isinstance(row, dict):
        raise Unusable(f"expected a JSON object, got {type(row).__name__}")
    if field not in row:
        raise Unusable(_no_field(field, row))
    return _text(row[field], field)


def _read_array(source: JsonlSource, path: Path, skip: int, chunks: Iterator[bytes]) -> Iterator[str | Bad]:
    number = 0
    try:
        for row in array_values(chunks):
            number += 1
            if number > skip:
                try:
                    yield _json_text(row, source.field)
                except Unusable as reason:
                    yield Bad(f"{path}: document {number}", str(reason))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a valid JSON array after document {number}: {error}") from None


def _read_parquet(source: ParquetSource, path: Path, skip: int, gauge: Gauge) -> Iterator[str | Bad]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        # With a buffer a row group is read page by page, so that one which is as large as its file costs no memory.
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20) as file:
            _check_column(file.schema_arrow, source.field, path)
            counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            group = 0  # the first row group to read; `row` is its first row
            while group < len(counts) and row + counts[group] <= skip:
                group, row = group + 1, row + counts[group]
            num_rows = max(1, sum(counts))
            gauge.share = lambda: row / num_rows
            for number in range(group, len(counts)):  # one call for all of them would keep what it has read of each
                for batch in file.iter_batches(
                    _PARQUET_ROWS, row_groups=[number], columns=[source.field], use_threads=False
                ):
                    # `a.b` means the column of that name, and to pyarrow the field b of a column a as well.
                    for value in _values(batch.column(batch.schema.names.index(source.field))):
                        row += 1
                        if row > skip:
                            yield value if isinstance(value, str) else Bad(f"{path}: row {row}", str(value))
    except (pyarrow.ArrowException, OSError) as error:
        if problem := why_not_parquet(path):
            raise UserError(f"{path} {problem}") from None
        raise UserError(f"{path} cannot be read as parquet after row {row}: {error}") from None


def _check_column(schema: Any, name: str, path: Path) -> None:
    """Refuse a file unless one column has this name, and it holds text."""
    from pyarrow import types

    if name not in schema.names:
        raise UserError(f"{path}: {_no_field(name, schema.names)}")
    if schema.names.count(name) > 1:
        raise UserError(f"{path}: {schema.names.count(name)} columns have the name {name!r}; rename all but one")
    kind = schema.field(name).type
    text = kind.value_type if types.is_dictionary(kind) else getattr(kind, "storage_type", kind)
    checks = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    if not any(check(text) for check in checks):
        raise UserError(f"{path}: field {name!r} is {str(kind)[:100]}, not text")


def _values(column: Any) -> Sequence[object]:
    """The texts of an Arrow array; for each that is not UTF-8, why."""
    try:
        return [value or "" for value in column.to_pylist()]
    except UnicodeDecodeError:
        return [_value(value) for value in column]


def _value(value: Any) -> object:
    try:
        return value.as_py() or ""
    except UnicodeDecodeError as error:
        return Unusable(f"byte {error.start} of the text {not_utf8(error)}")


def _read_datasets(source: DatasetsSource, path: Path, skip: int, gauge: Gauge) -> Iterator[str | Bad]:
    where, number = f"data set {source.path}", skip
    rows: Any = _load_dataset(source, where)
    columns: list[str] | None = getattr(rows, "column_names", None)  # not known of every stream
    if columns and source.field not in columns:
        raise UserError(f"{where}: {_no_field(source.field, columns)}")
    if hasattr(rows, "__len__"):
        num_rows = max(1, len(rows))
        gauge.share = lambda: number / num_rows
    try:
        if columns:
            rows = rows.select_columns([source.field])  # else images and sounds beside it would be decoded
        for row in rows.skip(skip) if skip else rows:
            number += 1
            if source.field not in row:
                raise UserError(f"{where}: {_no_field(source.field, row)}")
            try:
                yield _text(row[source.field], source.field)
            except Unusable as reason:
                yield Bad(f"{where}: row {number}", str(reason))
    except UserError:
        raise
    except Exception as error:  # whatever the library and those below it raise; a stream reads as it goes
        raise UserError(f"{where} cannot be read after row {number}: {_with_cause(error)}") from None


def _with_cause(error: BaseException) -> str:
    """What an error says, and the one that it began with: `datasets` hides that behind one of its own."""
    first = error
    for _ in range(50):  # causes may go in a circle
        first = first.__cause__ or (None if first.__suppress_context__ else first.__context__) or first
    texts = [f"{type(one).__name__}: {' '.join(str(one).split())[:500]}" for one in (error, first)]
    return texts[0] if first is error else f"{texts[0]} (because of {texts[1]})"


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
    except UserError:
        raise
    except Exception as error:  # whatever the library and those below it raise
        raise UserError(f"{where} cannot be loaded: {_with_cause(error)}") from None


def _text(value: object, field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Unusable(f"field {field!r} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Unusable(f"field {field!r} has half a surrogate pair at character {error.start}") from None
    return value


def _no_field(field: str, fields: Iterable[str]) -> str:
    return f"there is no field {field!r}; the fields are {', '.join(sorted(fields)) or '(none)'}"


_READERS: dict[str, Callable[[Any, Path, int, Gauge], Iterator[str | Bad]]] = {
    "stdlib": _read_stdlib,
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "datasets": _read_datasets,
}
