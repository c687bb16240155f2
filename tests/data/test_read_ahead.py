"""Several processes read: the store, what is refused and what is kept are the same as with one."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turbolm.data.prepare import blocks as blocks_module
from turbolm.data.prepare import build as prepare_module
from turbolm.data.prepare import read_ahead
from turbolm.data.prepare.blocks import files_from, plan_tasks, read_blocks
from turbolm.data.prepare.build import prepare, store_folder
from turbolm.data.prepare.cut import Dropped, cut_shards, held_out, is_validation
from turbolm.data.prepare.progress import Progress
from turbolm.data.prepare.read_ahead import BlockReader
from turbolm.data.prepare.reader import SourceSizes
from turbolm.data.prepare.sample import Sample, read_sample
from turbolm.data.prepare.texts import Texts
from turbolm.data.prepare.tokenizer import save_tokenizer, train_tokenizer
from turbolm.data.store.token_store import SPLITS, open_store
from turbolm.errors import UserError
from turbolm.recipe.schema import Recipe

from .conftest import make_recipe, make_texts, write_jsonl
from .test_prepare import contents

SHARD_BYTES = 32_000


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "SHARD_TEXT_BYTES", SHARD_BYTES)
    monkeypatch.setattr(read_ahead, "_PARALLEL_BYTES", 0)
    monkeypatch.setattr(read_ahead, "_BLOCK_BYTES", 700)
    monkeypatch.setattr(blocks_module, "_TASK_BYTES", 2_000)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(texts, 300), folder)
    return folder


def write_parquet(path: Path, texts: list[str]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=25)
    return path


def mixed_recipe(folder: Path, tokenizer: Path, cache: str) -> tuple[Recipe, list[str]]:
    """Files of all kinds, large and small, with duplicates in and across files, empty and bad documents."""
    texts = make_texts(500, seed=1)
    parts = [texts[:200], [*texts[190:210], "", texts[3]], texts[200:400], [texts[250], *texts[380:500], texts[499]]]
    folder.mkdir(exist_ok=True)
    for number, part in enumerate(parts[:2]):
        write_jsonl(folder / f"{number}.jsonl", part)
    with (folder / "0.jsonl").open("a") as file:
        file.write('{"text": 3}\n\n{"body": "a"}\n')
    write_parquet(folder / "a.parquet", parts[2])
    for number, text in enumerate(parts[3]):
        (folder / f"{number:03d}.txt").write_bytes(text.encode())
    (folder / "999.txt").write_bytes(b"\xff")
    sources = [
        {"type": "jsonl", "path": str(folder / "*.jsonl")},
        {"type": "parquet", "path": str(folder / "a.parquet")},
        {"type": "text", "path": str(folder / "*.txt")},
    ]
    recipe = make_recipe(folder / cache, sources, validation=0.2, path=str(tokenizer))
    data = recipe.data.model_copy(update={"deduplicate": "exact", "on_bad_document": "skip"})
    return recipe.model_copy(update={"data": data}), [text for part in parts for text in part]


def cut(recipe: Recipe, folder: Path, num_readers: int) -> tuple[list[Any], Dropped]:
    """What the shards hold and where they come from, and what is in none."""
    folder.mkdir(exist_ok=True)
    dropped, found = Dropped(), []
    for shard in cut_shards(recipe, folder, SHARD_BYTES, SourceSizes(recipe.data.sources), dropped, num_readers):
        found.append((shard.number, shard.record, {split: list(shard.texts[split]) for split in SPLITS}, shard.digests))
        shard.drop_texts()
    assert not list(folder.iterdir())
    return found, dropped


def test_readers_make_no_difference_to_the_shards(tmp_path: Path, tokenizer_dir: Path) -> None:
    recipe, documents = mixed_recipe(tmp_path / "corpus", tokenizer_dir, "cache")
    one, dropped = cut(recipe, tmp_path / "one", 1)
    assert len(list(plan_tasks(recipe.data.sources, 0, (0, 0)))) == 10
    assert cut(recipe, tmp_path / "three", 3) == (one, dropped)
    # Beside what the documents are in plain Python
    kept = list(dict.fromkeys(text.encode() for text in documents if text))
    found = [texts for _, _, texts, _ in one]
    for split in SPLITS:
        expected = [t for t in kept if is_validation(hashlib.sha256(t).digest(), 0.2) == (split == "validation")]
        assert [text for texts in found for text in texts[split]] == expected
    assert dropped.empty == 1
    assert dropped.duplicates == len(documents) - 1 - len(kept)
    places = [line.split(": ")[0].rpartition("/")[2] for line in dropped.bad.first]
    assert places == ["0.jsonl:201", "0.jsonl:203", "999.txt:1"]


def in_cache(recipe: Recipe, cache: Path) -> Recipe:
    return recipe.model_copy(update={"execution": recipe.execution.model_copy(update={"cache_dir": str(cache)})})


def test_a_build_killed_with_two_readers_goes_on_with_another_number(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Shards, manifest and fingerprint are those of one reader; no process outlives the killed one."""
    recipe, _ = mixed_recipe(tmp_path / "corpus", tokenizer_dir, "cache")
    undisturbed = prepare(recipe, num_workers=1, num_readers=1)
    recipe = in_cache(recipe, tmp_path / "killed")
    (tmp_path / "recipe").write_bytes(pickle.dumps(recipe))
    script = tmp_path / "run.py"
    script.write_text(
        "import multiprocessing, os, pickle, signal, sys; from pathlib import Path\n"
        "from turbolm.data.prepare import blocks, build, read_ahead\n"
        "def die(progress):\n"
        "    die.count += 1\n"
        "    if die.count == 5:\n"
        "        print(len(multiprocessing.active_children()), flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "if __name__ == '__main__':\n"
        f"    build.SHARD_TEXT_BYTES, read_ahead._PARALLEL_BYTES = {SHARD_BYTES}, 0\n"
        "    read_ahead._BLOCK_BYTES, blocks._TASK_BYTES, die.count = 700, 2000, 0\n"
        "    recipe = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
        "    build.prepare(recipe, num_workers=1, num_readers=2, on_progress=die)\n"
    )
    command = [sys.executable, str(script), str(tmp_path / "recipe")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    # Readers and workers hold the other end of stdout: `run` comes back when the last of them has ended.
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "3\n")
    finished = {path: path.stat().st_ino for path in store_folder(recipe).glob("shard-*.json")}
    assert 5 <= len(finished) < len(open_store(undisturbed).manifest["shards"])
    lost = store_folder(recipe) / "shard-00001.index"
    lost.unlink()
    folder = prepare(recipe, num_workers=1, num_readers=3)
    assert contents(folder) == contents(undisturbed)  # and nothing that ends in .tmp
    assert open_store(folder, verify="full").fingerprint == open_store(undisturbed).fingerprint
    rewritten = [path.name for path, inode in finished.items() if path.stat().st_ino != inode]
    assert rewritten == ["shard-00001.json"]


def test_an_interrupt_leaves_no_process_and_no_text(tmp_path: Path, tokenizer_dir: Path) -> None:
    recipe, _ = mixed_recipe(tmp_path / "corpus", tokenizer_dir, "cache")
    during: list[int] = []

    def interrupt(progress: Progress) -> None:
        during.append(len(multiprocessing.active_children()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(recipe, num_workers=1, num_readers=2, on_progress=interrupt)
    assert during[0] == 3
    assert multiprocessing.active_children() == []
    assert list(store_folder(recipe).glob("shard-*.json"))
    assert not list(store_folder(recipe).glob("*.tmp"))


def test_what_is_wrong_first_is_named(tmp_path: Path) -> None:
    """In the order of the documents, whichever process finds it first; by file and line, as with one reader."""
    lines = [json.dumps({"text": text}).encode() for text in make_texts(300)]
    (tmp_path / "0.jsonl").write_bytes(b"\n".join(lines))
    packed = gzip.compress(b"\n".join(lines))
    (tmp_path / "1.jsonl.gz").write_bytes(packed[:-20])
    (tmp_path / "2.jsonl").write_bytes(b"\n".join([*lines[:61], b'{"text": ', *lines[61:]]))

    def refusal(names: str, num_readers: int) -> str:
        recipe = make_recipe(tmp_path / "cache", [{"type": "jsonl", "path": str(tmp_path / names)}])
        with pytest.raises(UserError) as caught:
            cut(recipe, tmp_path / "cut", num_readers)
        return str(caught.value)

    for names, message in (
        ("*", f"{tmp_path}/1.jsonl.gz cannot be read: its gzip data is truncated at byte {len(packed) - 20}"),
        ("[!1].jsonl", f"{tmp_path}/2.jsonl:62: not valid JSON: "),
    ):
        found = refusal(names, 2)
        assert found == refusal(names, 1)
        assert found.startswith(message)
    assert multiprocessing.active_children() == []


def test_a_killed_reader_is_reported(tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, _ = mixed_recipe(tmp_path / "corpus", tokenizer_dir, "cache")
    monkeypatch.setattr(read_ahead, "_serve", os._exit)
    with pytest.raises(UserError, match="worker process of prepare was killed, possibly by the out-of-memory killer"):
        prepare(recipe, num_workers=1, num_readers=2)
    assert multiprocessing.active_children() == []


def test_readers_do_not_run_far_ahead(tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "_BLOCKS_AHEAD", 4)
    for number in range(4):
        write_jsonl(tmp_path / f"{number}.jsonl", texts)
    recipe = make_recipe(tmp_path, [{"type": "jsonl", "path": str(tmp_path / "*.jsonl")}])
    (tmp_path / "texts").mkdir()
    reader = BlockReader(recipe.data.sources, tmp_path / "texts", 2, 1)
    blocks = reader.read(0, (0, 0), ahead=True)
    taken = [next(blocks)]
    counts: list[int] = []
    while len(counts) < 5 or len(set(counts[-5:])) > 1:
        time.sleep(0.1)
        counts.append(len(list((tmp_path / "texts").iterdir())))
    assert 8 <= counts[-1] <= 2 * 5 + 1  # what may be ahead, a block each that is waiting, and the one taken
    taken += blocks
    assert len(taken) > 40
    found = [block.file.path.read_bytes()[: block.lengths.sum()] for block in taken]
    assert b"".join(found).decode() == "".join(texts) * 4
    reader.close()


def test_readers_make_no_difference_to_the_tokenizers_sample(tmp_path: Path, tokenizer_dir: Path) -> None:
    """The documents with the smallest digests; texts that cannot be among them are not kept for long."""
    recipe, documents = mixed_recipe(tmp_path / "corpus", tokenizer_dir, "cache")
    samples = []
    for num_readers in (1, 2):
        sample = Sample(8_000)
        read_sample(sample, recipe, tmp_path / "sample.jsonl", num_readers, lambda progress: None)
        samples.append(sample.texts())
    ranked = sorted({text for text in documents if text}, key=lambda text: hashlib.sha256(text.encode()).digest())
    ranked = [text for text in ranked if not is_validation(hashlib.sha256(text.encode()).digest(), 0.2)]
    assert samples[0] == samples[1]
    assert samples[0][:-1] == ranked[: len(samples[0]) - 1]
    assert sum(len(text.encode()) for text in samples[0]) == pytest.approx(8_000, abs=3)
    (source, *_), paths = recipe.data.sources, iter([tmp_path / "0.text", tmp_path / "1.text"])
    bound = hashlib.sha256(ranked[20].encode()).digest()[:8]
    (block,) = read_blocks(
        source, files_from(source, (0, 0)), paths, lambda: 10**6, lambda: int.from_bytes(bound, "big")
    )
    texts = {text for text in documents[:222] if text and hashlib.sha256(text.encode()).digest()[:8] <= bound}
    held = Texts()
    held.add(block.file.path, block.starts[block.starts >= 0], block.lengths[block.starts >= 0])
    assert {text.decode() for text in held} == texts
    assert len(texts) < 100 < len(block)


def test_without_semaphores_one_process_reads(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object, **__: object) -> None:
        raise OSError(38, "Function not implemented")

    recipe, _ = mixed_recipe(tmp_path / "corpus", tokenizer_dir, "cache")
    expected = cut(recipe, tmp_path / "cut", 1)
    monkeypatch.setattr("multiprocessing.synchronize._multiprocessing.SemLock", none)
    assert cut(recipe, tmp_path / "cut", 2) == expected
    assert multiprocessing.active_children() == []


def test_tasks_cover_each_document_once(tmp_path: Path) -> None:
    """Whatever the offset, and row groups or small files are put together."""
    texts = make_texts(500)
    for number in range(3):
        write_parquet(tmp_path / f"{number}.parquet", texts[number * 100 : (number + 1) * 100])
    write_parquet(tmp_path / "3.parquet", texts[300:])
    (source,) = make_recipe(tmp_path, [{"type": "parquet", "path": str(tmp_path / "*.parquet")}]).data.sources
    for offset, first in (((0, 0), 0), ((1, 30), 130), ((3, 0), 300), ((3, 199), 499), ((3, 200), 500)):
        tasks = list(plan_tasks([source], 0, offset))
        assert [task.is_last for task in tasks] == [False] * (len(tasks) - 1) + [True]
        paths = (tmp_path / f"{number}.text" for number in itertools.count())  # again, over the old ones
        found = [
            (block.end_of(number)[0], block.file.path.read_bytes()[start : start + length].decode())
            for task in tasks
            for block in read_blocks(source, task.spans, paths, lambda: 2000)
            for number, (start, length) in enumerate(zip(block.starts, block.lengths, strict=True))
        ]
        assert [text for _, text in found] == texts[first:]
        ends = [(min(n // 100, 3), n + 1 - 100 * min(n // 100, 3)) for n in range(first, 500)]
        assert [end for end, _ in found] == ends
    assert len(list(plan_tasks([source], 0, (3, 0)))) > 1  # parts of one file


def test_held_out_is_exact() -> None:
    random = np.random.default_rng(0)
    digests = random.integers(0, 256, (3000, 32), np.uint8)
    digests[:, :6] = digests[0, :6]  # close to the share, where rounding decides
    share = int.from_bytes(digests[7, :8].tobytes(), "big") / 2**64
    expected = [is_validation(digest.tobytes(), share) for digest in digests]
    assert held_out(digests, share).tolist() == expected
    assert 0 < sum(expected) < len(expected)
