"""Write a checkpoint: every rank its own fragments, then one manifest, then the rename."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from turbolm.checkpoint import manifest
from turbolm.checkpoint.fragments import (
    inner_optimizer,
    is_written_here,
    own_fragments,
    parameter_shapes,
    scalar_state,
    sharded_state,
)


def save_checkpoint(
    folder: Path,
    engine: Any,
    *,
    step: int,
    trainer_state: Mapping[str, Any],
    contract_fingerprint: str,
    keep_last: int,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Save the state after `step` steps as `folder/step-<n>` and remove older ones. Collective.

    `folder` must be on a file system that all ranks share; `group` is a host-side process group. If any rank fails,
    all raise RuntimeError and earlier checkpoints stay.
    """
    final = folder / manifest.checkpoint_name(step)
    temporary = folder / f".tmp-{final.name}"
    failure = None
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            manifest.write_json(temporary / manifest.TRAINER_STATE, {**trainer_state, "scaler": scaler_state(engine)})
        except OSError as error:
            failure = str(error)
    _agree(failure, group)
    files: dict[str, Any] = {}
    try:
        files = _write_rank_files(temporary, engine)
    except Exception as error:  # whatever it was, the other ranks must not wait for this one
        failure = f"{type(error).__name__}: {error}"
    gathered = _agree(failure, group, files)
    if dist.get_rank() == 0:
        try:
            described = {name: info for part in gathered for name, info in part.items()}
            described[manifest.TRAINER_STATE] = manifest.describe_file(temporary / manifest.TRAINER_STATE)
            shapes = {name: list(shape) for name, shape in parameter_shapes(engine.module).items()}
            manifest.commit(
                temporary,
                final,
                {
                    "step": step,
                    "contract": contract_fingerprint,
                    "world_size": dist.get_world_size(),
                    "zero_stage": engine.zero_optimization_stage(),
                    "parameters": shapes,
                    "files": dict(sorted(described.items())),
                },
            )
            manifest.remove_old(folder, keep_last)
        except OSError as error:
            failure = str(error)
    _agree(failure, group)
    return final


def scaler_state(engine: Any) -> dict[str, float]:
    """The numbers of DeepSpeed's loss scaler (fp16); empty where none is in use."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    numbers = vars(scaler) if scaler is not None else {}
    return {name: value for name, value in numbers.items() if isinstance(value, (int, float))}


def _write_rank_files(folder: Path, engine: Any) -> dict[str, Any]:
    """This rank's files; returns their descriptions for the manifest."""
    optimizer, rank = inner_optimizer(engine), dist.get_rank()
    tensors, index, scalars, states = {}, {}, {}, set()
    for number, fragment in enumerate(own_fragments(engine)):
        if not is_written_here(engine, number):
            continue
        tensors[f"weight/{fragment.name}"] = fragment.view(fragment.flat)
        for name, value in sharded_state(optimizer, fragment).items():
            tensors[f"{name}/{fragment.name}"] = value
            states.add(name)
        index[fragment.name] = {"start": fragment.start, "numel": fragment.numel}
        scalars[fragment.name] = scalar_state(optimizer, fragment)
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    written = [folder / f"fragments-{rank:05d}.safetensors", folder / f"fragments-{rank:05d}.json"]
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, written[0])
    manifest.sync_file(written[0])
    manifest.write_json(written[1], {"fragments": index, "scalars": scalars, "states": sorted(states)})
    buffers = _persistent_buffers(engine.module) if rank == 0 else {}
    if buffers:
        written.append(folder / "buffers.safetensors")
        save_file(buffers, written[-1])
        manifest.sync_file(written[-1])
    return {path.name: manifest.describe_file(path) for path in written}


def _persistent_buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    names = {name for name, _ in module.named_buffers()} & set(module.state_dict().keys())
    return {name: buffer.cpu().contiguous() for name, buffer in module.named_buffers() if name in names}


def _agree(failure: str | None, group: dist.ProcessGroup | None, payload: Any = None) -> list[Any]:
    """Gather every rank's payload, or raise on all ranks what any of them failed with."""
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (failure, payload), group=group)
    failures = [f"rank {rank}: {failure}" for rank, (failure, _) in enumerate(outcomes) if failure]
    if failures:
        raise RuntimeError(f"the checkpoint was not written; {'; '.join(failures)}")
    return [payload for _, payload in outcomes]
