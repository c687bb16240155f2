"""Stores behind URLs: what is fetched is what the recipe would build, complete, or it is refused in one line."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.checkpoint.mirror_places import Proxy, content_below
from tests.memory_folder import memory_folder, tmp_path
from tests.train.harness import make_recipe
from turbolm import storage
from turbolm.cli import app
from turbolm.data.prepare import build, progress, remote_store
from turbolm.data.prepare.build import check_place, find_store, prepare, store_settings
from turbolm.data.prepare.listings import tell_once
from turbolm.data.prepare.remote_store import check_target, copy_to
from turbolm.data.store.token_store import open_store
from turbolm.errors import UserError
from turbolm.files import read_json, write_json
from turbolm.launch.prepare_job import prepared_bytes
from turbolm.recipe.contract import contract_of, fingerprint
from turbolm.recipe.load import dump_recipe
from turbolm.recipe.schema import Recipe
from turbolm.storage import Remote, StorageError

__all__ = ["tmp_path"]


@dataclass
class Place:
    """A store that was built, its copy below `folder`, and the recipe of a machine with neither sources nor store."""

    folder: Path
    built: Path
    recipe: Recipe

    @property
    def far(self) -> Path:
        return self.folder / "far"

    @property
    def stores(self) -> Path:
        return self.folder / "elsewhere" / "stores"

    @property
    def settings(self) -> dict[str, Any]:
        return store_settings(self.recipe)

    def changed(self, **sections: dict[str, Any]) -> Recipe:
        update = {name: getattr(self.recipe, name).model_copy(update=values) for name, values in sections.items()}
        return self.recipe.model_copy(update=update)

    def complete_stores(self) -> list[Path]:
        """What could be taken for a store there."""
        return [path.parent for path in self.stores.glob("*/manifest.json")]


def store_files(folder: Path) -> dict[str, bytes]:
    """The files of a store, without the records from which a build goes on."""
    return {name: content for name, content in content_below(folder).items() if not is_record(name)}


def is_record(name: str) -> bool:
    return name == "tokenizer-files.json" or (name.startswith("shard-") and name.endswith(".json"))


@pytest.fixture(scope="module")
def home() -> Iterator[tuple[Recipe, Path, Path]]:
    """The recipe of the machine that builds, its store, and the copy of it."""
    with memory_folder() as folder:
        recipe = make_recipe(folder)
        built = prepare(recipe, num_workers=1)
        copy_to(built, f"file://{folder}/far", store_settings(recipe))
        (folder / "corpus.jsonl").rename(folder / "corpus.gone")
        yield recipe, built, folder / "far"


@pytest.fixture
def place(home: tuple[Recipe, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(storage, "RETRY_SEC", (0.01, 0.02))
    tell_once.cache_clear()
    recipe, built, far = home
    shutil.copytree(far, tmp_path / "far")
    execution = recipe.execution.model_copy(
        update={"cache_dir": str(tmp_path / "elsewhere"), "store": f"file://{tmp_path}/far"}
    )
    return Place(tmp_path, built, recipe.model_copy(update={"execution": execution}))


def test_another_machine_gets_the_store_without_the_sources(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_store(place.recipe) is None
    folder = prepare(place.recipe)
    assert folder.is_relative_to(place.stores) and store_files(folder) == store_files(place.built)
    store = open_store(folder, verify="full")
    assert store.fingerprint == open_store(place.built).fingerprint
    assert not list(place.stores.glob(".fetched-*"))
    with monkeypatch.context() as read_only:
        read_only.setattr(build, "make_folder", lambda *_: pytest.fail("the cache is written to"))
        assert prepare(place.recipe) == folder
    without = place.changed(execution={"store": None})
    assert fingerprint(contract_of(place.recipe)) == fingerprint(contract_of(without)), "where it is from is no matter"
    monkeypatch.setattr(Remote, "read", lambda self: pytest.fail("a rank asks"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert find_store(place.recipe) == prepare(place.recipe) == folder


def test_without_the_service_a_complete_store_is_enough(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(self: Remote) -> bytes:
        raise StorageError(f"{self.url}: no route to host")

    with monkeypatch.context() as offline:
        offline.setattr(Remote, "read", unreachable)
        with pytest.raises(UserError, match="^execution.store: file://.*no route to host; check the network"):
            prepare(place.recipe)
    folder = prepare(place.recipe)
    monkeypatch.setattr(Remote, "read", unreachable)
    assert prepare(place.recipe) == folder
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].endswith("no route to host. The token store as it was last fetched is used")
    next(folder.glob("*.tokens")).write_bytes(b"damaged")
    with pytest.raises(UserError, match="^execution.store: .*no route to host"):
        prepare(place.recipe)


def test_an_interrupted_fetch_is_no_store_and_goes_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_CHUNK_BYTES", 1 << 10)
    chunk, starts = Remote._chunk, list[tuple[str, int]]()

    def cut(self: Remote, start: int, end: int) -> bytes:
        starts.append((self.path.rpartition("/")[2], start))
        if self.path.endswith(".tokens") and start >= 4 << 10:
            raise PermissionError("gone")
        return chunk(self, start, end)

    with monkeypatch.context() as broken:
        broken.setattr(Remote, "_chunk", cut)
        with pytest.raises(UserError, match=r"\.tokens: PermissionError: gone"):
            prepare(place.recipe)
    assert not place.complete_stores() and find_store(place.recipe) is None
    assert prepared_bytes(place.recipe) > 4 << 10, "what a prepare job that is stopped here goes on from"
    starts.clear()
    monkeypatch.setattr(
        Remote, "_chunk", lambda self, a, b: (starts.append((self.path.rpartition("/")[2], a)), chunk(self, a, b))[1]
    )
    assert store_files(prepare(place.recipe)) == store_files(place.built)
    tokens = [start for name, start in starts if name.endswith(".tokens")]
    assert min(tokens) == 4 << 10, "what was there is kept"


def damage(name: str) -> Callable[[Path], None]:
    def flip(far: Path) -> None:
        path = next(far.rglob(name))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))

    return flip


def change(name: str, **values: Any) -> Callable[[Path], None]:
    return lambda far: write_json(far / name, (read_json(far / name) or {}) | values) and None


@pytest.mark.parametrize(
    ("damaging", "message"),
    [
        (damage("*.tokens"), r"shard-00000.tokens: content differs \(SHA-256\); remove what is damaged there"),
        (damage("tokenizer.json"), r"tokenizer/tokenizer.json: content differs"),
        (lambda far: next(far.rglob("*.index")).unlink(), r"shard-00000.index: missing"),
        (lambda far: (far / "manifest.json").unlink(), "there is no complete token store in file://"),
        (change("manifest.json", vocab_size=7), "far/manifest.json has changed since it was written"),
        (change("manifest.json", format_version=1), "far/manifest.json is of format 1, not 2"),
        (change("built-from.json", validation=0.5), "has a built-from.json of another store"),
        (lambda far: (far / "built-from.json").unlink(), "has no built-from.json, so that"),
    ],
)
def test_nothing_half_or_damaged_is_taken_and_the_cure_works(
    damaging: Callable[[Path], None], message: str, place: Place
) -> None:
    damaging(place.far)
    with pytest.raises(UserError, match=message) as refused:
        prepare(place.recipe)
    assert "\n" not in str(refused.value)
    assert not place.complete_stores() and find_store(place.recipe) is None
    if damaged := re.search("file://([^ :]*): content differs", str(refused.value)):
        Path(damaged[1]).unlink()
    if "manifest.json" in message:
        with pytest.raises(UserError, match="holds another token store; remove it"):
            copy_to(place.built, f"file://{place.far}", place.settings)
        shutil.rmtree(place.far)
    copy_to(place.built, f"file://{place.far}", place.settings)
    assert store_files(prepare(place.recipe)) == store_files(place.built)


def test_the_store_of_another_recipe_is_refused_with_what_differs(place: Place) -> None:
    (source,) = place.recipe.data.sources
    (path,), source = source.path, source.model_copy(update={"path": ("other.jsonl",)})
    other = place.changed(data={"validation": 0.25, "sources": (source,)}, tokenizer={"special_tokens_in_text": "keep"})
    with pytest.raises(UserError) as refused:
        prepare(other)
    text = str(refused.value)
    assert "data.validation: 0.1 -> 0.25" in text and f'data.sources.0.path: ["{path}"] -> ["other.jsonl"]' in text
    assert 'special_tokens_in_text: null -> "keep"' in text and "\n" not in text and not place.complete_stores()


def test_a_newer_store_at_the_url_is_fetched_and_one_that_is_built_here_is_used(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(place.recipe)
    corpus = Path(place.recipe.data.sources[0].path[0])
    corpus.write_text(corpus.with_suffix(".gone").read_text() + json.dumps({"text": "one more"}) + "\n")
    at_home = place.changed(execution={"store": None, "cache_dir": str(place.folder / "new")})
    (place.folder / "recipe.yaml").write_text(dump_recipe(at_home), encoding="utf-8")
    command = ["prepare", str(place.folder / "recipe.yaml"), "--to", f"file://{place.far}"]
    asked = CliRunner().invoke(app, command)
    assert "holds another token store" in str(asked.exception)
    assert not (place.folder / "new").exists(), "told before anything is tokenized"
    newer = prepare(at_home, num_workers=1)
    with pytest.raises(UserError, match="--to: file://.* holds another token store; remove it"):
        copy_to(newer, f"file://{place.far}", place.settings)
    shutil.rmtree(place.far)
    assert CliRunner().invoke(app, command).exit_code == 0
    corpus.unlink()
    with monkeypatch.context() as broken:
        broken.setattr(storage, "RETRY_SEC", ())
        broken.setattr(Remote, "_chunk", lambda *_: 1 / 0)
        with pytest.raises(UserError, match=r"^execution.store: .*ZeroDivisionError.*; run it again, it goes on$"):
            prepare(place.recipe)
    second = prepare(place.recipe)
    assert second != first and store_files(second) == store_files(newer)
    assert prepare(place.changed(execution={"cache_dir": str(place.folder / "new")})) == newer, "nothing is fetched"


def test_a_store_of_the_same_documents_is_not_copied_for_a_recipe_with_other_paths(place: Place) -> None:
    other = place.folder / "other.jsonl"
    shutil.copy(Path(place.recipe.data.sources[0].path[0]).with_suffix(".gone"), other)
    shutil.copytree(place.built.parent, place.folder / "here" / "stores")
    sources = (place.recipe.data.sources[0].model_copy(update={"path": (str(other),)}),)
    here, empty = (
        place.changed(data={"sources": sources}, execution={"store": None, "cache_dir": str(place.folder / name)})
        for name in ("here", "empty")
    )
    check_place(here, f"file://{place.far}")  # it may be the same store
    found, there = prepare(here), f"file://{place.folder}/other"
    assert found.name == place.built.name
    with pytest.raises(
        UserError, match=r"data.sources.0.path: .*other.jsonl.*build it again, in an empty exec"
    ) as told:
        copy_to(found, there, store_settings(here))
    assert "\n" not in str(told.value) and not (place.folder / "other").exists()
    own = prepare(empty, num_workers=1)
    copy_to(own, there, store_settings(empty))
    fetched = prepare(place.changed(data={"sources": sources}, execution={"store": there}))
    assert store_files(fetched) == store_files(own)
    for folder, recipe in (own, empty), (fetched, place.changed(data={"sources": sources}, execution={"store": there})):
        damage("*.tokens")(folder)
        with pytest.raises(UserError, match=r"Remove manifest.json there and run `turbolm prepare RECIPE` again"):
            open_store(folder, verify="full")
        (folder / "manifest.json").unlink()
        prepare(recipe, num_workers=1)
        open_store(folder, verify="full")
    other.write_text(other.read_text() + '{"text": "one more"}\n')
    with pytest.raises(UserError, match="holds another token store"):
        check_place(here, f"file://{place.far}")


def test_without_file_locks_each_fetches_for_itself_and_the_first_store_stays(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(progress.fcntl, "flock", without_locks)
    download, first = remote_store.download_all, list[int]()

    def slow(remote: Remote, files: Any, folder: Path, num_threads: int) -> list[str]:
        assert folder.name.endswith(f"-{os.uname().nodename}-{os.getpid()}")
        if not first:  # another process is faster
            first.append(0)
            first[0] = prepare(place.recipe).stat().st_ino
        return download(remote, files, folder, num_threads)

    monkeypatch.setattr(remote_store, "download_all", slow)
    assert prepare(place.recipe).stat().st_ino == first[0]
    assert not list(place.stores.glob(".fetched-*"))


def test_an_interrupted_copy_is_no_store_and_goes_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(place.far)
    upload, sent = Remote.upload, list[str]()

    def failing(self: Remote, local: Path, num_bytes: int) -> None:
        if local.suffix == ".index":
            raise StorageError("cut")
        upload(self, local, num_bytes)

    with monkeypatch.context() as broken:
        broken.setattr(Remote, "upload", failing)
        with pytest.raises(StorageError, match="cut"):
            copy_to(place.built, f"file://{place.far}", place.settings)
    assert not (place.far / "manifest.json").exists()
    assert (place.far / "tokenizer" / "tokenizer.json").exists()
    monkeypatch.setattr(
        Remote, "upload", lambda self, local, size: (sent.append(local.name), upload(self, local, size))[1]
    )
    copy_to(place.built, f"file://{place.far}", place.settings)
    assert "shard-00000.index" in sent and "tokenizer.json" not in sent
    assert store_files(prepare(place.recipe)) == store_files(place.built)


@pytest.mark.parametrize("url", ["https://host/x", "far", "s3://bucket/*", "s3://$BUCKET/x"])
def test_a_target_that_cannot_be_written_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="^--to: expected a URL"):
        check_target(url)


@pytest.mark.skipif(importlib.util.find_spec("aiohttp") is None, reason="fsspec's http needs aiohttp")
def test_cut_connections_of_a_web_server_are_tried_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RETRY_SEC", (0.01,) * 6)
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(SimpleHTTPRequestHandler, directory=str(place.folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    proxy = Proxy(server.server_address[1], cuts=3, after_bytes=900)
    try:
        folder = prepare(place.changed(execution={"store": f"http://127.0.0.1:{proxy.port}/far"}))
    finally:
        server.shutdown()
        proxy.server.close()
    assert proxy.num_cut == 3 and store_files(folder) == store_files(place.built)
