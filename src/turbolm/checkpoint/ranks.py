"""What all ranks do in step on the host: what fails on one of them fails on all, so that none waits for ever.

Torch-free; `agreement` has the two ways in which ranks exchange values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from turbolm.errors import UserError

_MAX_REASONS, _MAX_RANKS = 8, 8  # named in a failure: every rank gets its text


class Agree:
    """How the ranks exchange values on the host. Every rank calls the same method, in the same order.

    `gather` and `scatter` send each rank's value between it and rank 0 alone, so that what a rank sends and receives
    does not grow with the number of ranks. This class is that of a process on its own.
    """

    rank, num_ranks = 0, 1

    def gather(self, value: Any) -> list[Any] | None:
        """What every rank gave, by rank, on rank 0; None on the others."""
        return [value]

    def scatter(self, values: Sequence[Any] | None) -> Any:
        """What rank 0 gives this rank, of its one value for each rank; the others pass None."""
        assert values is not None
        return values[0]

    def broadcast(self, value: Any) -> Any:
        """What rank 0 gave, on every rank."""
        return self.scatter([value] * self.num_ranks if self.rank == 0 else None)

    def __call__(self, value: Any) -> list[Any]:
        """What every rank gave, by rank, on every rank: for a few bytes only."""
        everything: list[Any] = self.broadcast(self.gather(value))
        return everything


ALONE = Agree()


def in_step(agree: Agree, action: Callable[[], Any] | None, error: type[Exception] = RuntimeError) -> Any:
    """Do this rank's part and wait for the others'; returns what this rank's part gave, which is not sent.

    Raises `error` on all ranks with what any failed with.
    """
    result, failure = None, None
    try:
        result = action() if action else None
    except UserError as reason:
        failure = str(reason)
    except Exception as reason:  # whatever it was, the other ranks must not wait for this one
        failure = f"{type(reason).__name__}: {reason}"
    failures = share_failure(agree, failure)
    if failures:
        raise error(failures)
    return result


def share_failure(agree: Agree, failure: str | None) -> str:
    """What any rank failed with, the same text on every rank; empty where none failed."""
    by_rank = agree.gather(failure)
    told: str = agree.broadcast(None if by_rank is None else told_of(by_rank))
    return told


def told_of(by_rank: list[str | None]) -> str:
    """What any rank failed with; the same text for ranks with the same reason is said once."""
    ranks: dict[str, list[str]] = {}
    for rank, failure in enumerate(by_rank):
        if failure:
            ranks.setdefault(failure, []).append(str(rank))
    named = list(ranks.items())[:_MAX_REASONS]
    texts = [f"rank {_some(numbers)}: {failure}" for failure, numbers in named]
    if len(ranks) > len(named):
        texts.append(f"and {len(ranks) - len(named)} more reasons of other ranks")
    return "; ".join(texts)


def _some(numbers: list[str]) -> str:
    more = len(numbers) - _MAX_RANKS
    return ", ".join(numbers[:_MAX_RANKS]) + (f" and {more} more" if more > 0 else "")
