"""Which rank saved which elements: the index files of a checkpoint, merged, and what one process needs of them.

At a resume rank 0 alone reads the index files of all ranks and gives each rank its `Part`, whose size does not grow
with the number of ranks that saved. Torch-free.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbolm.checkpoint.manifest import BUFFERS, TRAINER_STATE, index_file, rank_of_tensor_file, read_manifest
from turbolm.errors import UserError
from turbolm.files import load_json

WEIGHT_AVERAGE = "weight_average"  # a parameter's mean over the steps that `evaluation.weight_average` names

Piece = tuple[int, int, int]  # elements [start, end) of a flattened parameter, and the rank that saved them


@dataclass
class RankIndex:
    """An index file: what one rank saved."""

    fragments: dict[str, tuple[int, int]]  # parameter: first element and number of elements
    states: dict[str, list[str]]  # parameter: its state tensors that are cut like it
    scalars: dict[str, dict[str, float]]
    whole: dict[str, dict[str, Any]]  # parameter: `layout` and `states` of what is saved whole
    groups: list[dict[str, float]]
    rng: Any
    labels: dict[str, Any]  # step, rank and world_size, as far as the file says them


def pack_fragments(
    fragments: Mapping[str, tuple[int, int]],
    states: Mapping[str, list[str]],
    scalars: Mapping[str, Mapping[str, float]],
) -> list[dict[str, Any]]:
    """The fragments of a rank as its index file holds them: by states and scalars, which most have in common."""
    groups: dict[str, dict[str, Any]] = {}
    for name, place in fragments.items():
        kind = {"states": states[name], "scalars": scalars[name]}
        groups.setdefault(json.dumps(kind), {**kind, "fragments": {}})["fragments"][name] = list(place)
    return list(groups.values())


def parse_index(name: str, index: Any) -> RankIndex:
    """The content of an index file, of this format or the one before. Raises UserError."""
    try:
        packed = index["fragments"]
        if isinstance(packed, dict):  # format 2
            places = {key: (int(one["start"]), int(one["numel"])) for key, one in packed.items()}
            states = {key: list(index["states"].get(key, ())) for key in places}
            scalars = dict(index["scalars"])
        else:
            places, states, scalars = {}, {}, {}
            for group in packed:
                for key, (start, numel) in group["fragments"].items():
                    places[key] = int(start), int(numel)
                    states[key], scalars[key] = list(group["states"]), dict(group["scalars"])
        labels = {label: index[label] for label in ("step", "rank", "world_size") if label in index}
        whole = {key: {"layout": one["layout"], "states": list(one["states"])} for key, one in index["whole"].items()}
        return RankIndex(places, states, scalars, whole, list(index["groups"]), index.get("rng"), labels)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{name}: not an index of fragments: {error!r}") from None


def read_index(checkpoint: Path, rank: int) -> RankIndex:
    """The index file of a rank. Raises UserError."""
    name = index_file(rank)
    try:
        index = load_json(checkpoint / name)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: {error}") from None
    return parse_index(name, index)


@dataclass
class Wanted:
    """What a process loads: elements by parameter, and the layouts its whole states are bound to."""

    fragments: dict[str, tuple[int, int]]  # parameter: first element and number of elements
    layouts: dict[str, str]


@dataclass
class Part:
    """What one process needs to know to load from a checkpoint."""

    world_size: int  # of the ranks that saved
    zero_stage: int | None
    shapes: dict[str, tuple[int, ...]]  # of all parameters
    has_states: bool  # whether any rank saved a state tensor of the optimizer
    has_average: bool
    counted: dict[str, float]  # a parameter's scalars, those of any
    groups: list[dict[str, float]]
    has_buffers: bool
    trainer_state: dict[str, Any]
    pieces: dict[str, list[Piece]]  # by start
    states_of: dict[str, set[str]]  # parameter: state tensors that are cut like it
    scalars: dict[str, dict[str, float]]
    whole: dict[tuple[str, str], tuple[int, set[str]]]  # (parameter, layout): rank and states
    with_whole: set[str]  # parameters with whole states of any layout
    tensor_files: dict[int, list[str]]  # by rank
    rng: dict[int, Any]  # the host's random state, by rank


class CheckpointIndex:
    """The index files of all ranks. Raises UserError when they do not hold each parameter exactly once."""

    def __init__(self, checkpoint: Path):
        self.checkpoint, self.manifest = checkpoint, read_manifest(checkpoint)
        self.pieces: dict[str, list[Piece]] = {name: [] for name in self.manifest["parameters"]}
        self._states_of: dict[str, set[str]] = defaultdict(set)
        self._scalars: dict[str, dict[str, float]] = {}
        self._whole: dict[tuple[str, str], tuple[int, set[str]]] = {}
        self._groups: list[dict[str, float]] = []
        self._rng: dict[int, Any] = {}
        for rank in range(self.manifest["world_size"]):
            self._add(rank, read_index(self.checkpoint, rank))
        self._starts = {name: self._check_coverage(name, shape) for name, shape in self.manifest["parameters"].items()}
        self.has_average = any(WEIGHT_AVERAGE in states for states in self._states_of.values())
        self._with_whole = {name for name, _ in self._whole}
        self._shapes = {name: tuple(shape) for name, shape in self.manifest["parameters"].items()}
        self._counted = {key: value for scalars in self._scalars.values() for key, value in scalars.items()}
        self._tensor_files: dict[int, list[str]] = defaultdict(list)
        for name in self.manifest["files"]:
            owner = rank_of_tensor_file(name)
            if owner is not None:
                self._tensor_files[owner].append(name)

    def _add(self, rank: int, index: RankIndex) -> None:
        for name, (start, numel) in index.fragments.items():
            if name not in self.pieces:
                raise UserError(f"{index_file(rank)}: {name} is not a parameter of the manifest")
            self.pieces[name].append((start, start + numel, rank))
            self._states_of[name].update(index.states[name])
        self._scalars.update(index.scalars)
        for name, whole in index.whole.items():
            self._whole[name, whole["layout"]] = (rank, set(whole["states"]))
        self._groups = self._groups or index.groups
        self._rng[rank] = index.rng

    def _check_coverage(self, name: str, shape: list[int]) -> list[int]:
        """Where the pieces of a parameter start, which are put in order."""
        pieces, reached = self.pieces[name], 0
        pieces.sort()
        for start, end, _ in pieces:
            if start != reached:
                first, last = sorted((start, reached))
                raise UserError(f"elements {first} to {last} of {name} are missing or doubled")
            reached = end
        if reached != math.prod(shape):
            raise UserError(f"{reached} of {math.prod(shape)} elements of {name} are there")
        return [start for start, _, _ in pieces]

    def everything(self) -> Part:
        """What a process needs that reads all of the checkpoint."""
        sizes = {name: (0, math.prod(shape)) for name, shape in self.manifest["parameters"].items()}
        part = self.part(Wanted(sizes, {}), 0, self.trainer_state())
        part.whole, part.rng, part.tensor_files = self._whole, self._rng, self._tensor_files
        return part

    def trainer_state(self) -> dict[str, Any]:
        """What the trainer noted beside the tensors. Raises OSError or ValueError."""
        state: dict[str, Any] = load_json(self.checkpoint / TRAINER_STATE)
        return state

    def part(self, wanted: Wanted, rank: int, trainer_state: dict[str, Any]) -> Part:
        """What rank `rank` needs to load `wanted`, and to continue the random state of the rank of its number."""
        names = [name for name in wanted.fragments if name in self.pieces]
        pieces = {name: self._overlapping(name, *wanted.fragments[name]) for name in names}
        whole = {key: self._whole[key] for key in wanted.layouts.items() if key in self._whole}
        owners = {owner for found in pieces.values() for _, _, owner in found}
        owners |= {owner for owner, _ in whole.values()} | ({rank} & self._rng.keys())
        return Part(
            world_size=self.manifest["world_size"],
            zero_stage=self.manifest.get("zero_stage"),
            shapes=self._shapes,
            has_states=any(states - {WEIGHT_AVERAGE} for states in self._states_of.values()) or bool(self._whole),
            has_average=self.has_average,
            counted=self._counted,
            groups=self._groups,
            has_buffers=BUFFERS in self.manifest["files"],
            trainer_state=trainer_state,
            pieces=pieces,
            states_of={name: self._states_of[name] for name in names},
            scalars={name: self._scalars[name] for name in names if name in self._scalars},
            whole=whole,
            with_whole=self._with_whole.intersection(names),
            tensor_files={owner: self._tensor_files[owner] for owner in sorted(owners)},
            rng={rank: self._rng[rank]} if rank in self._rng else {},
        )

    def _overlapping(self, name: str, start: int, numel: int) -> list[Piece]:
        pieces, found = self.pieces[name], []
        at = max(0, bisect_right(self._starts[name], start) - 1)
        while at < len(pieces) and pieces[at][0] < start + numel:
            if pieces[at][1] > start:
                found.append(pieces[at])
            at += 1
        return found
