"""Documents that cannot be used: not what their source says. A recipe has them refused, or left out and counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from turbolm.errors import UserError

OnBad = Literal["refuse", "skip"]  # data.on_bad_document
_NUM_NAMED = 10
_NUM_KEY, _NAMED_KEY = "bad_documents", "first_bad_documents"  # in records of shards, and in manifests


class Unusable(Exception):
    """Why a document cannot be used; where it is, the caller knows."""


@dataclass(frozen=True)
class Bad:
    """What a reader gives in place of a document that cannot be used."""

    where: str  # file and line, or row
    reason: str

    def refusal(self) -> UserError:
        """What to raise where it is not to be left out."""
        return _refusal(f"{self.where}: {self.reason}")


def _refusal(problem: str) -> UserError:
    return UserError(f"{problem}. `data.on_bad_document: skip` leaves such documents out")


@dataclass
class LeftOut:
    """How many documents were left out, and what was wrong with the first ten of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, bad: Bad) -> None:
        """Count one more."""
        self.count += 1
        if len(self.first) < _NUM_NAMED:
            self.first.append(str(UserError(f"{bad.where}: {bad.reason}"))[:500])

    def extend(self, record: Mapping[str, Any]) -> None:
        """Count those of a later part, which its record tells."""
        self.count += record.get(_NUM_KEY, 0)
        self.first += record.get(_NAMED_KEY, ())[: _NUM_NAMED - len(self.first)]

    def record(self) -> dict[str, Any]:
        """The same as plain data; nothing where there are none, as before they could be left out."""
        return {_NUM_KEY: self.count, _NAMED_KEY: self.first} if self.count else {}


def check_left_out(record: Mapping[str, Any], on_bad: OnBad) -> None:
    """Raise UserError where the record of a shard or a store tells of documents that a recipe refuses."""
    if on_bad == "refuse" and record.get(_NUM_KEY):
        raise _refusal(record[_NAMED_KEY][0])


def tell_left_out(record: Mapping[str, Any]) -> list[str]:
    """Lines that say how many documents a store leaves out for being bad, and what is wrong with the first of them."""
    count, first = record.get(_NUM_KEY, 0), record.get(_NAMED_KEY, [])
    return [f"left out: {count} bad documents, such as", *(f"  {problem}" for problem in first)] if count else []
