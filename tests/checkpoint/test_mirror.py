"""checkpoint.mirror: what is copied is what was saved, and nothing half is ever taken for whole."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.mirror_places import Proxy, content_below, flip_byte, needs_s3, s3_server
from tests.memory_folder import tmp_path
from tests.train.harness import make_recipe
from turbolm import storage
from turbolm.checkpoint import manifest as manifests
from turbolm.checkpoint.manifest import checkpoint_name, list_checkpoints
from turbolm.checkpoint.mirror import Mirror, claim, mirror_root, read_current
from turbolm.checkpoint.mirror_upload import UploadJob, command, copy_checkpoint
from turbolm.checkpoint.mirroring import Mirroring
from turbolm.errors import UserError
from turbolm.files import read_json
from turbolm.plan.machine import detect_machine
from turbolm.plan.plan import build_plan
from turbolm.recipe.contract import contract_of, fingerprint
from turbolm.recipe.schema import Recipe
from turbolm.report.attempts import attempt_numbers
from turbolm.train.fresh import start_fresh
from turbolm.train.from_mirror import fetch_run, start_mirroring
from turbolm.train.run_directory import RunDirectory, run_directory

__all__ = ["tmp_path"]


@dataclass
class Case:
    """A run folder, and the recipe that names its mirror."""

    recipe: Recipe
    proxy: Proxy | None = None

    @property
    def run(self) -> RunDirectory:
        return run_directory(self.recipe)

    @property
    def mirror(self) -> Mirror:
        root = mirror_root(str(self.recipe.checkpoint.mirror), self.recipe.name)
        return Mirror(root, (read_current(root) or {})["id"])

    def with_(self, **sections: dict[str, Any]) -> Case:
        """The same with other values of some sections, under the same names."""
        update = {
            name: getattr(self.recipe, name).model_copy(update=values) for name, values in sections.items()
        }  # fmt: skip
        return replace(self, recipe=self.recipe.model_copy(update=update))

    def on_empty_disk(self) -> Case:
        """The same run as another machine sees it."""
        return self.with_(execution={"runs_dir": f"{self.recipe.execution.runs_dir}-elsewhere"})

    def begin(self) -> None:
        """What the worker leaves before its first step."""
        self.run.path.mkdir(parents=True, exist_ok=True)
        contract = contract_of(self.recipe)
        record = {
            "fingerprint": fingerprint(contract),
            "contract": contract,
            "store_fingerprint": "s",
            "budgets_tokens": [1],
        }
        self.run.contract.write_text(json.dumps(record))

    def save(self, step: int, num_files: int = 3, num_bytes: int = 10_000) -> Path:
        """A checkpoint of random files, and the metrics until then."""
        folder, rng = manifests.temporary_folder(self.run.checkpoints, step), random.Random(step)
        folder.mkdir(parents=True)
        files = {}
        for number in range(num_files):
            content = rng.randbytes(num_bytes)
            (folder / f"file-{number}").write_bytes(content)
            files[f"file-{number}"] = {"bytes": num_bytes, "sha256": hashlib.sha256(content).hexdigest()}
        about = {"step": step, "tokens_seen": 100 * step, "contract": "c", "world_size": 1, "parameters": {}}
        final = self.run.checkpoints / checkpoint_name(step)
        manifests.commit(folder, final, {**about, "files": files})
        with self.run.metrics.open("a") as file:
            file.write(json.dumps({"step": step, "train/loss": 1 / step}) + "\n")
        return final

    def job(self, step: int) -> UploadJob:
        job = start_mirroring(build_plan(self.recipe, detect_machine(), 1), attempt=7)
        assert job is not None
        return replace(job, step=step)


@pytest.fixture(params=["file", pytest.param("s3", marks=needs_s3)])
def case(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    monkeypatch.setattr(storage, "RETRY_SEC", (0.01, 0.02, 0.04))
    if request.param == "file":
        yield begun(tmp_path, f"file://{tmp_path}/far")
        return
    with s3_server(monkeypatch) as proxy:
        yield replace(begun(tmp_path, "s3://bucket/runs"), proxy=proxy)


@pytest.fixture
def folder_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(storage, "RETRY_SEC", (0.01, 0.02))
    return begun(tmp_path, f"file://{tmp_path}/far")


def begun(folder: Path, url: str) -> Case:
    case = Case(make_recipe(folder, checkpoint={"mirror": url}))
    case.begin()
    return case


def test_an_empty_folder_gets_the_newest_checkpoint_and_the_run_around_it(case: Case) -> None:
    for step in (1, 2, 3):
        case.save(step)
        job = case.job(step)
        copy_checkpoint(job)
    assert case.mirror.steps() == [2, 3], "mirror_keep_last is 2"
    assert not list(case.run.checkpoints.glob(".mirror*")), "nothing is held any more"
    there = case.on_empty_disk()
    fetch_run(there.recipe)
    assert [step for step, _ in list_checkpoints(there.run.checkpoints)] == [3]
    name = checkpoint_name(3)
    assert content_below(there.run.checkpoints / name) == content_below(case.run.checkpoints / name)
    for path in (case.run.contract, case.run.metrics):
        assert (there.run.path / path.name).read_bytes() == path.read_bytes()
    assert attempt_numbers(there.run.path) == [7], "the next attempt is the eighth"
    there.save(4)
    copy_checkpoint(there.job(4))
    with pytest.raises(UserError, match="was taken over by a start on"):
        copy_checkpoint(job)


def test_a_copy_lists_the_mirror_once(folder_case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case, listed, names = folder_case, [], storage.Remote.names
    monkeypatch.setattr(storage.Remote, "names", lambda self: (listed.append(self.url), names(self))[1])
    for number, step in enumerate((1, 2, 3), start=1):
        case.save(step)
        copy_checkpoint(replace(case.job(step), keep_last=1))
        assert len(listed) == number
    assert case.mirror.steps() == [3]


def test_what_has_no_record_or_another_content_is_never_taken(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2, 3):
        case.save(step)
        copy_checkpoint(replace(case.job(step), keep_last=9))
    case.mirror.checkpoint(3).at("mirror.json").remove()
    flip_byte(case.mirror.checkpoint(2).at("file-1"))
    there = case.on_empty_disk()
    fetch_run(there.recipe)
    assert [step for step, _ in list_checkpoints(there.run.checkpoints)] == [1]
    output = capsys.readouterr().out
    assert "passed over" in output and "step-00000002/file-1: content differs (SHA-256)" in output
    flip_byte(case.mirror.checkpoint(1).at("manifest.json"))
    nowhere = there.on_empty_disk()
    with pytest.raises(UserError, match="none of the 2 checkpoints .* is intact") as refused:
        fetch_run(nowhere.recipe)
    assert "\n" not in str(refused.value)
    assert not list_checkpoints(nowhere.run.checkpoints) and not nowhere.run.metrics.exists()


@needs_s3
def test_cut_connections_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RETRY_SEC", (0.01,) * 6)
    monkeypatch.setattr(storage, "_CHUNK_BYTES", 1 << 20)
    with s3_server(monkeypatch) as proxy:
        case = begun(tmp_path, "s3://bucket/runs")
        case.save(1, num_bytes=3 << 20)
        job = case.job(1)
        proxy.cuts, proxy.after_bytes, proxy.num_cut = 3, 1 << 20, 0  # in the middle of a file
        copy_checkpoint(job)
        assert proxy.num_cut == 3
        proxy.after_bytes, proxy.num_cut = 1 << 19, 0
        there = case.on_empty_disk()
        fetch_run(there.recipe)
        assert proxy.num_cut == 3
    name = checkpoint_name(1)
    assert content_below(there.run.checkpoints / name) == content_below(case.run.checkpoints / name)


@needs_s3
def test_a_mirror_that_is_gone_is_one_line_and_no_new_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RETRY_SEC", (0.01,))
    with s3_server(monkeypatch) as proxy:
        case = begun(tmp_path, "s3://bucket/runs")
        case.save(1)
        job = case.job(1)
        proxy.cuts, proxy.after_bytes = 10**6, 0
        said: list[str] = []
        monkeypatch.setattr(Mirroring, "_run", lambda self, job: run_here(job))
        mirroring = Mirroring(job, said.append)
        mirroring.request(1)
        mirroring.finish(60)
        said = [line for line in said if "waiting up to" not in line]  # which a busy machine is told as well
        assert len(said) == 1 and "the checkpoint of step 1 was not copied: s3://bucket/runs/cell" in said[0]
        assert "testing-secret" not in said[0]
        with pytest.raises(UserError, match="checkpoint.mirror: s3://bucket/runs/cell/current.json"):
            fetch_run(case.on_empty_disk().recipe)


def run_here(job: UploadJob) -> dict[str, Any]:
    try:
        return copy_checkpoint(job)
    except UserError as error:
        return {"failed": str(error)}


STOPS_AT_FILE_7 = """
import sys, time
from turbolm import storage
from turbolm.checkpoint import mirror_upload

upload = storage.Remote.upload
storage.Remote.upload = lambda self, path, size: time.sleep(600) if path.name == "file-7" else upload(self, path, size)
sys.exit(mirror_upload.main())
"""


def test_a_killed_upload_goes_on_where_it_was(folder_case: Case) -> None:
    case = folder_case
    case.save(1, num_files=10)
    job = replace(case.job(1), parent=os.getpid())
    remote, others = case.mirror.checkpoint(1), [f"file-{number}" for number in range(10) if number != 7]
    note = case.run.checkpoints / f".mirror-{checkpoint_name(1)}" / ".arrived.json"
    process = subprocess.Popen([sys.executable, "-c", STOPS_AT_FILE_7, command(job)[-1]])
    deadline = time.monotonic() + 60
    while (read_json(note) or {}).get("files") != others:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert case.mirror.record(1) is None
    there = case.on_empty_disk()
    fetch_run(there.recipe)
    assert not list_checkpoints(there.run.checkpoints), "nothing half is taken"
    times = {name: Path(remote.at(name).path).stat().st_mtime_ns for name in others}
    told = subprocess.run(command(job), capture_output=True, text=True, check=True)
    assert json.loads(told.stdout)["bytes"] > 10 * 10_000
    assert times == {name: Path(remote.at(name).path).stat().st_mtime_ns for name in others}, "not sent again"
    fetch_run(there.recipe)
    assert [step for step, _ in list_checkpoints(there.run.checkpoints)] == [1]


def test_an_interrupted_fetch_keeps_its_bytes_and_changes_no_run(
    folder_case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = folder_case
    case.save(1, num_bytes=1 << 20)
    copy_checkpoint(case.job(1))
    there, chunk = case.on_empty_disk(), storage.Remote._chunk
    monkeypatch.setattr(storage, "_CHUNK_BYTES", 1 << 18)
    starts: list[tuple[str, int]] = []

    def cut(self: storage.Remote, start: int, end: int) -> bytes:
        if self.path.endswith("file-2") and start >= 1 << 19:
            raise PermissionError("gone")
        starts.append((self.path[-6:], start))
        return chunk(self, start, end)

    with monkeypatch.context() as broken:
        broken.setattr(storage.Remote, "_chunk", cut)
        with pytest.raises(UserError, match="file-2: PermissionError: gone"):
            fetch_run(there.recipe)
    assert not list_checkpoints(there.run.checkpoints) and not there.run.metrics.exists()
    starts.clear()
    monkeypatch.setattr(
        storage.Remote, "_chunk", lambda self, a, b: (starts.append((self.path[-6:], a)), chunk(self, a, b))[1]
    )
    fetch_run(there.recipe)
    assert [one for one in starts if one[0].startswith("file-")] == [("file-2", 1 << 19), ("file-2", 3 << 18)]
    name = checkpoint_name(1)
    assert content_below(there.run.checkpoints / name) == content_below(case.run.checkpoints / name)


def test_a_request_to_stop_ends_a_fetch_at_its_next_chunks(folder_case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case = folder_case
    case.save(1, num_bytes=1 << 18)
    copy_checkpoint(case.job(1))
    monkeypatch.setattr(storage, "_CHUNK_BYTES", 1 << 10)  # 256 of each of 3 files
    chunk, num_chunks = storage.Remote._chunk, 0

    def slow(self: storage.Remote, start: int, end: int) -> bytes:
        nonlocal num_chunks
        num_chunks += 1
        if num_chunks == 20:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.005)
        return chunk(self, start, end)

    monkeypatch.setattr(storage.Remote, "_chunk", slow)
    there = case.on_empty_disk()
    with pytest.raises(KeyboardInterrupt):
        fetch_run(there.recipe)
    assert 20 <= num_chunks < 300 and not list_checkpoints(there.run.checkpoints)


def test_another_contract_is_refused_with_its_keys(folder_case: Case) -> None:
    case = folder_case
    case.save(1)
    copy_checkpoint(case.job(1))
    other = case.on_empty_disk().with_(train={"seed": 4}, anomalies={"threshold": 7.0}, checkpoint={"keep_last": 9})
    with pytest.raises(UserError, match=r"another learning contract \(train.seed: 3 -> 4\); restore") as refused:
        fetch_run(other.recipe)
    assert "\n" not in str(refused.value) and not list_checkpoints(other.run.checkpoints)
    budget = case.recipe.train.budget
    with pytest.raises(UserError, match=r"another learning contract \(train.budget: "):
        fetch_run(case.on_empty_disk().with_(train={"budget": budget - 1}).recipe)
    extended = case.on_empty_disk().with_(train={"budget": budget + 1})
    fetch_run(extended.recipe)
    assert list_checkpoints(extended.run.checkpoints), "whether it may be extended is decided as for any run"


def test_fresh_starts_a_run_of_its_own_and_the_former_stays(folder_case: Case) -> None:
    case = folder_case
    case.save(1)
    copy_checkpoint(case.job(1))
    former = case.mirror
    start_fresh(case.recipe)
    fetch_run(case.recipe)
    assert not list_checkpoints(case.run.checkpoints)
    fetch_run(case.on_empty_disk().recipe)
    assert not list_checkpoints(case.on_empty_disk().run.checkpoints), "its disk may be lost before its first copy"
    case.begin()
    case.save(2)
    copy_checkpoint(case.job(2))
    assert case.mirror.id != former.id and case.mirror.steps() == [2] and former.record(1) is not None


def test_a_mirror_whose_current_run_cannot_be_read_is_refused(folder_case: Case) -> None:
    case = folder_case
    case.save(1)
    copy_checkpoint(case.job(1))
    current = case.mirror.root.at("current.json")
    for content in (b'{"format_version": 1, "id', b'{"format_version": 1}'):
        current.write(content)
        with pytest.raises(UserError, match="current.json is damaged"):
            fetch_run(case.on_empty_disk().recipe)


def test_a_folder_with_another_run_does_not_write_there(folder_case: Case) -> None:
    case = folder_case
    case.save(1)
    copy_checkpoint(case.job(1))
    other = case.on_empty_disk()
    other.begin()
    other.save(1)
    with pytest.raises(UserError, match="holds the checkpoints of another run than"):
        claim(case.mirror.root, other.run.path)


def test_a_folder_whose_run_went_on_elsewhere_gets_what_is_newer(folder_case: Case) -> None:
    case = folder_case
    case.save(1)
    copy_checkpoint(case.job(1))
    there = case.on_empty_disk()
    fetch_run(there.recipe)
    there.save(2)
    copy_checkpoint(there.job(2))
    with pytest.raises(UserError, match="was continued on .* since"):
        case.job(1)  # which would remove the copy of step 2
    fetch_run(case.recipe)
    assert [step for step, _ in list_checkpoints(case.run.checkpoints)] == [1, 2]
    assert case.run.metrics.read_bytes() == there.run.metrics.read_bytes()
    case.save(3)
    copy_checkpoint(case.job(3))
    fetch_run(case.recipe)
    assert case.mirror.steps() == [2, 3]


def test_later_copies_go_only_where_the_run_went_back(folder_case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case = folder_case
    for step in (2, 4, 6):
        case.save(step)
        copy_checkpoint(replace(case.job(step), keep_last=9))
    (case.run.checkpoints / checkpoint_name(6) / "file-0").write_bytes(b"damaged")
    job = replace(case.job(4), keep_last=9)
    copy_checkpoint(job)  # of the newest valid one here
    assert case.mirror.steps() == [2, 4, 6] and case.mirror.record(6)
    tried: list[UploadJob] = []

    def fails_once(_: Mirroring, job: UploadJob) -> dict[str, Any]:
        tried.append(job)
        return {"failed": "cut"} if len(tried) == 1 else run_here(job)

    monkeypatch.setattr(Mirroring, "_run", fails_once)
    mirroring = Mirroring(job, lambda _: None)
    mirroring.request(2, went_back=True)
    mirroring.finish(60)
    case.save(7)
    mirroring.request(7)
    mirroring.finish(60)
    assert case.mirror.steps() == [2, 7], "the second try knows that the run went back"


def test_a_checkpoint_that_changed_on_disk_is_not_copied(folder_case: Case) -> None:
    case = folder_case
    path = case.save(1) / "file-0"
    path.write_bytes(bytes(10_000))
    with pytest.raises(UserError, match="file-0: content changed"):
        copy_checkpoint(case.job(1))
    assert case.mirror.record(1) is None


@pytest.mark.parametrize("name", ["../../outside", "run/../../../outside", "/outside", "run/model/x", "run/lock.json"])
def test_a_forged_record_writes_nothing_outside(name: str, folder_case: Case) -> None:
    case = folder_case
    case.save(1)
    copy_checkpoint(case.job(1))
    remote = case.mirror.checkpoint(1)
    record = remote.at("mirror.json").read_json() or {}
    content = b"forged"
    path = Path(remote.path) / name.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    record["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    remote.at("mirror.json").write_json(record)
    there = case.on_empty_disk()
    if name.startswith("run/") and ".." not in name:
        fetch_run(there.recipe)
        assert list_checkpoints(there.run.checkpoints)
    else:
        with pytest.raises(UserError, match="mirror.json: damaged"):
            fetch_run(there.recipe)
    runs = Path(there.recipe.execution.runs_dir)
    assert not {path.name for path in runs.rglob("*")}.intersection(("outside", "x", "lock.json"))
    assert not Path("/outside").exists()


@pytest.mark.parametrize("url", ["https://host/x", "s3://key:secret@bucket/x", "bucket/x", "file://x", "s3://bucket/*"])
def test_a_url_that_cannot_be_written_or_holds_a_secret_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a|credentials"):
        make_recipe(tmp_path, checkpoint={"mirror": url})
