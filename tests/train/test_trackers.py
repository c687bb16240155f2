"""Trackers get every line of metrics.jsonl, through resumes and rollbacks, and none of them can harm a run."""

from __future__ import annotations

import json
import sqlite3
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from turbolm.train.trackers import Target, Trackers, flatten, numbers

Line = dict[str, Any]
SECRET = "hf_" + "a" * 34


def step_line(step: int, **more: Any) -> Line:
    return {"step": step, "tokens_seen": 100 * step, "train/loss": 5 / step, "data/samples": "c0ffee", **more}


# A run that meets a NaN at step 4, goes back to step 2, is stopped after step 5, and resumes from step 3.
FIRST = [
    *(step_line(step) for step in (1, 2, 3)),
    step_line(4, **{"train/loss": "nan", "experts/max_share": [0.25, 0.5]}),
    {"step": 2, "tokens_seen": 200, "anomaly": "non_finite", "anomaly/to_step": 2, "anomaly/policy": {"window": 128}},
    *(step_line(step) for step in (3, 4, 5)),
]
SECOND = [*(step_line(step) for step in (4, 5, 6)), {"step": 6, "tokens_seen": 600, "eval/loss": 2.5}]


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    PartialState(cpu=True)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no netrc"))


def run_twice(tracker: str, folder: Path) -> list[str]:
    """Two attempts of one run; returns what people were told."""
    pytest.importorskip(tracker)
    said: list[str] = []
    settings = flatten({"train": {"budget": 1000}, "tokenizer": {"path": f"https://user:{SECRET}@host/x"}})
    for lines in (FIRST, SECOND):
        trackers = Trackers([tracker], Target("a run", folder, "a project", settings), said.append)
        trackers.log(lines)
        trackers.close(120)
    return said


def test_tensorboard_hides_what_a_resume_takes_back(tmp_path: Path) -> None:
    assert run_twice("tensorboard", tmp_path) == []
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert [step for step, _ in losses] == [1, 2, 3, 3, 4, 5, 6]
    assert dict(losses) == pytest.approx({step: 5 / step for step in range(1, 7)})
    assert [event.value for event in events.Scalars("eval/loss")] == [2.5]
    assert [event.value for event in events.Scalars("anomaly/to_step")] == [2]
    assert "anomaly/text_summary" in events.Tags()["tensors"], "the rollback is named"
    [hyperparameters] = [path.read_text() for path in tmp_path.rglob("hparams.yml")]
    assert "train.budget: 1000" in hyperparameters
    assert SECRET not in hyperparameters


def wandb_records(folder: Path) -> Iterator[Any]:
    """The records of W&B's offline files: LevelDB's log format (blocks of 32 KiB; CRC, length, type), of protobufs."""
    from wandb.proto import wandb_internal_pb2

    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, place, message = path.read_bytes(), 7, b""
        while place + 7 <= len(data):
            _, length, kind = struct.unpack_from("<IHB", data, place)
            if 32768 - place % 32768 < 7 or kind == 0:
                place += 32768 - place % 32768
                continue
            message += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # whole, or the last part
                yield wandb_internal_pb2.Record.FromString(message)
                message = b""


@pytest.mark.parametrize("has_login", [False, True])
def test_wandb_without_its_server_keeps_every_line_of_both_attempts_under_one_id(
    has_login: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if has_login:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens on the discard port
    assert run_twice("wandb", tmp_path) == []
    deadline = time.monotonic() + 60  # a process of W&B's own writes the files
    while (records := list(wandb_records(tmp_path))) and sum(record.HasField("exit") for record in records) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    history: list[Line] = []
    runs: set[tuple[str, str, str]] = set()
    config = ""
    for record in records:
        if record.HasField("run"):
            runs.add((record.run.run_id, record.run.project, record.run.display_name))
            config += str(record.run.config)
        if record.HasField("history"):
            items = record.history.item
            history.append({(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in items})
        config += str(record.config) if record.HasField("config") else ""
    assert len(runs) == 1, "the second attempt goes on with the first one's run"
    assert {run[1:] for run in runs} == {("a project", "a run")}
    assert [line["step"] for line in history] == [line["step"] for line in FIRST + SECOND]
    assert [line["tokens_seen"] for line in history] == [line["tokens_seen"] for line in FIRST + SECOND]
    assert history[3]["experts/max_share/1"] == 0.5
    assert history[4]["anomaly/policy/window"] == 128
    assert history[-1]["eval/loss"] == 2.5
    assert "train.budget" in config
    assert SECRET not in config


def test_trackio_has_every_line_of_both_attempts_in_one_run(tmp_path: Path) -> None:
    assert run_twice("trackio", tmp_path) == []
    database = sqlite3.connect(tmp_path / "trackio" / "aproject.db")
    rows = database.execute("select run_id, run_name, step, metrics from metrics order by id").fetchall()
    assert {name for _, name, _, _ in rows} == {"a run"}
    assert len({run_id for run_id, _, _, _ in rows}) == 1
    assert [step for _, _, step, _ in rows] == [line["step"] for line in FIRST + SECOND]
    logged = [json.loads(metrics) for _, _, _, metrics in rows]
    assert [line["tokens_seen"] for line in logged] == [line["tokens_seen"] for line in FIRST + SECOND]
    assert logged[4]["anomaly/to_step"] == 2
    assert logged[-1]["eval/loss"] == 2.5
    [config] = database.execute("select config from configs").fetchone()
    assert json.loads(config)["train.budget"] == 1000
    assert SECRET not in str(config)


class _Broken(GeneralTracker):
    name, requires_logging_directory = "broken", False

    def __init__(self, run_name: str):
        super().__init__(_blank=True)

    def start(self) -> None:
        raise ConnectionError(f"no answer from https://user:{SECRET}@host")


class _Hanging(_Broken):
    name = "hanging"
    released = threading.Event()

    def start(self) -> None:
        self.released.wait(60)


@pytest.mark.parametrize("kind", [_Broken, _Hanging])
def test_a_tracker_that_fails_or_hangs_costs_one_line(
    kind: type[_Broken], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, kind.name, kind)
    said: list[str] = []
    say: Callable[[str], None] = said.append
    started = time.monotonic()
    trackers = Trackers([kind.name], Target("a run", tmp_path, "a project", {}), say)
    for _ in range(3):
        trackers.log(FIRST)
        time.sleep(0.1)  # a tracker that has failed gets no more lines, and loses none
    trackers.close(1)
    assert time.monotonic() - started < 20, "steps and the end of the run do not wait for it"
    [line] = said
    assert line.startswith(f"tracker {kind.name} ")
    assert "metrics.jsonl has every step" in line
    assert SECRET not in line
    if kind is _Hanging:
        _Hanging.released.set()


def test_values_keep_their_names() -> None:
    line = {"step": 3, "train/loss": "inf", "perf/mfu": None, "experts/max_share": [0.5], "data/samples": "c0ffee"}
    assert numbers(line) == {"train/loss": float("inf"), "experts/max_share/0": 0.5}
