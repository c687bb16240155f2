"""A rollback reaches further into the data than the run was planned for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from turbolm.data.batch.loader import BatchLoader
from turbolm.data.order.batch_order import constant_order
from turbolm.reliability.anomalies import SkippedBatches
from turbolm.train.loop import batches_to_train
from turbolm.train.session import set_skipped


def session(num_steps: int) -> Any:
    """Documents of one size, but for those of the last batches: there are many more in a row."""
    lengths = np.array([8] * 40 + [1] * 64, dtype=np.int64)
    order = constant_order(lengths, seq_len=8, sequences_per_batch=2)
    order.build(num_steps)
    loader = BatchLoader(order, None, "train", 1, 0, "auto", order.max_slices(num_steps))  # type: ignore[arg-type]
    return SimpleNamespace(plan=SimpleNamespace(num_steps=num_steps), loader=loader, skipped=None, step=0)


def test_fixed_sizes_of_compiled_models_cover_the_batches_it_adds() -> None:
    trained = session(4)
    set_skipped(trained, SkippedBatches())
    assert trained.loader.max_slices == trained.loader.order.max_slices(4)
    set_skipped(trained, SkippedBatches().without(1, 200))
    assert trained.loader.max_slices == trained.loader.order.max_slices(203)


def test_the_steps_that_are_left_get_the_batches_after_a_rollback(monkeypatch: Any) -> None:
    trained, seen = session(6), []
    monkeypatch.setattr(BatchLoader, "global_batch", lambda loader, index: SimpleNamespace(index=index))
    set_skipped(trained, SkippedBatches())
    for batch in batches_to_train(trained):
        seen.append(batch.index)
        trained.step += 1
        if batch.index == 3:  # back to the checkpoint of step 2, as `roll_back` does
            trained.step = 2
            set_skipped(trained, SkippedBatches().without(2, 4))
    assert seen == [0, 1, 2, 3, 4, 5, 6, 7]
    trained.step = 4  # a resume
    assert next(batches_to_train(trained)).index == 6
