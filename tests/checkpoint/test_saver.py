"""Saving goes on beside the training, and what is saved is the state at the step and nothing else."""

from __future__ import annotations

import errno
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from tests.checkpoint.toy import Engine, build_saver
from turbolm.checkpoint import save as save_module
from turbolm.checkpoint import snapshot as snapshot_module
from turbolm.checkpoint import tensor_file
from turbolm.checkpoint.load import load_checkpoint
from turbolm.checkpoint.manifest import list_checkpoints
from turbolm.checkpoint.snapshot import HostCopy, Snapshot, pack_blocks, take_snapshot
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


def test_an_update_waits_until_the_state_before_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_copy, fill = threading.Event(), HostCopy.fill

    def late(copy: HostCopy, snapshot: Snapshot) -> Snapshot:
        assert may_copy.wait(30)
        return fill(copy, snapshot)

    monkeypatch.setattr(HostCopy, "fill", late)
    engine = Engine()
    saver = build_saver(tmp_path, engine)
    engine.train(3)
    expected = everything(engine)
    saver.save(3, {"step": 3, "order_digest": ""})
    assert saver.waited_sec < 0.3
    training = threading.Thread(target=engine.train, args=(1, 3))
    training.start()
    training.join(0.5)
    assert training.is_alive(), "it waits"
    assert engine.module.steps == 4, "its forward pass, which changes a buffer, is done"
    may_copy.set()
    training.join(30)
    saver.finish()
    assert saver.waited_sec > 0.3
    assert not torch.equal(engine.module.inner.weight, expected["inner.weight"])
    loaded = Engine(seed=9)
    load_checkpoint(tmp_path / "step-00000003", loaded)
    assert_equal(everything(loaded), expected)


def test_a_copy_that_fails_is_reported_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no memory for the copy")

    reported: list[str] = []
    engine = Engine()
    saver = build_saver(tmp_path, engine, report=reported.append)
    engine.train(1)
    with monkeypatch.context() as broken:
        broken.setattr(HostCopy, "fill", fail)
        saver.save(1, {"step": 1, "order_digest": ""})
        engine.train(1, first=1)
        saver.wait()
    assert len(reported) == 1 and "no memory for the copy" in reported[0]
    saver.save(2, {"step": 2, "order_digest": ""})
    saver.finish()
    assert find_newest_valid(tmp_path) == (tmp_path / "step-00000002", [])


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
        broken.setattr(tensor_file, "write_all", fail)
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


class CudaRecorder:
    """Stands in for torch.cuda on a machine without a GPU: notes what each thread asks of it, in order."""

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[Any, ...]]] = defaultdict(list)  # by the thread's name

    def note(self, *call: Any) -> None:
        self.calls[threading.current_thread().name].append(call)

    def is_available(self) -> bool:
        return True

    def get_rng_state(self) -> torch.Tensor:
        self.note("get_rng_state")
        return torch.zeros(1, dtype=torch.uint8)

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> MagicMock:
            self.note(name, *arguments)
            return MagicMock()  # a stream, or entering one

        return call


@pytest.mark.parametrize("asynchronous", [True, False])
def test_every_thread_that_touches_cuda_first_chooses_its_gpu(
    asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread starts on GPU 0, where pinned memory and streams would leave a context of every rank."""
    engine, recorder, empty = Engine(), CudaRecorder(), torch.empty
    engine.device = torch.device("cuda", 3)
    saver = build_saver(tmp_path, engine, asynchronous=asynchronous)
    engine.train(1)

    def pinned(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            recorder.note("pinned memory")
        return empty(*size, **options)

    def write(*arguments: Any) -> dict[str, Any]:
        recorder.note("read tensors of the device")
        return tensor_file.write_tensors(*arguments)

    monkeypatch.setattr(torch, "cuda", recorder)
    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(save_module, "write_tensors", write)
    saver.prepare()
    saver.wait()
    saver.save(1, {"step": 1, "order_digest": ""})
    saver.finish()
    of_threads = {name: calls for name, calls in recorder.calls.items() if name != threading.current_thread().name}
    assert {name: calls[0] for name, calls in of_threads.items()} == dict.fromkeys(
        of_threads, ("set_device", engine.device)
    )
    used = {call[0] for calls in of_threads.values() for call in calls}
    assert used >= {"read tensors of the device"} | ({"pinned memory", "stream"} if asynchronous else set())


def test_the_host_copy_of_8b_is_pinned_in_blocks_that_round_up_to_little() -> None:
    """Llama-3.1-8B at stage 3 on 8 GPUs: 11.2 GiB a rank, for which one pinned tensor would take 16."""
    layer = [4096 * 4096] * 2 + [1024 * 4096] * 2 + [14336 * 4096] * 3 + [4096] * 2
    parameters = [128256 * 4096] * 2 + 32 * layer + [4096]
    assert sum(parameters) == 8_030_261_248
    for share in (1, 2, 8):  # of a parameter: of stages 1 and 2 a rank holds some whole
        own = [4 * numel // share for numel in parameters[:: 8 // share]] * 3  # weight and two moments
        used, places = pack_blocks(own)
        pinned = [2 ** (block - 1).bit_length() for block in used]
        assert sum(used) == sum(own) <= sum(pinned) <= 1.04 * sum(own)
        assert set(pinned[:-8]) <= {2**30, 2**31}, "about 1 GiB each, or what the embedding needs"
        spans = sorted((block, start, start + size) for size, (block, start) in zip(own, places, strict=True))
        for (block, _, end), (after, start, _) in zip(spans, spans[1:], strict=False):
            assert start == (end if after == block else 0), "no two overlap, and nothing lies between"


def test_pinned_memory_is_allocated_in_blocks_once_and_holds_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks of 128 bytes: a recorder in place of torch.empty sees which memory is pinned."""
    engine, empty, pinned = Engine(), torch.empty, list[int]()
    engine.train(1)
    snapshot = take_snapshot(engine, 1, {})
    del snapshot.tensors["rng/cpu"]  # 5,056 bytes, which all others would fit beside

    def record(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        assert pin_memory
        pinned.append(size[0])
        return empty(*size, **options)

    monkeypatch.setattr(torch, "cuda", CudaRecorder())
    monkeypatch.setattr(torch, "empty", record)
    monkeypatch.setattr(snapshot_module, "_BLOCK_BYTES", 128)
    copy = HostCopy()
    copy.reserve(snapshot.sizes)
    # Weight and two moments of 7 x 5 floats, 192 bytes each, leave 64 of 256. Of eight more of 64 (bias and the outer
    # weight with their moments, the gain whose moments are numbers, and a buffer) three go there.
    assert pinned == [256, 256, 256, 128, 128, 64]
    for _ in range(2):
        filled = copy.fill(snapshot)
        assert_equal({**filled.tensors, **filled.buffers}, {**snapshot.tensors, **snapshot.buffers})
        engine.train(1, first=1)
    assert len(pinned) == 6, "allocated once"
