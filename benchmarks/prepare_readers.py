"""How many tokenizer processes of `turbolm prepare` the processes that read can feed.

    python benchmarks/prepare_readers.py [corpus.parquet] [--text-mb 200] [--join 1 5] [--rounds 3]

Without a corpus it takes the source files of the running Python. Measured is MB of text per second of processor time:
of a process that reads, of the one that decides about the documents of all readers, and of a worker. How many workers
are fed is worked out from these. Then one process reads and decides, and two read while a third decides: MB of text
per second by the clock, and of the busiest one's processor time, which other programs on the machine hardly change.
`--join`: so many documents put together to one. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from prepare import VOCAB_SIZE, changed_copies, corpus_texts, installed, recipe_of, write_parquet

from turbolm.data.prepare import cut, read_ahead, shards
from turbolm.data.prepare.blocks import Block, append_block, files_from, load_block, read_blocks
from turbolm.data.prepare.cut import Dropped, cut_shards
from turbolm.data.prepare.reader import SourceSizes
from turbolm.data.prepare.shards import Layout, Shard
from turbolm.data.prepare.tokenizer import save_tokenizer, special_ids, train_tokenizer
from turbolm.recipe.schema import Recipe

SHARD_BYTES = 32 * 10**6
WORKERS = 64
NUM_FILES = 4


class Replay:
    """Gives out blocks that were read before, as `BlockReader` does those of its processes."""

    saved: list[tuple[Path, int]]

    def __init__(self, *_: Any) -> None:
        pass

    def read(self, *_: Any, **__: Any) -> Iterator[Block]:
        for path, at in self.saved:
            block = load_block(path, at)
            block.file.use()  # the next round reads it again
            yield block

    def close(self) -> None:
        pass


def make_recipe(kind: str, paths: list[Path], folder: Path, deduplicate: str = "none") -> Recipe:
    settings = recipe_of(paths[0], folder, folder, "auto", deduplicate)
    settings["data"]["sources"] = ({"type": kind, "path": [str(path) for path in paths]},)
    return Recipe.model_validate(settings)


def write_corpora(documents: list[str], folder: Path) -> dict[str, list[Path]]:
    """Files of each kind, which hold the same documents."""
    paths: dict[str, list[Path]] = {"parquet": [], "jsonl": []}
    for number in range(NUM_FILES):
        part = documents[number::NUM_FILES]  # files of much the same size
        for kind in paths:
            paths[kind].append(folder / f"{number}.{kind}")
        write_parquet(paths["parquet"][-1], iter(part))
        with paths["jsonl"][-1].open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in part)
    return paths


def median_sec(rounds: int, call: Callable[..., Any], *arguments: Any) -> float:
    """Processor seconds of this process."""
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        call(*arguments)
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def read(recipe: Recipe, folder: Path) -> list[tuple[Path, int]]:
    """What a process that reads does; the blocks' files, and where in them the blocks are told of."""
    (source,) = recipe.data.sources
    paths, saved = (folder / f"{number}.text" for number in count()), []
    for block in read_blocks(source, files_from(source, (0, 0)), paths, lambda: read_ahead._BLOCK_BYTES):
        saved.append((block.file.path, append_block(block)))
    return saved


def decide(recipe: Recipe, folder: Path, num_readers: int = 1) -> list[Shard]:
    """What the process does that decides: which documents are in a shard, and tell a worker of it."""
    found = []
    sizes = SourceSizes(recipe.data.sources)
    for shard in cut_shards(recipe, folder, SHARD_BYTES, sizes, Dropped(), num_readers):
        pickle.dumps(replace(shard, files=[]))
        shard.drop_texts()
        found.append(shard)
    return found


def reading_sec(recipe: Recipe, folder: Path, num_readers: int) -> tuple[float, float]:
    """Seconds by the clock, and processor seconds of the busiest process that reads or decides."""
    folder.mkdir()
    clock, own, reading = time.monotonic(), time.process_time(), {}
    for shard in cut_shards(recipe, folder, SHARD_BYTES, SourceSizes(recipe.data.sources), Dropped(), num_readers):
        pickle.dumps(replace(shard, files=[]))
        shard.drop_texts()
        for process in multiprocessing.active_children():
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            reading[process.pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - clock, max(time.process_time() - own, *reading.values(), 0.0)


def scaling(paths: list[Path], folder: Path, num_bytes: int, rounds: int) -> dict[str, dict[int, float]]:
    """MB/s of one and two processes that read: what the second half of the files adds, so that starts do not count."""
    found: dict[str, dict[int, list[float]]] = {"clock": {1: [], 2: []}, "busiest": {1: [], 2: []}}
    half, whole = (make_recipe("jsonl", part, folder) for part in (paths[: NUM_FILES // 2], paths))
    for number in range(rounds):
        for num_readers in (1, 2):
            seconds = []
            for name, recipe in (("half", half), ("whole", whole)):
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:  # its memory is its own
                    cut_folder = folder / f"{number}-{num_readers}-{name}"
                    seconds.append(fresh.submit(reading_sec, recipe, cut_folder, num_readers).result())
            print(f"round {number}, {num_readers} reading: {seconds}", file=sys.stderr)
            for column, small, large in zip(found, *seconds, strict=True):
                found[column][num_readers].append(num_bytes / 2 / (large - small) / 1e6)
    return {name: {key: statistics.median(values) for key, values in row.items()} for name, row in found.items()}


def write(layout: Layout, part: list[Shard]) -> None:
    """What a worker does."""
    for shard in part:
        shards._write_shard(layout, shard)


def worker_speeds(tokenizer: Path, folder: Path, found: list[Shard], rounds: int) -> dict[str, float]:
    """MB/s of a worker with each engine. The first shard fills caches, and is not counted."""
    (folder / "tokenizer").symlink_to(tokenizer)
    bos_id, eos_id = special_ids(tokenizer)
    figures = {}
    for engine in ("tokenizers", "words", "gigatoken"):
        if engine == "gigatoken" and not installed(engine):
            continue
        layout = Layout(str(folder), "<u2", bos_id, eos_id, engine)
        shards._write_shard(layout, found[0])
        part = found[1:5]
        num_bytes = sum(int(texts.lengths.sum()) for shard in part for texts in shard.texts.values())
        seconds = median_sec(rounds, write, layout, part)
        figures[engine] = num_bytes / seconds / 1e6
    return figures


def measure(documents: list[str], tokenizer: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Speeds in MB/s of one process each, and by the clock."""
    num_bytes = sum(len(text.encode()) for text in documents)
    paths = write_corpora(documents, folder)
    texts = folder / "texts"
    texts.mkdir()
    figures: dict[str, Any] = {
        "document_bytes": num_bytes / len(documents),
        "read": {},
        "decide": {},
    }
    for kind in paths:
        recipe = make_recipe(kind, paths[kind], folder)
        figures["read"][kind] = num_bytes / median_sec(rounds, read, recipe, texts) / 1e6
    Replay.saved = read(recipe, texts)
    original, cut.BlockReader = cut.BlockReader, Replay
    try:
        for deduplicate in ("none", "exact"):
            recipe = make_recipe("parquet", paths["parquet"], folder, deduplicate)
            seconds = median_sec(rounds, decide, recipe, texts)
            figures["decide"][deduplicate] = num_bytes / seconds / 1e6
        figures["worker"] = worker_speeds(tokenizer, texts, decide(recipe, texts), rounds)
    finally:
        cut.BlockReader = original
    figures |= scaling(paths["jsonl"], folder, num_bytes, rounds)
    return figures


def work_out(figures: dict[str, Any]) -> dict[str, Any]:
    """For each engine: the readers that 64 workers need, and how many workers the deciding process is enough for."""
    return {
        engine: {
            "workers_of_a_reader": {kind: speed / worker for kind, speed in figures["read"].items()},
            "readers": {kind: math.ceil(WORKERS * worker / speed) for kind, speed in figures["read"].items()},
            "workers_of_the_decider": {kind: speed / worker for kind, speed in figures["decide"].items()},
        }
        for engine, worker in figures["worker"].items()
    }


def show(figures: dict[str, Any]) -> None:
    print(f"\ndocuments of {figures['document_bytes']:.0f} bytes\n\n| one process | MB/s |\n|---|---|")
    for what in ("read", "decide", "worker"):
        for kind, speed in figures[what].items():
            print(f"| {what}, {kind} | {speed:.1f} |")
    for what, label in (("clock", "by the clock"), ("busiest", "in the time of the busiest process")):
        for num_readers, speed in figures[what].items():
            print(f"| {num_readers} reading jsonl, {label} | {speed:.1f} |")
    print(f"\n| engine | workers of a reader | readers of {WORKERS} workers | workers of the deciding process |")
    print("|---|---|---|---|")
    for engine, row in figures["worked_out"].items():
        cells = [", ".join(f"{number:.0f} ({kind})" for kind, number in column.items()) for column in row.values()]
        print(f"| {engine} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="?", type=Path, help="a parquet file with a column `text`")
    parser.add_argument("--text-mb", type=int, default=200)
    parser.add_argument("--join", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.text_mb * 10**6 / 2 < 1.1 * read_ahead._PARALLEL_BYTES:
        parser.error("--text-mb: at least 141, as one process reads less than 64 MB, and half of it is read too")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    result: dict[str, Any] = {
        "bench": "prepare_readers",
        "figures": {},
        "rivals": {},
        "targets": {"workers_fed": WORKERS},
        "met": {},
        "versions": {name: installed(name) for name in ("tokenizers", "gigatoken", "regex", "pyarrow")},
    }
    texts = corpus_texts(arguments.corpus)
    with tempfile.TemporaryDirectory() as name:
        tokenizer = Path(name) / "tokenizer"
        save_tokenizer(train_tokenizer(texts[:20_000], VOCAB_SIZE), tokenizer)
        for size in arguments.join:
            copies = list(changed_copies(texts, arguments.text_mb * 10**6))
            documents = ["\n\n".join(copies[at : at + size]) for at in range(0, len(copies), size)]
            folder = Path(name) / str(size)
            folder.mkdir()
            figures = measure(documents, tokenizer, folder, arguments.rounds)
            figures["worked_out"] = work_out(figures)
            show(figures)
            result["figures"][f"join_{size}"] = figures
    enough = [
        number
        for figures in result["figures"].values()
        for row in figures["worked_out"].values()
        for number in row["workers_of_the_decider"].values()
    ]
    result["met"]["workers_fed"] = min(enough) >= WORKERS
    print(json.dumps(result))


if __name__ == "__main__":
    main()
