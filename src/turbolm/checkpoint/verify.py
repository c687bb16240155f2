"""Verify a checkpoint: every file matches its manifest, and together they form a resumable state. Torch-free."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from turbolm.checkpoint.host_rng import host_rng_problem
from turbolm.checkpoint.manifest import (
    BUFFERS,
    TRAINER_STATE,
    checkpoint_name,
    index_file,
    list_checkpoints,
    rank_of_tensor_file,
    read_manifest,
)
from turbolm.errors import UserError
from turbolm.files import load_json, sha256_file


def verify_checkpoint(checkpoint: Path, contracts: Collection[str] | None = None) -> list[str]:
    """Every reason why this checkpoint cannot be resumed from; empty for a valid one.

    `contracts` are the fingerprints of the run's learning contract; None accepts any.
    """
    return verify_files(checkpoint, contracts) or verify_structure(checkpoint)


Hashed = Callable[[Path], list[str] | None]  # what `hash_ahead` found, or None where it did not look


def not_hashed(checkpoint: Path) -> None:
    """Nothing was hashed ahead."""


def verify_files(
    checkpoint: Path,
    contracts: Collection[str] | None = None,
    share: tuple[int, int] = (0, 1),
    hashed: Hashed = not_hashed,
) -> list[str]:
    """Problems of the manifest, or of single files.

    With `share` (k, n) only the k-th part of the files in n is hashed; none if that was done ahead.
    """
    try:
        manifest = read_manifest(checkpoint)
    except UserError as error:
        return [str(error)]
    if checkpoint.is_symlink():
        return ["a link, not a folder of the run"]
    if checkpoint.name != checkpoint_name(manifest["step"]):
        return [f"its manifest is of step {manifest['step']}"]
    if contracts is not None and manifest["contract"] not in contracts:
        return ["saved under another learning contract than the run's"]
    found = hashed(checkpoint)
    return _hash_files(checkpoint, manifest["files"], share) if found is None else found


def hash_ahead(folder: Path, share: tuple[int, int]) -> Hashed:
    """Start to hash this process's share of the newest checkpoint in a thread; waits for it when asked for the result.

    For a process that owns the run (nothing else changes checkpoints) and is about to build its model.
    """
    newest = max(list_checkpoints(folder), default=None)
    if newest is None:
        return not_hashed
    problems = ThreadPoolExecutor(1).submit(lambda: _hash_files(newest[1], read_manifest(newest[1])["files"], share))
    return lambda checkpoint: problems.result() if checkpoint == newest[1] else None


def _hash_files(checkpoint: Path, records: Mapping[str, Any], share: tuple[int, int]) -> list[str]:
    part, parts = share
    files = sorted(records.items(), key=lambda item: (-item[1]["bytes"], item[0]))[part::parts]
    threads = min(8, max(1, (os.cpu_count() or 1) // parts))
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda item: _file_problem(checkpoint, *item), files)
        return sorted(f"{name}: {problem}" for (name, _), problem in zip(files, found, strict=True) if problem)


def verify_structure(checkpoint: Path) -> list[str]:
    """Problems of how files that match their manifest fit together."""
    try:
        _check_structure(checkpoint, read_manifest(checkpoint))
    except UserError as error:
        return [str(error)]
    except Exception as error:  # one rank looks, and the others wait for its result
        return [f"{type(error).__name__}: {error}"]
    return []


def find_newest_valid(
    folder: Path,
    contracts: Collection[str] | None = None,
    share: tuple[int, int] = (0, 1),
    agree: Callable[[Any], list[Any]] = lambda value: [value],
    below_step: int | None = None,
    hashed: Hashed = not_hashed,
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that passes verification, and why each newer one was rejected.

    With n processes each hashes its share of the files; `agree` returns what every process gave, by rank, so that all
    agree even if a shared file system shows them different folders. With `below_step`, only checkpoints of earlier
    steps are considered.
    """
    steps = agree([step for step, _ in list_checkpoints(folder) if below_step is None or step < below_step])[0]
    rejected: list[str] = []
    for step in reversed(steps):
        path = folder / checkpoint_name(step)
        try:
            own = verify_files(path, contracts, share, hashed)
        except OSError as error:
            own = [str(error)]
        problems = [problem for part in agree(own) for problem in part]
        if not problems:
            problems = agree(verify_structure(path) if share[0] == 0 else [])[0]
        if not problems:
            return path, rejected
        rejected.append(f"{path}: {problems[0]}")
    return None, rejected


def _read_header(path: Path, labels: Mapping[str, int]) -> dict[str, tuple[str, list[int]]]:
    """The type and shape of every tensor in a safetensors file that says the same `labels` inside. Raises UserError."""
    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            _check_labels(path.name, file.metadata() or {}, labels)
            return {name: (one.get_dtype(), one.get_shape()) for name, one in slices.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path.name}: {error}") from None


def _check_labels(name: str, found: Mapping[str, Any], expected: Mapping[str, int]) -> None:
    """A file says inside which step and rank it is of, and of how many ranks, which earlier versions left out."""
    for label, value in expected.items():
        if label in found and str(found[label]) != str(value):
            raise UserError(f"{name}: not of {label} {value}, but of {found[label]!r}")


def _file_problem(checkpoint: Path, name: str, expected: Mapping[str, Any]) -> str | None:
    path = checkpoint / name
    if Path(name).name != name or path.is_symlink():
        return "not a plain file of the checkpoint"
    if not path.is_file():
        return "missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{path.stat().st_size} bytes instead of {expected['bytes']}"
    return None if sha256_file(path) == expected["sha256"] else "content changed (SHA-256 differs)"


def _check_structure(checkpoint: Path, manifest: Mapping[str, Any]) -> None:
    """Check that every rank's files are there, of this step, and cover each parameter once. Raises UserError."""
    step, files = manifest["step"], manifest["files"]
    trainer_state = _read_mapping(checkpoint, TRAINER_STATE, files)
    if trainer_state.get("step") != step:
        raise UserError(f"{TRAINER_STATE}: not of step {step}")
    _check_trainer_state(trainer_state)
    labels = {"step": step, "rank": 0, "world_size": manifest["world_size"]}
    if BUFFERS in files:
        _read_header(checkpoint / BUFFERS, labels)
    ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in manifest["parameters"]}
    for rank in range(manifest["world_size"]):
        name = index_file(rank)
        index = _read_mapping(checkpoint, name, files)
        labels["rank"] = rank
        _check_labels(name, {"step": None, "rank": None, **index}, labels)
        tensors: dict[str, tuple[str, list[int]]] = {}
        for file in files:
            if rank_of_tensor_file(file) == rank:
                tensors |= _read_header(checkpoint / file, labels)
        if "rng/cpu" not in tensors or not isinstance(index.get("rng"), dict):
            raise UserError(f"{name}: the random state of rank {rank} is missing")
        if problem := host_rng_problem(index["rng"]):
            raise UserError(f"{name}: the random state of rank {rank} is not one: {problem}")
        for parameter, (start, numel) in _fragments(name, index, tensors).items():
            if parameter not in ranges:
                raise UserError(f"{name}: {parameter} is not a parameter of the manifest")
            ranges[parameter].append((start, numel))
    for parameter, shape in manifest["parameters"].items():
        end = 0
        for start, numel in sorted(ranges[parameter]):
            if start != end:
                first, last = sorted((start, end))
                raise UserError(f"elements {first} to {last} of {parameter} are missing or doubled")
            end = start + numel
        if end != math.prod(shape):
            raise UserError(f"{end} of {math.prod(shape)} elements of {parameter} are there")


def _check_trainer_state(state: Mapping[str, Any]) -> None:
    """Check everything a run reads there to resume. Raises UserError."""
    for key, kind in {"scaler": dict, "order_digest": str}.items():
        if not isinstance(state.get(key), kind):
            raise UserError(f"{TRAINER_STATE}: lacks {key}, or has it of another type")
    best, anomalies, restarts = state.get("best_eval_loss"), state.get("anomalies", {}), state.get("restarts")
    try:
        windows = [(int(first), int(end)) for first, end in anomalies.get("skipped_batches", ())]
        counts = [int(anomalies.get(key, 0)) for key in ("in_a_row", "num_rollbacks", "segment")]
        recent = [float(value) for key in ("losses", "norms") for value in anomalies.get(key, ())]
        is_sound = (best is None or math.isfinite(best)) and (restarts is None or isinstance(restarts, dict))
        is_sound = is_sound and all(0 <= first < end for first, end in windows) and min(counts) >= 0
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{TRAINER_STATE}: not a trainer's state: {error}") from None
    if not is_sound or not all(map(math.isfinite, recent)):
        raise UserError(f"{TRAINER_STATE}: not a trainer's state")


def _fragments(
    name: str, index: Mapping[str, Any], tensors: Mapping[str, tuple[str, list[int]]]
) -> dict[str, tuple[int, int]]:
    """(start, numel) of each fragment of a rank, whose tensors are all there, and the weights in fp32."""
    try:
        fragments = {
            key: (int(fragment["start"]), int(fragment["numel"])) for key, fragment in index["fragments"].items()
        }
        wanted = {
            f"{state}/{key}": numel
            for key, (_, numel) in fragments.items()
            for state in ("weight", *index["states"].get(key, ()))
        }
        wrong = [key for key, numel in wanted.items() if key not in tensors or tensors[key][1] != [numel]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{name}: not an index of fragments: {error!r}") from None
    if wrong:
        raise UserError(f"{name}: the tensor {wrong[0]} is missing or of another size")
    narrow = [f"weight/{key}" for key in fragments if tensors[f"weight/{key}"][0] != "F32"]
    if narrow:
        raise UserError(f"{name}: the tensor {narrow[0]} is not in fp32")
    return fragments


def _read_mapping(checkpoint: Path, name: str, files: Collection[str]) -> dict[str, Any]:
    if name not in files:
        raise UserError(f"{name}: missing in the manifest")
    try:
        value = load_json(checkpoint / name)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{name}: not a JSON object")
    return value
