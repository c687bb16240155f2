"""Prepared once: what is the same by content is not tokenized again; read-only and full file systems are said so."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from tests.data.conftest import make_recipe, make_texts, write_jsonl
from turbolm import cli
from turbolm.data.order.batch_order import recipe_order
from turbolm.data.prepare import build, same_content
from turbolm.data.prepare.build import find_store, prepare, store_folder, store_key
from turbolm.data.prepare.progress import Progress
from turbolm.data.prepare.reader import OnBad, Reader
from turbolm.data.store.token_store import open_store
from turbolm.errors import UserError
from turbolm.plan.curriculum import build_curriculum
from turbolm.recipe.schema import Recipe
from turbolm.recipe.sources import Source

from .cases import TEXTS, compress, jsonl, parquet

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "texts").mkdir()
    for name in "ab":
        write_jsonl(tmp_path / "texts" / f"{name}.jsonl", make_texts(60, seed=ord(name)))
    return make_recipe(tmp_path / "cache", [{"type": "jsonl", "path": str(tmp_path / "texts" / "*.jsonl")}])


def nothing_is_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_build", lambda *arguments: pytest.fail("tokenizes again"))


def touch(time_ns: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for path in folder.iterdir():
            os.utime(path, ns=(time_ns, time_ns))

    return change


def copy(folder: Path) -> None:
    """Other inodes, and the time of the copy."""
    shutil.copytree(folder, folder.with_name("copy"), copy_function=shutil.copyfile)
    shutil.rmtree(folder)
    folder.with_name("copy").rename(folder)


@pytest.mark.parametrize(
    "change", [touch(2 * 10**18), touch(10**9), touch(0), copy], ids=["newer", "older", "0", "copy"]
)
def test_other_times_of_the_same_content(
    change: Callable[[Path], None], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, key = prepare(recipe, num_workers=1), store_key(recipe)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    change(tmp_path / "texts")
    assert store_key(recipe) != key and find_store(recipe) is None
    nothing_is_tokenized(monkeypatch)
    assert prepare(recipe, num_workers=1) == folder
    assert find_store(recipe) == folder == store_folder(recipe)  # what the ranks and `verify` find
    monkeypatch.setattr(same_content, "_hash_all", lambda files, on_progress: [] if not files else pytest.fail("again"))
    assert prepare(recipe, num_workers=1) == folder  # nothing is read the second time
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_same_files_in_another_folder(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare(recipe, num_workers=1)
    (tmp_path / "texts").rename(tmp_path / "restored")
    moved = make_recipe(tmp_path / "cache", [{"type": "jsonl", "path": str(tmp_path / "restored" / "*.jsonl")}])
    nothing_is_tokenized(monkeypatch)
    assert prepare(moved, num_workers=1) == folder


@pytest.mark.parametrize("time_ns", [0, 10**9, 2 * 10**18])
def test_other_content_of_the_same_size_is_prepared_again(recipe: Recipe, tmp_path: Path, time_ns: int) -> None:
    folder, path = prepare(recipe, num_workers=1), tmp_path / "texts" / "b.jsonl"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"cat", b"dog", 1))
    assert path.stat().st_size == len(content) and path.read_bytes() != content
    touch(time_ns)(tmp_path / "texts")
    other = prepare(recipe, num_workers=1)
    assert other != folder and find_store(recipe) == other
    assert open_store(other).fingerprint != open_store(folder).fingerprint
    # Exchanged names: the same bytes, in another order.
    path.rename(tmp_path / "c")
    (tmp_path / "texts" / "a.jsonl").rename(path)
    (tmp_path / "c").rename(tmp_path / "texts" / "a.jsonl")
    assert prepare(recipe, num_workers=1) not in (folder, other)


def test_a_store_without_a_record_gets_one_while_its_files_are_the_same(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare(recipe, num_workers=1)
    (record,) = (tmp_path / "cache" / "stores").glob("*.json")
    content = record.read_bytes()
    hashed = {Path(file[0]).name: file[3] for file in json.loads(content)["files"]}
    texts = (tmp_path / "texts").iterdir()
    assert hashed == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in texts}
    record.unlink()
    assert prepare(recipe, num_workers=1) == folder and record.read_bytes() == content
    record.write_bytes(content[:-9])  # cut: as if there were none
    touch(10**9)(tmp_path / "texts")
    assert prepare(recipe, num_workers=1) != folder


def test_files_that_change_while_they_are_hashed_are_not_recorded(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = same_content._hash_all

    def change(*arguments: Any) -> list[str]:
        touch(10**9)(tmp_path / "texts")
        return original(*arguments)

    monkeypatch.setattr(same_content, "_hash_all", change)
    prepare(recipe, num_workers=1)
    assert not list((tmp_path / "cache" / "stores").glob("*.json"))


def test_a_damaged_store_is_not_taken(recipe: Recipe, tmp_path: Path) -> None:
    folder = prepare(recipe, num_workers=1)
    touch(10**9)(tmp_path / "texts")
    assert prepare(recipe, num_workers=1) == folder
    next(folder.glob("*.tokens")).write_bytes(b"")
    own = prepare(recipe, num_workers=1)
    assert own != folder and find_store(recipe) == own and open_store(own, verify="full")
    touch(2 * 10**9)(tmp_path / "texts")
    assert prepare(recipe, num_workers=1) == own
    touch(10**9)(tmp_path / "texts")
    next(own.glob("*.tokens")).write_bytes(b"")
    assert prepare(recipe, num_workers=1) == find_store(recipe) == own and open_store(own, verify="full")


def test_hashes_in_parallel_are_those_of_hashlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, expected, seen = random.Random(0), [], list[Progress]()
    monkeypatch.setattr(same_content, "_CHUNK_BYTES", 1000)
    monkeypatch.setattr(same_content, "_REPORT_SEC", 0.02)

    def slow(path: str, *how: object, **more: object) -> object:
        time.sleep(0.1)  # so that there is progress to be seen
        return open(path, *how, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(same_content, "open", slow, raising=False)
    for number, size in enumerate([0, 1, 999, 1000, 1001, 100_000, 2_000_000]):
        (path := tmp_path / f"{number}.txt").write_bytes(content := rng.randbytes(size))
        expected.append([str(path), size, path.stat().st_mtime_ns, hashlib.sha256(content).hexdigest()])
    source = TypeAdapter(Source).validate_python({"type": "text", "path": str(tmp_path / "*.txt")})
    assert same_content.hash_files(tmp_path, [source], seen.append) == expected
    shares = [progress.share or 0 for progress in seen]
    assert seen and shares == sorted(shares) and str(seen[-1]).startswith("hashing the source files, ")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., None]]:
    mounted = list[Path]()

    def run(path: Path, *arguments: str) -> None:
        done = subprocess.run(["mount", *arguments, str(path)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mount: {done.stderr}")
        mounted.extend([path] if path not in mounted else [])

    yield run
    for path in reversed(mounted):
        subprocess.run(["umount", "-l", str(path)], check=True)


@needs_root
def test_a_read_only_store(
    recipe: Recipe, tmp_path: Path, mount: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, cache = prepare(recipe, num_workers=1), tmp_path / "cache"
    (record,) = (cache / "stores").glob("*.json")
    for path in (record, *(cache / "stores").glob("*.lock")):
        path.rename(tmp_path / path.name)  # of the version before
    store, curriculum = open_store(folder), build_curriculum(recipe)
    expected = recipe_order(recipe, store, curriculum, save=False).digest(curriculum.num_steps)
    mount(cache, "--bind", str(cache))
    mount(cache, "-o", "remount,bind,ro")
    with pytest.raises(OSError, match="Read-only"):
        (cache / "probe").touch()
    assert prepare(recipe, num_workers=1) == find_store(recipe) == folder
    assert capsys.readouterr().err == ""
    order = recipe_order(recipe, open_store(folder), curriculum, save=True)
    assert order.digest(curriculum.num_steps) == expected
    (line,) = capsys.readouterr().err.splitlines()
    assert "order of the batches stays in memory" in line and "mounted read-only" in line
    touch(10**9)(tmp_path / "texts")
    with pytest.raises(UserError, match=r"execution\.cache_dir.*mounted read-only"):  # without a record
        prepare(recipe, num_workers=1)


@needs_root
def test_a_read_only_store_whose_sources_were_touched(
    recipe: Recipe, tmp_path: Path, mount: Callable[..., None]
) -> None:
    prepare(recipe, num_workers=1)
    touch(10**9)(tmp_path / "texts")
    mount(tmp_path / "cache", "--bind", str(tmp_path / "cache"))
    mount(tmp_path / "cache", "-o", "remount,bind,ro")
    with pytest.raises(UserError, match=r"same content, which cannot be noted .* mounted read-only"):
        prepare(recipe, num_workers=1)


HEARTBEAT = """
import sys
from pathlib import Path
from turbolm.reliability import heartbeat
folder = Path(sys.argv[1])
heartbeat.start(folder, 3)
heartbeat.advance("step", 7)
(sign,) = heartbeat.read_signs(folder)
assert (sign.rank, sign.step, sign.phase) == (3, 7, "step"), sign
print((folder / "3.sign").resolve().parent)
heartbeat.remove(folder)
"""


@needs_root
@pytest.mark.parametrize("full", [True, False])
def test_heartbeats_in_a_full_tmpfs(full: bool, tmp_path: Path, mount: Callable[..., None]) -> None:
    """A sparse map there would end in a bus error."""
    (folder := tmp_path / "shm").mkdir()
    mount(folder, "-t", "tmpfs", "-o", "size=1M", "tmpfs")
    if full:
        with suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        assert os.statvfs(folder).f_bavail == 0
    done = subprocess.run(
        [sys.executable, "-c", HEARTBEAT, folder], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines, place = done.stderr.splitlines(), Path(done.stdout.strip())
    assert (place != folder, len(lines)) == (full, int(full))
    assert not full or ("No space left on device" in lines[0] and str(folder) in lines[0] and not place.exists())


@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), OSError(38, "Function not implemented")])
def test_prepare_without_shared_memory(
    problem: OSError, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = prepare(recipe, num_workers=2)

    def no_semaphore(*arguments: object, **options: object) -> None:
        raise problem

    monkeypatch.setattr("multiprocessing.synchronize._multiprocessing.SemLock", no_semaphore)
    capfd.readouterr()
    alone = make_recipe(tmp_path / "alone", [recipe.data.sources[0].model_dump(exclude_unset=True)])
    assert open_store(prepare(alone, num_workers=2)).fingerprint == open_store(folder).fingerprint
    (line,) = capfd.readouterr().err.splitlines()
    assert "/dev/shm" in line and str(problem.strerror) in line and "--shm-size" in line


# ------------------------------------------------------------------------------------------------------- manglings

_SUFFIXES = ["", ".jsonl", ".json", ".txt", ".gz", ".zst", ".xz", ".bz2", ".parquet", ".html", ".csv"]
_FORMATS = ["plain", "gzip", "zstd", "xz", "bz2"]


def mangled(rng: random.Random) -> tuple[str, bytes, list[str]]:
    """Return a file's name, its content and the manglings, up to three."""
    good = [jsonl(TEXTS), "\n".join(TEXTS).encode(), json.dumps([{"text": text} for text in TEXTS]).encode(), b""]
    content = rng.choice([*good[:3], parquet({"text": TEXTS}), compress(good[0], rng.choice(_FORMATS))])
    names = rng.choices(list(_MANGLE), k=rng.randint(1, 3))
    for name in names:
        content = _MANGLE[name](content, rng)
    return f"file{rng.choice(_SUFFIXES)}", content, names


def inserted(content: bytes, at: int, what: bytes) -> bytes:
    return content[:at] + what + content[at:]


def recoded(content: bytes, rng: random.Random) -> bytes:
    return content.decode(errors="replace").encode(rng.choice(["utf-16", "utf-16-be", "utf-32", "latin-1"]), "replace")


def bit_flipped(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) or 1)
    return content[:at] + bytes(byte ^ (1 << rng.randrange(8)) for byte in content[at : at + 1]) + content[at + 1 :]


_MANGLE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "as it is": lambda content, rng: content,
    "cut": lambda content, rng: content[: rng.randint(0, len(content))],
    "zero bytes inserted": lambda content, rng: inserted(
        content, rng.randint(0, len(content)), bytes(rng.choice([1, 7, 4096]))
    ),
    "first bytes swapped": lambda content, rng: content[:4][::-1] + content[4:],
    "other first bytes": lambda content, rng: (
        compress(b"x", rng.choice(_FORMATS[1:]))[: rng.randint(1, 6)] + content[rng.randint(0, 6) :]
    ),
    "compressed again": lambda content, rng: compress(content, rng.choice(_FORMATS)),
    "joined twice": lambda content, rng: content + content,
    "BOM": lambda content, rng: rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"]) + content,
    "CRLF": lambda content, rng: content.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\r"])),
    "recoded": recoded,
    "noise": lambda content, rng: inserted(content, rng.randint(0, len(content)), rng.randbytes(rng.choice([1, 50]))),
    "bit flipped": bit_flipped,
    "all noise": lambda content, rng: rng.randbytes(rng.choice([1, 3, 300])),
}


def test_every_mangled_file_is_documents_or_one_line(tmp_path: Path) -> None:
    rng, num_read, met, refused = random.Random(14), 0, Counter[str](), list[tuple[tuple[object, ...], str]]()
    for number in range(2500):
        name, content, how = mangled(rng)
        (path := tmp_path / name).write_bytes(content)
        kind = rng.choice(["jsonl", "text", "parquet"])
        on_bad: OnBad = "skip" if rng.random() < 0.5 else "refuse"
        what = (number, kind, on_bad, name, how)
        try:
            reader = Reader(TypeAdapter(Source).validate_python({"type": kind, "path": str(path)}), (0, 0), on_bad)
            texts = list(reader)
            for text in texts:
                assert isinstance(text, str) and text.encode().decode() == text, what
            if how == ["as it is"] and content == jsonl(TEXTS) and kind == "jsonl":
                assert texts == TEXTS, what
            num_read += 1
        except UserError as error:
            refused.append((what, str(error)))
        except Exception as error:
            error.add_note(str(what))
            raise
        met.update(how)
        path.unlink()
    assert met.keys() == _MANGLE.keys() and min(met.values()) > 200
    for case, message in refused:
        assert str(tmp_path / "file") in message and "\n" not in message and len(message) < 1000, (case, message)
    assert num_read + len(refused) == 2500 and min(num_read, len(refused)) > 500


COMMAND = """\
name: test
model: {{config: {{model_type: llama}}}}
tokenizer: {{train: {{vocab_size: 300}}}}
data: {{seq_len: 64, validation: 0, sources: [{{type: {kind}, path: {path}}}]}}
train: {{budget: 64000, global_batch: 640}}
execution: {{cache_dir: {cache}, prepare_workers: 1}}
"""


@pytest.mark.slow
def test_mangled_files_through_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, codes = random.Random(3), Counter[int]()
    for number in range(10):
        (folder := tmp_path / str(number)).mkdir()
        name, content, how = mangled(rng)
        (folder / name).write_bytes(content)
        recipe = COMMAND.format(kind=rng.choice(["jsonl", "text"]), path=folder / name, cache=folder / "cache")
        (folder / "recipe.yaml").write_text(recipe)
        monkeypatch.setattr(sys, "argv", ["turbolm", "prepare", str(folder / "recipe.yaml")])
        with pytest.raises(SystemExit) as end:
            cli.main()
        output, code = capsys.readouterr(), int(end.value.code or 0)
        assert code in (0, 2) and "Traceback" not in output.err, (name, how, output.err)
        assert code == 0 or output.err.startswith("turbolm: "), (name, how, output.err)
        codes[code] += 1
    assert codes[0] and codes[2]
