"""The source files of Python's standard library."""

from __future__ import annotations

import io
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from turbolm.errors import UserError
from turbolm.recipe.sources.base import BaseSource, Gauge

# Folders of the standard library that some distributions omit, move, add, or fill with build settings.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class StdlibSource(BaseSource):
    """The source files of the running Python's standard library: always there, real, long-tailed."""

    type: Literal["stdlib"] = Field(description="which kind of source this is")

    def files(self) -> list[Path]:
        """Return its source files, sorted by path."""
        root = Path(sysconfig.get_path("stdlib"))
        files = []
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in _NOT_STDLIB and not name.startswith("config-")]
            files += [Path(folder, n) for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata")]
        if not files:
            raise UserError(f"The standard library in {root} has no source files; use another source ({self.key})")
        return sorted(files, key=lambda path: path.relative_to(root).as_posix())

    def listing(self) -> list[tuple[str, int, int | str]]:
        """Return names and sizes: each node may have its own installation of the standard library."""
        return [("/".join(path.parts[-2:]), status.st_size, 0) for path, status in self.stats()]

    def read(self, path: Path, skip: int, gauge: Gauge) -> Iterator[str]:
        """Yield the text of a file; nothing for one that is invalid on purpose."""
        gauge.share = lambda: 1.0
        if skip:
            return
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        try:
            text = content.decode()
        except UnicodeDecodeError:
            try:
                encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
                text = content.decode(encoding)
            except (SyntaxError, UnicodeDecodeError):
                return
        yield text
