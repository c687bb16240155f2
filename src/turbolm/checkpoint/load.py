"""Read a checkpoint into an engine of any ZeRO stage and world size."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from turbolm.checkpoint.agreement import gather_over
from turbolm.checkpoint.host_rng import set_host_rng_state
from turbolm.checkpoint.index import WEIGHT_AVERAGE, CheckpointIndex, Part, Wanted
from turbolm.checkpoint.manifest import BUFFERS, TRAINER_STATE
from turbolm.checkpoint.optimizer_state import (
    PARAMETER,
    check_same_states,
    layouts,
    parameter_state,
    set_group_numbers,
    set_scalars,
)
from turbolm.checkpoint.ranks import Agree, in_step
from turbolm.engine.engine import Engine
from turbolm.engine.partitions import Fragment
from turbolm.errors import UserError


class CheckpointReader:
    """The tensors of a checkpoint, whoever wrote which part of them. Use as a context manager.

    `part` is what this process is to read; by default all, for which it reads the index files of all ranks itself.
    `read_whole` reads `weights`: those trained, or their mean.
    """

    def __init__(self, checkpoint: Path, part: Part | None = None, weights: str = "weight"):
        self.checkpoint, self._weights = checkpoint, weights
        self.part = part or CheckpointIndex(checkpoint).everything()
        self.shapes, self.scalars, self.groups = self.part.shapes, self.part.scalars, self.part.groups
        self.states_of, self.whole = self.part.states_of, self.part.whole

    def __enter__(self) -> CheckpointReader:
        self._stack = ExitStack()
        self._tensors: dict[int, dict[str, Any]] = {}  # rank: tensor name: open file
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def read(self, state: str, name: str, start: int, numel: int) -> torch.Tensor:
        """Elements [start, start + numel) of the flattened tensor, 1-D, as saved; maps only the files that hold them.

        Where they lie in one file, the result is a view of it.
        """
        parts = []
        for first, end, rank in self.part.pieces[name]:
            low, high = max(start, first), min(start + numel, end)
            if low < high:
                key = f"{state}/{name}"
                parts.append(self._open(rank)[key].get_slice(key)[low - first : high - first])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def read_whole(self, name: str) -> torch.Tensor:
        """A parameter's fp32 weight in its own shape."""
        shape = self.shapes[name]
        return self.read(self._weights, name, 0, math.prod(shape)).view(shape)

    def read_bound(self, state: str, name: str, layout: str) -> torch.Tensor:
        """A state tensor that was saved whole for one layout."""
        key = f"whole/{state}/{name}"
        tensor: torch.Tensor = self._open(self.whole[name, layout][0])[key].get_tensor(key)
        return tensor

    def buffers(self) -> dict[str, torch.Tensor]:
        """The model's persistent buffers."""
        if not self.part.has_buffers:
            return {}
        file = self._stack.enter_context(self._map(BUFFERS))
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)

    def rng_state(self, rank: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The random state rank `rank` saved, torch's and the host's; empty when fewer ranks wrote this checkpoint."""
        if rank not in self.part.rng:
            return {}, {}
        files = self._open(rank)
        keys = {name: f"rng/{name}" for name in ("cpu", "cuda") if f"rng/{name}" in files}
        return {name: files[key].get_tensor(key) for name, key in keys.items()}, self.part.rng[rank]

    def _open(self, rank: int) -> dict[str, Any]:
        """The open file of each tensor that a rank wrote."""
        if rank not in self._tensors:
            files = [self._stack.enter_context(self._map(name)) for name in self.part.tensor_files[rank]]
            self._tensors[rank] = {key: file for file in files for key in file.keys()}  # noqa: SIM118
        return self._tensors[rank]

    def _map(self, name: str) -> Any:
        try:
            return safe_open(self.checkpoint / name, framework="pt")
        except SafetensorError as error:
            raise UserError(f"{self.checkpoint / name}: {error}") from None


def load_checkpoint(checkpoint: Path, engine: Engine, agree: Agree | None = None) -> dict[str, Any]:
    """Restore weights, optimizer state and random state of an engine; returns the trainer's state.

    Collective, through `agree` (the default process group's). The checkpoint must have been verified; the caller
    compares its contract. A failure on any rank is a UserError on all, such as tensors that do not fit this model,
    optimizer or layout; the engine must then be loaded from another checkpoint, which restores all of it.
    """
    agree = agree or gather_over(None)
    with ExitStack() as stack:
        reader = _open_fitting(checkpoint, engine, stack, agree)
        if reader.part.has_states:
            engine.materialise_state()
        _make_average(reader, engine)
        in_step(agree, lambda: _load_own_part(reader, engine), UserError)
        engine.publish_weights()
        in_step(agree, lambda: _load_rest(reader, engine), UserError)
        return reader.part.trainer_state


def load_weights(checkpoint: Path, engine: Engine, agree: Agree) -> None:
    """Load the weights and persistent buffers alone. Collective, with the errors of `load_checkpoint`."""

    def load() -> None:
        for fragment in engine.fragments():
            _load_weight(reader, fragment)
        _load_buffers(reader, engine)

    with ExitStack() as stack:
        reader = _open_fitting(checkpoint, engine, stack, agree)
        in_step(agree, load, UserError)
        engine.publish_weights()


def _open_fitting(checkpoint: Path, engine: Engine, stack: ExitStack, agree: Agree) -> CheckpointReader:
    """Return the opened checkpoint, of which this rank knows its part; rank 0 reads the index files for all."""
    part = _own_part(checkpoint, in_step(agree, lambda: _wanted(engine), UserError), agree)

    def open_and_check() -> CheckpointReader:
        reader = stack.enter_context(CheckpointReader(checkpoint, part))
        _check_fits(reader, engine)
        return reader

    reader: CheckpointReader = in_step(agree, open_and_check, UserError)
    return reader


def _own_part(checkpoint: Path, wanted: Wanted, agree: Agree) -> Part:
    """What this rank needs to know of the checkpoint. Collective."""
    by_rank = agree.gather(wanted)

    def deal() -> list[Part]:
        index = CheckpointIndex(checkpoint)
        state = index.trainer_state()
        return [index.part(one, rank, state) for rank, one in enumerate(by_rank or ())]

    part: Part = agree.scatter(in_step(agree, deal if by_rank is not None else None, UserError))
    return part


def _wanted(engine: Engine) -> Wanted:
    """What this rank's optimizer holds."""
    wanted = {one.name: (one.start, one.numel) for one in engine.fragments()}
    shapes = engine.parameter_shapes()
    owned = {name: (0, math.prod(shapes[name])) for name in getattr(engine.optimizer, "owned", {})}
    return Wanted(wanted | owned, layouts(engine))


def _check_fits(reader: CheckpointReader, engine: Engine) -> None:
    """All that can be seen before anything is changed. Raises UserError."""
    ours, checkpoint = engine.parameter_shapes(), reader.checkpoint
    if ours != reader.shapes:
        different = sorted(name for name in {*ours, *reader.shapes} if ours.get(name) != reader.shapes.get(name))
        raise UserError(f"{checkpoint}: the model's parameters differ, first {different[0]}")
    buffers = dict(engine.module.named_buffers())
    for name, value in reader.buffers().items():
        if name not in buffers or buffers[name].shape != value.shape:
            raise UserError(f"{checkpoint}: the model has no buffer {name} of shape {tuple(value.shape)}")
    rank = dist.get_rank()
    try:
        for device, state in reader.rng_state(rank)[0].items():
            if device == "cpu" or torch.cuda.is_available():
                torch.Generator(device).set_state(state)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{checkpoint}: the random state of rank {rank} is not one: {error}") from None
    scaler = reader.part.trainer_state["scaler"]
    if not all(isinstance(value, (int, float)) for value in scaler.values()):
        raise UserError(f"{checkpoint}: {TRAINER_STATE}: the loss scaler's state is not numbers")


def _load_own_part(reader: CheckpointReader, engine: Engine) -> None:
    """This rank's fragments and what goes with them."""
    optimizer, bound_to, seen = engine.optimizer, layouts(engine), set()
    for fragment in engine.fragments():
        layout = bound_to[fragment.name]
        is_read = layout == PARAMETER or id(fragment.flat) not in seen
        mean = engine.averaged.of(fragment) if engine.averaged else None
        if mean is not None:
            _load_values(reader, WEIGHT_AVERAGE, fragment, mean)
        _load_fragment(reader, fragment, optimizer, layout if is_read else None)
        seen.add(id(fragment.flat))
    counted = reader.part.counted
    set_group_numbers(optimizer, reader.groups, {"step": counted["step"]} if "step" in counted else {})
    _load_buffers(reader, engine)


def _load_buffers(reader: CheckpointReader, engine: Engine) -> None:
    buffers = dict(engine.module.named_buffers())
    for name, value in reader.buffers().items():
        buffers[name].copy_(value)


def _load_weight(reader: CheckpointReader, fragment: Fragment) -> None:
    _load_values(reader, "weight", fragment, fragment.view(fragment.flat))


@torch.no_grad()
def _load_values(reader: CheckpointReader, state: str, fragment: Fragment, ours: torch.Tensor) -> None:
    values = reader.read(state, fragment.name, fragment.start, fragment.numel)
    ours.copy_(_of_its_kind(reader, f"{state} of {fragment.name}", values, ours))


def _make_average(reader: CheckpointReader, engine: Engine) -> None:
    """Create what the checkpoint's mean of the weights is loaded into, if it has one and this engine keeps one."""
    engine.drop_average()
    if engine.averaged is not None and reader.part.has_average:
        engine.materialise_average()


def _load_rest(reader: CheckpointReader, engine: Engine) -> None:
    """What follows the weights."""
    _set_rng_state(*reader.rng_state(dist.get_rank()))
    engine.restore_loss_scaler(reader.part.trainer_state["scaler"])


@torch.no_grad()
def _load_fragment(
    reader: CheckpointReader, fragment: Fragment, optimizer: torch.optim.Optimizer, layout: str | None
) -> None:
    """`layout` is that of the fragment's flat tensor where its whole states are to be read, else None."""

    def read(state: str) -> torch.Tensor:
        return reader.read(state, fragment.name, fragment.start, fragment.numel)

    name = fragment.name
    _load_weight(reader, fragment)
    ours = parameter_state(optimizer, fragment)
    saved, scalars = reader.states_of.get(name, set()) - {WEIGHT_AVERAGE}, reader.scalars.get(name, {})
    if not saved and not scalars and name not in reader.part.with_whole:
        getattr(optimizer, "owned", {}).get(name, {}).clear()
        optimizer.state.pop(fragment.flat, None)  # it had none: never updated, or an optimizer without state
        return
    in_groups = {key: value for numbers in reader.groups for key, value in numbers.items()}
    scalars = {key: value for key, value in {**in_groups, **scalars}.items() if key in ours.scalars or key in scalars}
    check_same_states(name, set(scalars) - {"step"}, set(ours.scalars) - {"step"})
    bound = reader.whole.get((name, layout), (0, set[str]()))[1] if layout is not None else set[str]()
    if layout is not None and ours.whole and not bound and not set(ours.whole) <= saved:
        raise UserError(
            f"{reader.checkpoint}: the optimizer's state {sorted(ours.whole)[0]!r} of {name} is bound to the "
            f"{reader.part.world_size} processes and ZeRO stage {reader.part.zero_stage} it was saved "
            "with; resume with these"
        )
    ours_whole = ours.whole if layout is not None else {}
    if name in getattr(optimizer, "elsewhere", ()):  # the matrix's owner has the rest of its state
        saved = saved.intersection(ours.sharded)
    check_same_states(name, saved | bound, {*ours.sharded, *ours_whole})
    owned = getattr(optimizer, "owned", {}).get(name) is not None
    for state, tensor in {**ours.sharded, **ours_whole}.items():
        # A tensor in another memory order is saved whole, and the same state may have another order here.
        if state not in saved:
            values = reader.read_bound(state, name, str(layout))
        elif owned and state not in ours.sharded:  # saved at stage 0, where it is cut like the parameter
            values = reader.read(state, name, 0, math.prod(fragment.shape))
        else:
            values = read(state)
        tensor.copy_(_of_its_kind(reader, f"{state} of {name}", values, tensor).reshape(tensor.shape))
    set_scalars(optimizer, fragment, {key: value for key, value in scalars.items() if key in ours.scalars})


def _of_its_kind(reader: CheckpointReader, what: str, values: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """`values`, where they have the type of ours and its shape, flattened or not. Raises UserError."""
    is_flat = 1 in (values.dim(), ours.dim()) and values.numel() == ours.numel()
    if values.dtype != ours.dtype or not (is_flat or values.shape == ours.shape):
        shapes = [f"{str(one.dtype).removeprefix('torch.')} of shape {tuple(one.shape)}" for one in (values, ours)]
        raise UserError(f"{reader.checkpoint}: {what} is {shapes[0]}, expected {shapes[1]}")
    return values


def _set_rng_state(torch_states: dict[str, torch.Tensor], host_state: dict[str, Any]) -> None:
    if "cpu" in torch_states:
        torch.set_rng_state(torch_states["cpu"])
    if "cuda" in torch_states and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch_states["cuda"])
    if host_state:
        set_host_rng_state(host_state)
