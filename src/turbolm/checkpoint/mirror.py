"""The copy of a run's checkpoints behind `checkpoint.mirror`: what lies there, and who may write it. Torch-free.

    URL/NAME/current.json            the id of the run that is copied there, and the start of it that writes
    URL/NAME/ID/step-00000120/       the files of a checkpoint under their own names
                       run/          contract.json, hub.json, metrics.jsonl and what else the run folder needs
                       mirror.json   size and SHA-256 of all of them; written last: without it there is no checkpoint

A run gets its id when it first writes there, and keeps it in its folder (mirror.json). `--fresh` takes another one, so
the checkpoints of two runs of one name never mix; those of the former stay. Each start says that it is the writer, and
keeps that in the folder too: one that finds another writer there has been continued elsewhere, and copies nothing.
"""

from __future__ import annotations

import platform
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbolm.checkpoint.manifest import checkpoint_name
from turbolm.checkpoint.retention import Kept, Retention
from turbolm.errors import UserError
from turbolm.files import read_json, write_json
from turbolm.storage import Remote, open_url

KEY = "checkpoint.mirror"
RECORD = "mirror.json"  # of a mirrored checkpoint; in a run folder: the id under which the run is mirrored
RUN_FILES = "run"
FORMAT_VERSION = 1
_CURRENT = "current.json"


@dataclass(frozen=True)
class Mirror:
    """The place of one run's copies."""

    root: Remote  # URL/NAME
    id: str
    writer: str = ""  # this start of the run; empty: it only reads

    @property
    def folder(self) -> Remote:
        return self.root.at(self.id)

    def checkpoint(self, step: int) -> Remote:
        """Where the copy of a checkpoint lies."""
        return self.folder.at(checkpoint_name(step))

    def steps(self) -> list[int]:
        """The steps of which anything is there, ascending. Raises StorageError."""
        names = [name.removeprefix("step-") for name in self.folder.names() if name.startswith("step-")]
        return sorted(int(name) for name in names if name.isdigit())

    def record(self, step: int) -> dict[str, Any] | None:
        """The record of a copy; None for one that is not complete, and an empty one where it is damaged.

        Raises StorageError.
        """
        remote = self.checkpoint(step).at(RECORD)
        record = remote.read_json()
        if record is None:
            return None if remote.info() is None else {}
        return record if _is_record(record, step) else {}

    def remove(self, step: int) -> None:
        """Remove a copy; its record goes first, so that a half-removed one is none. Raises StorageError."""
        self.checkpoint(step).at(RECORD).remove()
        self.checkpoint(step).remove()

    def remove_old(self, retention: Retention, steps: list[int]) -> None:
        """Remove those copies of these steps, ascending, that the retention does not keep. Raises StorageError."""
        known = [
            Kept(step, record["tokens_seen"], record.get("eval_loss"), Path(checkpoint_name(step)))
            for step in steps
            if (record := self.record(step))
        ]
        kept = {path.name for path in retention.keeps(known)}
        for step in steps:
            if checkpoint_name(step) not in kept:
                self.remove(step)


def mirror_root(url: str, name: str) -> Remote:
    """Where the runs of a name are mirrored. Raises UserError."""
    return open_url(url, KEY).at(name)


def read_current(root: Remote) -> dict[str, Any] | None:
    """Which run is mirrored there and which start of it writes; None if there is no word of any. Raises UserError."""
    remote = root.at(_CURRENT)
    current = remote.read_json()
    if current is None and remote.info() is None:
        return None
    if current is not None and current.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{KEY}: {remote.url} is not of this version's format; use another URL")
    if current is None or not isinstance(current.get("id"), str):
        raise UserError(
            f"{KEY}: {remote.url} is damaged, and names the run whose copies are there; restore it, or remove it to "
            "begin another run beside them"
        )
    return current


def claim(root: Remote, run_folder: Path) -> Mirror:
    """Make this process's start the writer of the mirror; a run that has no id yet gets one.

    Raises UserError where the mirror holds another run, and StorageError.
    """
    known, current = read_local(run_folder), read_current(root) or {}
    if current and current["id"] == known.get("id") and not wrote_last(known, current):
        raise UserError(
            f"{KEY}: the run in {root.url} was continued on {current.get('host')} since {run_folder} wrote there; "
            "`turbolm train` and `turbolm submit` fetch what is newer there before they start"
        )
    if current and current["id"] != known.get("id"):
        raise UserError(
            f"{KEY}: {root.url} holds the checkpoints of another run than {run_folder}; give this run another `name` "
            "or URL, or start it with `turbolm train` in an empty run folder to resume from there, or with --fresh"
        )
    return renew(root, run_folder, known.get("id"), current.get("writer"))


def renew(root: Remote, run_folder: Path, known: str | None = None, former: str | None = None) -> Mirror:
    """Say that the run of this folder is mirrored from now on, under a new id unless it is `known`.

    `former` is the last writer of the same run, whom the folder remembers: this process may end before it has told.
    """
    own = known or f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:8]}"
    writer = uuid.uuid4().hex
    about = {"id": own, "writer": writer, "host": platform.node(), "since_unix_sec": int(time.time())}
    write_json(run_folder / RECORD, {**about, "former": former}, durable=True)
    root.at(_CURRENT).write_json({"format_version": FORMAT_VERSION, **about})
    return Mirror(root, own, writer)


def adopt(run_folder: Path, current: dict[str, Any]) -> None:
    """Record that a run folder continues the run that is mirrored, from what its last writer left."""
    write_json(run_folder / RECORD, {key: current.get(key) for key in ("id", "writer")}, durable=True)


def wrote_last(known: dict[str, Any], current: dict[str, Any]) -> bool:
    """Whether a run folder is the one that last wrote to the mirror of its run, or fetched from it."""
    return current.get("writer") in (known.get("writer"), known.get("former"))


def read_local(run_folder: Path) -> dict[str, Any]:
    """The id under which the run of this folder is mirrored, and its last writer; empty before it is."""
    return read_json(run_folder / RECORD) or {}


def check_writer(mirror: Mirror) -> None:
    """Raise UserError unless this start of the run is still the one that writes there."""
    current = read_current(mirror.root) or {}
    if (mirror.id, mirror.writer) != (current.get("id"), current.get("writer")):
        who = f"a start on {current['host']}" if current.get("host") else "something else"
        raise UserError(f"{mirror.root.url} was taken over by {who}; this one copies nothing more there")


def _is_record(record: dict[str, Any], step: int) -> bool:
    files = record.get("files")
    return (
        record.get("format_version") == FORMAT_VERSION
        and record.get("step") == step
        and isinstance(record.get("tokens_seen"), int)
        and isinstance(record.get("attempt"), int)
        and isinstance(files, dict)
        and all(_is_plain(name) and _is_described(file) for name, file in files.items())
    )


def _is_plain(name: str) -> bool:
    """Whether a name stays in the folder it is fetched into."""
    parts = name.split("/")
    return all(part not in ("", ".", "..") and "\\" not in part and "\0" not in part for part in parts)


def _is_described(file: Any) -> bool:
    return isinstance(file, dict) and isinstance(file.get("bytes"), int) and isinstance(file.get("sha256"), str)
