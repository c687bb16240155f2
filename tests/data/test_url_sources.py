"""Sources behind URLs: the same store as from local files, whatever the connection does, or a refusal."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.mirror_places import needs_s3, s3_server
from tests.memory_folder import tmp_path
from tests.train.harness import make_recipe
from turbolm import storage
from turbolm.data.batch.kept_sets import are_kept
from turbolm.data.batch.scored import read_scored
from turbolm.data.prepare.build import find_store, prepare, store_key
from turbolm.data.store.token_store import open_store
from turbolm.errors import UserError
from turbolm.launch import store
from turbolm.launch.store import prepare_store
from turbolm.recipe.schema import Recipe
from turbolm.recipe.sources import urls
from turbolm.recipe.sources.base import Gauge
from turbolm.recipe.sources.text import TextSource

__all__ = ["tmp_path"]


def write_sources(folder: Path) -> Path:
    """JSON lines, plain and compressed, and Parquet."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True)
    lines = ["".join(json.dumps({"text": f"{part} text {n} of many"}) + "\n" for n in range(60)) for part in "abc"]
    (folder / "a.jsonl").write_text(lines[0])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines[1].encode(), mtime=0))
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"row {n}" for n in range(60)]}), folder / "c.parquet")
    return folder


def recipe_of(folder: Path, at: str, **sections: Any) -> Recipe:
    sources = [{"type": "jsonl", "path": f"{at}/*.json*"}, {"type": "parquet", "path": f"{at}/c.parquet"}]
    return make_recipe(folder, data={"sources": sources}, **sections)


def texts(recipe: Recipe) -> list[Any]:
    """Every document of the recipe's sources, as its readers give them."""
    return [list(urls.read_url(source, path, 0, Gauge())) for source in recipe.data.sources for path in source.files()]


def tokens(recipe: Recipe) -> list[Any]:
    """Everything in the recipe's store, in its order."""
    store = open_store(prepare(recipe, num_workers=1))
    lengths = store.lengths("train").tolist()
    return [store.read("train", number, 0, length).tolist() for number, length in enumerate(lengths)]


def test_a_url_gives_the_store_of_the_files_and_ranks_need_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = write_sources(tmp_path / "there")
    local, remote = recipe_of(tmp_path, str(there)), recipe_of(tmp_path, f"file://{there}")
    assert tokens(remote) == tokens(local)
    assert not list(Path(urls.tempfile.gettempdir()).glob(f"{urls._prefix()}{os.getpid()}-*")), "nothing is left"
    store = find_store(remote)
    there.rename(tmp_path / "gone")
    urls.forget_urls()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert find_store(remote) == store
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match="no file matches"):
        find_store(remote)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert find_store(remote) == store, "a rank that is alone"


def test_a_complete_store_needs_no_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(storage, "RETRY_SEC", (0.0,))
    at = f"file://{write_sources(tmp_path / 'there')}"
    recipe, tries = recipe_of(tmp_path, at), 0
    store = prepare(recipe, num_workers=1)

    def unreachable(*_: object) -> dict[str, dict[str, Any]]:
        nonlocal tries
        tries += 1
        raise OSError("no route to host")

    monkeypatch.setattr(urls, "_look", unreachable)
    capsys.readouterr()
    assert prepare(recipe, num_workers=1) == find_store(recipe) == store
    assert tries == 2, "one listing with its second try"
    assert (
        capsys.readouterr().err.count("no route to host; check the network and the credentials. The token store") == 1
    )
    with pytest.raises(UserError, match="no route to host"):
        prepare(recipe_of(tmp_path, at, execution={"cache_dir": str(tmp_path / "empty")}), num_workers=1)


def test_a_changed_file_is_another_store_and_one_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = write_sources(tmp_path / "there")
    recipe = recipe_of(tmp_path, f"file://{there}")
    before = store_key(recipe)
    text = (there / "a.jsonl").read_text()
    (there / "a.jsonl").write_text(text.replace("text 1 ", "word 1 "))
    urls.forget_urls()
    assert store_key(recipe) != before
    download = storage.Remote.download

    def changing(self: storage.Remote, local: Path, num_bytes: int) -> None:
        download(self, local, num_bytes)
        os.utime(self.path, ns=(1, 1))

    monkeypatch.setattr(storage.Remote, "download", changing)
    with pytest.raises(UserError, match="a.jsonl changed while it was read"):
        texts(recipe)


def test_messages_name_the_url(tmp_path: Path) -> None:
    there = write_sources(tmp_path / "there")
    (there / "a.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    recipe = recipe_of(tmp_path, f"file://{there}")
    with pytest.raises(UserError, match=rf"^file://{there}/a.jsonl:2: field 'text' is int"):
        prepare(recipe, num_workers=1)
    for pattern, message in {
        f"file://{there}/*.csv": "no file matches",
        f"file://{there}/none.txt": "there is no file://",
        f"file://{there}": r"there is a folder; name its files, such as file://.*/there/\*\*/\*.jsonl",
        "https://127.0.0.1/*.txt": "a web server lists no files",
    }.items():
        with pytest.raises(UserError, match=message) as refused:
            TextSource(type="text", path=(pattern,)).files()
        assert "\n" not in str(refused.value)
    for url, message in {
        "https://user:secret@host/x": "credentials",
        "abfs://user:secret@account/x": "credentials",
        "github://owner:repo@main/x": "expected a URL of file://, s3://",
        "nonsense://x/y": "expected a URL of file://, s3://",
        "s3://bucket/$TURBOLM_NO_SUCH/*.txt": "expected a URL written out",
    }.items():
        with pytest.raises(ValueError, match=message):
            TextSource(type="text", path=(url,))
    at = "abfss://container@account.dfs.core.windows.net"
    assert TextSource(type="text", path=(f"{at}/x/*.txt",)).has_urls
    file = urls._described(
        storage.Remote(None, "container/x/*", f"{at}/x/*"), "container/x/a", {"size": 1, "etag": "e"}, "key"
    )
    assert file.url == f"{at}/x/a" == urls.url_of(urls.path_of(file.url))


@pytest.mark.parametrize(
    ("told", "version"),  # what HTTP servers send, by the names of RFC 9110, 1864 and 3230
    [
        ({"Last-Modified": "Sun, 29 Nov 2026 21:00:00 GMT"}, "Last-Modified Sun, 29 Nov 2026 21:00:00 GMT"),
        ({"Last-Modified": "Sun", "Content-MD5": "Q2hl"}, "Content-MD5 Q2hl"),
        ({"Last-Modified": "Sun", "Digest": "sha-256=4REj"}, "Digest sha-256=4REj"),
        ({"Content-MD5": "Q2hl", "ETag": '"x"'}, 'ETag "x"'),
        ({}, "does not tell an ETag, a hash or the time of its last change"),
        ({"ETag": '"x"', "size": None}, "does not tell its size"),
    ],
)
def test_what_a_server_tells_is_the_version_of_a_file(told: dict[str, Any], version: str) -> None:
    class Fs:
        def unstrip_protocol(self, name: str) -> str:
            return name

    url = "https://host/a.txt"
    info = {"size": 1, "type": "file", **told}
    if version.startswith("does not"):
        with pytest.raises(UserError, match=f"^evaluation.sets.0: {url}: the server {version}, so that"):
            urls._described(storage.Remote(Fs(), url, url), url, info, "evaluation.sets.0")
    else:
        assert urls._described(storage.Remote(Fs(), url, url), url, info, "key") == urls.UrlFile(url, 1, version)


def test_sets_behind_urls_need_no_service_once_they_are_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(storage, "RETRY_SEC", ())
    there = write_sources(tmp_path / "there")

    def recipe_with(*sets: str, label: str = "s") -> Recipe:
        own = [{"type": "jsonl", "label": f"{label}{n}", "path": path} for n, path in enumerate(sets)]
        return make_recipe(tmp_path, evaluation={"sets": own, "tokens": 200})

    def documents(recipe: Recipe) -> Any:
        scored = read_scored(recipe, open_store(prepare_store(recipe)))
        assert scored is not None
        return scored.notes, scored.tokens.tolist(), scored.ends.tolist(), scored.label.tolist()

    names = "a.jsonl", "b.jsonl.gz"
    recipe = recipe_with(*(f"file://{there}/{name}" for name in names))
    before = documents(recipe)
    assert before == documents(recipe_with(*(str(there / name) for name in names)))
    assert [note.partition(" ")[0] for note in before[0]] == ["s0:", "s1:"], "evaluation.tokens cuts both"
    relabeled = documents(recipe_with(*(f"file://{there}/{name}" for name in names), label="t"))
    assert relabeled[0] == tuple(note.replace("s", "t", 1) for note in before[0]), "they are kept without the label"
    listed = urls._look

    def unreachable(*_: object) -> dict[str, dict[str, Any]]:
        raise OSError("no route to host")

    monkeypatch.setattr(urls, "_look", unreachable)
    urls.forget_urls()
    capsys.readouterr()
    assert documents(recipe) == before
    told = [line for line in capsys.readouterr().err.splitlines() if "no route" in line]
    assert len(told) == 2 and told[1].endswith("The documents of evaluation.sets.1 as they were last listed are used")
    assert is_all_kept(recipe)
    with pytest.raises(UserError) as refused:
        prepare_store(recipe_with(*(f"file://{there}/{name}" for name in ("c.jsonl", "d.jsonl"))))
    assert [line.partition(":")[0] for line in str(refused.value).splitlines()] == [
        "evaluation.sets.0",
        "evaluation.sets.1",
    ]
    for path in (tmp_path / "cache" / "sets").iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    urls.forget_urls()
    with pytest.raises(UserError, match=r"evaluation.sets.0: .*no route to host"):
        documents(recipe)
    monkeypatch.setattr(urls, "_look", listed)
    urls.forget_urls()
    assert documents(recipe) == before
    (there / "a.jsonl").write_text((there / "a.jsonl").read_text().replace("text 1 ", "word 1 "))
    urls.forget_urls()
    assert not is_all_kept(recipe)
    changed = documents(recipe)
    assert changed != before

    def long_prepare(recipe: Recipe, **options: Any) -> Path:
        (there / "a.jsonl").write_text((there / "a.jsonl").read_text().replace("word 1 ", "text 1 "))
        return prepare(recipe, **options)

    monkeypatch.setattr(store, "prepare", long_prepare)
    assert documents(recipe) == before and is_all_kept(recipe), "a set that changes meanwhile is listed again"


def is_all_kept(recipe: Recipe) -> bool:
    store = find_store(recipe)
    assert store is not None
    return are_kept(recipe, open_store(store))


def test_hf_needs_no_package_and_says_that_it_is_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RETRY_SEC", ())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="data.sources: .*hf://datasets/owner/name/x.jsonl.*") as refused:
        TextSource(type="text", path=("hf://datasets/owner/name/x.jsonl",)).files()
    assert "\n" not in str(refused.value)


@needs_s3
def test_cut_connections_of_a_bucket_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RETRY_SEC", (0.01,) * 6)
    there = write_sources(tmp_path / "there")
    with s3_server(monkeypatch) as proxy:
        bucket = storage.open_url("s3://bucket/data", "test")
        for path in there.iterdir():
            bucket.at(path.name).upload(path, path.stat().st_size)
        proxy.cuts, proxy.after_bytes, proxy.num_cut = 3, 900, 0
        assert texts(recipe_of(tmp_path, "s3://bucket/data")) == texts(recipe_of(tmp_path, str(there)))
        assert proxy.num_cut == 3
