"""MB of text a second and core that `turbolm prepare` turns into a token store, against `datasets.map`; peak memory.

    python benchmarks/prepare.py [corpus.parquet] [--text-mb 100] [--memory-mb 100 1000] [--part speed] [--part memory]

Without a corpus it takes the source files of the running Python. All read the same parquet file, in as many processes.
Speed is text over the processor time of all processes: reading, writing, and the start of worker processes included;
the imports of the first process and the training of the tokenizer not. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
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
        from turbolm.data.prepare.reader import Reader
        from turbolm.recipe.sources.stdlib import StdlibSource

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
    import turbolm.data.prepare.build
    from turbolm.data.prepare.build import prepare
    from turbolm.recipe.schema import Recipe

    if task["plain"]:
        turbolm.data.prepare.build.choose_engine = lambda *_: "tokenizers"
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
                # The latest, not the largest: between fork and exec a process has the peak of its parent.
                peaks[pid] = high_water(pid) or peaks.get(pid, 0)

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
    import pyarrow.parquet  # noqa: F401
    import tokenizers  # noqa: F401

    if task["who"] == "datasets":
        import datasets  # noqa: F401
        from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401
    else:
        import turbolm.data.prepare.build
        import turbolm.data.prepare.tokenizer
        import turbolm.recipe.schema  # noqa: F401
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
            runs[name].append(run := measured(task))
            shutil.rmtree(cache)
            core, clock = (text_bytes / run[kind] / 1e6 for kind in ("cpu_sec", "wall_sec"))
            print(f"round {number + 1}, {name}: {core:.2f} MB/s a core, {clock:.2f} by the clock", file=sys.stderr)
    print(f"\n{text_bytes / 1e6:.0f} MB of text, {arguments.workers} processes, median of {arguments.rounds} rounds\n")
    print("| who | processor s | MB/s per core | against datasets.map | MB/s by the clock | against datasets.map |")
    print("|---|---|---|---|---|---|")
    figures = {}
    for name in contenders:
        row = figures[name] = {"text_mb": text_bytes / 1e6}
        for kind, label in (("cpu_sec", "core"), ("wall_sec", "clock")):
            seconds = [run[kind] for run in runs[name]]
            ratios = [a[kind] / b for a, b in zip(runs[DATASETS_MAP], seconds, strict=True)]
            row[kind] = statistics.median(seconds)
            row[f"mb_per_sec_{label}"] = text_bytes / row[kind] / 1e6
            row[f"ratio_{label}"], row[f"lowest_ratio_{label}"] = statistics.median(ratios), min(ratios)
        parts = [
            f"{row[f'mb_per_sec_{kind}']:.2f} | {row[f'ratio_{kind}']:.2f}x (lowest {row[f'lowest_ratio_{kind}']:.2f}x)"
            for kind in ("core", "clock")
        ]
        print(f"| {name} | {row['cpu_sec']:.1f} | {' | '.join(parts)} |")
    return figures


def reading_speed(texts: list[str], folder: Path, text_mb: int) -> dict[str, float]:
    """MB/s of the one process that reads, hashes and deals out text for all workers."""
    from turbolm.data.prepare.cut import Dropped, cut_shards
    from turbolm.data.prepare.reader import SourceSizes
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
        for shard in cut_shards(recipe, folder, 32 * 10**6, SourceSizes(recipe.data.sources), Dropped()):
            shard.drop_texts()
        name = kind + (", duplicates left out" if deduplicate == "exact" else "")
        figures[name] = text_bytes / (time.process_time() - start) / 1e6
        print(f"| {name} | {figures[name]:.0f} |")
    return figures


def memory(arguments: argparse.Namespace, texts: list[str], tokenizer: Path, folder: Path) -> list[dict[str, Any]]:
    """A row for each engine and way with duplicates: the peak of all processes together at each size of text."""
    engines = ["tokenizers"] + ["gigatoken"] * bool(installed("gigatoken"))
    kinds = [(engine, "none") for engine in engines] + [(engines[-1], "exact")]
    rows: list[dict[str, Any]] = [{"engine": engine, "deduplicate": kind, "runs": []} for engine, kind in kinds]
    print("\n| engine | duplicates | text | peak of prepare | of a worker | all together | clock |")
    print("|---|---|---|---|---|---|---|")
    for megabytes in arguments.memory_mb:
        corpus = folder / f"{megabytes}.parquet"
        write_parquet(corpus, changed_copies(texts, megabytes * 10**6))
        for row in rows:
            cache = folder / "memory"
            settings = recipe_of(corpus, tokenizer, cache, row["engine"], row["deduplicate"])
            task = {"who": "turbolm", "workers": arguments.workers, "plain": False, "recipe": settings}
            run = {"mb": megabytes} | measured(task)
            run["all_bytes"] = run["parent_bytes"] + arguments.workers * run["worker_bytes"]
            row["runs"].append(run)
            row["growth"] = run["all_bytes"] / row["runs"][0]["all_bytes"]
            shutil.rmtree(cache)
            peaks = " | ".join(f"{run[f'{who}_bytes'] / 1e6:.0f} MB" for who in ("parent", "worker", "all"))
            name = f"{row['engine']} | {row['deduplicate']} | {megabytes} MB"
            print(f"| {name} | {peaks} | {run['wall_sec']:.0f} s |", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="?", type=Path, help="a parquet file with a column `text`")
    parser.add_argument("--part", choices=("speed", "memory"), action="append", help="both, if neither is named")
    parser.add_argument("--text-mb", type=int, default=100, help="text of the comparison of speeds")
    parser.add_argument("--memory-mb", type=int, nargs="+", default=[100, 1000], help="text of the memory runs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        run_task(json.loads(arguments.task))
        return
    from turbolm.data.prepare.tokenizer import save_tokenizer, train_tokenizer

    parts = arguments.part or ["speed", "memory"]
    texts = corpus_texts(arguments.corpus)
    result: dict[str, Any] = {
        "bench": "prepare",
        "figures": {},
        "rivals": {},
        "targets": {"tokenizers": 1.5, "gigatoken": 8, "memory": 1.15},
        "met": {},
        "versions": {
            package: installed(package)
            for package in ("tokenizers", "gigatoken", "datasets", "transformers", "regex", "pyarrow")
        },
    }
    figures, met = result["figures"], result["met"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = folder / "tokenizer"
        save_tokenizer(train_tokenizer(texts[:20_000], VOCAB_SIZE), tokenizer)
        if "speed" in parts:
            figures["speed"] = speed = speeds(arguments, texts, tokenizer, folder)
            figures["reading_mb_per_sec"] = reading_speed(texts, folder, arguments.text_mb)
            result["rivals"][DATASETS_MAP] = speed[DATASETS_MAP]
            met["tokenizers"] = speed[WORDS]["ratio_core"] >= 1.5
            met["gigatoken"] = speed[GIGATOKEN]["ratio_core"] >= 8 if GIGATOKEN in speed else None
        if "memory" in parts:
            figures["memory"] = memory(arguments, texts, tokenizer, folder)
            figures["memory_growth"] = growth = max(row["growth"] for row in figures["memory"])
            met["memory"] = growth <= 1.15 if len(arguments.memory_mb) > 1 else None
    print(json.dumps(result))


if __name__ == "__main__":
    main()
