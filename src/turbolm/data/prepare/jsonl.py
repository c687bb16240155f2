"""Parse JSON lines, and a JSON array of documents in their place; say what is wrong in the words of a user."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator

from turbolm.data.prepare.bad import Unusable

_ARRAY = re.compile(rb"\s*\[\s*[{\]]")
_BLANK = re.compile(r"[ \t\n\r]*")
_LONGEST_LITERAL = len("-Infinity")


def not_utf8(error: UnicodeDecodeError) -> str:
    """What to say after the place of the byte."""
    byte = error.object[error.start]
    return f"(0x{byte:02x}) is not UTF-8; text in Latin-1 or Windows-1252 must be saved as UTF-8"


def parse_line(line: bytes) -> object:
    """The value of a line. Raises Unusable."""
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise Unusable(f"byte {error.start} of the line {not_utf8(error)}") from None
    except (ValueError, RecursionError) as error:
        if line.startswith(codecs.BOM_UTF8):  # of files that were put together, each with its mark
            return parse_line(line[len(codecs.BOM_UTF8) :])
        raise Unusable(f"not valid JSON: {error}{_hint(line.strip())}") from None


def _hint(line: bytes) -> str:
    if b"\0" in line:
        return "; it holds zero bytes, as an interrupted download leaves them"
    if not line.startswith((b"{", b"[")):
        return f"; it begins with {line[:40].decode(errors='replace')!r}"
    if line.endswith((b"{", b",")):
        return "; a line must be a whole JSON object, as `jq -c .` writes it"
    return ""


def is_array(head: bytes) -> bool:
    """Whether a file that begins like this is one JSON array of objects: a line of JSON lines is an object itself."""
    return _ARRAY.match(head) is not None


def array_values(chunks: Iterator[bytes]) -> Iterator[object]:
    """The values of a JSON array of which `is_array` knows the first chunk. Raises ValueError for anything else.

    The time is linear in the length of a value: what is held doubles before it is parsed again.
    """
    buffer = _Buffer(chunks)
    buffer.grow()
    at = buffer.text.index("[") + 1
    end = _skip(buffer.text, at)
    mark, buffer.at = ("]", end + 1) if buffer.text[end] == "]" else (",", at)
    while mark == ",":
        value, mark = buffer.take()
        yield value
    if not buffer.is_blank():
        raise ValueError("something follows its end")


class _Buffer:
    """The part of a JSON text that is being parsed, from `at` on."""

    def __init__(self, chunks: Iterator[bytes]):
        self.text, self.at, self._is_all = "", 0, False
        self._chunks = chunks
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._parse = json.JSONDecoder().raw_decode

    def grow(self) -> None:
        """Forget what was parsed, and read at least as much as is left."""
        parts = [self.text[self.at :]]
        wanted = max(1, len(parts[0]))
        while wanted > 0 and not self._is_all:
            chunk = next(self._chunks, None)
            self._is_all = chunk is None
            try:
                parts.append(self._decode(chunk or b"", self._is_all))
            except UnicodeDecodeError as error:
                raise ValueError(f"byte {not_utf8(error)}") from None
            wanted -= len(parts[-1])
        self.text, self.at = "".join(parts), 0

    def take(self) -> tuple[object, str]:
        """The next value, and the comma or bracket after it."""
        while True:
            try:
                value, end = self._parse(self.text, _skip(self.text, self.at))
                end = _skip(self.text, end)
                if (mark := self.text[end]) not in ",]":
                    raise json.JSONDecodeError("Expecting ',' delimiter", self.text, end)
                self.at = end + 1
                return value, mark
            except IndexError:  # nothing after the value, which may go on then
                problem = "the file ends inside it"
            except json.JSONDecodeError as error:
                # What is only cut off fails near its end, and an open string where it begins.
                is_open = error.msg.startswith("Unterminated")
                problem = "the file ends inside it" if is_open or error.pos == len(self.text) else error.msg
                if not is_open and error.pos + _LONGEST_LITERAL < len(self.text):
                    raise ValueError(problem) from None
            if self._is_all:
                raise ValueError(problem)
            self.grow()

    def is_blank(self) -> bool:
        """Whether nothing is left but blanks."""
        return not self.text[self.at :].strip() and not any(chunk.strip() for chunk in self._chunks)


def _skip(text: str, at: int) -> int:
    """Where the blanks from `at` on end."""
    return _BLANK.match(text, at).end()  # type: ignore[union-attr]
