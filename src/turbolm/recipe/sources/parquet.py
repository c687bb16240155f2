"""Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from turbolm.errors import UserError
from turbolm.recipe.fields import Text
from turbolm.recipe.sources.base import Bad, FileSource, Gauge, Unusable, no_field, not_utf8
from turbolm.recipe.sources.files import why_not_parquet

_ROWS = 256  # decoded at a time; a row may be megabytes


class ParquetSource(FileSource):
    """Parquet files; each row is one document."""

    type: Literal["parquet"] = Field(description="which kind of source this is")
    field: Text = Field("text", description="the key or column that holds the document's text")

    def read(self, path: Path, skip: int, gauge: Gauge) -> Iterator[str | Bad]:
        """Yield the text of each row. Row groups before the first row to read are not decoded."""
        import pyarrow
        import pyarrow.parquet

        row = 0
        try:
            # With a buffer, a row group is read page by page, so even one as large as its file costs little memory.
            with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20) as file:
                _check_column(file.schema_arrow, self.field, path)
                counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                group = 0  # the first row group to read; `row` is its first row
                while group < len(counts) and row + counts[group] <= skip:
                    group, row = group + 1, row + counts[group]
                num_rows = max(1, sum(counts))
                gauge.share = lambda: row / num_rows
                for number in range(group, len(counts)):  # a single call for all of them would keep their data
                    for batch in file.iter_batches(_ROWS, row_groups=[number], columns=[self.field], use_threads=False):
                        # `a.b` is the column of that name; to pyarrow it is also the field b of a column a.
                        for value in _values(batch.column(batch.schema.names.index(self.field))):
                            row += 1
                            if row > skip:
                                yield value if isinstance(value, str) else Bad(f"{path}: row {row}", str(value))
        except (pyarrow.ArrowException, OSError) as error:
            if problem := why_not_parquet(path):
                raise UserError(f"{path} {problem}") from None
            why = " ".join(str(error).split())[:500]  # Arrow's may have several lines
            raise UserError(f"{path} cannot be read as parquet after row {row}: {why}") from None

    def parts(self, path: Path) -> list[tuple[int, int]]:
        """Return rows and bytes of each row group; none if the file cannot be read, which `read` explains."""
        import pyarrow.parquet

        try:
            metadata = pyarrow.parquet.read_metadata(path)
        except (pyarrow.ArrowException, OSError):
            return []
        groups = map(metadata.row_group, range(metadata.num_row_groups))
        return [(group.num_rows, group.total_byte_size) for group in groups]


def _check_column(schema: Any, name: str, path: Path) -> None:
    """Refuse a file unless exactly one column has this name, and it is text."""
    from pyarrow import types

    if name not in schema.names:
        raise UserError(f"{path}: {no_field(name, schema.names)}")
    if schema.names.count(name) > 1:
        raise UserError(f"{path}: {schema.names.count(name)} columns have the name {name!r}; rename all but one")
    kind = schema.field(name).type
    text = kind.value_type if types.is_dictionary(kind) else getattr(kind, "storage_type", kind)
    checks = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    if not any(check(text) for check in checks):
        raise UserError(f"{path}: field {name!r} is {str(kind)[:100]}, not text")


def _values(column: Any) -> Sequence[object]:
    """Yield the texts of an Arrow array; for each that is not UTF-8, the reason."""
    try:
        return [value or "" for value in column.to_pylist()]
    except UnicodeDecodeError:
        return [_value(value) for value in column]


def _value(value: Any) -> object:
    try:
        return value.as_py() or ""
    except UnicodeDecodeError as error:
        return Unusable(f"byte {error.start} of the text {not_utf8(error)}")
