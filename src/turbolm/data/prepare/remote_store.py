"""Token stores behind URLs: `turbolm prepare --to URL` copies one there, and `execution.store: URL` fetches it.

Beside the files of a store lies `built-from.json`: settings and listing of the sources whose hash is the store's key.
So a machine without the sources can tell that a store is what its recipe would build, and name what differs. The
manifest is written last, there as here: without it there is no store.

What is fetched lies in a folder of its own, where an interrupted fetch goes on, until all of it is checked against the
hashes of the manifest. `cache_dir/fetched/` records which key stands for URL and settings: ranks look nothing up.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbolm.data.store.token_store import MANIFEST, check_manifest, open_store
from turbolm.errors import UserError
from turbolm.files import load_json, read_json, sha256_json, sync_folder, write_json
from turbolm.recipe.contract import changed_keys
from turbolm.recipe.execution import writable_url
from turbolm.storage import Remote, StorageError, download_all, in_parallel, open_url
from turbolm.units import format_bytes

KEY = "execution.store"
BUILT_FROM = "built-from.json"
_STAGING = ".fetched-"
_THREADS = 8
_MAX_VALUE = 100  # characters of a value in a message


@dataclass(frozen=True)
class FoundStore:
    """A store behind a URL: its manifest, and what its key is the hash of."""

    remote: Remote
    manifest: dict[str, Any]
    built_from: dict[str, Any]

    @property
    def key(self) -> str:
        return str(self.manifest["key"])


def known_key(cache: Path, url: str, settings: Mapping[str, Any]) -> str:
    """The key of the store that was fetched for these settings; before that, one that no store has."""
    return str((read_json(_record(cache, url, settings)) or {}).get("key") or sha256_json([url, settings]))


def note_key(cache: Path, url: str, settings: Mapping[str, Any], key: str) -> None:
    """Record which store stands for these settings. Raises OSError."""
    if known_key(cache, url, settings) != key:
        write_json(_record(cache, url, settings), {"key": key, "url": url}, durable=True)


def look_up(url: str, settings: Mapping[str, Any]) -> FoundStore:
    """What lies behind a URL. Raises UserError unless it is a store that these settings would build, and StorageError.

    `settings`: all that determines a store but the listing of its sources.
    """
    remote = open_url(url, KEY)
    manifest, built_from = (remote.at(name).read_json() for name in (MANIFEST, BUILT_FROM))
    if manifest is None:
        raise UserError(
            f"{KEY}: there is no complete token store in {url}; copy one there with `turbolm prepare RECIPE --to URL`, "
            f"or build it here with {KEY}=null"
        )
    manifest = check_manifest(manifest, f"{url}/{MANIFEST}")
    if built_from is None or sha256_json(built_from) != manifest["key"]:
        what = f"has no {BUILT_FROM}" if built_from is None else f"has a {BUILT_FROM} of another store"
        raise UserError(
            f"{KEY}: {url} {what}, so that what it was built from is not known; run `turbolm prepare RECIPE --to URL` "
            "again where it was built"
        )
    if changes := _told_changes(built_from, settings):
        raise UserError(f"{KEY}: {url} is not the store of this recipe ({changes}); name another URL, or restore these")
    return FoundStore(remote, manifest, built_from)


def fetch(found: FoundStore, folder: Path, *, is_locked: bool) -> None:
    """Fetch a store into its folder, which is replaced when all is there. Raises UserError and OSError.

    `is_locked`: nobody else fetches it meanwhile. Otherwise it is fetched into a folder of this process, and not
    resumed.
    """
    own = "" if is_locked else f"-{os.uname().nodename}-{os.getpid()}"
    staging = folder.with_name(f"{_STAGING}{folder.name}{own}")
    try:
        _download(found, staging, folder)
        if not is_locked and _is_there(found, folder):  # from another process
            return
        if folder.is_dir():  # of a build that was interrupted, or damaged
            shutil.rmtree(folder)
        os.rename(staging, folder)
        sync_folder(folder.parent)
    except StorageError as error:
        raise UserError(f"{KEY}: {error}; run it again{', it goes on' if is_locked else ''}") from None
    finally:
        if not is_locked:
            shutil.rmtree(staging, ignore_errors=True)


def fetched_so_far(stores: Path) -> list[Path]:
    """Return the folders of fetches that are not complete."""
    return list(stores.glob(f"{_STAGING}*"))


def _download(found: FoundStore, staging: Path, folder: Path) -> None:
    files = {part["file"]: part for part in _parts(found.manifest)}
    total = sum(part["bytes"] for part in files.values())
    print(f"{KEY}: fetching {found.remote.url} ({format_bytes(total)}) into {folder}", flush=True)
    if problems := download_all(found.remote, files, staging, _THREADS):
        listed = "\n".join(problems)
        raise UserError(
            f"{KEY}: {listed}; remove what is damaged there, and run `turbolm prepare RECIPE --to URL` again where it "
            "was built: it sends what is missing"
        )
    write_json(staging / BUILT_FROM, found.built_from, durable=True)
    write_json(staging / MANIFEST, found.manifest, durable=True)
    open_store(staging)


def _is_there(found: FoundStore, folder: Path) -> bool:
    try:
        return open_store(folder).manifest == found.manifest
    except UserError:
        return False


def note_built_from(folder: Path, content: Mapping[str, Any]) -> None:
    """Write what a store's key is the hash of into its folder, if it can be written."""
    if folder.name == sha256_json(content)[: len(folder.name)]:
        with suppress(OSError):
            write_json(folder / BUILT_FROM, content, durable=True)


def check_target(url: str) -> None:
    """Raise UserError for what a store cannot be copied to."""
    try:
        writable_url(url)
    except ValueError as error:
        raise UserError(f"--to: {error}") from None


def key_at(url: str) -> str | None:
    """Return the key of the complete store behind a URL, or None. Raises UserError."""
    there = open_url(url, "--to").at(MANIFEST).read_json()
    return None if there is None else str(there.get("key"))


def another_store(url: str) -> UserError:
    """Return the error for a place that is taken."""
    return UserError(f"--to: {url} holds another token store; remove it, or name another URL")


def copy_to(folder: Path, url: str, settings: Mapping[str, Any]) -> None:
    """Copy the complete store of these settings to a URL; an interrupted copy goes on. Raises UserError.

    Of a store that is there already, what is missing is sent.
    """
    manifest, built_from = open_store(folder, verify="full").manifest, read_json(folder / BUILT_FROM)
    if built_from is None or sha256_json(built_from) != manifest["key"]:
        raise UserError(
            f"--to: what {folder} was built from is not known: its sources have other names or times since; build it "
            "again, in an empty execution.cache_dir"
        )
    if changes := _told_changes(built_from, settings):
        raise UserError(
            f"--to: {folder} has the documents of this recipe but was built from another one ({changes}), and "
            f"`{KEY}` would refuse it; build it again, in an empty execution.cache_dir"
        )
    remote = open_url(url, "--to")
    there = remote.at(MANIFEST).read_json()
    if there is not None and there != manifest:
        raise another_store(url)
    _send(folder, remote, manifest, is_there=there is not None)
    print(f"{url}: the token store is there; `{KEY}: {url}` fetches it")


def _send(folder: Path, remote: Remote, manifest: dict[str, Any], *, is_there: bool) -> None:
    """Send all files, the manifest last. Those of this store that have arrived stay."""
    built_from = load_json(folder / BUILT_FROM)
    is_known = remote.at(BUILT_FROM).read_json() == built_from
    goes_on = is_there or is_known
    if not is_known:
        remote.at(BUILT_FROM).write_json(built_from)

    def send(part: Mapping[str, Any]) -> None:
        target = remote.at(part["file"])
        if not (goes_on and (target.info() or {}).get("size") == part["bytes"]):
            target.upload(folder / part["file"], part["bytes"])

    in_parallel(send, _parts(manifest), _THREADS)
    if not is_there:
        remote.at(MANIFEST).write_json(manifest)


def _parts(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    shards = manifest["shards"]
    return [*manifest["tokenizer_files"], *(shard[name] for shard in shards for name in ("tokens", "index"))]


def _record(cache: Path, url: str, settings: Mapping[str, Any]) -> Path:
    return cache / "fetched" / f"{sha256_json([url, settings])[:32]}.json"


def _told_changes(built_from: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return how the settings differ from those that a store was built with; empty if they do not."""
    changes = changed_keys(_by_key(built_from), _by_key(settings))
    return ", ".join(f"{key}: {_short(before)} -> {_short(after)}" for key, before, after in changes)


def _by_key(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a key is the hash of, by the keys of a recipe."""
    data = {name: content.get(name) for name in ("sources", "validation", "deduplicate")}
    if isinstance(sources := data["sources"], list):
        data["sources"] = {str(number): source for number, source in enumerate(sources)}
    return {"data": data, **{name: value for name, value in content.items() if name not in ("files", *data)}}


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}..."
