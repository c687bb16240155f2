"""Saving goes on beside the training, and what is saved is the state at the step and nothing else."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.toy import Engine, build_saver
from turbolm.checkpoint import save as save_module
from turbolm.checkpoint import tensor_file
from turbolm.checkpoint.load import load_checkpoint
from turbolm.checkpoint.manifest import list_checkpoints
from turbolm.checkpoint.snapshot import HostCopy
from turbolm.checkpoint.verify import find_newest_valid
from turbolm.errors import RunError

pytestmark = pytest.mark.usefixtures("process_group")


def everything(engine: Engine) -> dict[str, torch.Tensor]:
    """A copy of every tensor that training changes."""
    tensors = {name: value.clone() for name, value in engine.module.state_dict().items()}
    for name, parameter in engine.module.named_parameters():
        tensors |= {f"{key}/{name}": torch.as_tensor(v).clone() for key, v in engine.optimizer.state[parameter].items()}
    return tensors


def assert_equal(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []


class Gate:
    """Holds every write of tensors back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.opened, self.reached = threading.Event(), threading.Event()

        def write(*arguments: Any) -> dict[str, Any]:
            self.reached.set()
            assert self.opened.wait(30)
            return tensor_file.write_tensors(*arguments)

        monkeypatch.setattr(save_module, "write_tensors", write)


def test_training_goes_on_and_the_state_at_the_step_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    engine = Engine()
    saver = build_saver(tmp_path, engine)
    engine.train(3)
    expected = everything(engine)
    saver.save(3, {"step": 3, "order_digest": ""})
    assert gate.reached.wait(30)
    engine.train(2, first=3)
    assert list_checkpoints(tmp_path) == [], "nothing counts before it is complete"
    assert not torch.equal(engine.module.inner.weight, expected["inner.weight"])
    gate.opened.set()
    saver.finish()
    loaded = Engine(seed=9)
    assert load_checkpoint(tmp_path / "step-00000003", loaded)["step"] == 3
    assert_equal(everything(loaded), expected)
    assert loaded.train(2, first=3) == Engine().train(5)[3:]


def test_a_second_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    engine = Engine()
    saver = build_saver(tmp_path, engine)
    expected = {}
    for step in (1, 2):
        engine.train(1, first=step - 1)
        expected[step] = everything(engine)
        if step == 2:
            threading.Timer(0.3, gate.opened.set).start()
        start = time.monotonic()
        saver.save(step, {"step": step, "order_digest": ""})
        assert (time.monotonic() - start > 0.25) == (step == 2)
    saver.finish()
    for step, tensors in expected.items():
        loaded = Engine(seed=9)
        load_checkpoint(tmp_path / f"step-{step:08d}", loaded)
        assert_equal(everything(loaded), tensors)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_write_is_reported_and_the_next_one_counts(
    asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[str] = []
    engine = Engine()
    saver = build_saver(tmp_path, engine, asynchronous=asynchronous, report=reported.append)
    engine.train(1)
    saver.save(1, {"step": 1, "order_digest": ""})
    saver.finish()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(tensor_file, "_write_all", fail)
        engine.train(1, first=1)
        saver.save(2, {"step": 2, "order_digest": ""})
        saver.wait()
    assert len(reported) == 1
    assert "step 2 was not written" in reported[0] and "No space left on device" in reported[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001"], "nothing is left of it"
    with pytest.raises(RunError, match="No space left"):
        saver.finish()
    saver.save(2, {"step": 2, "order_digest": ""})
    saver.finish()
    assert saver.failure is None
    assert find_newest_valid(tmp_path) == (tmp_path / "step-00000002", [])


def test_a_checkpoint_is_not_put_in_place_when_another_writer_took_over(tmp_path: Path) -> None:
    def taken_over() -> None:
        raise RuntimeError("the run is locked by another process")

    saver = build_saver(tmp_path, Engine(), before_commit=taken_over)
    saver.save(1, {"step": 1, "order_digest": ""})
    with pytest.raises(RunError, match="locked by another process"):
        saver.finish()
    assert list(tmp_path.iterdir()) == []


def test_memory_for_copies_is_fetched_before_a_save_and_not_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A virtual or swapping machine takes it away between saves; then the training would wait for it to come back."""
    touched: list[int] = []
    monkeypatch.setattr(HostCopy, "touch", lambda copy: touched.append(len(copy._memory)))
    engine = Engine()
    saver = build_saver(tmp_path, engine)
    engine.train(1)
    saver.prepare(save_is_next=True)  # for the first time it is filled anyway
    saver.wait()
    saver.prepare()
    assert touched == []
    saver.prepare(save_is_next=True)
    saver.wait()
    assert len(touched) == 1 and touched[0] > 0
    gate = Gate(monkeypatch)
    saver.save(1, {"step": 1, "order_digest": ""})
    assert gate.reached.wait(30)
    saver.prepare(save_is_next=True)
    gate.opened.set()
    saver.finish()
    assert len(touched) == 1
    assert len(list_checkpoints(tmp_path)) == 1


def test_fetching_memory_leaves_a_copy_as_it_is() -> None:
    copy = HostCopy()
    copy.touch()  # of nothing yet
    copy.reserve(20_000)
    copy._memory.fill_(7)
    copy.touch()
    assert len(copy._memory) == 20_000 and torch.all(copy._memory == 7)
