"""How each rank ended. Torch-free.

Launchers lose exit codes, and a rank that lost its peer is not the one that failed.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

from turbolm.redaction import redact

# What gloo, NCCL and the rendezvous store say when a peer is gone or silent.
_COMMUNICATION_TEXTS = (
    "Timed out waiting",
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "gloo/transport",
    "Gloo connectFullMesh failed",
    "Socket Timeout",
    "NCCL error",
    "failed to connect",
    "wait timeout",
)
_COMMUNICATION_TYPES = {"DistBackendError", "DistNetworkError", "DistStoreError", "QueueEmptyError"}


@dataclass(frozen=True)
class RankEnd:
    """The end of one rank. `kind` is done, refused (a UserError), communication or error."""

    rank: int
    host: str
    exit_code: int
    kind: str
    message: str


def failure_kind(error: BaseException) -> str:
    """`communication` when the error tells of a lost or silent peer, else `error`: something is wrong on this rank."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & _COMMUNICATION_TYPES:
        return "communication"
    lost_peer = isinstance(error, (RuntimeError, OSError)) and any(text in str(error) for text in _COMMUNICATION_TEXTS)
    return "communication" if lost_peer else "error"


def record_rank_end(attempt_folder: Path, exit_code: int, kind: str, message: str = "") -> None:
    """Leave this rank's end where the launchers of all nodes find it."""
    rank = int(os.environ.get("RANK", "0"))
    end = RankEnd(rank, platform.node(), exit_code, kind, redact(message)[:2000])
    folder = attempt_folder / "ranks"
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{rank}.{os.getpid()}"
    temporary.write_text(json.dumps(asdict(end)) + "\n", encoding="utf-8")
    temporary.replace(folder / f"{rank}.json")


def read_rank_ends(attempt_folder: Path) -> list[RankEnd]:
    """The ranks that ended by themselves, by number; a killed one left nothing."""
    ends = []
    for path in (attempt_folder / "ranks").glob("[0-9]*.json"):
        try:
            ends.append(RankEnd(**json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError, RecursionError):
            continue
    return sorted(ends, key=lambda end: end.rank)
