"""The mean of the weights of several checkpoints of a run, exported as a model (arXiv 2306.03241).

Checkpoints are read in slices and the mean is written as it is made: beside the export itself, memory is that of a few
tensors, however many checkpoints there are.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from turbolm import __version__
from turbolm.checkpoint.export import export_weights
from turbolm.checkpoint.export_folder import Origin
from turbolm.checkpoint.load import CheckpointReader
from turbolm.checkpoint.manifest import MANIFEST, list_checkpoints, read_manifest, remove_folder
from turbolm.checkpoint.verify import verify_checkpoint
from turbolm.engine.device import DTYPES
from turbolm.errors import UserError
from turbolm.files import sha256_file
from turbolm.recipe.paths import make_folder
from turbolm.train.run_directory import RunDirectory, precision_of, run_of

NOTE = "turbolm_average.json"  # in the export: what was averaged
_SLICE_ELEMENTS = 2**24  # of each checkpoint at a time
_PART_BYTES = 512 * 2**20  # of averaged tensors in memory before they are written

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [turbolm, weight-averaging]
---
# {run}

The mean of the fp32 weights of {count} checkpoints of {run}, rounded once to {precision}. Buffers are those of
the last one.

| checkpoint | tokens | share | SHA-256 of its manifest |
| --- | --- | --- | --- |
{rows}

The fingerprint of their learning contract is `{contract}`. {note} says the same for programs.
"""


@dataclass(frozen=True)
class _Source:
    """A checkpoint and its share of the mean; all shares add up to 1."""

    path: Path
    share: float
    manifest: Mapping[str, Any]


def average_command(paths: Sequence[Path], last: int | None, weights: str | None) -> Path:
    """Do what `turbolm average` is told to: `paths` are checkpoints, or with `last` a run, and the folder to write."""
    if len(paths) < 2:
        raise UserError("expected checkpoints (or with --last a run directory) and the folder to write")
    *checkpoints, out = paths
    if last is not None:
        if len(checkpoints) > 1:
            raise UserError(f"--last {last}: expected one run directory, got {len(checkpoints)} paths")
        checkpoints = _newest(checkpoints[0], last)
    try:
        numbers = [float(text) for text in weights.split(",")] if weights else []
    except ValueError:
        raise UserError(f"--weights: expected numbers such as 1,2,4, got {weights!r}") from None
    return average_checkpoints(checkpoints, out, numbers)


def _newest(run: Path, count: int) -> list[Path]:
    """Return the newest `count` checkpoints of a run directory. Raises UserError if it has fewer."""
    found = [path for _, path in list_checkpoints(RunDirectory(run).checkpoints)]
    if len(found) < count:
        raise UserError(
            f"--last {count}: {run} has {len(found)} checkpoints; a run keeps more with checkpoint.keep_last and "
            "checkpoint.keep_every"
        )
    return found[-count:]


def average_checkpoints(checkpoints: Sequence[Path], out: Path, weights: Sequence[float] = ()) -> Path:
    """Write the mean of the checkpoints' weights to the new folder `out`, in the layout of `turbolm export`.

    `weights` are those of the checkpoints, of which only the ratios count; by default they are equal. The mean is taken
    in fp64 of the fp32 weights, and rounded once to the precision of the run. What a killed call leaves is removed by
    the next one. Raises UserError with everything that is wrong, before anything is written; a weight that is not
    finite is found while the mean is taken.
    """
    if len(checkpoints) < 2:
        raise UserError(f"expected two or more checkpoints to average, got {len(checkpoints)}")
    if os.path.lexists(out):
        raise UserError(f"{out} exists; choose another folder")
    make_folder(out.absolute().parent, "OUT")
    run, record = run_of(checkpoints[0])
    precision = precision_of(run, record)  # before every byte of the checkpoints is read
    sources = _choose(checkpoints, weights, {record["fingerprint"], *record.get("former_fingerprints", ())})
    folder = out.with_name(f".tmp-{out.name}.average")
    remove_folder(folder)
    try:
        folder.mkdir()
        with ExitStack() as stack:
            readers = [stack.enter_context(CheckpointReader(source.path)) for source in sources]
            files = _write_mean(readers, [source.share for source in sources], folder, DTYPES[precision])
            mapped = {path: stack.enter_context(safe_open(path, "pt")) for path in set(files.values())}
            mean = _Mean(readers[-1], {name: mapped[path] for name, path in files.items()})
            card, notes = _card(run, precision, sources), {NOTE: _note(run, sources)}
            origin = Origin(run.path.name, f"{sources[0].path.name} to {sources[-1].path.name}", averaged=True)
            return export_weights(mean, run.model, out, precision=precision, card=card, origin=origin, notes=notes)
    finally:
        remove_folder(folder)


class _Mean:
    """The averaged tensors, mapped from the files that hold them, and the buffers of the last checkpoint."""

    def __init__(self, last: CheckpointReader, files: Mapping[str, Any]):
        self.checkpoint, self.shapes, self.buffers, self._files = last.checkpoint, last.shapes, last.buffers, files

    def read_whole(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor


def _choose(checkpoints: Sequence[Path], weights: Sequence[float], contracts: set[str]) -> list[_Source]:
    """Return the checkpoints by step, verified, with their shares. Raises UserError with everything that is wrong."""
    problems: list[str] = []
    if weights and len(weights) != len(checkpoints):
        problems.append(f"--weights: expected one for each of {len(checkpoints)} checkpoints, got {len(weights)}")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        problems.append(f"--weights: expected numbers above 0, got {', '.join(f'{weight:g}' for weight in weights)}")
    used = weights if weights and not problems else [1.0] * len(checkpoints)
    sources: list[_Source] = []
    for path, weight in zip(checkpoints, used, strict=True):
        try:
            source = _Source(path, weight / sum(used), read_manifest(path))
            _check_same_run(source, sources, contracts)
            sources.append(source)
        except UserError as error:
            problems.append(str(error))
    if not problems:  # otherwise do not read them first
        problems = [f"{one.path}: {problem}" for one in sources for problem in verify_checkpoint(one.path, contracts)]
    if problems:
        raise UserError("\n".join(problems))
    return sorted(sources, key=lambda source: int(source.manifest["step"]))


def _check_same_run(source: _Source, others: Sequence[_Source], contracts: set[str]) -> None:
    """Raise UserError unless a checkpoint is another one of the same run."""
    manifest = source.manifest
    if manifest["contract"] not in contracts:
        raise UserError(f"{source.path}: saved under another learning contract than that of the first checkpoint's run")
    twice = next((other.path for other in others if other.manifest["step"] == manifest["step"]), None)
    if twice is not None:
        raise UserError(f"{source.path}: of step {manifest['step']}, as is {twice}")
    shapes = others[0].manifest["parameters"] if others else manifest["parameters"]
    ours = manifest["parameters"]
    if ours != shapes:
        different = sorted(name for name in {*ours, *shapes} if ours.get(name) != shapes.get(name))
        raise UserError(f"{source.path}: its parameters are not those of {others[0].path}, first {different[0]}")


def _write_mean(
    readers: Sequence[CheckpointReader], shares: Sequence[float], folder: Path, dtype: torch.dtype
) -> dict[str, Path]:
    """Write the mean of every parameter to files in `folder`; return which file has it."""
    files: dict[str, Path] = {}
    part: dict[str, torch.Tensor] = {}

    def write() -> None:
        path = folder / f"part-{len(set(files.values())):05d}.safetensors"
        save_file(part, path)
        files.update(dict.fromkeys(part, path))
        part.clear()

    for name in readers[0].shapes:
        part[name] = _mean_of(readers, shares, name, dtype)
        if sum(tensor.nbytes for tensor in part.values()) >= _PART_BYTES:
            write()
    if part:
        write()
    return files


def _mean_of(
    readers: Sequence[CheckpointReader], shares: Sequence[float], name: str, dtype: torch.dtype
) -> torch.Tensor:
    """Return the mean of one parameter in `dtype`. Raises UserError where a weight is not finite."""
    shape = readers[0].shapes[name]
    mean = torch.empty(shape, dtype=dtype)
    for start in range(0, mean.numel(), _SLICE_ELEMENTS):
        part = mean.view(-1)[start : start + _SLICE_ELEMENTS]
        total = torch.zeros(part.numel(), dtype=torch.float64)
        for reader, share in zip(readers, shares, strict=True):
            values = reader.read("weight", name, start, part.numel())
            if not torch.isfinite(values).all():
                raise UserError(
                    f"{reader.checkpoint}: {name} has a weight that is not finite; leave this checkpoint out"
                )
            total.add_(values, alpha=share)
        part.copy_(total)
    return mean


def _note(run: RunDirectory, sources: Sequence[_Source]) -> str:
    checkpoints = [
        {
            "checkpoint": source.path.name,
            "step": source.manifest["step"],
            "tokens_seen": source.manifest["tokens_seen"],
            "share": source.share,
            "contract": source.manifest["contract"],
            "manifest_sha256": sha256_file(source.path / MANIFEST),
        }
        for source in sources
    ]
    note = {"turbolm": __version__, "run": run.path.name, "checkpoints": checkpoints}
    return json.dumps(note, indent=1) + "\n"


def _card(run: RunDirectory, precision: str, sources: Sequence[_Source]) -> str:
    rows = [
        f"| {source.path.name} | {source.manifest['tokens_seen']:,} | {source.share:.4g} "
        f"| `{sha256_file(source.path / MANIFEST)}` |"
        for source in sources
    ]
    return _CARD.format(
        run=run.path.name,
        count=len(sources),
        precision=precision,
        rows="\n".join(rows),
        contract=sources[-1].manifest["contract"],
        note=NOTE,
    )
