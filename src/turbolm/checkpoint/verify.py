"""Verify a checkpoint: every file matches its manifest, and together they form a resumable state. Torch-free."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from turbolm.checkpoint.host_rng import host_rng_problem
from turbolm.checkpoint.index import CheckpointIndex, RankIndex, read_index
from turbolm.checkpoint.manifest import (
    BUFFERS,
    TRAINER_STATE,
    checkpoint_name,
    index_file,
    list_checkpoints,
    rank_of_tensor_file,
    read_manifest,
)
from turbolm.checkpoint.ranks import ALONE, Agree, in_step
from turbolm.errors import UserError
from turbolm.files import load_json, sha256_file


def verify_checkpoint(checkpoint: Path, contracts: Collection[str] | None = None) -> list[str]:
    """Every reason why this checkpoint cannot be resumed from; empty for a valid one.

    `contracts` are the fingerprints of the run's learning contract; None accepts any.
    """
    problem, (share,) = _deal(checkpoint, contracts, 1)
    if problem:
        return [problem]
    return _hash_files(checkpoint, share.files, 1) or list(filter(None, [_structure_problem(checkpoint, share)]))


Hashed = Callable[[Path], list[str] | None]  # what `hash_ahead` found, or None where it did not look


def not_hashed(checkpoint: Path) -> None:
    """Nothing was hashed ahead."""


@dataclass
class Share:
    """What one of n processes verifies: files to hash, and ranks whose index and tensor files must fit together."""

    files: dict[str, Any] = field(default_factory=dict)  # their size and SHA-256
    ranks: dict[int, list[str]] = field(default_factory=dict)  # the tensor files of each
    labels: dict[str, int] = field(default_factory=dict)  # what all files must say inside
    is_first: bool = False  # and what concerns all ranks


def hash_ahead(folder: Path, agree: Agree) -> Hashed:
    """Start to hash this process's share of the newest checkpoint in a thread; waits for it when asked for the result.

    For a process that owns the run (nothing else changes checkpoints) and is about to build its model. Collective:
    rank 0 alone reads the manifest. Raises UserError when the folder cannot be read.
    """

    def deal() -> list[Any]:
        step, newest = max(list_checkpoints(folder), default=(None, folder))
        problem, shares = (None, [Share()] * agree.num_ranks) if step is None else _deal(newest, None, agree.num_ranks)
        return [(None if problem else step, share.files) for share in shares]

    step, files = agree.scatter(in_step(agree, deal if agree.rank == 0 else None, UserError))
    if step is None:
        return not_hashed
    newest = folder / checkpoint_name(step)
    problems = ThreadPoolExecutor(1).submit(lambda: _hash_files(newest, files, agree.num_ranks))
    return lambda checkpoint: problems.result() if checkpoint == newest else None


def find_newest_valid(
    folder: Path,
    contracts: Collection[str] | None = None,
    agree: Agree = ALONE,
    below_step: int | None = None,
    hashed: Hashed = not_hashed,
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that passes verification, and why each newer one was rejected.

    Collective. Rank 0 lists the folder and reads the manifest, so that all agree even if a shared file system shows
    them different folders; each rank hashes its share of the files and looks into its share. With `below_step`, only
    checkpoints of earlier steps are considered. Raises UserError when the folder cannot be read.
    """

    def steps_there() -> list[int]:
        return [step for step, _ in list_checkpoints(folder) if below_step is None or step < below_step]

    steps = agree.broadcast(in_step(agree, steps_there if agree.rank == 0 else None, UserError))
    rejected: list[str] = []
    for step in reversed(steps):
        path = folder / checkpoint_name(step)
        problem = _first_problem(path, contracts, agree, hashed)
        if not problem:
            return path, rejected
        rejected.append(f"{path}: {problem}")
    return None, rejected


def _first_problem(path: Path, contracts: Collection[str] | None, agree: Agree, hashed: Hashed) -> str | None:
    """A reason why a checkpoint cannot be resumed from, the same on all ranks, or None. Collective."""
    dealt = None
    if agree.rank == 0:
        problem, shares = _deal(path, contracts, agree.num_ranks)
        dealt = [(problem, share) for share in shares]
    problem, share = agree.scatter(dealt)

    def hash_problem() -> str | None:
        found = hashed(path)
        return next(iter(_hash_files(path, share.files, agree.num_ranks) if found is None else found), None)

    def first_of(look: Callable[[], str | None]) -> str | None:
        by_rank = agree.gather(_told(look))
        return agree.broadcast(None if by_rank is None else next(filter(None, by_rank), None))

    return (
        problem
        or first_of(hash_problem)
        or first_of(lambda: _ranks_problem(path, share))
        or first_of(lambda: _coverage_problem(path) if share.is_first else None)
    )


def _told(look: Callable[[], str | None]) -> str | None:
    """What is wrong, whatever way that shows: the other ranks wait for this one's word."""
    try:
        return look()
    except Exception as error:
        is_said = isinstance(error, (UserError, OSError)) and str(error)
        return str(error) if is_said else f"{type(error).__name__}: {error}"


def _deal(checkpoint: Path, contracts: Collection[str] | None, num_shares: int) -> tuple[str | None, list[Share]]:
    """What is wrong with the manifest, or None, and what each of `num_shares` processes is to verify."""
    shares = [Share(is_first=number == 0) for number in range(num_shares)]
    return _told(lambda: _fill(shares, checkpoint, contracts)), shares


def _fill(shares: list[Share], checkpoint: Path, contracts: Collection[str] | None) -> str | None:
    """Deal the files and ranks of a checkpoint. Returns, or raises UserError, what is wrong with the manifest."""
    manifest = read_manifest(checkpoint)
    if checkpoint.is_symlink():
        return "a link, not a folder of the run"
    if checkpoint.name != checkpoint_name(manifest["step"]):
        return f"its manifest is of step {manifest['step']}"
    if contracts is not None and manifest["contract"] not in contracts:
        return "saved under another learning contract than the run's"
    files = sorted(manifest["files"].items(), key=lambda item: (-item[1]["bytes"], item[0]))
    tensor_files: dict[int, list[str]] = {}
    for name in manifest["files"]:
        owner = rank_of_tensor_file(name)
        if owner is not None:
            tensor_files.setdefault(owner, []).append(name)
    num_ranks = min(manifest["world_size"], len(files))  # each has files
    for number, share in enumerate(shares):
        share.files = dict(files[number :: len(shares)])
        share.ranks = {rank: tensor_files.get(rank, []) for rank in range(number, num_ranks, len(shares))}
        share.labels = {"step": manifest["step"], "world_size": manifest["world_size"]}
    return None


def _hash_files(checkpoint: Path, files: Mapping[str, Any], num_shares: int) -> list[str]:
    """What is wrong with each of these files."""
    threads = min(8, max(1, (os.cpu_count() or 1) // num_shares))
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda item: _file_problem(checkpoint, *item), files.items())
        return sorted(f"{name}: {problem}" for name, problem in zip(files, found, strict=True) if problem)


def _structure_problem(checkpoint: Path, share: Share) -> str | None:
    """How files that match their manifest do not fit together, for a process that looks at all of them."""
    return _told(lambda: _ranks_problem(checkpoint, share)) or _told(lambda: _coverage_problem(checkpoint))


def _ranks_problem(checkpoint: Path, share: Share) -> str | None:
    """Check the files of each rank of a share. Raises UserError."""
    if share.is_first:
        _check_files_of_all(checkpoint, share.labels)
    for rank, tensor_files in share.ranks.items():
        _check_rank(checkpoint, rank, tensor_files, {**share.labels, "rank": rank})
    return None


def _coverage_problem(checkpoint: Path) -> None:
    """Read all index files. Raises UserError where they do not cover each parameter once."""
    CheckpointIndex(checkpoint)


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


def _check_files_of_all(checkpoint: Path, labels: Mapping[str, int]) -> None:
    """Check the trainer's state, the buffers, and that every rank has an index file. Raises UserError."""
    manifest = read_manifest(checkpoint)
    if TRAINER_STATE not in manifest["files"]:
        raise UserError(f"{TRAINER_STATE}: missing in the manifest")
    try:
        state = load_json(checkpoint / TRAINER_STATE)
    except (OSError, ValueError) as error:
        raise UserError(f"{TRAINER_STATE}: {error}") from None
    if not isinstance(state, dict) or state.get("step") != labels["step"]:
        raise UserError(f"{TRAINER_STATE}: not of step {labels['step']}")
    _check_trainer_state(state)
    if BUFFERS in manifest["files"]:
        _read_header(checkpoint / BUFFERS, {**labels, "rank": 0})
    for rank in range(manifest["world_size"]):
        if index_file(rank) not in manifest["files"]:
            raise UserError(f"{index_file(rank)}: missing in the manifest")


def _check_rank(checkpoint: Path, rank: int, tensor_files: list[str], labels: Mapping[str, int]) -> None:
    """Check that what a rank saved is of this step and rank, and that its tensors are those of its index file."""
    name, index = index_file(rank), read_index(checkpoint, rank)
    _check_labels(name, {"step": None, "rank": None, **index.labels}, labels)
    tensors: dict[str, tuple[str, list[int]]] = {}
    for file in tensor_files:
        tensors |= _read_header(checkpoint / file, labels)
    if "rng/cpu" not in tensors or not isinstance(index.rng, dict):
        raise UserError(f"{name}: the random state of rank {rank} is missing")
    if problem := host_rng_problem(index.rng):
        raise UserError(f"{name}: the random state of rank {rank} is not one: {problem}")
    _check_fragments(name, index, tensors)


def _check_trainer_state(state: Mapping[str, Any]) -> None:
    """Check everything a run reads there to resume. Raises UserError."""
    for key, kind in {"scaler": dict, "order_digest": str}.items():
        if not isinstance(state.get(key), kind):
            raise UserError(f"{TRAINER_STATE}: lacks {key}, or has it of another type")
    best, anomalies, restarts = state.get("best_eval_loss"), state.get("anomalies", {}), state.get("restarts")
    average = state.get("weight_average")
    try:
        windows = [(int(first), int(end)) for first, end in anomalies.get("skipped_batches", ())]
        counts = [int(anomalies.get(key, 0)) for key in ("in_a_row", "num_rollbacks", "segment")]
        counts += [int(average.get(key, -1)) for key in ("first_step", "every_steps", "count") if average is not None]
        recent = [float(value) for key in ("losses", "norms") for value in anomalies.get(key, ())]
        is_sound = (best is None or math.isfinite(best)) and (restarts is None or isinstance(restarts, dict))
        is_sound = is_sound and all(0 <= first < end for first, end in windows) and min(counts) >= 0
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{TRAINER_STATE}: not a trainer's state: {error}") from None
    if not is_sound or not all(map(math.isfinite, recent)):
        raise UserError(f"{TRAINER_STATE}: not a trainer's state")


def _check_fragments(name: str, index: RankIndex, tensors: Mapping[str, tuple[str, list[int]]]) -> None:
    """Check that the tensors of each fragment of a rank are all there, and the weights in fp32. Raises UserError."""
    for key, (_, numel) in index.fragments.items():
        for state in ("weight", *index.states[key]):
            if f"{state}/{key}" not in tensors or tensors[f"{state}/{key}"][1] != [numel]:
                raise UserError(f"{name}: the tensor {state}/{key} is missing or of another size")
        if tensors[f"weight/{key}"][0] != "F32":
            raise UserError(f"{name}: the tensor weight/{key} is not in fp32")
