"""Parse and format the quantities a recipe is written in: counts, shares, spans of training, durations, bytes.

Token counts are decimal (`2M` is 2,000,000) except for the lower-case `k`, which is 1,000 as well; sequence lengths
that must be powers of two are written out (`2048`) or with the binary suffix `Ki` (`2Ki`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

_DECIMAL = {"k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_COUNT_SUFFIXES = {"": 1, "B": 10**9} | _DECIMAL | _BINARY
_BYTE_SUFFIXES = {"": 1, "B": 1} | {f"{prefix}B": scale for prefix, scale in (_DECIMAL | _BINARY).items()}
_NUMBER = r"([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)"
_COUNT = re.compile(rf"^{_NUMBER}\s*([A-Za-z]*)$")
_PERCENT = re.compile(rf"^{_NUMBER}\s*%$")
_STEPS = re.compile(rf"^{_NUMBER}\s*([kM]?)\s*steps?$")
_DURATION = re.compile(r"^(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?:in)?)?(?:(\d+)s(?:ec)?)?$")
_CLOCK = re.compile(r"^(?:(\d+)-)?(\d+):(\d{2})(?::(\d{2}))?$")


def parse_count(value: object, suffixes: dict[str, int] = _COUNT_SUFFIXES) -> int:
    """`2M`, `32k`, `1.5B`, `4Ki`, `3e6`, `1_000` or a plain integer, as a non-negative integer.

    Raises ValueError when the text is not such a number or does not come out whole.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"expected a count such as 4096, 32k or 2M, got {value!r}")
    match = _COUNT.match(str(value).strip())
    if match is None or match[2] not in suffixes:
        raise ValueError(f"expected a count such as 4096, 32k or 2M, got {value!r}")
    exact = _fraction(match[1], value) * suffixes[match[2]]
    if exact.denominator != 1:
        raise ValueError(f"expected a whole number, got {value!r} = {float(exact):g}")
    return int(exact)


def parse_bytes(value: object) -> int:
    """`512MB`, `8GiB` or a plain integer, in bytes."""
    try:
        return parse_count(value, _BYTE_SUFFIXES)
    except ValueError:
        raise ValueError(f"expected a size such as 512MB or 8GiB, got {value!r}") from None


def parse_share(value: object) -> float:
    """`2%` or `0.02`, as a number from 0 to 1."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        text = str(value).strip()
        percent = _PERCENT.match(text)
        plain = None if percent else re.match(rf"^{_NUMBER}$", text)
        if percent or plain:
            share = _fraction((percent or plain)[1], value) / (100 if percent else 1)  # type: ignore[index]
            if 0 <= share <= 1:
                return float(share)
    raise ValueError(f"expected a share such as 2% or 0.02, from 0 to 1, got {value!r}")


def parse_duration(value: object) -> int:
    """`1h30m`, `45s`, `2d`, `01:30:00`, `1-12:00:00` or a plain number of seconds, in seconds.

    Raises ValueError for anything else, and for `12:30`, which has two readings.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and (text := value.strip()):
        if text.isdigit() and len(text) < 12:
            return int(text)
        clock = _CLOCK.match(text)
        if clock and clock[1] is None and clock[4] is None:
            raise ValueError(
                f"{text} is minutes and seconds for Slurm, hours and minutes for others; write "
                f"{clock[2]}m{clock[3]}s or {clock[2]}h{clock[3]}m"
            )
        if match := _DURATION.match(text) or clock:
            days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
            return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    raise ValueError(f"expected a duration such as 1h30m, 45s or 01:30:00, got {value!r}")


@dataclass(frozen=True)
class Span:
    """A stretch of training: a number of tokens, a number of steps, or a share of the token budget."""

    amount: float
    unit: str  # "tokens", "steps" or "share"

    @staticmethod
    def parse(value: object) -> Span:
        """`2M` (tokens), `200 steps`, `2%` (of the budget)."""
        if isinstance(value, Span):
            return value
        if isinstance(value, str):
            if match := _STEPS.match(value.strip()):
                return Span(parse_count(match[1] + match[2]), "steps")
            if _PERCENT.match(value.strip()):
                return Span(parse_share(value), "share")
        try:
            return Span(parse_count(value), "tokens")
        except ValueError:
            raise ValueError(f"expected tokens (2M), steps (200 steps) or a share (2%), got {value!r}") from None

    def tokens(self, budget_tokens: int, global_batch_tokens: int) -> float:
        """The span in tokens."""
        scale = {"tokens": 1, "steps": global_batch_tokens, "share": budget_tokens}[self.unit]
        return self.amount * scale

    def __str__(self) -> str:
        if self.unit == "share":  # shifted in decimal, so that the text parses back to the very same share
            percent = Decimal(repr(float(self.amount))).scaleb(2).normalize()
            return f"{percent:f}%" if percent == 0 or percent.adjusted() > -6 else f"{percent}%"
        return f"{int(self.amount)} steps" if self.unit == "steps" else f"{int(self.amount)}"


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of a table as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def format_count(count: float) -> str:
    """1234567 as `1.23M`."""
    for suffix, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= scale * 0.9995:
            return f"{count / scale:.3g}{suffix}"
    return f"{count:.3g}" if count != int(count) else str(int(count))


def format_bytes(num_bytes: float) -> str:
    """Bytes with a binary suffix: 1536 as `1.5 KiB`."""
    for prefix, scale in reversed(_BINARY.items()):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {prefix}B"
    return f"{int(num_bytes)} B"


def format_duration(seconds: float) -> str:
    """5400 as `1h30m`, 75 as `1m15s`, 2.5 as `2.5s`."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def format_step(seconds: float) -> str:
    """The duration of a step, which may take less than a second: 0.0125 as `12.5 ms`, 2.5 as `2.5s`."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else format_duration(seconds)


def _fraction(text: str, value: object) -> Fraction:
    exponent = re.search(r"[eE]([+-]?[0-9]+)$", text)
    if len(text) > 40 or (exponent is not None and abs(int(exponent[1])) > 30):
        raise ValueError(f"number out of range: {value!r}")
    return Fraction(text.replace("_", ""))
