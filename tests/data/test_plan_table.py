"""The plan table is kept in parts: read when needed, planned again where damaged, gone on with after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turbolm.data.order import plan_table
from turbolm.data.order.batch_order import BatchOrder, order_of_lengths
from turbolm.data.order.plan_table import INDEX, load_windows, part_name, read_index, save_windows, whole_parts
from turbolm.plan.curriculum import Segment

from .test_order import segments_of, slices

LENGTHS = np.random.default_rng(0).integers(1, 60, 400)
SEGMENTS = segments_of((5, (32,), 4), (5, (4, 8, 16), 8), (5, (16,), 3))
STEPS = 150


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_table, "PART_WINDOWS", 4)


def in_memory(segments: list[Segment] = SEGMENTS) -> BatchOrder:
    return order_of_lengths(LENGTHS, segments, window_documents=20)


def from_files(folder: Path, *, check: bool = False) -> BatchOrder:
    like = in_memory()
    parts = read_index(folder, like.key)
    return BatchOrder(like.sources, like.settings, "", folder, whole_parts(folder, parts) if check else parts)


def build(folder: Path, steps: int = STEPS, until: int | None = None) -> int:
    """Build the table in files; killed after `until` windows. Returns how many windows were planned."""
    planned = 0

    def count(_: int) -> None:
        nonlocal planned
        planned += 1
        if planned == until:
            raise MemoryError

    try:
        from_files(folder, check=True).build(steps, count, save=True)
    except MemoryError:
        pass
    return planned


def content(order: BatchOrder) -> tuple[Any, ...]:
    batches = [slices(order.batch(step)) for step in range(STEPS)]
    return order.digest(STEPS), order.max_slices(STEPS), [planned.end_step for planned in order.table], batches


def test_a_table_is_read_back(tmp_path: Path) -> None:
    expected = in_memory()
    expected.build(STEPS)
    num_windows = build(tmp_path)
    assert num_windows == len(expected.table) > 8 and num_windows % 4
    again = from_files(tmp_path)
    assert again.num_steps == expected.num_steps >= STEPS
    assert content(again) == content(expected)
    assert slices(again.batch(STEPS + 30)) == slices(expected.batch(STEPS + 30)), "beyond the table, on demand"
    assert build(tmp_path) == 0
    assert not read_index(tmp_path, "another key")


def test_only_the_parts_that_are_used_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path)
    read: list[str] = []
    monkeypatch.setattr(plan_table, "load_windows", lambda path, key: read.append(path.name) or load_windows(path, key))
    order = from_files(tmp_path)
    tail = part_name(len(order.table) // 4)
    assert read == [tail], "the last part alone may still grow"
    order.max_slices(STEPS)
    first = order.table[5]
    order.batch(first.first_step)
    assert read == [tail, part_name(1)]


def test_a_killed_build_goes_on_from_the_last_part(tmp_path: Path) -> None:
    expected = in_memory()
    expected.build(STEPS)
    assert build(tmp_path, until=11) == 11
    assert len(from_files(tmp_path).table) == 8, "two parts of four windows; three windows are lost"
    assert build(tmp_path) == len(expected.table) - 8
    assert content(from_files(tmp_path)) == content(expected)
    # Killed between a part and the record of it
    record = (tmp_path / INDEX).read_text()
    before = json.loads(record)["parts"][-1]
    build(tmp_path, steps=STEPS + 40)
    assert read_index(tmp_path, expected.key)[len(from_files(tmp_path).table) // 4 - 1].num_bytes > 0
    (tmp_path / INDEX).write_text(record)
    assert before["num_windows"] < 4
    assert content(from_files(tmp_path)) == content(expected)


def test_a_larger_budget_adds_to_the_table(tmp_path: Path) -> None:
    build(tmp_path, steps=30)
    few = len(from_files(tmp_path).table)
    expected = in_memory()
    expected.build(STEPS)
    assert build(tmp_path) == len(expected.table) - few
    assert content(from_files(tmp_path)) == content(expected)


@pytest.mark.parametrize("damage", ["missing", "cut", "changed", "another part"])
def test_a_damaged_part_is_planned_again(tmp_path: Path, damage: str) -> None:
    expected = in_memory()
    expected.build(STEPS)
    build(tmp_path)
    part = tmp_path / part_name(1)
    whole = part.read_bytes()
    if damage == "missing":
        part.unlink()
    elif damage == "another part":
        part.write_bytes((tmp_path / part_name(0)).read_bytes())
    else:
        part.write_bytes(whole[:-50] if damage == "cut" else whole[:700] + b"\xff\xff" + whole[702:])
    assert content(from_files(tmp_path)) == content(expected), "by a rank, which writes nothing"
    if damage in ("missing", "cut"):  # `prepare` compares sizes, and plans the part again
        assert build(tmp_path) == len(expected.table) - 4
        assert part.read_bytes() == whole


def test_a_damaged_record_counts_as_none(tmp_path: Path) -> None:
    order = in_memory()
    build(tmp_path)
    whole = json.loads((tmp_path / INDEX).read_text())
    for changed in (
        whole | {"key": "k"},
        whole | {"parts": whole["parts"][:1]},
        whole | {"version": 9},
        [],
        3,
        "[" * 9999,
    ):
        (tmp_path / INDEX).write_text(json.dumps(changed) if not isinstance(changed, str) else changed)
        assert not read_index(tmp_path, order.key)
    (tmp_path / INDEX).unlink()
    assert not read_index(tmp_path, order.key)


def test_windows_in_a_file(tmp_path: Path) -> None:
    order, path = in_memory(), tmp_path / "orders" / "windows.npz"
    order.build(40)
    windows = list(order.table)
    save_windows(path, order.key, windows)
    assert [planned.digest for planned in load_windows(path, order.key)] == [planned.digest for planned in windows]
    assert not load_windows(path, "another key")
    whole = dict(np.load(path))
    for name in whole:
        np.savez(path, **{other: array for other, array in whole.items() if other != name})
        assert not load_windows(path, order.key), f"without {name}"
    for name in ("ranges", "owed", "digests", "max_pieces_counts"):
        np.savez(path, **{**whole, name: whole[name][:-1]})
        assert not load_windows(path, order.key), f"{name} cut short"
    assert not load_windows(tmp_path / "missing.npz", order.key)
