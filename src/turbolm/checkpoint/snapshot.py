"""The state of a run after a step, as one rank saves it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from turbolm.checkpoint.host_rng import host_rng_state
from turbolm.checkpoint.optimizer_state import group_numbers, layouts, parameter_state
from turbolm.engine.engine import Engine

_ALIGNMENT_BYTES = 64


@dataclass
class Snapshot:
    """What this rank saves after `step`. The tensors may be the live ones, which the next update changes."""

    step: int
    rank: int
    tensors: dict[str, torch.Tensor]
    index: dict[str, Any]
    buffers: dict[str, torch.Tensor]  # rank 0 only
    trainer_state: dict[str, Any]
    about: dict[str, Any]  # for the manifest
    device: torch.device  # of the engine; whichever thread reads the tensors makes it current

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, each padded as in a `HostCopy`."""
        return sum(_padded_bytes(tensor) for group in (self.tensors, self.buffers) for tensor in group.values())


def take_snapshot(engine: Engine, step: int, trainer_state: Mapping[str, Any]) -> Snapshot:
    """Everything this rank saves: references to what only an update changes, copies of the rest, which is small.

    Raises RuntimeError for an optimizer state that the format cannot hold.
    """
    optimizer, rank = engine.optimizer, dist.get_rank()
    bound_to = layouts(engine)
    tensors: dict[str, torch.Tensor] = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    fragments, scalars, states, whole = {}, {}, {}, {}
    seen = set()
    for number, fragment in enumerate(engine.fragments()):
        if engine.zero_stage == 0 and number % dist.get_world_size() != rank:
            continue  # every rank has it, and they take turns
        state = parameter_state(optimizer, fragment)
        tensors[f"weight/{fragment.name}"] = fragment.view(fragment.flat)
        tensors |= {f"{name}/{fragment.name}": tensor for name, tensor in state.sharded.items()}
        fragments[fragment.name] = {"start": fragment.start, "numel": fragment.numel}
        scalars[fragment.name], states[fragment.name] = state.scalars, sorted(state.sharded)
        if state.whole and id(fragment.flat) not in seen:  # once for all fragments of a partition
            tensors |= {f"whole/{name}/{fragment.name}": tensor for name, tensor in state.whole.items()}
            whole[fragment.name] = {"layout": bound_to[fragment.name], "states": sorted(state.whole)}
        seen.add(id(fragment.flat))
    index = {
        "step": step,
        "rank": rank,
        "world_size": dist.get_world_size(),
        "fragments": fragments,
        "states": states,
        "scalars": scalars,
        "whole": whole,
        "groups": group_numbers(optimizer),
        "rng": host_rng_state(),
    }
    about = {
        "step": step,
        "tokens_seen": int(trainer_state.get("tokens_seen", 0)),
        "world_size": dist.get_world_size(),
        "zero_stage": engine.zero_stage,
        "optimizer": type(optimizer).__name__,
        "parameters": {name: list(shape) for name, shape in engine.parameter_shapes().items()},
    }
    return Snapshot(
        step=step,
        rank=rank,
        tensors=tensors,
        index=index,
        buffers=_persistent_buffers(engine.module) if rank == 0 else {},
        trainer_state={**trainer_state, "scaler": engine.loss_scaler_state()},
        about=about,
        device=engine.device,
    )


def use_device(device: torch.device) -> None:
    """Make `device` current for the calling thread; call it before the thread touches a GPU.

    Every thread starts on GPU 0, and pinned memory or a stream would leave a context there, about 0.5 GiB for each
    rank of the host.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)


class HostCopy:
    """Host memory that snapshots are copied to, reused from one to the next because fresh memory is slow.

    The training thread calls `follow`, a background thread the rest.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._stream: torch.cuda.Stream | None = None  # the device copies on it beside the training's

    def reserve(self, num_bytes: int) -> None:
        """Allocate and touch this much memory, so that `fill` finds it ready."""
        if len(self._memory) < num_bytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # free it first
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
            self._memory.fill_(0)

    def follow(self) -> None:
        """Make `fill` copy the state as it is once the device has finished all work queued so far."""
        if torch.cuda.is_available():
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())

    @torch.no_grad()
    def fill(self, snapshot: Snapshot) -> Snapshot:
        """The same snapshot with its tensors copied; valid until the next call. They must not change meanwhile."""
        groups = (snapshot.tensors, snapshot.buffers)
        self.reserve(snapshot.num_bytes)
        copies: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
        start = 0
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            for group, copied in zip(groups, copies, strict=True):
                for name, tensor in group.items():
                    size = tensor.numel() * tensor.element_size()
                    copied[name] = self._memory[start : start + size].view(tensor.dtype).view(tensor.shape)
                    copied[name].copy_(tensor, non_blocking=True)
                    start += _padded_bytes(tensor)
        if self._stream:
            self._stream.synchronize()
        return Snapshot(**{**vars(snapshot), "tensors": copies[0], "buffers": copies[1]})


def _persistent_buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    names = {name for name, _ in module.named_buffers()} & set(module.state_dict().keys())
    return {name: buffer.clone() for name, buffer in module.named_buffers() if name in names}


def _padded_bytes(tensor: torch.Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
