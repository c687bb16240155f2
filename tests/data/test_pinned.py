"""Micro-batches in pinned memory: who allocates it on which GPU, how much, and until when it is kept."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from turbolm.data.batch.loader import BatchLoader, evaluation_batches, evaluation_set
from turbolm.data.store.token_store import TokenStore
from turbolm.train.pinned import PinnedMemory

from .test_loader import SEQ_LEN, SEQUENCES_PER_BATCH, order_of


class Cuda:
    """Stands in for torch.cuda: notes calls by thread; events are done when the test says so."""

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[str, Any]]] = {}
        self.is_done = False

    def note(self, *call: Any) -> None:
        self.calls.setdefault(threading.current_thread().name, []).append(call)

    def set_device(self, device: torch.device) -> None:
        self.note("set_device", device)

    def Event(self) -> Any:
        cuda = self

        class Event:
            def record(self) -> None: ...

            def query(self) -> bool:
                return cuda.is_done

        return Event()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    recorder, empty = Cuda(), torch.empty

    def pinned(shape: Any, *, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            recorder.note("pinned", int(np.prod(shape)) * 8)
        return empty(shape, **options)

    monkeypatch.setattr(torch, "cuda", recorder)
    monkeypatch.setattr(torch, "empty", pinned)
    return recorder


def loader_of(store: TokenStore) -> BatchLoader:
    order = order_of(store, SEQUENCES_PER_BATCH, "best_fit")
    return BatchLoader(order, store, "train", 2, 1, SEQ_LEN, memory=PinnedMemory(torch.device("cuda", 1)))


def test_the_prefetch_thread_chooses_its_gpu_and_pins_a_block_for_each_batch(store: TokenStore, cuda: Cuda) -> None:
    cuda.is_done = True
    batches = list(loader_of(store).iterate(0, 4))
    (calls,) = cuda.calls.values()
    assert [name for name in cuda.calls if name.startswith("turbolm-prefetch")], "not the training's thread"
    block = 3 * 8 * SEQ_LEN * SEQUENCES_PER_BATCH // 2  # inputs, positions, targets, int64, of half the sequences
    assert calls == [("set_device", torch.device("cuda", 1)), *[("pinned", block)] * 4]
    plain = BatchLoader(loader_of(store).order, store, "train", 2, 1, SEQ_LEN)
    for index, batch in enumerate(batches):
        for micro, expected in zip(batch.micro_batches, plain.global_batch(index).micro_batches, strict=True):
            assert all(np.array_equal(micro[name], expected[name]) for name in expected)


def test_evaluation_reads_into_pinned_memory_too(store: TokenStore, cuda: Cuda) -> None:
    held_out = evaluation_set(store, SEQ_LEN, 10**9)
    memory = PinnedMemory(torch.device("cuda", 1))
    batches = evaluation_batches(held_out, store, micro_batch_size=2, memory=memory)
    first = weakref.ref(next(batches))
    next(batches)
    gc.collect()
    assert first() is not None, "the device has not read it yet"
    cuda.is_done = True
    rest = list(batches)
    gc.collect()
    assert first() is None
    (calls,) = cuda.calls.values()
    assert len(calls) == len(rest) + 2 and {name for name, _ in calls} == {"pinned"}


@pytest.mark.parametrize("stops", [False, True])
def test_a_batch_is_kept_until_the_device_has_read_it(store: TokenStore, cuda: Cuda, stops: bool) -> None:
    loader = loader_of(store)
    batches = loader.iterate(0, 10)
    first = weakref.ref(next(batches))
    if stops:  # as after a rollback
        batches.close()
    else:
        next(batches)
    gc.collect()
    assert first() is not None
    cuda.is_done = True
    del batches
    next(taken := loader.iterate(0, 10))
    next(taken)
    gc.collect()
    assert first() is None
