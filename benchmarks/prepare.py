"""MB of text a second and core that `turbolm prepare` turns into a token store, against `datasets.map`; peak memory.

    python benchmarks/prepare.py [corpus.parquet] [--text-mb 24] [--memory-mb 100 1000] [--workers 2]

Without a corpus it takes the source files of the running Python. Speed is text over the processor time of all
processes, reading and writing included, the training of the tokenizer not: it is the same for all. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

VOCAB_SIZE = 32_000
DATASETS_MAP, WORDS, GIGATOKEN, PLAIN = "datasets.map", "tokenizers", "gigatoken", "tokenizers, every word"


def corpus_texts(path: Path | None) -> list[str]:
    if path is None:
        from turbolm.data.sources import Reader
        from turbolm.recipe.schema import StdlibSource

        return [text for text in Reader(StdlibSource(type="stdlib")) if text]
    import pyarrow.parquet

    texts = pyarrow.parquet.read_table(path, columns=["text"]).column(0).to_pylist()
    random.Random(0).shuffle(texts)  # a prefix of it is like the whole
    return texts


def changed_copies(texts: list[str], text_bytes: int) -> Iterator[str]:
    """Documents up to `text_bytes`; each repetition with other numbers in it, so that no two are the same."""
    written = copy = 0
    while True:
        for number, text in enumerate(texts):
            if copy:
                at = text.find(" ", len(text) // 2)
                text = f"{copy}.{number} {text[:at]} {copy * 7919 + number}{text[at:]}"
            yield text
            written += len(text.encode())
            if written >= text_bytes:
                return
        copy += 1


def write_parquet(path: Path, texts: Iterator[str]) -> int:
    """The bytes of text written, in row groups of 10,000."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([("text", pyarrow.string())])
    text_bytes = 0
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        rows: list[str] = []
        for text in texts:
            rows.append(text)
            text_bytes += len(text.encode())
            if len(rows) == 10_000:
                writer.write_table(pyarrow.table({"text": rows}, schema))
                rows = []
        writer.write_table(pyarrow.table({"text": rows}, schema))
    return text_bytes


def recipe_of(corpus: Path, tokenizer: Path, cache: Path, engine: str, deduplicate: str = "none") -> dict[str, Any]:
    return {
        "name": "benchmark",
        "model": {"config": {"model_type": "llama"}},
        "tokenizer": {"path": str(tokenizer)},
        "data": {
            "seq_len": 2048,
            "sources": [{"type": "parquet", "path": str(corpus)}],
            "deduplicate": deduplicate,
        },
        "train": {"budget": 2_048_000, "global_batch": 20_480},
        "execution": {"cache_dir": str(cache), "tokenizer_engine": engine},
    }


# ------------------------------------------------------------------- what is measured, in a process of its own


def run_turbolm(task: dict[str, Any]) -> None:
    import turbolm.data.prepare
    from turbolm.data.prepare import prepare
    from turbolm.recipe.schema import Recipe

    if task["plain"]:
        turbolm.data.prepare.choose_engine = lambda *_: "tokenizers"
    recipe = dict(task["recipe"])
    recipe["data"]["sources"] = tuple(recipe["data"]["sources"])
    prepare(Recipe.model_validate(recipe), num_workers=task["workers"])


def run_datasets_map(task: dict[str, Any]) -> None:
    import datasets
    from transformers import AutoTokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(task["tokenizer"])
    rows = datasets.load_dataset("parquet", data_files=task["corpus"], split="train", cache_dir=task["cache"])
    rows.map(
        lambda batch: tokenizer(batch["text"], return_attention_mask=False),
        batched=True,
        num_proc=task["workers"],
        remove_columns=["text"],
        cache_file_name=str(Path(task["cache"]) / "mapped.arrow"),
    )


def measured(task: dict[str, Any]) -> dict[str, float]:
    """Processor seconds (children included) and wall seconds of the task, its start-up apart; peak memory in bytes."""
    command = [sys.executable, __file__, "--task", json.dumps(task)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peaks: dict[int, int] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            for pid in descendants(process.pid):
                peaks[pid] = max(peaks.get(pid, 0), high_water(pid))

    thread = threading.Thread(target=watch)
    thread.start()
    output = process.communicate()[0]
    done.set()
    thread.join()
    if process.returncode:
        raise SystemExit(f"{task['who']} failed")
    figures: dict[str, float] = json.loads(output.splitlines()[-1])
    workers = [peak for pid, peak in peaks.items() if pid != process.pid]
    return figures | {"parent_bytes": peaks[process.pid], "worker_bytes": max(workers, default=0)}


def run_task(task: dict[str, Any]) -> None:
    run = {"turbolm": run_turbolm, "datasets": run_datasets_map}[task["who"]]
    if task["who"] == "datasets":
        import datasets  # noqa: F401
        import transformers  # noqa: F401
    else:
        import turbolm.data.prepare  # noqa: F401
    start, cpu = time.monotonic(), os.times().user + os.times().system
    run(task)
    wall = time.monotonic() - start
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = os.times().user + os.times().system - cpu
    print(json.dumps({"cpu_sec": own + children.ru_utime + children.ru_stime, "wall_sec": wall}))


def descendants(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        try:
            tasks = os.listdir(f"/proc/{parent}/task")
            for task in tasks:
                found += map(int, Path(f"/proc/{parent}/task/{task}/children").read_text().split())
        except OSError:
            continue
    return found


def high_water(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


# ----------------------------------------------------------------------------------------------------- tables


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def speeds(arguments: argparse.Namespace, texts: list[str], tokenizer: Path, folder: Path) -> dict[str, Any]:
    """Rounds in turns, so that a machine whose speed drifts is the same for all; medians."""
    corpus = folder / "speed.parquet"
    text_bytes = write_parquet(corpus, changed_copies(texts, arguments.text_mb * 10**6))
    contenders = [DATASETS_MAP, PLAIN, WORDS] + [GIGATOKEN] * bool(installed("gigatoken"))
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for number in range(arguments.rounds):
        for name in contenders:
            cache = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{number}"
            cache.mkdir()
            task: dict[str, Any] = {"who": "turbolm", "workers": arguments.workers, "plain": name == PLAIN}
            if name == DATASETS_MAP:
                task |= {"who": "datasets", "tokenizer": str(tokenizer), "corpus": str(corpus), "cache": str(cache)}
            else:
                engine = "gigatoken" if name == GIGATOKEN else "tokenizers"
                task["recipe"] = recipe_of(corpus, tokenizer, cache, engine)
            runs[name].append(measured(task))
            print(f"{name}: {text_bytes / runs[name][-1]['cpu_sec'] / 1e6:.2f} MB/s a core", file=sys.stderr)
    print(f"\n{text_bytes / 1e6:.0f} MB of text, {arguments.workers} processes, median of {arguments.rounds} rounds\n")
    print("| who | MB/s per core | MB/s by the clock | against datasets.map |\n|---|---|---|---|")
    figures = {}
    for name in contenders:
        per_core = [text_bytes / run["cpu_sec"] / 1e6 for run in runs[name]]
        ratios = [a["cpu_sec"] / b["cpu_sec"] for a, b in zip(runs[DATASETS_MAP], runs[name], strict=True)]
        clock = statistics.median(text_bytes / run["wall_sec"] / 1e6 for run in runs[name])
        figures[name] = {"mb_per_sec_core": statistics.median(per_core), "ratio": statistics.median(ratios)}
        row = f"{figures[name]['mb_per_sec_core']:.2f} | {clock:.2f} | {figures[name]['ratio']:.2f}x"
        print(f"| {name} | {row} |")
    return figures


def reading_speed(texts: list[str], folder: Path, text_mb: int) -> dict[str, float]:
    """MB/s of the one process that reads, hashes and deals out text for all workers."""
    from turbolm.data.shards import Dropped, cut_shards
    from turbolm.data.sources import SourceSizes
    from turbolm.recipe.schema import Recipe

    parquet, jsonl = folder / "read.parquet", folder / "read.jsonl"
    text_bytes = write_parquet(parquet, changed_copies(texts, text_mb * 10**6))
    with jsonl.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in changed_copies(texts, text_mb * 10**6))
    figures = {}
    print("\n| one process reads and hashes | MB/s |\n|---|---|")
    for kind, path, deduplicate in (
        ("parquet", parquet, "none"),
        ("parquet", parquet, "exact"),
        ("jsonl", jsonl, "none"),
    ):
        settings = recipe_of(path, folder, folder, "auto", deduplicate)
        settings["data"]["sources"] = ({"type": kind, "path": str(path)},)
        recipe = Recipe.model_validate(settings)
        start = time.process_time()
        for shard, _ in cut_shards(recipe, folder, 32 * 10**6, SourceSizes(recipe.data.sources), Dropped()):
            shard.remove_texts()
        name = kind + (", duplicates left out" if deduplicate == "exact" else "")
        figures[name] = text_bytes / (time.process_time() - start) / 1e6
        print(f"| {name} | {figures[name]:.0f} |")
    return figures


def memory(arguments: argparse.Namespace, texts: list[str], tokenizer: Path, folder: Path) -> list[dict[str, Any]]:
    rows = []
    engine = "gigatoken" if installed("gigatoken") else "tokenizers"
    print("\n| text | engine | duplicates | peak of prepare | of a worker | wall |\n|---|---|---|---|---|---|")
    for megabytes in arguments.memory_mb:
        corpus = folder / f"{megabytes}.parquet"
        write_parquet(corpus, changed_copies(texts, megabytes * 10**6))
        for deduplicate in ("none", "exact"):
            cache = folder / f"memory-{megabytes}-{deduplicate}"
            settings = recipe_of(corpus, tokenizer, cache, engine, deduplicate)
            task = {"who": "turbolm", "workers": arguments.workers, "plain": False, "recipe": settings}
            run = measured(task)
            rows.append({"mb": megabytes, "engine": engine, "deduplicate": deduplicate} | run)
            peaks = f"{run['parent_bytes'] / 1e6:.0f} MB | {run['worker_bytes'] / 1e6:.0f} MB"
            print(f"| {megabytes} MB | {engine} | {deduplicate} | {peaks} | {run['wall_sec']:.0f} s |", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="?", type=Path, help="a parquet file with a column `text`")
    parser.add_argument("--text-mb", type=int, default=24, help="text of the comparison of speeds")
    parser.add_argument("--memory-mb", type=int, nargs="*", default=[100, 1000], help="text of the memory runs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        run_task(json.loads(arguments.task))
        return
    from turbolm.data.tokenizer import save_tokenizer, train_tokenizer

    texts = corpus_texts(arguments.corpus)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = folder / "tokenizer"
        save_tokenizer(train_tokenizer(texts[:20_000], VOCAB_SIZE), tokenizer)
        figures = speeds(arguments, texts, tokenizer, folder)
        reading = reading_speed(texts, folder, arguments.text_mb)
        peaks = memory(arguments, texts, tokenizer, folder)
    met: dict[str, bool | None] = {"tokenizers": figures[WORDS]["ratio"] >= 1.5}
    met["gigatoken"] = figures[GIGATOKEN]["ratio"] >= 8 if GIGATOKEN in figures else None
    growth = None
    if len(arguments.memory_mb) > 1:
        total = [p["parent_bytes"] + arguments.workers * p["worker_bytes"] for p in peaks if p["deduplicate"] == "none"]
        growth = total[-1] / total[0]
        met["memory"] = growth <= 1.15
    result = {
        "bench": "prepare",
        "figures": {"speed": figures, "reading_mb_per_sec": reading, "memory": peaks, "memory_growth": growth},
        "rivals": {DATASETS_MAP: figures[DATASETS_MAP]},
        "targets": {"tokenizers": 1.5, "gigatoken": 8, "memory": 1.15},
        "met": met,
        "versions": {package: installed(package) for package in ("tokenizers", "gigatoken", "datasets", "regex")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
