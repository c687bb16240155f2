"""Slurm's own grammar for times, sizes, hosts, dependencies and features, as sbatch(1) reads them. Torch-free.

What Slurm reads in silence as something else (`a[1-3` is one host for it, and `ib&` the same as `ib`) is refused.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, WithJsonSchema

from turbolm.recipe.fields import UNIT_TEXT, Text
from turbolm.units import parse_duration

UNLIMITED: Literal["UNLIMITED"] = "UNLIMITED"
_MAX_DAYS = 3650  # Slurm (22.05) counts minutes in 32 bits, and takes what goes beyond for something shorter

_HOST = re.compile(r"[\w.-]*(?:\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\][\w.-]*)+|[\w.-]+", re.ASCII)
_JOB = r"\d+(?:_(?:\d+|\*))?(?:\+\d+)?"
_DEPENDENCY = rf"(?:after(?:any|burstbuffer|corr|notok|ok)?(?::{_JOB})+|singleton)"
_GROUP = "\0"
_FEATURE = rf"(?:[\w.:=+%@/-]+|{_GROUP})(?:\*\d+)?"
_FEATURES = rf"{_FEATURE}(?:[&|,]{_FEATURE})*"


def slurm_clock(seconds: int | Literal["UNLIMITED"]) -> str:
    """D-HH:MM:SS, or UNLIMITED."""
    if isinstance(seconds, str):
        return seconds
    days, rest = divmod(seconds, 86400)
    return f"{days}-{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"


def _time(value: object) -> object:
    """`D-HH`, `D-HH:MM[:SS]`, `HH:MM:SS`, `UNLIMITED` as Slurm reads them, and 1h30m as elsewhere in a recipe."""
    text = str(value).strip()
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"expected a time limit such as 1h30m, 01:30:00 or 1-12:00:00, got {value!r}")
    if text.lower() in ("unlimited", "infinite", "-1"):
        return UNLIMITED
    if re.fullmatch(r"[0-9]+", text):
        raise ValueError(
            f"expected a unit: {text} is {text} minutes for sbatch and {text} seconds in the rest of a recipe; write "
            f"{text}m or {text}s, or UNLIMITED for no limit, which 0 is for sbatch"
        )
    clock = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+)(?::(\d+))?)?", text, re.ASCII)
    if clock and (clock[1] or clock[4]):
        days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        limit = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    else:
        limit = parse_duration(text)
    if not 0 < limit <= _MAX_DAYS * 86400:
        raise ValueError(f"expected more than 0 and at most {_MAX_DAYS} days, or UNLIMITED for no limit, got {value!r}")
    return limit


def _memory(value: object) -> object:
    """Of Slurm's units, which count in 1024; a bare number is in MB."""
    match = re.fullmatch(r"([0-9]+)(?:([KMGT])B?)?", str(value), re.ASCII | re.IGNORECASE)
    if match is None or isinstance(value, bool):
        raise ValueError(
            f"expected a size as Slurm writes it, such as 64G (K, M, G or T; a bare number is in MB), got {value!r}"
        )
    return match[1] + (match[2] or "").upper()


def memory_bytes(value: str) -> int:
    """The bytes of a memory as the recipe has it; 0 is all of a node's."""
    unit = value[-1] if value[-1] in "KMGT" else "M"
    return int(value.rstrip("KMGT")) * 1024 ** (1 + "KMGT".index(unit))


def _value(value: str) -> str:
    """Slurm's own grammar for lists and expressions needs no blank, quote or backslash: none of it means a shell."""
    if not re.fullmatch(r"[\w\[(~!@%/][\w.,:+*%@=/\[\]()|&!~^?{}-]*", value, re.ASCII):
        raise ValueError(
            "expected letters, digits and any of _.,:+*%@=/[]()|&!~^?{}- without blanks and quotes, "
            f"not starting with '-', got {value!r}"
        )
    return value


def _hosts(value: str) -> str:
    """A list such as `a[1-3,7],b`, or the path of a file with host names."""
    hosts = re.split(r",(?![^\[]*\])", value)
    ranges = re.findall(r"(?<=[\[,])(\d+)-(\d+)(?=[\],])", value)
    if "/" not in value and not (
        all(map(_HOST.fullmatch, hosts)) and all(int(first) <= int(last) for first, last in ranges)
    ):
        raise ValueError(f"expected hosts as Slurm lists them, such as node[03,07-09],login1, got {value!r}")
    return value


def _dependency(value: str) -> str:
    """`,` waits for all, `?` for any; Slurm takes a mixture for `?` alone."""
    alone = re.fullmatch(_JOB, value)
    if not re.fullmatch(rf"{_DEPENDENCY}(?:(?:,{_DEPENDENCY})*|(?:\?{_DEPENDENCY})*)", value, re.IGNORECASE):
        raise ValueError(
            "expected jobs to wait for as sbatch takes them, such as afterok:12:13,singleton (after, afterany, "
            "afterburstbuffer, aftercorr, afternotok, afterok; all joined by `,` or all by `?`), "
            f"got {value!r}" + (f"; did you mean afterok:{value}, or afterany:{value}?" if alone else "")
        )
    return value


def _constraint(value: str) -> str:
    """Features joined by `&`, `|` or `,`, in groups of `()` and `[]`, each with a number of nodes after `*`."""
    rest = value
    while (inner := re.sub(rf"\({_FEATURES}\)|\[{_FEATURES}\]", _GROUP, rest)) != rest:
        rest = inner
    if not re.fullmatch(_FEATURES, rest):
        raise ValueError(f"expected features as sbatch takes them, such as ib&ssd or [rack1*2&rack2*4], got {value!r}")
    return value


SlurmTime = Annotated[
    int | Literal["UNLIMITED"],
    BeforeValidator(_time),
    PlainSerializer(slurm_clock, return_type=str),
    WithJsonSchema(UNIT_TEXT),
]
SlurmMemory = Annotated[Text, BeforeValidator(_memory), WithJsonSchema(UNIT_TEXT)]
SlurmValue = Annotated[Text, AfterValidator(_value)]
Hosts = Annotated[SlurmValue, AfterValidator(_hosts)]
Dependency = Annotated[SlurmValue, AfterValidator(_dependency)]
Constraint = Annotated[SlurmValue, AfterValidator(_constraint)]
