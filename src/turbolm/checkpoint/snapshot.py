"""The state of a run after a step, as one rank saves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from turbolm.checkpoint.host_rng import host_rng_state
from turbolm.checkpoint.index import WEIGHT_AVERAGE, pack_fragments
from turbolm.checkpoint.optimizer_state import PARAMETER, group_numbers, layouts, parameter_state
from turbolm.engine.engine import Engine

_ALIGNMENT_BYTES = 64
_BLOCK_BYTES = 2**30
_SMALL_BLOCK_BYTES = 2**26


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
    def sizes(self) -> list[int]:
        """Bytes of each tensor, padded as in a `HostCopy`."""
        return [_padded_bytes(tensor) for group in (self.tensors, self.buffers) for tensor in group.values()]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.sizes)


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
        mean = engine.averaged.of(fragment) if engine.averaged else None
        if mean is not None:
            state.sharded[WEIGHT_AVERAGE] = mean
        tensors[f"weight/{fragment.name}"] = fragment.view(fragment.flat)
        tensors |= {f"{name}/{fragment.name}": tensor for name, tensor in state.sharded.items()}
        fragments[fragment.name] = (fragment.start, fragment.numel)
        scalars[fragment.name], states[fragment.name] = state.scalars, sorted(state.sharded)
        is_of_parameter = bound_to[fragment.name] == PARAMETER
        if state.whole and (is_of_parameter or id(fragment.flat) not in seen):  # else once for all of a partition
            tensors |= {f"whole/{name}/{fragment.name}": tensor for name, tensor in state.whole.items()}
            whole[fragment.name] = {"layout": bound_to[fragment.name], "states": sorted(state.whole)}
        seen.add(id(fragment.flat))
    index = {
        "step": step,
        "rank": rank,
        "world_size": dist.get_world_size(),
        "fragments": pack_fragments(fragments, states, scalars),
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


class HostCopy:
    """Host memory that snapshots are copied to, reused from one to the next because fresh memory is slow.

    On a machine with GPUs it is pinned, in blocks (`pack_blocks`). The training thread calls `follow`, a background
    thread the rest.
    """

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []
        self._stream: torch.cuda.Stream | None = None  # the device copies on it beside the training's

    def reserve(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Allocate and touch memory for tensors of these bytes, so that `fill` finds it ready; return each one's."""
        pinned = torch.cuda.is_available()
        blocks, places = pack_blocks(sizes)
        wanted = [_power_of_two(used) if pinned else used for used in blocks]
        if [len(block) for block in self._blocks] != wanted:
            self._blocks = []  # free them first
            self._blocks = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned).fill_(0) for size in wanted]
        return [self._blocks[block][start : start + size] for size, (block, start) in zip(sizes, places, strict=True)]

    def follow(self) -> None:
        """Make `fill` copy the state as it is once the device has finished all work queued so far."""
        if torch.cuda.is_available():
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())

    @torch.no_grad()
    def fill(self, snapshot: Snapshot) -> Snapshot:
        """The same snapshot with its tensors copied; valid until the next call. They must not change meanwhile."""
        memory = iter(self.reserve(snapshot.sizes))
        copies: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            for group, copied in zip((snapshot.tensors, snapshot.buffers), copies, strict=True):
                for name, tensor in group.items():
                    own = next(memory)[: tensor.numel() * tensor.element_size()]
                    copied[name] = own.view(tensor.dtype).view(tensor.shape)
                    copied[name].copy_(tensor, non_blocking=True)
        if self._stream:
            self._stream.synchronize()
        return Snapshot(**{**vars(snapshot), "tensors": copies[0], "buffers": copies[1]})


def pack_blocks(sizes: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Pack tensors, whole, into blocks of about 1 GiB; return the bytes used of each block, and each tensor's place.

    torch's allocator rounds pinned memory up to a power of two, so one block of 11.2 GiB would take 16. Largest first,
    a tensor goes into the first block with room, else into a new one: of 1 GiB, or the power of two that holds a larger
    tensor, or less where the remaining tensors would not fill it. A place is (block, first byte).
    """
    capacities: list[int] = []
    used: list[int] = []
    places = [(0, 0)] * len(sizes)
    left = sum(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        size = sizes[index]
        block = next((block for block, start in enumerate(used) if start + size <= capacities[block]), len(used))
        if block == len(used):
            last = max(_SMALL_BLOCK_BYTES, 2 ** (left.bit_length() - 1))
            capacities.append(max(_power_of_two(size), min(_BLOCK_BYTES, last)))
            used.append(0)
        places[index] = (block, used[block])
        used[block] += size
        left -= size
    return used, places


def _power_of_two(num_bytes: int) -> int:
    """The smallest power of two that is not below `num_bytes`."""
    return 2 ** (num_bytes - 1).bit_length() if num_bytes else 0


def _persistent_buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    names = {name for name, _ in module.named_buffers()} & set(module.state_dict().keys())
    return {name: buffer.clone() for name, buffer in module.named_buffers() if name in names}


def _padded_bytes(tensor: torch.Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
