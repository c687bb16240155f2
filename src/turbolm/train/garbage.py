"""Garbage collection at the same step on every rank.

Left to itself, Python collects whenever a rank has made enough objects, on each rank at another time, and all others
wait for it at the next collective. torchtitan and Megatron-LM collect by hand too (`gc_freq`, `manual_gc_interval`).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

COLLECT_EVERY_STEPS = 50  # as torchtitan


@contextmanager
def manual_collection() -> Iterator[None]:
    """Inside this context (or a function that it decorates) Python does not collect by itself.

    What was built before is never looked at again, so that a collection takes milliseconds.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def collect_when_due(step: int) -> None:
    """Collect every COLLECT_EVERY_STEPS steps."""
    if step % COLLECT_EVERY_STEPS == 0:
        gc.collect()
