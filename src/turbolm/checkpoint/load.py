"""Read a checkpoint into an engine of any ZeRO stage and world size."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from turbolm.checkpoint.fragments import (
    Fragment,
    inner_optimizer,
    materialise_state,
    own_fragments,
    parameter_shapes,
    publish_weights,
    set_scalar_state,
    sharded_state,
)
from turbolm.checkpoint.manifest import TRAINER_STATE, read_manifest
from turbolm.errors import UserError


class CheckpointReader:
    """The tensors of a checkpoint, whoever wrote which part of them. Use as a context manager."""

    def __init__(self, checkpoint: Path):
        self.checkpoint = checkpoint
        self.manifest = read_manifest(checkpoint)
        self.shapes = {name: tuple(shape) for name, shape in self.manifest["parameters"].items()}
        self.scalars: dict[str, dict[str, float]] = {}
        self.states: set[str] = set()  # none before the first update
        self._places: dict[str, list[tuple[int, int, str]]] = defaultdict(list)  # parameter: (start, end, file)
        for rank in range(self.manifest["world_size"]):
            index = json.loads((checkpoint / f"fragments-{rank:05d}.json").read_text(encoding="utf-8"))
            for name, place in index["fragments"].items():
                end = place["start"] + place["numel"]
                self._places[name].append((place["start"], end, f"fragments-{rank:05d}.safetensors"))
            self.scalars.update(index["scalars"])
            self.states.update(index["states"])
        for name, shape in self.shapes.items():
            covered = sum(end - start for start, end, _ in self._places[name])
            if covered != math.prod(shape):
                raise UserError(f"{checkpoint}: holds {covered} of {math.prod(shape)} elements of {name}")

    def __enter__(self) -> CheckpointReader:
        self._stack, self._files = ExitStack(), {}  # type: ignore[var-annotated]
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def read(self, state: str, name: str, start: int, numel: int) -> torch.Tensor:
        """Elements [start, start + numel) of the flattened tensor, fp32, 1-D; maps only the files that hold them."""
        result = torch.empty(numel, dtype=torch.float32)
        for first, end, file in self._places[name]:
            low, high = max(start, first), min(start + numel, end)
            if low < high:
                part = self._open(file).get_slice(f"{state}/{name}")[low - first : high - first]
                result[low - start : high - start] = part
        return result

    def read_whole(self, name: str) -> torch.Tensor:
        """A parameter's fp32 weight in its own shape."""
        shape = self.shapes[name]
        return self.read("weight", name, 0, math.prod(shape)).view(shape)

    def buffers(self) -> dict[str, torch.Tensor]:
        """The model's persistent buffers."""
        if "buffers.safetensors" not in self.manifest["files"]:
            return {}
        file = self._open("buffers.safetensors")
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)

    def rng_state(self, rank: int) -> dict[str, torch.Tensor]:
        """The random state rank `rank` saved, or nothing when fewer ranks wrote this checkpoint."""
        if rank >= self.manifest["world_size"]:
            return {}
        file = self._open(f"fragments-{rank:05d}.safetensors")
        saved = set(file.keys())
        return {name: file.get_tensor(f"rng/{name}") for name in ("cpu", "cuda") if f"rng/{name}" in saved}

    def trainer_state(self) -> dict[str, Any]:
        """What the trainer noted beside the tensors."""
        state: dict[str, Any] = json.loads((self.checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
        return state

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = self._stack.enter_context(safe_open(self.checkpoint / file, framework="pt"))
        return self._files[file]


def load_checkpoint(checkpoint: Path, engine: Any) -> dict[str, Any]:
    """Restore weights, optimizer state and random state of a freshly built engine; returns the trainer's state.

    Collective. The checkpoint must have been verified; its contract is the caller's to compare.
    """
    optimizer = inner_optimizer(engine)
    with CheckpointReader(checkpoint) as reader:
        ours = parameter_shapes(engine.module)
        if ours != reader.shapes:
            different = sorted(name for name in {*ours, *reader.shapes} if ours.get(name) != reader.shapes.get(name))
            raise UserError(f"{checkpoint}: the model's parameters differ, first {different[0]}")
        if reader.states:
            materialise_state(engine)
        for fragment in own_fragments(engine):
            _load_fragment(reader, fragment, optimizer)
        buffers = dict(engine.module.named_buffers())
        for name, value in reader.buffers().items():
            buffers[name].copy_(value)
        publish_weights(engine)
        rng = reader.rng_state(dist.get_rank())
        if "cpu" in rng:
            torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and torch.cuda.is_available():
            torch.cuda.set_rng_state(rng["cuda"])
        state = reader.trainer_state()
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    for name, value in state["scaler"].items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)
    return state


@torch.no_grad()
def _load_fragment(reader: CheckpointReader, fragment: Fragment, optimizer: torch.optim.Optimizer) -> None:
    def read(state: str) -> torch.Tensor:
        return reader.read(state, fragment.name, fragment.start, fragment.numel)

    fragment.view(fragment.flat).copy_(read("weight"))
    for name, tensor in sharded_state(optimizer, fragment).items():
        tensor.copy_(read(name))
    set_scalar_state(optimizer, fragment, reader.scalars[fragment.name])
