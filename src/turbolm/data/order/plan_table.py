"""The plan table: all planned windows of an order, in parts; parts in files are read when a window of them is needed.

    cache_dir/orders/<key>/table.json    the parts so far: their last step, digest and size; written after each part
                           part-<n>.npz  windows n * PART_WINDOWS and on

A build that is killed keeps the parts in table.json, and the next one goes on from there. Planned windows never change,
so a part with a file is replaced only by a longer one. Memory: two parts and a record for each, whatever the table.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from turbolm.data.native import IntArray
from turbolm.data.order.table import PlannedWindow
from turbolm.data.order.window import Slices
from turbolm.files import load_json, sha256_json, temporary, write_json

PART_WINDOWS = 256  # planned in about two seconds: what a killed build loses
_VERSION = 1
INDEX = "table.json"
PlanNext = Callable[[PlannedWindow | None, int], PlannedWindow]  # (the window before, number): window `number`


@dataclass(frozen=True)
class Part:
    """A part of the table in a file. `max_slices` are the most of a sequence, by segment and sequence length."""

    num_windows: int
    end_step: int
    digest: str
    num_bytes: int
    max_slices: dict[str, list[int]]


class PlanTable(Sequence[PlannedWindow]):
    """The windows so far. `plan_next` plans one more; `parts` are in `folder`; `save` adds to it. Not thread-safe."""

    def __init__(self, plan_next: PlanNext, key: str = "", folder: Path | None = None, parts: Sequence[Part] = ()):
        self._plan_next, self._key, self._folder, self._parts = plan_next, key, folder, list(parts)
        self._tail: list[PlannedWindow] = []  # windows after the last full part
        self._part = lru_cache(2)(self._read_part)
        if self._parts and self._parts[-1].num_windows < PART_WINDOWS:
            last = self._parts.pop()
            self._tail = self._load(len(self._parts), last) or []
        self._num_saved = len(self)  # windows in files

    def __len__(self) -> int:
        return self._num_full + len(self._tail)

    def __getitem__(self, number: int) -> PlannedWindow:  # type: ignore[override]  # no slices
        number = range(len(self))[number]
        part, at = divmod(number, PART_WINDOWS)
        return self._part(part)[at] if part < len(self._parts) else self._tail[number - self._num_full]

    def __iter__(self) -> Iterator[PlannedWindow]:
        return (self[number] for number in range(len(self)))

    @property
    def _num_full(self) -> int:
        return len(self._parts) * PART_WINDOWS

    @property
    def num_steps(self) -> int:
        """Return the number of steps planned so far."""
        if self._tail:
            return self._tail[-1].end_step
        return self._parts[-1].end_step if self._parts else 0

    def window_of(self, step: int) -> int:
        """Return the number of the window that holds a planned step."""
        part = bisect_right(self._parts, step, key=lambda part: part.end_step)
        windows = self._part(part) if part < len(self._parts) else self._tail
        return part * PART_WINDOWS + bisect_right(windows, step, key=lambda planned: planned.end_step)

    def extend(self) -> None:
        """Plan one more window; a full part leaves memory once it is saved."""
        number = len(self)
        self._tail.append(self._plan_next(self[-1] if number else None, number))

    def max_slices(self, num_windows: int) -> Iterator[tuple[int, Sequence[int]]]:
        """Yield (segment, most slices of a sequence by the segment's lengths) over the first windows."""
        num_parts = min(num_windows // PART_WINDOWS, len(self._parts))
        for part in self._parts[:num_parts]:
            yield from ((int(segment), most) for segment, most in part.max_slices.items())
        for number in range(num_parts * PART_WINDOWS, num_windows):
            yield self[number].segment, self[number].max_slices

    def save(self, *, last: bool = False) -> None:
        """Write the windows that are not in a file, part by part; with `last`, also those that do not fill a part.

        Raises OSError.
        """
        while self._folder is not None and self._num_saved < len(self):
            windows = self._tail[:PART_WINDOWS]
            if len(windows) < PART_WINDOWS and not last:
                return
            part = self._write_part(self._folder, windows)
            self._num_saved = self._num_full + part.num_windows
            if part.num_windows == PART_WINDOWS:
                self._parts.append(part)
                del self._tail[:PART_WINDOWS]

    def _write_part(self, folder: Path, windows: Sequence[PlannedWindow]) -> Part:
        """Write the part after the full ones, and then the record of all parts."""
        name = part_name(len(self._parts))
        save_windows(folder / name, f"{self._key}/{name}", windows)
        most: dict[str, list[int]] = {}
        for planned in windows:
            before = most.get(str(planned.segment), planned.max_slices)
            most[str(planned.segment)] = list(map(max, before, planned.max_slices))
        end, num_bytes = windows[-1], (folder / name).stat().st_size
        part = Part(len(windows), end.end_step, end.digest, num_bytes, most)
        write_index(folder, self._key, [*self._parts, part])
        return part

    def _read_part(self, number: int) -> list[PlannedWindow]:
        """Return a full part's windows: from its file or, where that is damaged, planned again."""
        part = self._parts[number]
        if (windows := self._load(number, part)) is not None:
            return windows
        windows, last = [], self[number * PART_WINDOWS - 1] if number else None
        for at in range(part.num_windows):
            last = self._plan_next(last, number * PART_WINDOWS + at)
            windows.append(last)
        if last is None or last.digest != part.digest:
            raise RuntimeError(f"part {number} of {self._folder} is damaged, and planned again it has other batches")
        return windows

    def _load(self, number: int, part: Part) -> list[PlannedWindow] | None:
        """Return the windows in a part's file, or None if they are not those of its record."""
        assert self._folder is not None
        name, first_step = part_name(number), self._parts[number - 1].end_step if number else 0
        windows = load_windows(self._folder / name, f"{self._key}/{name}")[: part.num_windows]
        if len(windows) != part.num_windows or windows[0].first_step != first_step:
            return None
        return windows if (windows[-1].end_step, windows[-1].digest) == (part.end_step, part.digest) else None


# ------------------------------------------------------------------------------------------------------ the files


def part_name(number: int) -> str:
    """Return the name of a part's file."""
    return f"part-{number:05d}.npz"


def write_index(folder: Path, key: str, parts: Sequence[Part]) -> None:
    """Record the parts that a table has so far. Raises OSError."""
    content = {"version": _VERSION, "key": key, "parts": [asdict(part) for part in parts]}
    write_json(folder / INDEX, {**content, "sha256": sha256_json(content)})


def read_index(folder: Path, key: str) -> list[Part]:
    """Return the parts that a table with this key has so far; none if the record is missing or damaged."""
    try:
        content = dict(load_json(folder / INDEX))
        sha256 = content.pop("sha256")
        if (content["version"], content["key"], sha256_json(content)) != (_VERSION, key, sha256):
            return []
        return [Part(**part) for part in content["parts"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def whole_parts(folder: Path, parts: Sequence[Part]) -> Sequence[Part]:
    """Return the parts before the first one whose file is missing or has another size; opens none of them."""
    for number, part in enumerate(parts):
        try:
            if (folder / part_name(number)).stat().st_size == part.num_bytes:
                continue
        except OSError:
            pass
        return parts[:number]
    return parts


def save_windows(path: Path, key: str, table: Sequence[PlannedWindow]) -> None:
    """Write consecutive windows to `path` (.npz without pickles) through a temporary file.

    Raises OSError, and then leaves none.
    """
    slices = [table[0].carried, *(planned.carried_on for planned in table)]
    joined = np.stack(list(vars(Slices.join(slices)).values()))
    if joined.max(initial=0) < 2**31:  # nearly all of the file, which every start reads and checks
        joined = joined.astype(np.int32)
    arrays: dict[str, IntArray] = {  # names from the first version of the format
        "numbers": np.array([[planned.first_step, planned.end_step, planned.segment] for planned in table], np.int64),
        "ranges": np.array([planned.ranges for planned in table], np.int64),
        "owed": np.array([planned.owed for planned in table], np.int64),
        "piece_counts": np.array([len(part.length) for part in slices], np.int64),
        "pieces": joined,
        "max_pieces_counts": np.array([len(planned.max_slices) for planned in table], np.int64),
        "max_pieces": np.array([most for planned in table for most in planned.max_slices], np.int64),
        "digests": np.array([planned.digest for planned in table]),
        "key": np.array(key),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary(path).open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        temporary(path).replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary(path).unlink()
        error.filename = error.filename or str(path)  # a full disk names no file
        raise


def load_windows(path: Path, key: str) -> list[PlannedWindow]:
    """Read the windows that `save_windows` wrote under this key; empty if the file is missing or corrupt."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        if str(arrays["key"]) != key:
            return []
        slices = [Slices(*part) for part in _split(arrays["pieces"], arrays["piece_counts"])]
        max_slices = _split(arrays["max_pieces"], arrays["max_pieces_counts"])
        columns = (arrays[name].tolist() for name in ("numbers", "ranges", "owed", "digests"))
        return [
            PlannedWindow(
                first, end, segment, tuple(map(tuple, ranges)), tuple(owed), carried, on, tuple(most.tolist()), digest
            )
            for (first, end, segment), ranges, owed, digest, carried, on, most in zip(
                *columns, slices[:-1], slices[1:], max_slices, strict=True
            )
        ]
    except Exception:  # it is a cache: whatever is wrong, the table is built again
        return []


def _split(values: IntArray, counts: IntArray) -> list[IntArray]:
    """Split the last axis of `values` into parts of these sizes."""
    ends = np.cumsum(counts)
    assert ends[-1] == values.shape[-1]
    return np.split(values, ends[:-1], axis=-1)
