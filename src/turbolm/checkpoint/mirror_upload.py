"""Copy one checkpoint to the mirror: the process that rank 0 starts beside the training. Torch-free.

    python -m turbolm.checkpoint.mirror_upload JOB     JOB: an `UploadJob` as JSON

The files are hard-linked first, so that the run may remove the checkpoint meanwhile. What has arrived is noted beside
the links: a later process goes on after it.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from turbolm.checkpoint.manifest import HELD, MANIFEST, checkpoint_name, read_manifest, remove_folder
from turbolm.checkpoint.mirror import FORMAT_VERSION, RECORD, RUN_FILES, Mirror, check_writer, claim, mirror_root
from turbolm.checkpoint.retention import Retention
from turbolm.errors import EXIT_FAILED, EXIT_OK, UserError
from turbolm.files import load_json, sha256_file, write_json
from turbolm.redaction import redact
from turbolm.reliability.orphans import end_with_parent
from turbolm.reliability.stop import STOP_SIGNALS
from turbolm.storage import in_parallel, one_line

_ARRIVED = ".arrived.json"
_THREADS = 4
_NICE = 10  # the training comes first
_RUN_FILES = ("contract.json", "hub.json", "recipe.yaml", "metrics.jsonl")
_RUN_FOLDERS = ("tokenizer/*", "trackers/*.json")  # of a fork with its own data; by what trackers continue


@dataclass(frozen=True)
class UploadJob:
    """What to copy where."""

    run: str  # its folder
    name: str
    url: str
    step: int
    attempt: int
    id: str | None  # None: claim the mirror first, which could not be reached before
    writer: str
    keep_last: int
    keep_every_tokens: float | None
    keep_best: bool
    parent: int  # the process that this one ends with
    back_at: int | None = None  # the step that the run went back to since the last copy

    @property
    def retention(self) -> Retention:
        return Retention(self.keep_last, self.keep_every_tokens, self.keep_best)


def copy_checkpoint(job: UploadJob) -> dict[str, Any]:
    """Copy the checkpoint of a step and what the run folder needs to resume from it; returns what to tell rank 0.

    Copies of steps that the run went back behind are removed. Others of later steps, whose checkpoints are damaged
    here, stay until the run gets there again. Raises UserError and OSError.
    """
    run, root = Path(job.run), mirror_root(job.url, job.name)
    mirror = claim(root, run) if job.id is None else Mirror(root, job.id, job.writer)
    check_writer(mirror)
    held = _hold(run / "checkpoints" / checkpoint_name(job.step))
    manifest = read_manifest(held)
    files = {**manifest["files"], MANIFEST: _described(held / MANIFEST)}
    there = mirror.steps()
    given_up = [step for step in there if job.back_at is not None and step > job.back_at]
    for step in given_up:
        mirror.remove(step)
    record = mirror.record(job.step)
    is_there = files.items() <= (record or {}).get("files", {}).items()
    if not is_there:
        mirror.checkpoint(job.step).at(RECORD).remove()  # of another checkpoint of this step
        _copy_files(mirror, job.step, held, files)
        _copy_run_files(mirror, job, manifest, files)
    others = [step for step in there if step < job.step and step not in given_up]
    mirror.remove_old(job.retention, [*others, job.step])
    if held.name.startswith(HELD):
        remove_folder(held)
    num_bytes = 0 if is_there else sum(file["bytes"] for file in files.values())
    return {"id": mirror.id, "writer": mirror.writer, "bytes": num_bytes, "url": mirror.checkpoint(job.step).url}


def _hold(checkpoint: Path) -> Path:
    """Return a folder with links to the files of a checkpoint, or the checkpoint where its file system has no links.

    Raises UserError where the checkpoint has been removed.
    """
    held = checkpoint.with_name(HELD + checkpoint.name)
    for other in checkpoint.parent.glob(f"{HELD}*"):
        if other != held:
            remove_folder(other)
    with suppress(OSError, UserError):
        if _described(held / MANIFEST) == _described(checkpoint / MANIFEST):
            return held  # of a process that was killed
    remove_folder(held)
    try:
        held.mkdir()
        for name in (*read_manifest(checkpoint)["files"], MANIFEST):  # the manifest last: without it nothing is held
            os.link(checkpoint / name, held / name)
    except FileNotFoundError:
        remove_folder(held)
        raise UserError(f"{checkpoint} was removed before it could be copied") from None
    except OSError:
        remove_folder(held)
        return checkpoint
    return held


def _copy_files(mirror: Mirror, step: int, held: Path, files: dict[str, Any]) -> None:
    """Copy the files that have not arrived yet. Raises UserError for one that is not what its manifest says."""
    remote, note, lock = mirror.checkpoint(step), held / _ARRIVED, Lock()
    now = {"id": mirror.id, "manifest": files[MANIFEST]["sha256"]}
    before: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        before = load_json(note)
    arrived = set(before["files"]) if {key: before.get(key) for key in now} == now else set()

    def copy(name: str) -> None:
        num_bytes = files[name]["bytes"]
        if name in arrived and (remote.at(name).info() or {}).get("size") == num_bytes:
            return
        if sha256_file(held / name) != files[name]["sha256"]:
            raise UserError(f"{held / name}: content changed (SHA-256 differs from the manifest)")
        remote.at(name).upload(held / name, num_bytes)
        with lock:
            arrived.add(name)
            if held.name.startswith(HELD):
                write_json(note, {**now, "files": sorted(arrived)})

    in_parallel(copy, [name for name in files if name != MANIFEST], _THREADS)
    copy(MANIFEST)


def _copy_run_files(mirror: Mirror, job: UploadJob, manifest: dict[str, Any], files: dict[str, Any]) -> None:
    """Copy what the run folder needs besides, then the record, with which the checkpoint counts."""
    remote, described = mirror.checkpoint(job.step), dict(files)
    for name, content in _run_files(Path(job.run)):
        key = f"{RUN_FILES}/{name}"
        remote.at(key).write(content)
        described[key] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    about = {key: manifest.get(key) for key in ("step", "tokens_seen", "eval_loss", "contract", "world_size")}
    check_writer(mirror)
    remote.at(RECORD).write_json(
        {"format_version": FORMAT_VERSION, **about, "attempt": job.attempt, "writer": job.writer, "files": described}
    )


def _run_files(run: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of what a run folder needs besides a checkpoint."""
    paths = [run / name for name in _RUN_FILES] + [path for one in _RUN_FOLDERS for path in sorted(run.glob(one))]
    for path in paths:
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            if path.suffix == ".jsonl":
                content = content[: content.rfind(b"\n") + 1]  # rank 0 may be writing a line
            yield str(path.relative_to(run)), content


def is_run_file(name: str) -> bool:
    """Whether a name below `run/` is one that is put into a run folder."""
    parts = name.split("/")
    return name in _RUN_FILES or len(parts) == 2 and any(Path(name).match(pattern) for pattern in _RUN_FOLDERS)


def _described(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def main() -> int:
    """Run the job of the command line; the last line of the output is what to tell rank 0, as JSON."""
    job = UploadJob(**json.loads(sys.argv[1]))
    end_with_parent(job.parent)
    for number in STOP_SIGNALS:  # Slurm sends them to every process: the parent decides how long a stop waits
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICE)
    try:
        print(json.dumps(copy_checkpoint(job)))
    except Exception as error:  # told in one line: training goes on
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        print(json.dumps({"failed": redact(f"{kind}{one_line(error)}")}))
        return EXIT_FAILED
    return EXIT_OK


def command(job: UploadJob) -> list[str]:
    """The command that runs a job."""
    return [sys.executable, "-m", "turbolm.checkpoint.mirror_upload", json.dumps(asdict(job))]


if __name__ == "__main__":
    sys.exit(main())
