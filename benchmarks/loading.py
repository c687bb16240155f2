"""How fast packed batches come from a warm store, and how soon the first one after a resume; beside other loaders.

    python benchmarks/loading.py --corpus corpus.parquet

Every loader reads the same sequences in the same order from existing files, in one process without workers, and gives
batches of int64 inputs, positions and targets; the first batch of each is compared with ours. They take turns. Rates
are tokens per second of processor time, medians of `--rounds` passes; latencies are by the clock. The last line of the
output is a JSON object.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from turbolm.data.batch.loader import BatchLoader
from turbolm.data.order.batch_order import recipe_order
from turbolm.data.prepare.build import prepare
from turbolm.data.store.token_store import (
    FORMAT_VERSION,
    MANIFEST,
    TokenStore,
    _ends_sha256,
    file_record,
    manifest_sha256,
    open_store,
)
from turbolm.plan.curriculum import build_curriculum
from turbolm.recipe.schema import Recipe

COLUMNS = ("input_ids", "position_ids", "targets")
TARGETS = {
    "tokens_per_s": 100e6,  # on one core
    "ratio": 2.0,  # over the fastest rival
    "resume_ms": 100.0,  # at most, the slowest of the steps tried
}
DOCUMENTS_PER_SHARD = 50_000  # of the large store
Batches = Iterator[Any]
# The launcher sets these for every rank: freed memory is kept instead of being mapped anew for each batch.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}


@dataclass
class Loader:
    """A contender: `batches()` begins a pass; `arrays` turns a batch into NumPy arrays in the order of COLUMNS."""

    name: str
    batches: Callable[[], Batches]
    arrays: Callable[[Any], list[np.ndarray]]
    note: str = ""
    is_rival: bool = True
    order: np.ndarray | None = None  # of the sequences, where it is not ours
    rates: list[float] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)


# The store and ours.


def recipe_of(folder: Path, arguments: argparse.Namespace, budget: int) -> Recipe:
    source = {"type": "parquet", "path": [str(arguments.corpus)]} if arguments.corpus else {"type": "stdlib"}
    return Recipe.model_validate(
        {
            "name": "loading",
            "model": {"config": {"model_type": "llama"}},
            "tokenizer": {"train": {"vocab_size": 8192, "sample_bytes": 4 * 10**6}},
            "data": {"seq_len": arguments.seq_len, "sources": (source,), "validation": 0.0},
            "train": {"budget": budget, "global_batch": arguments.seq_len * arguments.batch_size},
            "execution": {"cache_dir": str(folder)},
        }
    )


def batch_loader(recipe: Recipe, store: TokenStore) -> BatchLoader:
    """A run's loader on one rank; a step is one micro-batch."""
    order = recipe_order(recipe, store, build_curriculum(recipe), save=True)
    return BatchLoader(order, store, "train", world_size=1, rank=0, micro_batch=recipe.train.global_batch)


def ours(recipe: Recipe, store: TokenStore, num_batches: int) -> Loader:
    def batches() -> Batches:
        loader = batch_loader(recipe, store)  # a new one: each pass packs its windows itself
        for index in range(num_batches):
            yield loader.global_batch(index).micro_batches[0]

    note = "packs and shuffles as it reads; 2 bytes a token on disk"
    return Loader("turbolm", batches, lambda batch: [batch[name] for name in COLUMNS], note, is_rival=False)


def sequences_of(loader: Loader) -> np.ndarray:
    """Everything a pass gives, int64 [num_sequences, 3, seq_len]: what the rivals' files are written from."""
    return np.concatenate([np.stack(loader.arrays(batch), axis=1) for batch in loader.batches()])


# Rivals: each writes the sequences to a folder and returns its ways to read them.


def datasets_loaders(sequences: np.ndarray, folder: Path, batch_size: int) -> list[Loader]:
    import datasets
    import pyarrow as pa

    datasets.disable_progress_bars()
    seq_len = sequences.shape[2]
    columns = [pa.FixedSizeListArray.from_arrays(sequences[:, i].ravel(), seq_len) for i in range(len(COLUMNS))]
    datasets.Dataset(pa.table(dict(zip(COLUMNS, columns, strict=True)))).save_to_disk(str(folder))
    data = datasets.load_from_disk(str(folder))

    def ways(kind: str, sequences_of: Any = data) -> Callable[[], Batches]:
        formatted = sequences_of.with_format(kind)
        return lambda: (formatted[i : i + batch_size] for i in range(0, len(formatted), batch_size))

    def views(table: Any) -> list[np.ndarray]:
        parts = [table[name].combine_chunks() for name in COLUMNS]
        return [part.flatten().to_numpy(zero_copy_only=True).reshape(-1, seq_len) for part in parts]

    name = f"datasets {version('datasets')}"
    arrays = {
        "numpy": lambda batch: [batch[c] for c in COLUMNS],
        "torch": lambda batch: [batch[c].numpy() for c in COLUMNS],
    }
    loaders = [Loader(f"{name}, {kind} format", ways(kind), arrays[kind]) for kind in arrays]
    order = np.random.default_rng(0).permutation(len(data))
    note = "not compared: sequences in a new order each epoch, as ours are, by a list of numbers (`Dataset.shuffle`)"
    ways_shuffled = ways("numpy", data.select(order))
    shuffled = Loader(f"{name}, numpy format, shuffled", ways_shuffled, arrays["numpy"], note, False, order)
    note = "not a rival: hands out the memory map itself, 24 bytes a token, sequences for ever in this order"
    return [*loaders, shuffled, Loader(f"{name}, arrow format", ways("arrow"), views, note, is_rival=False)]


def litdata_loaders(sequences: np.ndarray, folder: Path, batch_size: int) -> list[Loader]:
    import torch
    from litdata.streaming import StreamingDataLoader, StreamingDataset, TokensLoader
    from litdata.streaming.writer import BinaryWriter

    num_sequences, _, seq_len = sequences.shape
    block, per_chunk = 3 * seq_len, 512
    for name, options in (("dict", {"chunk_size": per_chunk}), ("tokens", {"chunk_size": per_chunk * block})):
        (folder / name).mkdir(parents=True)
        loader = {"item_loader": TokensLoader(block_size=block)} if name == "tokens" else {}
        writer = BinaryWriter(str(folder / name), **options, **loader)
        for index in range(num_sequences):
            sequence = torch.from_numpy(sequences[index])
            writer[index] = sequence.reshape(-1) if name == "tokens" else dict(zip(COLUMNS, sequence, strict=True))
        writer.done()
        writer.merge()

    def ways(name: str) -> Callable[[], Batches]:
        def batches() -> Batches:
            loader = {"item_loader": TokensLoader(block_size=block)} if name == "tokens" else {}
            data = StreamingDataset(str(folder / name), shuffle=False, **loader)
            return iter(StreamingDataLoader(data, batch_size=batch_size, num_workers=0))

        return batches

    name = f"litdata {version('litdata')}"
    return [
        Loader(f"{name}, a dict of tensors a sequence", ways("dict"), lambda b: [b[c].numpy() for c in COLUMNS]),
        Loader(f"{name}, TokensLoader", ways("tokens"), lambda b: list(b.view(-1, 3, seq_len).numpy().swapaxes(0, 1))),
    ]


def streaming_loaders(sequences: np.ndarray, folder: Path, batch_size: int) -> list[Loader]:
    import torch.utils.data
    from streaming import MDSWriter, StreamingDataset

    kinds = dict.fromkeys(COLUMNS, f"ndarray:int64:{sequences.shape[2]}")
    with MDSWriter(out=str(folder), columns=kinds) as writer:
        for sequence in sequences:
            writer.write(dict(zip(COLUMNS, sequence, strict=True)))
    data = StreamingDataset(local=str(folder), shuffle=False, batch_size=batch_size)

    def batches() -> Batches:
        return iter(torch.utils.data.DataLoader(data, batch_size=batch_size, num_workers=0))

    name = f"mosaicml-streaming {version('mosaicml-streaming')}"
    return [Loader(name, batches, lambda batch: [batch[c].numpy() for c in COLUMNS])]


# Measuring.


def one_pass(loader: Loader, num_tokens: int) -> None:
    """Read every batch once; every page of memory it comes in is touched."""
    cpu_began = time.process_time()
    batches = loader.batches()
    while True:
        began = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            break
        for array in loader.arrays(batch):
            array.reshape(-1)[::512].sum()
        loader.latencies_ms.append((time.perf_counter() - began) * 1e3)
    loader.rates.append(num_tokens / (time.process_time() - cpu_began))


def stalls_ms(loader: BatchLoader, num_batches: int, busy_ms: float) -> list[float]:
    """How long a step waits for its batch when the device is busy for `busy_ms` between two of them."""
    waits = []
    began = time.perf_counter()
    for _ in loader.iterate(0, num_batches):
        waits.append((time.perf_counter() - began) * 1e3)
        time.sleep(busy_ms / 1e3)
        began = time.perf_counter()
    return waits[1:]  # before the first there is nothing to overlap with


def percentile(values: list[float], share: float) -> float:
    return float(np.percentile(values, share))


def compare(
    arguments: argparse.Namespace, folder: Path, recipe: Recipe, store: TokenStore
) -> tuple[list[Loader], list[dict[str, Any]]]:
    """Our loader and every rival, having taken turns; and the rivals that are not installed."""
    loaders = [ours(recipe, store, arguments.sequences // arguments.batch_size)]
    sequences, missing = sequences_of(loaders[0]), []
    for name, build in (("datasets", datasets_loaders), ("litdata", litdata_loaders), ("streaming", streaming_loaders)):
        try:
            loaders += build(sequences, folder / name, arguments.batch_size)
        except ImportError as error:
            missing.append({"name": name, "note": f"not measured: {error}"[:200]})
    for contender in loaders:  # the first batches of each are ours
        for index, batch in zip(range(3), contender.batches(), strict=False):
            indices = np.arange(index * arguments.batch_size, (index + 1) * arguments.batch_size)
            expected = sequences[indices if contender.order is None else contender.order[indices]]
            np.testing.assert_array_equal(np.stack(contender.arrays(batch), axis=1), expected)
    for number in range(-1, arguments.rounds):
        for contender in loaders:
            one_pass(contender, sequences.shape[0] * sequences.shape[2])
            if number < 0:  # not counted: threads that the others have begun are still busy
                contender.rates.clear()
                contender.latencies_ms.clear()
    return loaders, missing


# Resuming on a large store.


def large_store(folder: Path, corpus_lengths: np.ndarray, num_documents: int) -> Path:
    """A store of so many documents whose lengths are drawn from the corpus; its tokens are holes in sparse files."""
    folder = folder / f"store-{num_documents}"
    if (folder / MANIFEST).exists():  # kept from another run; its manifest is written last
        return folder
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    shards = []
    for number, first in enumerate(range(0, num_documents, DOCUMENTS_PER_SHARD)):
        num_tokens = rng.choice(corpus_lengths, min(DOCUMENTS_PER_SHARD, num_documents - first)) + 1
        index = np.stack([np.cumsum(num_tokens), num_tokens * 4], axis=1).astype("<i8")
        shard: dict[str, Any] = {"source": 0, "validation": {"documents": 0, "tokens": 0, "text_bytes": 0}}
        shard["train"] = {"documents": len(index), "tokens": int(index[-1, 0]), "text_bytes": int(index[:, 1].sum())}
        for part, num_bytes in (("index", index.nbytes), ("tokens", 2 * int(index[-1, 0]))):
            path = folder / f"shard-{number:05d}.{part}"
            with path.open("w+b") as file:
                file.write(index.tobytes() if part == "index" else b"")
                file.truncate(num_bytes)
                ends_sha256 = _ends_sha256(file, num_bytes)
            sha256 = hashlib.sha256(path.name.encode()).hexdigest()  # only a full check would read all of it
            shard[part] = {"file": path.name, "bytes": num_bytes, "ends_sha256": ends_sha256, "sha256": sha256}
        shards.append(shard)
    (folder / "tokenizer.json").write_text("{}")
    manifest = {
        "format_version": FORMAT_VERSION,
        "key": "none",
        "dtype": "<u2",
        "vocab_size": 8192,
        "bos_id": 0,
        "eos_id": 0,
        "tokenizer_fingerprint": "none",
        "tokenizer_files": [{"file": "tokenizer.json", **file_record(folder / "tokenizer.json")}],
        "validation": 0.0,
        "sources": [{}],
        "shards": shards,
    }
    manifest["manifest_sha256"] = manifest_sha256(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def private_bytes() -> int:
    """Memory of this process that is not a mapped file."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def resume(folder: Path, store_folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Build the plan table of one epoch, then take up the run at steps all over it, each time from the files."""
    began, before_bytes = time.perf_counter(), private_bytes()
    store = open_store(store_folder)
    open_sec, tokens = time.perf_counter() - began, store.source_positions()[0]
    recipe = recipe_of(folder / "cache", arguments, tokens)
    curriculum = build_curriculum(recipe)
    peak_bytes = 0

    def watch(_: int) -> None:
        nonlocal peak_bytes
        peak_bytes = max(peak_bytes, private_bytes())

    began = time.perf_counter()
    order = recipe_order(recipe, store, curriculum, save=True, on_progress=watch)
    build_sec = time.perf_counter() - began
    table = folder / "cache" / "orders" / order.key[:16]
    del order
    steps = np.linspace(0, curriculum.num_steps - 1, arguments.resumes).astype(int).tolist()
    times_ms, cpu_ms = [], []
    for step in [step for step in steps for _ in range(2)]:
        store = open_store(store_folder)  # checked before the ranks start and by each of them; reported by itself
        gc.collect()  # a run opens one store, not one after the other
        began, cpu_began = time.perf_counter(), time.process_time()
        batch = batch_loader(recipe, store).global_batch(step)
        times_ms.append((time.perf_counter() - began) * 1e3)
        cpu_ms.append((time.process_time() - cpu_began) * 1e3)
        assert batch.num_targets > 0
    warm_ms = times_ms[1::2]  # at the second time the pages of the step are in memory
    return {
        "documents": arguments.documents,
        "tokens": tokens,
        "steps": curriculum.num_steps,
        "open_store_ms": open_sec * 1e3,
        "table_build_s": build_sec if peak_bytes else None,  # None: kept from another run
        "table_bytes": sum(part.stat().st_size for part in table.iterdir()),
        "build_private_bytes": peak_bytes - before_bytes if peak_bytes else None,
        "resume_ms": {"median": percentile(warm_ms, 50), "slowest": max(warm_ms)},
        "resume_cpu_ms": {"median": percentile(cpu_ms[1::2], 50), "slowest": max(cpu_ms[1::2])},
    }


# Report.


def print_table(headings: list[str], rows: list[list[str]]) -> None:
    print(f"\n| {' | '.join(headings)} |\n|{'---|' * len(headings)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def report(loaders: list[Loader]) -> list[dict[str, Any]]:
    """One row a loader; `ratio`: how many times faster turbolm is, the median over the rounds."""
    us = loaders[0]
    rows = []
    for loader in loaders:
        ratios = [a / b for a, b in zip(us.rates, loader.rates, strict=True)]
        rows.append(
            {
                "name": loader.name,
                "tokens_per_s": statistics.median(loader.rates),
                "p50_ms": percentile(loader.latencies_ms, 50),
                "p99_ms": percentile(loader.latencies_ms, 99),
                "ratio": statistics.median(ratios),
                "is_rival": loader.is_rival,
                "note": loader.note,
            }
        )
    table = [
        [
            r["name"],
            f"{r['tokens_per_s'] / 1e6:.0f}M",
            f"{r['p50_ms']:.2f}",
            f"{r['p99_ms']:.2f}",
            f"{r['ratio']:.2f}x",
            r["note"],
        ]
        for r in rows
    ]
    print_table(["loader", "tokens/s and core", "batch p50, ms", "p99, ms", "turbolm is faster by", "note"], table)
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="Parquet file with a column `text`; else Python's standard library")
    parser.add_argument("--folder", type=Path, help="keep stores and tables here for the next run")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=17_408, help="of a pass: an epoch of the corpus")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--documents", type=int, default=100_000_000, help="of the store to resume on; 0: leave it out")
    parser.add_argument("--resumes", type=int, default=20, help="steps to resume at")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    import torch

    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder, kept = Path(name), arguments.folder or Path(name)
        recipe = recipe_of(kept / "cache", arguments, arguments.sequences * arguments.seq_len)
        store = open_store(prepare(recipe))
        contenders, missing = compare(arguments, folder, recipe, store)
        rows = report(contenders)
        waits = stalls_ms(batch_loader(recipe, store), arguments.sequences // arguments.batch_size, busy_ms=20.0)
        figures["wait_ms"] = {"median": percentile(waits, 50), "p99": percentile(waits, 99)}
        print(f"a step of 20 ms waits for its batch (ms): {figures['wait_ms']}", flush=True)
        if arguments.documents:
            store_folder = large_store(kept, store.lengths("train"), arguments.documents)
            figures["resume"] = resume(kept, store_folder, arguments)
            print(f"resume: {figures['resume']}")
    figures["tokens_per_s"] = rows[0]["tokens_per_s"]
    figures["ratio"] = min((row["ratio"] for row in rows if row["is_rival"]), default=None)
    figures["resume_ms"] = figures["resume"]["resume_ms"]["slowest"] if "resume" in figures else None
    met = {
        name: None if figures[name] is None else bool((figures[name] >= goal) != (name == "resume_ms"))
        for name, goal in TARGETS.items()
    }
    print(", ".join(f"{name} {figures[name]} ({goal:g}): {met[name]}" for name, goal in TARGETS.items()))
    result = {"bench": "loading", "figures": figures, "rivals": rows + missing, "targets": TARGETS, "met": met}
    print(json.dumps(result))


if __name__ == "__main__":
    if not KEEP_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
    main()
