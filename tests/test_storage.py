"""Questions to object storage: how long they may take, and what their messages say."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from tests.checkpoint.mirror_places import needs_s3
from turbolm import files, storage
from turbolm.errors import UserError
from turbolm.storage import StorageError, asked, check_url, one_line, open_url


def test_a_question_ends_and_a_long_wait_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(storage, "RETRY_SEC", (0.01,) * 1000)
    monkeypatch.setattr(storage, "_ASK_SEC", 0.3)
    monkeypatch.setattr(storage, "_QUIET_SEC", 0.05)
    begins = []

    def slow() -> None:
        begins.append(time.monotonic())
        time.sleep(0.02)
        raise OSError("no route")

    with pytest.raises(StorageError, match="s3://bucket: OSError: no route"):
        asked(slow, "s3://bucket")
    assert 2 <= len(begins) < 30, "no try begins after the limit"
    assert capsys.readouterr().err.splitlines() == [
        "turbolm: waiting for s3://bucket; if this lasts, check the network and the endpoint (such as AWS_ENDPOINT_URL)"
    ]
    assert asked(lambda: 1, "s3://bucket") == 1
    time.sleep(0.1)
    assert not capsys.readouterr().err, "an answer that comes soon is no news"


@needs_s3
def test_an_s3_server_that_accepts_and_says_nothing_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    for name, value in {"RETRY_SEC": (0.01,) * 9, "_ASK_SEC": 0.1, "_SILENT_SEC": 0.2}.items():
        monkeypatch.setattr(storage, name, value)
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        s3fs.S3FileSystem.clear_instance_cache()
        begun = time.monotonic()
        with pytest.raises(StorageError, match="s3://bucket/x: "):
            open_url("s3://bucket/x", "test").info()
        # Three attempts of the client with its own waits, and of s3fs one: with its default they would be fifteen.
        assert time.monotonic() - begun < 12
    s3fs.S3FileSystem.clear_instance_cache()


def test_messages_of_libraries_are_cut_and_those_of_turbolm_are_not() -> None:
    whole = "data.sources: " + "x" * 500 + "; and what to do"
    assert one_line(UserError(whole)) == one_line(StorageError(whole)) == whole
    assert one_line(OSError("a" * 500 + "\n<html>")) == "a" * 200


def test_variables_are_refused_in_every_url() -> None:
    for url in ("s3://$BUCKET/x", "s3://bucket/${NAME}/*.txt", "file:///data/$NAME"):
        with pytest.raises(ValueError, match=r"expected a URL written out: \$NAME is replaced in paths"):
            check_url(url)
    assert check_url("s3://bucket/price-in-$/5$.txt")


def test_a_write_to_a_folder_that_fails_leaves_the_former_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "RETRY_SEC", ())
    remote = open_url(f"file://{tmp_path}/a/b.json", "test")
    remote.write(b"before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(files.os, "replace", full)
        with pytest.raises(StorageError, match="No space left"):
            remote.write(b"after")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"] and remote.read() == b"before"
