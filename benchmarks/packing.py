"""How fast documents are packed, how full the sequences are, and how fast their tokens move; beside TRL and Axolotl.

    python benchmarks/packing.py --corpus corpus.parquet --column text

Rates are documents per second of processor time (all threads of the process added up), medians of `--repeats` runs.
Everything compared is measured in the same run. A rival that is not installed is reported as not measured. The last
line of the output is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np

from turbolm.data.batch.loader import BatchLoader
from turbolm.data.order.batch_order import BatchOrder, constant_order
from turbolm.data.order.packing import Packing, pack, pack_best_fit, pack_single
from turbolm.data.prepare.reader import Reader
from turbolm.data.store.token_store import TokenStore
from turbolm.recipe.sources.stdlib import StdlibSource

BYTES_PER_TOKEN = 4  # usual for English text and a vocabulary of some ten thousand tokens
WINDOW_DOCUMENTS = 65536  # BatchOrder's default: what a recipe packs at a time
# The launcher sets these for every rank: freed memory is kept instead of being mapped anew for each batch.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
LARGE_WARM_UPS = 4  # calls until the heap has room for all large arrays at once, beside the last result
TARGETS = {
    "utilisation": 0.9995,  # of best_fit, all documents packed at once
    "planning_docs_per_s": 5e6,  # best_fit with the assignment of documents, on one core
    "growth": 1.3,  # at most: processor time per document with the most documents, over that with the fewest
    "growth_in_windows": 1.3,  # the same packed as a run does
    "moving_ratio": 5.0,  # our token-moving rate over the faster rival that keeps documents apart
}


@dataclass(frozen=True)
class Timing:
    """Medians: seconds of processor time, of that without the kernel's part, and of the clock; and the first call's."""

    cpu_s: float
    user_s: float
    wall_s: float
    first_cpu_s: float  # with the kernel's pages for whatever memory no other call had yet

    def rate(self, num_documents: int) -> float:
        """Documents per second of processor time."""
        return num_documents / self.cpu_s

    def times(self, factor: float) -> Timing:
        """The medians of so many times the work."""
        return replace(self, cpu_s=factor * self.cpu_s, user_s=factor * self.user_s, wall_s=factor * self.wall_s)


def measure(work: Callable[[], Any], repeats: int, warm_ups: int = 1) -> tuple[Timing, Any]:
    """Median time of `work` over `repeats` calls, after `warm_ups` that do not count unless `repeats` is 1."""
    result, seconds = None, []
    for _ in range(repeats + (warm_ups if repeats > 1 else 0)):
        before = (time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_utime, time.perf_counter())
        result = work()
        after = (time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_utime, time.perf_counter())
        seconds.append([b - a for a, b in zip(before, after, strict=True)])
    medians = [statistics.median(column) for column in zip(*seconds[-repeats:], strict=True)]
    return Timing(*medians, first_cpu_s=seconds[0][0]), result


# What is packed.


def corpus_lengths(arguments: argparse.Namespace) -> tuple[np.ndarray, str]:
    """Positions of each document of the corpus, int64, and where they come from."""
    if arguments.lengths:
        return np.load(arguments.lengths).astype(np.int64), "lengths from a file"
    if arguments.corpus:
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        texts = pq.read_table(arguments.corpus, columns=[arguments.column])[arguments.column]
        num_bytes, name = pc.binary_length(texts.drop_null()).to_numpy(), "parquet corpus"
    else:
        texts = Reader(StdlibSource(type="stdlib"))
        num_bytes = np.array([len(text.encode("utf-8", "replace")) for text in texts])
        name = "Python's standard library"
    return np.maximum(1, num_bytes // BYTES_PER_TOKEN).astype(np.int64), f"{name}, bytes / {BYTES_PER_TOKEN}"


# turbolm.


@dataclass(frozen=True)
class Plan:
    """How well and how fast one strategy packs so many documents; `windows`: the same, window by window."""

    documents: int
    packing: str
    assign_docs_per_s: float
    assign_user_s: float
    assign_first_docs_per_s: float
    assign_wall_docs_per_s: float
    sequences: int
    utilisation: float
    windows_utilisation: float
    windows_docs_per_s: float
    cuts: int
    avoidable_cuts: int  # of documents that fit in a sequence


def plan(lengths: np.ndarray, seq_len: int, packing: Packing, repeats: int) -> Plan:
    assigning, sequences = measure(lambda: pack(lengths, seq_len, packing), repeats, LARGE_WARM_UPS)
    windows = [lengths[i : i + WINDOW_DOCUMENTS] for i in range(0, len(lengths), WINDOW_DOCUMENTS)]
    by_window, num_window_sequences = measure(
        lambda: sum(len(pack(window, seq_len, packing)) for window in windows), repeats
    )
    num_positions = int(lengths.sum())
    return Plan(
        documents=len(lengths),
        packing=packing,
        assign_docs_per_s=assigning.rate(len(lengths)),
        assign_user_s=assigning.user_s,
        assign_first_docs_per_s=len(lengths) / assigning.first_cpu_s,
        assign_wall_docs_per_s=len(lengths) / assigning.wall_s,
        sequences=len(sequences),
        utilisation=num_positions / (len(sequences) * seq_len),
        windows_utilisation=num_positions / (num_window_sequences * seq_len),
        windows_docs_per_s=by_window.rate(len(lengths)),
        cuts=len(sequences.document) - int((lengths > 0).sum()),
        avoidable_cuts=int((sequences.start[lengths[sequences.document] <= seq_len] > 0).sum()),
    )


def plan_epoch(lengths: np.ndarray, seq_len: int) -> None:
    """What a run plans for an epoch: the table, then every batch."""
    order = constant_order(lengths, seq_len, sequences_per_batch=256)
    for index in range(steps_of_an_epoch(order, len(lengths))):
        order.batch(index)


def steps_of_an_epoch(order: BatchOrder, num_documents: int) -> int:
    """The steps whose windows draw every document."""
    while not order.table or order.table[-1].ranges[0][1] < num_documents:
        order.build(order.num_steps + 1)
    return order.num_steps


@contextmanager
def token_store(lengths: np.ndarray) -> Iterator[TokenStore]:
    """A memory-mapped store of documents of these lengths, its tokens arbitrary."""
    with tempfile.TemporaryDirectory() as name:
        num_tokens = lengths + 1
        (np.arange(num_tokens.sum()) % 50_000).astype("<u2").tofile(Path(name, "0.tokens"))
        index = np.stack([np.cumsum(num_tokens), num_tokens * BYTES_PER_TOKEN], axis=1)
        index.astype("<i8").tofile(Path(name, "0.index"))
        shard = {"tokens": {"file": "0.tokens"}, "index": {"file": "0.index"}, "source": 0,
                 "train": {"documents": len(lengths)}, "validation": {"documents": 0}}  # fmt: skip
        yield TokenStore(Path(name), {"dtype": "<u2", "vocab_size": 50_000, "sources": [{}], "shards": [shard]})


def move_tokens(store: TokenStore, seq_len: int, packing: Packing, sequences_per_batch: int = 64) -> tuple[int, int]:
    """An epoch's batches as the arrays a model takes; returns their sequences and positions. Planning included.

    The last window carries some documents on, which the next epoch would draw.
    """
    order = constant_order(store.lengths("train"), seq_len, sequences_per_batch, 0, packing)
    loader = BatchLoader(order, store, "train", world_size=1, rank=0, micro_batch=8 * seq_len)
    num_steps = steps_of_an_epoch(order, store.num_documents("train"))
    num_positions = sum(int(loader.global_batch(index).sequences.length.sum()) for index in range(num_steps))
    return num_steps * sequences_per_batch, num_positions


# Rivals.


@dataclass(frozen=True)
class Rival:
    """One row: a rival's rate and utilisation, and how many times faster turbolm is at the same in this run."""

    name: str
    task: str  # plan or move
    docs_per_s: float | None = None
    wall_docs_per_s: float | None = None
    utilisation: float | None = None
    ratio: float | None = None
    keeps_apart: bool = True  # documents that share a sequence
    note: str = ""


@dataclass(frozen=True)
class Setting:
    """The documents that rivals get, and our own time for each task on them."""

    lengths: np.ndarray
    seq_len: int
    repeats: int
    ours: dict[str, Timing]


def rival_row(name: str, task: str, timing: Timing, num_sequences: int, setting: Setting, **more: Any) -> Rival:
    num_documents = len(setting.lengths)
    return Rival(
        name,
        task,
        timing.rate(num_documents),
        num_documents / timing.wall_s,
        int(setting.lengths.sum()) / (num_sequences * setting.seq_len),
        timing.cpu_s / setting.ours[task].cpu_s,
        **more,
    )


def trl_rows(setting: Setting) -> list[Rival]:
    """TRL's pack_dataset on a data set in memory, documents longer than a sequence split and not truncated."""
    try:
        import datasets
        import pyarrow as pa
        from trl import pack_dataset
    except Exception as error:
        return [Rival("TRL", "plan and move", note=f"not measured: {type(error).__name__}: {error}"[:200])]
    datasets.disable_progress_bars()
    release = f"TRL {version('trl')}"
    offsets = np.concatenate([[0], np.cumsum(setting.lengths)])

    def dataset(dtype: type) -> Any:
        values = pa.array((np.arange(offsets[-1]) % (100 if dtype is np.int8 else 50_000)).astype(dtype))
        return datasets.Dataset(pa.table({"input_ids": pa.LargeListArray.from_arrays(offsets, values)}))

    rows = []
    for strategy, batch_size in [("bfd_split", 1000), ("bfd_split", None), ("wrapped", None)]:
        for task, dtype in [("plan", np.int8), ("move", np.int32)]:
            source = dataset(dtype)

            def work(source: Any = source, strategy: str = strategy, batch_size: int | None = batch_size) -> int:
                options = {"batch_size": batch_size, "keep_in_memory": True, "load_from_cache_file": False}
                return len(pack_dataset(source, setting.seq_len, strategy, options))

            if strategy == "wrapped" and task == "plan":
                continue
            timing, num_sequences = measure(work, setting.repeats)
            name = f"{release} {strategy}, batch_size {batch_size or 'all'}"
            note = "moves one-byte tokens, which it cannot leave out" if task == "plan" else ""
            if strategy == "wrapped":
                note = "documents run into each other; tokens are not copied"
            rows.append(
                rival_row(name, task, timing, num_sequences, setting, keeps_apart=strategy != "wrapped", note=note)
            )
    return rows


def axolotl_rows(setting: Setting) -> list[Rival]:
    """Axolotl's packing with its defaults, on our slices (it skips documents longer than a sequence)."""
    try:
        from axolotl.utils.samplers import multipack
    except Exception as error:
        return [Rival("Axolotl", "plan", note=f"not measured: {type(error).__name__}: {error}"[:200])]
    release = f"Axolotl {version('axolotl')}"
    slices = pack_single(setting.lengths, setting.seq_len).length.astype(np.int32)
    packers: dict[str, Callable[[], int]] = {
        "multipack, group_size 100000": lambda: len(
            multipack.pack_parallel(slices, setting.seq_len, group_size=100_000, bin_size=200, num_processes=1)
        ),
        "sequential": lambda: len(multipack.allocate_sequentially(slices, 0, setting.seq_len, 1)[0]),
    }
    rows = []
    for name, work in packers.items():
        timing, num_sequences = measure(work, max(2, setting.repeats))  # the first call compiles
        note = "documents cut to sequences beforehand, not timed"
        rows.append(rival_row(f"{release} {name}", "plan", timing, num_sequences, setting, note=note))
    return rows


# Report.


def judge(plans: list[Plan], rivals: list[Rival]) -> tuple[dict[str, float | None], dict[str, bool | None]]:
    """The figures that have targets, and which are met; None where a figure could not be measured."""
    best = sorted((p for p in plans if p.packing == "best_fit"), key=lambda p: p.documents)
    apart = [r.ratio for r in rivals if r.task == "move" and r.keeps_apart and r.ratio]
    growth = best[0].assign_docs_per_s / best[-1].assign_docs_per_s if len(best) > 1 else None
    in_windows = best[0].windows_docs_per_s / best[-1].windows_docs_per_s if len(best) > 1 else None
    figures: dict[str, float | None] = {
        "utilisation": min(p.utilisation for p in best),
        "planning_docs_per_s": min(p.assign_docs_per_s for p in best),
        "growth": growth,
        "growth_in_windows": in_windows,
        "moving_ratio": min(apart, default=None),
    }
    met = {
        name: None if value is None else bool(value <= TARGETS[name] if "growth" in name else value >= TARGETS[name])
        for name, value in figures.items()
    }
    return figures, met


def print_table(headings: str, rows: list[list[str]]) -> None:
    print(f"\n| {headings} |\n|{'---|' * (headings.count('|') + 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def print_plans(plans: list[Plan]) -> None:
    rows = []
    for p in plans:
        rates = (p.assign_docs_per_s, p.assign_wall_docs_per_s, p.windows_docs_per_s)
        quality = [f"{p.utilisation:.5f}", f"{p.windows_utilisation:.5f}", f"{p.cuts:,}", f"{p.avoidable_cuts:,}"]
        rows.append([f"{p.documents:,}", p.packing, *(f"{rate / 1e6:.2f}M" for rate in rates)])
        each = (p.assign_user_s / p.documents, 1 / p.assign_first_docs_per_s)
        rows[-1] += [*(f"{seconds * 1e9:.0f} ns" for seconds in each), *quality]
    rates_of = "assigned, docs/s | (clock) | in windows, docs/s | assigned, without kernel | first"
    print_table(f"documents | packing | {rates_of} call | utilisation | in windows | cuts | avoidable", rows)


def print_rivals(rivals: list[Rival]) -> None:
    rows = []
    for row in rivals:
        rates = [f"{rate:,.0f}" if rate else "-" for rate in (row.docs_per_s, row.wall_docs_per_s)]
        quality = f"{row.utilisation:.5f}" if row.utilisation else "-"
        rows.append([row.task, row.name, *rates, quality, f"{row.ratio:.2f}x" if row.ratio else "-", row.note])
    print_table("task | who | docs/s | (clock) | utilisation | turbolm best_fit is faster by | note", rows)


def compare(lengths: np.ndarray, arguments: argparse.Namespace) -> tuple[list[Rival], list[Rival]]:
    """Our rows and the rivals' on the same documents."""
    seq_len, repeats = arguments.seq_len, arguments.repeats
    planning, sequences = measure(lambda: pack_best_fit(lengths, seq_len), repeats)
    with token_store(lengths) as store:
        moves = {packing: measure(lambda p=packing: move_tokens(store, seq_len, p), repeats)
                 for packing in get_args(Packing) if packing != "single"}  # fmt: skip
    # As long as all documents would take: the last window carries a few on.
    whole = {packing: timing.times(lengths.sum() / moved) for packing, (timing, (_, moved)) in moves.items()}
    setting = Setting(lengths, seq_len, repeats, {"plan": planning, "move": whole["best_fit"]})
    ours = [rival_row("turbolm best_fit", "plan", planning, len(sequences), setting)]
    for packing, timing in whole.items():
        note = "batches of inputs, positions and targets"
        num_sequences = round(moves[packing][1][0] * lengths.sum() / moves[packing][1][1])
        ours.append(rival_row(f"turbolm {packing}", "move", timing, num_sequences, setting, note=note))
    return ours, axolotl_rows(setting) + trl_rows(setting)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="Parquet file; without it, Python's standard library")
    parser.add_argument("--column", default="text", help="its column of texts")
    parser.add_argument("--lengths", type=Path, help=".npy of tokens per document, in place of bytes / 4")
    parser.add_argument("--documents", type=int, nargs="+", default=[1_000_000, 10_000_000], help="sizes to plan")
    parser.add_argument("--rival-documents", type=int, default=100_000, help="documents for the comparison")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    lengths, source = corpus_lengths(arguments)
    about = {"documents": len(lengths), "positions": int(lengths.sum()), "median": float(np.median(lengths)),
             "longest": int(lengths.max()), "source": source, "seq_len": arguments.seq_len}  # fmt: skip
    print("corpus: " + ", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    plans, epochs = [], {}
    for num_documents in sorted(arguments.documents):
        many = np.resize(lengths, num_documents)
        plans += [plan(many, arguments.seq_len, packing, arguments.repeats) for packing in get_args(Packing)]
        timing, _ = measure(lambda many=many: plan_epoch(many, arguments.seq_len), min(3, arguments.repeats))
        epochs[num_documents] = timing.rate(num_documents)
    print_plans(plans)
    for num_documents, rate in epochs.items():
        print(f"a whole epoch's batches of {num_documents:,} documents, best_fit: {rate / 1e6:.2f}M docs/s")
    ours, rivals = compare(np.resize(lengths, arguments.rival_documents), arguments)
    print_rivals(ours + rivals)
    figures, met = judge(plans, rivals)
    print("\ntargets: " + ", ".join(f"{k} {figures[k]} ({TARGETS[k]:g}): {met[k]}" for k in TARGETS))
    figures_all = {**figures, "corpus": about, "plans": [asdict(p) for p in plans], "epoch_docs_per_s": epochs,
                   "turbolm": [asdict(row) for row in ours]}  # fmt: skip
    result = {"bench": "packing", "figures": figures_all, "rivals": [asdict(r) for r in rivals],
              "targets": TARGETS, "met": met}  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    if not KEEP_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
    main()
