"""JSON lines, or a JSON array of documents, with error messages in the user's terms."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from turbolm.errors import UserError
from turbolm.recipe.fields import Text
from turbolm.recipe.sources.base import Bad, FileSource, Gauge, Unusable, no_field, not_utf8, text_of
from turbolm.recipe.sources.files import read_utf8, split_lines

_ARRAY = re.compile(rb"\s*\[\s*[{\]]")  # a line of JSON lines is a complete object
_BLANK = re.compile(r"[ \t\n\r]*")


class JsonlSource(FileSource):
    """JSON lines, plain or compressed (gzip, zstd, xz, bz2), one document per line; or a JSON array of documents."""

    type: Literal["jsonl"] = Field(description="which kind of source this is")
    field: Text = Field("text", description="the key or column that holds the document's text")

    empty_files_are_odd: ClassVar[bool] = True

    def read(self, path: Path, skip: int, gauge: Gauge) -> Iterator[str | Bad]:
        """Yield the text of each line that is not blank, or of each object of the array."""
        chunks = read_utf8(path, "JSON lines", gauge)
        first = next(chunks, b"")
        chunks = chain([first], chunks)
        if _ARRAY.match(first):
            yield from self._read_array(path, skip, b"".join(chunks))
            return
        for number, line in enumerate(split_lines(chunks), start=1):
            if not line or line.isspace():
                continue
            if skip:
                skip -= 1
                continue
            try:
                yield self._text(parse_line(line))
            except Unusable as reason:
                yield Bad(f"{path}:{number}", str(reason))

    def _read_array(self, path: Path, skip: int, content: bytes) -> Iterator[str | Bad]:
        number = 0
        try:
            for number, value in enumerate(_array_values(content), start=1):
                if number > skip:
                    try:
                        yield self._text(value)
                    except Unusable as reason:
                        yield Bad(f"{path}: document {number}", str(reason))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not a valid JSON array after document {number}: {error}") from None

    def _text(self, value: object) -> str:
        if not isinstance(value, dict):
            raise Unusable(f"expected a JSON object, got {type(value).__name__}")
        if self.field not in value:
            raise Unusable(no_field(self.field, value))
        return text_of(value[self.field], self.field)


def parse_line(line: bytes) -> object:
    """Return the value of a line. Raises Unusable."""
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise Unusable(f"byte {error.start} of the line {not_utf8(error)}") from None
    except (ValueError, RecursionError) as error:
        if line.startswith(codecs.BOM_UTF8):  # from concatenated files, each with its mark
            return parse_line(line[len(codecs.BOM_UTF8) :])
        raise Unusable(f"not valid JSON: {error}{_hint(line.strip())}") from None


def _hint(line: bytes) -> str:
    if b"\0" in line:
        return "; it holds zero bytes, as an interrupted download leaves them"
    if not line.startswith((b"{", b"[")):
        return f"; it begins with {line[:40].decode(errors='replace')!r}"
    if line.endswith((b"{", b",")):
        return "; a line must be a complete JSON object, as `jq -c .` writes it"
    return ""


def _array_values(content: bytes) -> Iterator[object]:
    """Yield the values of a JSON array; the full text is in memory. Raises ValueError for anything else."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} {not_utf8(error)}") from None
    parse = json.JSONDecoder().raw_decode
    at = _skip_blank(text, text.index("[") + 1)
    mark = text[at : at + 1]
    while mark != "]":
        try:
            value, end = parse(text, _skip_blank(text, at))
        except json.JSONDecodeError as error:
            # An unterminated string fails at its start; other truncation at the end.
            is_cut = error.msg.startswith("Unterminated") or error.pos == len(text)
            raise ValueError("the file ends inside it" if is_cut else error.msg) from None
        at = _skip_blank(text, end) + 1
        mark = text[at - 1 : at]
        if mark not in (",", "]"):
            raise ValueError("Expecting ',' delimiter" if mark else "the file ends inside it")
        yield value
    if text[max(at, text.index("[") + 2) :].strip():
        raise ValueError("something follows its end")


def _skip_blank(text: str, at: int) -> int:
    """Return the end of the whitespace at `at`."""
    return _BLANK.match(text, at).end()  # type: ignore[union-attr]
