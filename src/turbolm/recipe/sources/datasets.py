"""Data sets of the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from turbolm.errors import UserError
from turbolm.recipe.fields import PathText, Text
from turbolm.recipe.paths import use_path
from turbolm.recipe.sources.base import Bad, BaseSource, Gauge, Unusable, no_field, text_of


class DatasetsSource(BaseSource):
    """A data set of the `datasets` library, by hub name or local path."""

    type: Literal["datasets"] = Field(description="which kind of source this is")
    path: PathText = Field(description="name on the hub, or a local path")
    name: Text | None = Field(None, description="configuration of the data set, where it has several")
    split: Text = Field("train", description="which split is read")
    revision: Text | None = Field(None, description="branch, tag or commit on the hub")
    streaming: bool = Field(False, description="read while downloading, without a local copy")
    field: Text = Field("text", description="the key or column that holds the document's text")

    reads_all_files_at_once: ClassVar[bool] = True

    def files(self) -> list[Path]:
        """Return all files of a local folder; none for a data set from the hub."""
        folder = use_path(self.path, self.key)
        return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []

    def read(self, path: Path, skip: int, gauge: Gauge) -> Iterator[str | Bad]:
        """Yield the text of each row; other columns are not decoded."""
        where, number = f"data set {self.path}", skip
        rows: Any = self._load(where)
        columns: list[str] | None = getattr(rows, "column_names", None)  # some streams do not have them
        if columns and self.field not in columns:
            raise UserError(f"{where}: {no_field(self.field, columns)}")
        if hasattr(rows, "__len__"):
            num_rows = max(1, len(rows))
            gauge.share = lambda: number / num_rows
        try:
            if columns:
                rows = rows.select_columns([self.field])  # otherwise images and audio in other columns would be decoded
            for row in rows.skip(skip) if skip else rows:
                number += 1
                if self.field not in row:
                    raise UserError(f"{where}: {no_field(self.field, row)}")
                try:
                    yield text_of(row[self.field], self.field)
                except Unusable as reason:
                    yield Bad(f"{where}: row {number}", str(reason))
        except UserError:
            raise
        except Exception as error:  # whatever the library and its dependencies raise; a stream reads on demand
            raise UserError(f"{where} cannot be read after row {number}: {_with_cause(error)}") from None

    def _load(self, where: str) -> Any:
        import datasets

        folder = use_path(self.path, self.key)
        try:
            if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
                saved = datasets.load_from_disk(str(folder))
                if not isinstance(saved, datasets.DatasetDict):
                    return saved
                if self.split not in saved:
                    raise UserError(f"{where} has no split {self.split!r}; it has {', '.join(map(str, saved))}")
                return saved[self.split]
            return datasets.load_dataset(
                str(folder) if folder.exists() else self.path,
                self.name,
                split=self.split,
                revision=self.revision,
                streaming=self.streaming,
            )
        except UserError:
            raise
        except Exception as error:  # whatever the library and its dependencies raise
            raise UserError(f"{where} cannot be loaded: {_with_cause(error)}") from None


def _with_cause(error: BaseException) -> str:
    """Return the message of an error and of its root cause, which `datasets` hides."""
    first = error
    for _ in range(50):  # causes may be circular
        first = first.__cause__ or (None if first.__suppress_context__ else first.__context__) or first
    texts = [f"{type(one).__name__}: {' '.join(str(one).split())[:500]}" for one in (error, first)]
    return texts[0] if first is error else f"{texts[0]} (because of {texts[1]})"
