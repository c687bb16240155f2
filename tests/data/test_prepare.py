"""Stores are built once, hold every document, and have the same bytes however they came to be."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turbolm.data.prepare import build as prepare_module
from turbolm.data.prepare import shards as shards_module
from turbolm.data.prepare.build import find_store, finished_shards, prepare, store_folder, store_key
from turbolm.data.prepare.cut import is_validation
from turbolm.data.prepare.digests import DIGEST_BYTES, DigestSet
from turbolm.data.prepare.engines import Plain
from turbolm.data.prepare.progress import Meter, Progress
from turbolm.data.prepare.sample import Sample
from turbolm.data.prepare.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from turbolm.data.store.token_store import SPLITS, TokenStore, open_store
from turbolm.errors import UserError
from turbolm.recipe.sources.base import Bad, Gauge
from turbolm.recipe.sources.jsonl import JsonlSource

from .conftest import make_recipe, make_texts, write_jsonl


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "SHARD_TEXT_BYTES", 64_000)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(texts, 300), folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stored_texts(store: TokenStore) -> dict[str, list[str]]:
    tokenizer = load_tokenizer(store.tokenizer_dir)
    return {
        split: [
            tokenizer.decode(store.read(split, document, 0, int(length))[1:-1].tolist(), skip_special_tokens=False)
            for document, length in enumerate(store.lengths(split))
        ]
        for split in SPLITS
    }


def test_one_and_two_workers_write_the_same_bytes(tmp_path: Path, corpus: Path) -> None:
    sources = [{"type": "jsonl", "path": str(corpus)}]
    folders = [prepare(make_recipe(tmp_path / str(workers), sources), num_workers=workers) for workers in (1, 2)]
    one, two = map(contents, folders)
    assert one == two
    assert sum(name.endswith(".tokens") for name in one) > 3
    assert not any(name.endswith(".tmp") for name in one)
    assert open_store(folders[0]).fingerprint == open_store(folders[1]).fingerprint


def test_every_document_is_stored_on_one_side(tmp_path: Path, texts: list[str], tokenizer_dir: Path) -> None:
    # Duplicates in different shards, empty documents, and a special token spelled out
    corpus = [*texts, "", *texts[:50], "a<|endoftext|>b", ""]
    path = write_jsonl(tmp_path / "a.jsonl", corpus)
    recipe = make_recipe(tmp_path, [{"type": "jsonl", "path": str(path)}], validation=0.2, path=str(tokenizer_dir))
    store = open_store(prepare(recipe, num_workers=1), verify="full")
    kept = [text for text in corpus if text]
    expected = {
        split: [t for t in kept if is_validation(hashlib.sha256(t.encode()).digest(), 0.2) == (split == "validation")]
        for split in SPLITS
    }
    found = stored_texts(store)
    assert found == expected
    assert not set(found["train"]) & set(found["validation"])
    assert 0.1 < len(set(found["validation"])) / len(set(kept)) < 0.3
    for split in SPLITS:
        assert store.text_bytes(split).tolist() == [len(text.encode()) for text in expected[split]]
        total = store.manifest["totals"][split]
        assert total["documents"] == len(expected[split])
        assert total["tokens"] == int((store.lengths(split) + 1).sum())
        assert total["text_bytes"] == int(store.text_bytes(split).sum())
    assert store.manifest["empty_documents"] == 2
    assert store.manifest["dtype"] == "<u2"
    first = store.read("train", 0, 0, int(store.lengths("train")[0]))
    assert first[0] == store.manifest["bos_id"]
    assert first[-1] == store.manifest["eos_id"]


def test_prepare_is_idempotent(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(tmp_path, [{"type": "jsonl", "path": str(corpus)}])
    assert find_store(recipe) is None
    folder = prepare(recipe, num_workers=1)
    monkeypatch.setattr(prepare_module, "_build", None)
    assert prepare(recipe) == folder == find_store(recipe) == store_folder(recipe)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert prepare(recipe) == folder


def test_interrupted_prepare_goes_on(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [{"type": "jsonl", "path": str(corpus)}]
    undisturbed = prepare(make_recipe(tmp_path / "a", sources), num_workers=1)
    recipe = make_recipe(tmp_path / "b", sources)
    shards_done = 0

    def interrupt(progress: Progress) -> None:
        nonlocal shards_done
        shards_done += progress.stage == "tokenize"
        if shards_done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(recipe, num_workers=1, on_progress=interrupt)
    folder = store_folder(recipe)
    assert find_store(recipe) is None
    before = {path: path.stat().st_ino for path in folder.glob("shard-*")}
    count, text_bytes = finished_shards(recipe)
    assert count == len(list(folder.glob("shard-*.json"))) >= 3
    assert 3 * 4000 <= text_bytes < count * 5000
    (folder / "shard-00099.tokens.1.tmp").write_bytes(b"left by a killed process")
    damaged = folder / "shard-00001.tokens"
    damaged.write_bytes(b"\0" * damaged.stat().st_size)
    read: list[tuple[int, int]] = []
    read_file = JsonlSource.read

    def watched(self: JsonlSource, path: Path, skip: int, gauge: Gauge) -> Iterator[str | Bad]:
        for number, text in enumerate(read_file(self, path, skip, gauge), start=skip + 1):
            read.append((0, number))
            yield text

    monkeypatch.setattr(JsonlSource, "read", watched)
    assert prepare(recipe, num_workers=1) == folder
    assert contents(folder) == contents(undisturbed)
    rewritten = {path.name for path, inode in before.items() if path.stat().st_ino != inode}
    assert {name.split(".")[0] for name in rewritten} == {"shard-00001"}
    # What finished shards hold was not read again: only shard 1, and what comes after the last of them.
    records = [json.loads((folder / f"shard-{n:05d}.json").read_text()) for n in range(count)]
    assert not {place for place in read if records[2]["start"] < list(place) <= records[-1]["end"]}
    assert len(read) == len(set(read))


@pytest.mark.parametrize("after", [20, 150])
def test_interrupted_sample_goes_on(
    tmp_path: Path, texts: list[str], after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves = [write_jsonl(tmp_path / f"{n}.jsonl", part) for n, part in enumerate((texts[:100], texts[100:]))]
    sources = [{"type": "jsonl", "path": str(half)} for half in halves]
    train = {"vocab_size": 290, "sample_bytes": 6000}
    undisturbed = prepare(make_recipe(tmp_path / "a", sources, train=train), num_workers=1)
    recipe = make_recipe(tmp_path / "b", sources, train=train)
    num_considered, reads = 0, list[tuple[str, int]]()
    add, read_file = Sample.add, JsonlSource.read

    def interrupt(sample: Sample, digest: bytes, text: str) -> None:
        nonlocal num_considered
        num_considered += 1
        if num_considered == after:
            raise KeyboardInterrupt
        add(sample, digest, text)

    def watched(self: JsonlSource, path: Path, skip: int, gauge: Gauge) -> Iterator[str | Bad]:
        reads.append((path.name, skip))
        return read_file(self, path, skip, gauge)

    monkeypatch.setattr(Sample, "add", interrupt)
    monkeypatch.setattr(JsonlSource, "read", watched)
    with pytest.raises(KeyboardInterrupt):
        prepare(recipe, num_workers=1)
    assert (store_folder(recipe) / "sample.jsonl").is_file()
    before = list(reads)
    folder = prepare(recipe, num_workers=1)
    assert contents(folder) == contents(undisturbed)
    # It began where it was interrupted: in the first file, or behind it.
    assert reads[len(before)] == ("0.jsonl", 0 if after == 20 else 100)


def test_damaged_store_is_mended(tmp_path: Path, corpus: Path) -> None:
    recipe = make_recipe(tmp_path, [{"type": "jsonl", "path": str(corpus)}])
    folder = prepare(recipe, num_workers=1)
    sound = contents(folder)
    (folder / "shard-00002.tokens").unlink()
    assert prepare(recipe, num_workers=1) == folder
    assert contents(folder) == sound


def test_key_covers_what_decides_the_content(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    sources = [{"type": "jsonl", "path": str(corpus)}]
    copy = write_jsonl(tmp_path / "copy.jsonl", ["a"])
    recipe = make_recipe(tmp_path, [{"type": "jsonl", "path": str(copy)}])
    keys = [
        store_key(make_recipe(tmp_path, sources)),
        store_key(make_recipe(tmp_path, sources, validation=0.2)),
        store_key(make_recipe(tmp_path, sources, train={"vocab_size": 301})),
        store_key(make_recipe(tmp_path, sources, path=str(tokenizer_dir))),
        store_key(make_recipe(tmp_path, [*sources, *sources])),
        store_key(recipe),
    ]
    os.utime(copy, ns=(1, 1))
    keys.append(store_key(recipe))
    assert len(set(keys)) == len(keys)
    assert store_key(make_recipe(tmp_path / "elsewhere", sources)) == keys[0]


def test_lone_tokenizer_file_and_its_bos_are_in_the_key(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    sources = [{"type": "jsonl", "path": str(corpus)}]
    recipe = make_recipe(tmp_path, sources, path=str(tokenizer_dir))
    before = store_key(recipe)
    config = tokenizer_dir / "tokenizer_config.json"
    original = config.read_text()
    try:
        config.write_text(json.dumps({"bos_token": "a", "eos_token": "<|endoftext|>"}))
        assert store_key(recipe) != before
    finally:
        config.write_text(original)


def test_workers_end_with_a_killed_parent(tmp_path: Path, corpus: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import multiprocessing, os, signal, sys; from pathlib import Path\n"
        "from tests.data.conftest import make_recipe\n"
        "from turbolm.data.prepare.build import prepare\n"
        "def die(progress):\n"
        "    if progress.stage == 'tokenize':\n"
        "        print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "if __name__ == '__main__':\n"
        "    recipe = make_recipe(Path(sys.argv[1]), [{'type': 'jsonl', 'path': sys.argv[2]}])\n"
        "    prepare(recipe, num_workers=2, on_progress=die)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), str(tmp_path / "cache"), str(corpus)]
    # Workers hold the other end of stdout: `run` comes back when the last of them has ended.
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, timeout=30)
    assert done.returncode == -9
    assert done.stdout.split()


def test_two_prepares_at_once(tmp_path: Path, corpus: Path) -> None:
    """The second waits for the first, and then finds the store complete."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        "from tests.data.conftest import make_recipe\n"
        "from turbolm.data.prepare.build import prepare\n"
        "if __name__ == '__main__':\n"
        "    recipe = make_recipe(Path(sys.argv[1]), [{'type': 'jsonl', 'path': sys.argv[2]}])\n"
        "    stages = set()\n"
        "    prepare(recipe, num_workers=1, on_progress=lambda progress: stages.add(progress.stage))\n"
        "    print(*sorted(stages - {'sample'}))\n"
    )
    command = [sys.executable, str(script), str(tmp_path / "cache"), str(corpus)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    said = sorted(process.communicate(timeout=60)[0].strip() for process in running)
    assert [process.returncode for process in running] == [0, 0]
    assert said in (["tokenize", "waiting"], ["", "tokenize"])


@pytest.mark.parametrize(
    ("documents", "validation", "message"),
    [
        ([""], 0.0, "None of the 1 documents"),
        (["a", "b"], 0.9999999, "no training documents: all 2 are held out"),
    ],
)
def test_nothing_to_train_on(
    tmp_path: Path, tokenizer_dir: Path, documents: list[str], validation: float, message: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    sources = [{"type": "jsonl", "path": str(path)}]
    recipe = make_recipe(tmp_path, sources, validation=validation, path=str(tokenizer_dir))
    with pytest.raises(UserError, match=message):
        prepare(recipe, num_workers=1)
    assert find_store(recipe) is None
    recipe = make_recipe(tmp_path, sources, validation=validation)
    with pytest.raises(UserError, match="no training documents to train the tokenizer on"):
        prepare(recipe, num_workers=1)


def test_errors(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [{"type": "jsonl", "path": str(corpus)}]
    recipe = make_recipe(tmp_path, sources, train={"vocab_size": 100_000})
    with pytest.raises(UserError, match="vocab_size 100000: it gives"):
        prepare(recipe, num_workers=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="Run `turbolm prepare RECIPE` first"):
        prepare(recipe)
    monkeypatch.delenv("WORLD_SIZE")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        prepare(make_recipe(tmp_path / "file", sources))


def test_sources_without_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n\n")
    with pytest.raises(UserError, match="The sources hold no documents at all"):
        prepare(make_recipe(tmp_path, [{"type": "jsonl", "path": str(tmp_path / "a.jsonl")}]), num_workers=1)


def test_sources_that_change_meanwhile(tmp_path: Path, texts: list[str]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    recipe = make_recipe(tmp_path, [{"type": "jsonl", "path": str(path)}])
    with pytest.raises(UserError, match="changed while they were read"):
        prepare(recipe, num_workers=1, on_progress=lambda progress: os.utime(path, ns=(1, 1)))


def test_killed_worker_is_reported(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "start_worker", os._exit)
    with pytest.raises(UserError, match="worker process of prepare was killed"):
        prepare(make_recipe(tmp_path, [{"type": "jsonl", "path": str(corpus)}]), num_workers=1)


def test_long_texts_are_tokenized_in_parts(tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "_PART_BYTES", 50)
    tokenizer = load_tokenizer(tokenizer_dir)
    texts = ["short", "line of text\n" * 20, "x" * 120, "ü" + "🙂" * 40, *make_texts(5)]
    parts = list(shards_module.tokenize(Plain(tokenizer_dir), [text.encode() for text in texts]))
    ids, lengths = (np.concatenate(column) for column in zip(*parts, strict=True))
    documents = np.split(ids, np.cumsum(lengths)[:-1])
    assert [tokenizer.decode(document.tolist()) for document in documents] == texts
    sizes = [[len(part) for part in shards_module._parts(text.encode())] for text in texts[1:4]]
    assert sizes == [[39] * 6 + [26], [50, 50, 20], [50, 48, 48, 16]]


def test_sample_is_spread_and_bounded(tmp_path: Path) -> None:
    def sample_texts(pairs: list[tuple[bytes, str]], sample_bytes: int, sample: Sample | None = None) -> list[str]:
        sample = sample or Sample(sample_bytes)
        for digest, text in pairs:
            sample.add(digest, text)
        return sample.texts()

    pairs: list[tuple[bytes, str]] = [(hashlib.sha256(t.encode()).digest(), t) for t in make_texts(200)]
    sample = sample_texts(pairs, 5000)
    assert sum(len(text.encode()) for text in sample) in range(4990, 5001)
    assert sample == sample_texts(pairs[::-1], 5000) == sample_texts(pairs * 2, 5000)
    numbers = [int(text.split()[0]) for text in sample[:-1]]
    assert min(numbers) < 50
    assert max(numbers) > 150
    everything = sample_texts(pairs, 10**9)
    assert sorted(everything) == sorted(text for _, text in pairs)
    assert sample_texts([(b"1", "aü")], 2) == ["a"]  # not half a character
    assert sample_texts([], 3) == []
    first, second = Sample(5000), Sample(5000)
    sample_texts(pairs[:90], 0, first)
    first.save(tmp_path / "saved", {"documents": 90})
    assert second.load(tmp_path / "saved") == {"documents": 90}
    assert sample_texts(pairs[90:], 0, second) == sample
    (tmp_path / "saved").write_text("{")
    assert Sample(5).load(tmp_path / "saved") is None


@pytest.mark.parametrize("kind", ["text", "parquet", "datasets"])
def test_other_formats_hold_the_same_documents(
    tmp_path: Path, texts: list[str], tokenizer_dir: Path, kind: str
) -> None:
    texts = texts[:40]
    if kind == "text":
        for number, text in enumerate(texts):
            (tmp_path / f"{number:03d}.txt").write_bytes(text.encode())
        source: dict[str, Any] = {"type": "text", "path": str(tmp_path / "*.txt")}
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
        source = {"type": "parquet", "path": str(tmp_path / "a.parquet")}
    else:
        import datasets

        datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "set")
        source = {"type": "datasets", "path": str(tmp_path / "set")}
    recipe = make_recipe(tmp_path / "cache", [source], validation=0.0, path=str(tokenizer_dir))
    assert stored_texts(open_store(prepare(recipe, num_workers=1))) == {"train": texts, "validation": []}


def test_duplicates_are_left_out(
    tmp_path: Path, texts: list[str], tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "SHARD_TEXT_BYTES", 10_000)
    first, second = ["x", *texts[:120], "x", ""], [*texts[100:], "x", texts[5], "new"]
    sources = []
    for number, part in enumerate((first, second)):
        path = write_jsonl(tmp_path / f"{number}.jsonl", part)
        sources.append({"type": "jsonl", "path": str(path)})
    keep = make_recipe(tmp_path / "keep", sources, path=str(tokenizer_dir))
    recipes = [
        keep.model_copy(
            update={
                "data": keep.data.model_copy(update={"deduplicate": "exact"}),
                "execution": keep.execution.model_copy(update={"cache_dir": str(tmp_path / name)}),
            }
        )
        for name in ("a", "b")
    ]
    assert store_key(keep) != store_key(recipes[0])
    folder = prepare(recipes[0], num_workers=2)
    store = open_store(folder, verify="full")
    expected = list(dict.fromkeys(text for text in first + second if text))
    found = stored_texts(store)
    assert sorted(found["train"] + found["validation"]) == sorted(expected)
    assert [text for text in expected if text in set(found["train"])] == found["train"]
    assert store.manifest["duplicate_documents"] == len(first) + len(second) - 1 - len(expected) == 23
    assert open_store(prepare(keep, num_workers=1)).manifest["duplicate_documents"] == 0
    # The same when it is interrupted, a finished shard is lost, and its documents are read again
    assert len(store.manifest["shards"]) > 8
    done = 0

    def interrupt(progress: Progress) -> None:
        nonlocal done
        done += progress.stage == "tokenize"
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(recipes[1], num_workers=1, on_progress=interrupt)
    (store_folder(recipes[1]) / "shard-00002.tokens").unlink()
    (store_folder(recipes[1]) / "shard-00004.digests").unlink()
    assert contents(prepare(recipes[1], num_workers=1)) == contents(folder)


def test_digests_are_a_set_in_little_memory() -> None:
    random = np.random.default_rng(0)
    digests = [random.bytes(DIGEST_BYTES) for _ in range(40_000)]
    digests += [bytes(8) + random.bytes(DIGEST_BYTES - 8) for _ in range(300)]  # all for the same places
    digests += [*digests[::7], *digests[-300:]]
    rows = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES)
    seen = DigestSet()
    is_new = np.concatenate([seen.add(part) for part in np.split(rows, [0, 1, 2, 3000, 3007, 25_000])])
    assert is_new.tolist() == [True] * 40_300 + [False] * (len(digests) - 40_300)
    assert len(seen) == len(set(digests)) == 40_300
    assert 16 * len(seen) <= seen.num_bytes <= 23 * len(seen)


def test_progress_says_what_is_left(tmp_path: Path, texts: list[str]) -> None:
    paths = [str(write_jsonl(tmp_path / f"{n}.jsonl", texts)) for n in range(2)]
    seen: list[Progress] = []
    recipe = make_recipe(tmp_path, [{"type": "jsonl", "path": path} for path in paths])
    store = open_store(prepare(recipe, num_workers=1, on_progress=seen.append))
    seen = [progress for progress in seen if progress.stage == "tokenize"]
    shares = [progress.share or 0 for progress in seen]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert 0.3 < shares[len(shares) // 2] < 0.7
    for progress in seen[:-1]:
        assert progress.eta_sec is not None and progress.eta_sec > 0
    totals = store.manifest["totals"]
    assert seen[-1].documents == sum(totals[split]["documents"] for split in SPLITS) == 600
    assert seen[-1].text_bytes == sum(totals[split]["text_bytes"] for split in SPLITS)


def test_speed_and_eta_do_not_count_earlier_runs() -> None:
    seen: list[Progress] = []
    clock = iter([100.0, 110.0])
    meter = Meter("tokenize", seen.append, lambda: next(clock))
    meter.skip(50_000_000, 0.5)
    meter.report(7, 70_000_000, 0.6)
    assert (seen[0].bytes_per_sec, seen[0].eta_sec) == (pytest.approx(2e6), pytest.approx(40))
    assert str(seen[0]) == "tokenizing, 7 documents, 66.8 MiB, 2.0 MB/s, 60%, 40s left"


@pytest.mark.parametrize("change", ["edit", "truncate", "remove"])
def test_damaged_tokenizer_and_manifest_are_mended(tmp_path: Path, corpus: Path, change: str) -> None:
    recipe = make_recipe(tmp_path, [{"type": "jsonl", "path": str(corpus)}])
    folder = prepare(recipe, num_workers=1)
    sound = contents(folder)
    for name in ("tokenizer/tokenizer.json", "manifest.json"):
        damage(folder / name, change)
        assert prepare(recipe, num_workers=1) == folder
        assert contents(folder) == sound


def damage(path: Path, change: str) -> None:
    content = path.read_bytes()
    if change == "remove":
        path.unlink()
    elif change == "truncate":
        path.write_bytes(content[:-2])
    else:
        path.write_bytes(content.replace(b"1", b"2", 1))


def test_another_recipes_store_is_replaced(tmp_path: Path, corpus: Path) -> None:
    sources = [{"type": "jsonl", "path": str(corpus)}]
    one, two = make_recipe(tmp_path, sources), make_recipe(tmp_path, sources, validation=0.3)
    other = contents(prepare(one, num_workers=1))
    store_folder(one).rename(store_folder(two))
    assert contents(prepare(two, num_workers=1)) != other
    assert open_store(store_folder(two)).manifest["validation"] == 0.3
