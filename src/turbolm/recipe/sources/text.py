"""Text files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from turbolm.recipe.sources.base import Bad, FileSource, Gauge, not_utf8
from turbolm.recipe.sources.files import read_utf8


class TextSource(FileSource):
    """Text files, plain or compressed (gzip, zstd, xz, bz2); each file is one document."""

    type: Literal["text"] = Field(description="which kind of source this is")

    def read(self, path: Path, skip: int, gauge: Gauge) -> Iterator[str | Bad]:
        """Yield the text of a file."""
        gauge.share = lambda: 1.0
        if skip:
            return
        content = b"".join(read_utf8(path, "text", gauge))
        try:
            yield content.decode()
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            yield Bad(f"{path}:{line}", f"byte {error.start} of the file {not_utf8(error)}")
