"""What ranks read, send and write beside tensors when 64 and 512 of them save and resume at ZeRO-3.

Ranks 0 and 1, one in the middle and the last are threads that run the real code with engines of their share; for each
other rank stands what rank 1 sends, or what it would want. Everything is counted: JSON files, headers of tensor files,
and what passes between a rank and rank 0.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from torch import nn

from turbolm.checkpoint import index, load, manifest, save, verify
from turbolm.checkpoint.ranks import Agree
from turbolm.checkpoint.snapshot import take_snapshot
from turbolm.checkpoint.tensor_file import _header
from turbolm.engine import engine, state
from turbolm.engine.partitions import Fragment
from turbolm.errors import UserError
from turbolm.files import load_json
from turbolm.models.build import build_config
from turbolm.models.count import build_on_meta
from turbolm.recipe.load import load_recipe
from turbolm.shipped import find_recipe

STEP = 7
NOTED = {"step": STEP, "tokens_seen": 700, "order_digest": ""}
SHAPES = {f"layers.{number}.weight": (3 + number, 1024) for number in range(4)} | {"norm.weight": (1030,)}
here = threading.local()  # which rank this thread is


class ShardEngine(engine.Engine):
    """One rank's share of parameters at ZeRO-3: an equal part of each, in one flat tensor. Nothing is computed."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], rank: int, world_size: int, device: str = "cpu"):
        self.shapes, self.places = shapes, places_of(shapes, rank, world_size)
        self.flat = nn.Parameter(torch.zeros(sum(numel for _, numel in self.places.values()), device=device))
        optimizer = torch.optim.AdamW([self.flat])
        super().__init__(
            SimpleNamespace(
                module=nn.Module(), device=torch.device(device), optimizer=SimpleNamespace(optimizer=optimizer),
                zero_optimization_stage=lambda: 3,
            )
        )  # fmt: skip

    def fragments(self) -> list[Fragment]:
        fragments, offset = [], 0
        for name, (start, numel) in self.places.items():
            fragments.append(Fragment(name, self.shapes[name], start, numel, self.flat, offset))
            offset += numel
        return fragments

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return self.shapes

    def materialise_state(self) -> None:
        state.materialise_state(self.optimizer, [[self.flat]])

    def publish_weights(self) -> None:
        pass


def places_of(shapes: dict[str, tuple[int, ...]], rank: int, world_size: int) -> dict[str, tuple[int, int]]:
    """First element and number of elements of a rank's part of each parameter; the last parts are shorter or none."""
    places = {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        part = -(-size // world_size)
        numel = min(part, size - rank * part)
        if numel > 0:
            places[name] = (rank * part, numel)
    return places


def values_of(shapes: dict[str, tuple[int, ...]], name: str, start: int, numel: int) -> torch.Tensor:
    """The weights of a trained model here: each element tells its parameter and its place."""
    return torch.arange(start, start + numel, dtype=torch.float32) + 10_000 * list(shapes).index(name)


@contextmanager
def ranks_are_threads(world_size: int) -> Iterator[None]:
    with patch("torch.distributed.get_rank", lambda *_: here.rank), patch(
        "torch.distributed.get_world_size", lambda *_: world_size
    ):  # fmt: skip
        yield


def trained(shapes: dict[str, tuple[int, ...]], rank: int, world_size: int, device: str = "cpu") -> ShardEngine:
    built = ShardEngine(shapes, rank, world_size, device)
    moments = {name: torch.empty_like(built.flat) for name in ("exp_avg", "exp_avg_sq")}
    built.optimizer.state[built.flat] = {"step": torch.tensor(float(STEP)), **moments}
    for fragment in built.fragments() if device == "cpu" else ():
        values = values_of(shapes, fragment.name, fragment.start, fragment.numel)
        fragment.view(fragment.flat).copy_(values)
        fragment.view(moments["exp_avg"]).copy_(-values)
        fragment.view(moments["exp_avg_sq"]).copy_(values + 0.5)
    return built


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Checkpoints of 64 and of 512 ranks, each written rank after rank, by their number."""
    checkpoints = {}
    for world_size in (64, 512):
        folder = tmp_path_factory.mktemp(str(world_size))
        temporary, final = manifest.temporary_folder(folder, STEP), folder / manifest.checkpoint_name(STEP)
        temporary.mkdir()
        files: dict[str, Any] = {}
        with ranks_are_threads(world_size), patch("os.fsync", lambda _: None):
            for rank in range(world_size):
                here.rank = rank
                snapshot = take_snapshot(trained(SHAPES, rank, world_size), STEP, NOTED)
                files |= save.write_rank_files(temporary, snapshot)
        manifest.commit(temporary, final, {**snapshot.about, "contract": "c", "files": files})
        checkpoints[world_size] = final
    return checkpoints


class Meeting:
    """Where the threads of some ranks meet; `stand_in` gives what each other rank sends, of what rank 1 sends."""

    def __init__(self, ranks: Sequence[int], num_ranks: int, stand_in: Callable[[int, Any], Any]):
        self.ranks, self.num_ranks, self.stand_in = ranks, num_ranks, stand_in
        self.barrier, self.values = threading.Barrier(len(ranks)), dict[int, Any]()

    def exchange(self, rank: int, value: Any) -> dict[int, Any]:
        self.values[rank] = value
        self.barrier.wait(60)
        everything = dict(self.values)
        self.barrier.wait(60)
        return everything


class Member(Agree):
    """A rank of a meeting; counts the bytes that it sends and receives, pickled as over the process group."""

    def __init__(self, meeting: Meeting, rank: int, counts: Counter[str]):
        self.meeting, self.rank, self.num_ranks, self.counts = meeting, rank, meeting.num_ranks, counts

    def gather(self, value: Any) -> list[Any] | None:
        self._count(value)
        given = self.meeting.exchange(self.rank, value)
        if self.rank > 0:
            return None
        return [given[one] if one in given else self.meeting.stand_in(one, given[1]) for one in range(self.num_ranks)]

    def scatter(self, values: Sequence[Any] | None) -> Any:
        assert values is None or len(values) == self.num_ranks
        own = copy.deepcopy(self.meeting.exchange(self.rank, values)[0][self.rank])
        self._count(own)
        return own

    def __call__(self, value: Any) -> list[Any]:
        raise AssertionError("what all ranks send to all grows with their number")

    def _count(self, value: Any) -> None:
        self.counts["messages"] += 1
        self.counts["message_bytes"] += len(pickle.dumps(value))


@contextmanager
def counted(counts: dict[int, Counter[str]]) -> Iterator[None]:
    """Count what each rank reads beside tensors: JSON files, and the headers of the tensor files that it opens."""

    def read_json(path: Path) -> Any:
        counts[here.rank]["json_files"] += 1
        counts[here.rank]["json_bytes"] += path.stat().st_size
        return load_json(path)

    def open_tensors(path: Path, *arguments: Any, **settings: Any) -> Any:
        with path.open("rb") as file:
            counts[here.rank]["headers"] += 1
            counts[here.rank]["header_bytes"] += int.from_bytes(file.read(8), "little")
        return safe_open(path, *arguments, **settings)

    def list_folder(folder: Path) -> Any:
        counts[here.rank]["listings"] += 1
        return manifest.list_checkpoints(folder)

    with ExitStack() as stack:
        for module in (index, manifest, verify):
            stack.enter_context(patch.object(module, "load_json", read_json))
        for module in (load, verify):
            stack.enter_context(patch.object(module, "safe_open", open_tensors))
        stack.enter_context(patch.object(verify, "list_checkpoints", list_folder))
        yield


def as_ranks(ranks: Sequence[int], num_ranks: int, run: Callable[[Member], Any]) -> tuple[dict[int, Any], Any]:
    """What `run` returned or raised on each of the ranks, and what each of them read and sent."""
    counts: dict[int, Counter[str]] = defaultdict(Counter)

    def stand_in(rank: int, value: Any) -> Any:
        return index.Wanted(places_of(SHAPES, rank, num_ranks), {}) if isinstance(value, index.Wanted) else value

    meeting, results = Meeting(ranks, num_ranks, stand_in), {}

    def work(rank: int) -> None:
        here.rank = rank
        try:
            results[rank] = run(Member(meeting, rank, counts[rank]))
        except UserError as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in ranks]
    with ranks_are_threads(num_ranks), counted(counts):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
    return results, counts


def resume(checkpoint: Path, num_ranks: int) -> Callable[[Member], ShardEngine]:
    """Verify and load as a start does, its state in an engine that has none."""

    def run(agree: Member) -> ShardEngine:
        hashed = verify.hash_ahead(checkpoint.parent, agree)
        found, rejected = verify.find_newest_valid(checkpoint.parent, {"c"}, agree, hashed=hashed)
        assert (found, rejected) == (checkpoint, [])
        built = ShardEngine(SHAPES, agree.rank, num_ranks)
        assert load.load_checkpoint(found, built, agree)["step"] == STEP
        return built

    return run


def check_elements(results: dict[int, Any], num_ranks: int) -> None:
    """Each rank that resumed holds its elements of what was trained."""
    for rank, built in results.items():
        if isinstance(built, UserError):
            raise built
        expected = trained(SHAPES, rank, num_ranks)
        assert torch.equal(built.flat, expected.flat) and built.flat.numel() > 0
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(built.optimizer.state[built.flat][name], expected.optimizer.state[expected.flat][name])


@pytest.mark.parametrize(("wrote", "num_ranks"), [(64, 512), (512, 64)])
def test_ranks_get_their_own_elements_of_another_world(wrote: int, num_ranks: int, saved: dict[int, Path]) -> None:
    results, _ = as_ranks([0, 1, num_ranks // 2, num_ranks - 1], num_ranks, resume(saved[wrote], num_ranks))
    check_elements(results, num_ranks)


def test_what_a_rank_reads_at_a_resume_does_not_grow_with_the_ranks(saved: dict[int, Path]) -> None:
    by_world: dict[int, dict[int, Counter[str]]] = {}
    for num_ranks in (64, 512):
        ranks = [0, 1, num_ranks // 2 - 1, num_ranks - 1]
        results, by_world[num_ranks] = as_ranks(ranks, num_ranks, resume(saved[num_ranks], num_ranks))
        check_elements(results, num_ranks)
        for rank in ranks:
            print(f"rank {rank} of {num_ranks}: {dict(sorted(by_world[num_ranks][rank].items()))}")
    small, large = by_world[64][1], by_world[512][1]
    calls = ("json_files", "headers", "listings", "messages")
    for rank, read in (*by_world[64].items(), *by_world[512].items()):
        if rank > 0:
            assert [read[key] for key in calls] == [small[key] for key in calls], rank
            for key in ("json_bytes", "header_bytes", "message_bytes"):
                assert read[key] < 1.02 * small[key], (rank, key)  # the last have no part of a small parameter
    assert (small["json_files"], small["headers"], small["listings"]) == (1, 2, 0)
    assert all(large[key] > 0.9 * small[key] for key in small)
    # Rank 0 reads each index file twice for all, to verify and to load, and the manifest.
    assert by_world[512][0]["json_files"] - 2 * 512 == by_world[64][0]["json_files"] - 2 * 64 <= 8
    assert large["messages"] == small["messages"] < 40


def test_a_rank_that_cannot_read_the_index_files_ends_all_with_one_message(saved: dict[int, Path]) -> None:
    """Rank 0 reads for all, and none of them waits for it."""
    built = {rank: ShardEngine(SHAPES, rank, 64) for rank in (0, 1, 63)}

    def fail(*_: Any) -> Any:
        raise OSError("Stale file handle")

    def run(agree: Member) -> Any:
        return load.load_checkpoint(saved[64], built[agree.rank], agree)

    with patch.object(index, "read_index", fail):
        results, _ = as_ranks(list(built), 64, run)
        assert {str(error) for error in results.values()} == {"rank 0: OSError: Stale file handle"}
        results, _ = as_ranks(
            list(built), 64, lambda agree: verify.find_newest_valid(saved[64].parent, None, agree)
        )  # fmt: skip
    assert list(results.values()) == [(None, [f"{saved[64]}: Stale file handle"])] * 3
    with patch.object(load.CheckpointReader, "rng_state", fail):  # on the ranks that are there
        results, _ = as_ranks(list(built), 64, run)
    told = "rank 0, 1, 2, 3, 4, 5, 6, 7 and 56 more: OSError: Stale file handle"
    assert {str(error) for error in results.values()} == {told}
    assert len(results) == 3


def test_what_a_save_of_70b_on_512_ranks_writes_and_sends_beside_tensors() -> None:
    """With the tensors of the 70B recipe: index files, manifest, trainer's state and messages take under 64 MB."""
    num_ranks, recipe = 512, load_recipe(find_recipe("llama3.1-70b"))
    config = build_config(
        recipe.model, seq_len=recipe.data.seq_len, vocab_size=128256, bos_token_id=128000, eos_token_id=128001
    )
    shapes = {name: tuple(parameter.shape) for name, parameter in build_on_meta(config).named_parameters()}
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == (723, 70_553_706_496)
    totals: dict[str, int] = Counter()
    sizes = {}
    for rank in (0, 1, 255, 511):
        here.rank = rank
        with ranks_are_threads(num_ranks):
            snapshot = take_snapshot(trained(shapes, rank, num_ranks, "meta"), STEP, NOTED)
        parts = save._parts(snapshot.tensors)
        described = {
            manifest.tensor_file(rank, part): {"bytes": 2**29, "sha256": "0" * 64} for part in range(len(parts))
        }
        described[manifest.index_file(rank)] = {"bytes": 2**16, "sha256": "0" * 64}
        sizes[rank] = {
            "index": len(json.dumps(snapshot.index, separators=(",", ":"))),
            "message": len(json.dumps(described)),
            "in manifest": len(json.dumps(described, indent=1)) + 2 * len(described),
            "tensor headers": sum(len(_header(list(part.items()), {"rank": "511"})) for part in parts),
        }
    for key in sizes[0]:
        totals[key] = num_ranks * max(size[key] for size in sizes.values())
    totals["once"] = len(json.dumps(snapshot.about, indent=1)) + 2**16  # parameters, and the trainer's state
    print(totals, sizes[255])
    beside = sum(size for key, size in totals.items() if key != "tensor headers")
    assert 20e6 < beside < 64e6
    assert max(size["message"] for size in sizes.values()) < 1000
    # Part of the safetensors format, beside 1.65 GB of tensors of each rank, which alone writes them.
    assert sizes[255]["tensor headers"] < 3e-4 * 70_553_706_496 * 12 / num_ranks
