"""How an attempt ended: what every rank and node recorded, what follows from it, and the words for it. Torch-free.

    attempts/<n>/ranks/<rank>.json   how a rank ended, because launchers lose exit codes
                 nodes/<node>.json   what the launcher of a node of a Slurm job saw
                 outcome.json        how the attempt ended: from rank 0, from the watchdog, or from `explain`

A rank that lost its peer is not the one that failed, so the two are told apart.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from turbolm.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_OK,
    EXIT_REQUEUE,
    EXIT_SIGNAL,
    EXIT_STOPPED,
    RunError,
    UserError,
)
from turbolm.files import load_json, read_json, write_json
from turbolm.redaction import redact

OUTCOME = "outcome.json"

# The status of an attempt
FINISHED = "finished"  # trained its budget
COMPLETE = "complete"  # had nothing left to train
STOPPED = "stopped"  # saved and stopped, as asked
HUNG = "hung"  # ended by the watchdog
LOST = "lost"  # nodes or ranks were lost
REFUSED = "refused"  # something must change first
FAILED = "failed"

# How a rank ended
DONE, BAD_INPUT, LOST_PEER, ERROR = "done", "refused", "communication", "error"

# What gloo, NCCL and the rendezvous store say when a peer is gone or silent.
_LOST_PEER_TEXTS = (
    "Timed out waiting", "Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe",
    "gloo/transport", "Gloo connectFullMesh failed", "Socket Timeout", "NCCL error", "failed to connect",
    "wait timeout",
)  # fmt: skip
_LOST_PEER_TYPES = {"DistBackendError", "DistNetworkError", "DistStoreError", "QueueEmptyError"}
_MAX_LINES = 8  # of ranks that say the same
_LAST_WORDS = 15  # lines of a launcher's log


@dataclass(frozen=True)
class RankEnd:
    """The end of one rank; `kind` is DONE, BAD_INPUT, LOST_PEER or ERROR."""

    rank: int
    host: str
    exit_code: int
    kind: str
    message: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}: {self.message}"


@dataclass(frozen=True)
class Outcome:
    """The end of an attempt: a status, the exit code of the run, and what to tell the user."""

    status: str
    exit_code: int
    message: str = ""
    unix_time: float = field(default_factory=time.time)


def write_outcome(attempt_folder: Path, outcome: Outcome) -> None:
    """Record how an attempt ended."""
    write_json(attempt_folder / OUTCOME, asdict(outcome))


def read_outcome(attempt_folder: Path) -> Outcome | None:
    """How an attempt ended; None while it runs, and when it was killed with its launcher."""
    found = read_json(attempt_folder / OUTCOME)
    try:
        outcome = None if found is None else Outcome(**found)
    except TypeError:
        return None
    if outcome is None or [type(outcome.status), type(outcome.exit_code), type(outcome.message)] != [str, int, str]:
        return None  # damaged
    return outcome


def outcome_of(error: BaseException) -> Outcome:
    """The outcome of a start that `error` ended before any rank ran."""
    if isinstance(error, UserError | OSError):
        return Outcome(REFUSED, EXIT_BAD_INPUT, redact(str(error)))
    if isinstance(error, SystemExit) and error.code in (EXIT_REQUEUE, EXIT_STOPPED):
        return Outcome(STOPPED, int(error.code), "stopped before the ranks were started")
    return Outcome(FAILED, EXIT_FAILED, redact(f"{type(error).__name__}: {error}"))


class LateRanksError(RunError):
    """Ranks that never came to the meeting: a lost node, not an error of the rank that waited for them."""


def classify(error: BaseException) -> tuple[int, str, str]:
    """Exit code, kind and message of a rank that ends with an exception."""
    if isinstance(error, UserError):
        return EXIT_BAD_INPUT, BAD_INPUT, str(error)
    if isinstance(error, RunError):
        return EXIT_FAILED, LOST_PEER if isinstance(error, LateRanksError) else ERROR, str(error)
    return EXIT_FAILED, failure_kind(error), f"{type(error).__name__}: {error}".partition("\n")[0]


def failure_kind(error: BaseException) -> str:
    """LOST_PEER when the error means a lost or silent peer, else ERROR: something is wrong on this rank."""
    names = {kind.__name__ for kind in type(error).__mro__}
    lost_peer = isinstance(error, (RuntimeError, OSError)) and any(text in str(error) for text in _LOST_PEER_TEXTS)
    return LOST_PEER if lost_peer or names & _LOST_PEER_TYPES else ERROR


def record_rank_end(attempt_folder: Path, exit_code: int, kind: str, message: str = "") -> None:
    """Leave this rank's end where the launchers of all nodes find it."""
    rank = int(os.environ.get("RANK", "0"))
    end = RankEnd(rank, platform.node(), exit_code, kind, redact(message)[:2000])
    write_json(attempt_folder / "ranks" / f"{rank}.json", asdict(end))


def read_rank_ends(attempt_folder: Path, ranks: Iterable[int] | None = None) -> list[RankEnd]:
    """The ranks that ended by themselves, by number, of all or of these `ranks`; a killed one left nothing."""
    ends, folder = [], attempt_folder / "ranks"
    for path in folder.glob("[0-9]*.json") if ranks is None else [folder / f"{rank}.json" for rank in ranks]:
        try:
            ends.append(RankEnd(**load_json(path)))
        except (OSError, ValueError, TypeError):
            continue
    return sorted(ends, key=lambda end: end.rank)


def read_nodes(attempt_folder: Path) -> list[dict[str, Any]]:
    """What each node's launcher recorded, by node."""
    paths = sorted((attempt_folder / "nodes").glob("[0-9]*.json"), key=lambda path: int(path.stem))
    return [node for path in paths if (node := read_json(path)) is not None]


def explain(attempt_folder: Path, launcher_code: int | None = None) -> Outcome:
    """The outcome of an attempt that left none, from what its ranks and nodes recorded.

    `launcher_code` is the exit code of `accelerate launch` for a run on one machine, negative for a signal; None for a
    Slurm job. There an attempt is LOST, and worth another start, when a node or rank is gone or could not reach the
    others, and no rank has an error of its own.
    """
    ends, nodes = read_rank_ends(attempt_folder), read_nodes(attempt_folder)
    refused = [node["refused"] for node in nodes if node.get("refused")]
    refused += [end.message for end in ends if end.kind == BAD_INPUT]
    if refused:
        return Outcome(REFUSED, EXIT_BAD_INPUT, refused[0])
    errors = [str(end) for end in ends if end.kind == ERROR]
    cut_off = [str(end) for end in ends if end.kind == LOST_PEER]
    logs = f"logs: {attempt_folder}"
    if launcher_code is not None:
        lines = errors or cut_off or _last_words(attempt_folder / "launcher.log")  # killed, or never started
        return Outcome(FAILED, _exit_code(launcher_code), "\n".join(["training failed", *lines[-_LAST_WORDS:], logs]))
    if errors:
        return Outcome(FAILED, EXIT_FAILED, "\n".join(["training failed", *errors[:_MAX_LINES], logs]))
    if not nodes:
        return Outcome(FAILED, EXIT_FAILED, f"no node started its launcher; {logs}")
    # Cut off from each other, two nodes blame one another; the batch shell runs on the head, so its word counts first.
    lost = nodes[0].get("lost") or sorted({text for node in nodes for text in node.get("lost", ())}) or cut_off
    return Outcome(LOST, EXIT_REQUEUE, "\n".join(["nodes or ranks were lost", *lost[:_MAX_LINES], logs]))


def conclude(attempt_folder: Path) -> None:
    """Record how a world that was started by hand ended, as far as its rank 0 knows, unless that is recorded."""
    ends = [end for end in read_rank_ends(attempt_folder) if end.kind != DONE]
    if ends and read_outcome(attempt_folder) is None:
        write_outcome(attempt_folder, explain(attempt_folder, ends[0].exit_code))


def _last_words(log: Path) -> list[str]:
    try:
        return redact(log.read_text(encoding="utf-8", errors="replace")).splitlines()
    except OSError:
        return []


def _exit_code(launcher_code: int) -> int:
    if launcher_code < 0:
        return EXIT_SIGNAL - launcher_code  # as a shell does
    return launcher_code if launcher_code not in (EXIT_OK, EXIT_BAD_INPUT) else EXIT_FAILED
