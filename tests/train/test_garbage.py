"""Python collects garbage at the steps that the loop says, and not between them."""

from __future__ import annotations

import gc
import weakref

import pytest

from turbolm.train.garbage import COLLECT_EVERY_STEPS, collect_when_due, manual_collection


class Node:
    """Refers to itself: only a collection frees it."""

    def __init__(self) -> None:
        self.me = self


def test_cycles_live_until_the_step_of_a_collection() -> None:
    collected: list[str] = []

    def note(phase: str, _: dict[str, int]) -> None:
        collected.append(phase)

    @manual_collection()
    def loop() -> None:
        gc.callbacks.append(note)
        for step in range(1, 2 * COLLECT_EVERY_STEPS + 1):
            held = [[] for _ in range(5000)]  # more than Python's threshold
            node = weakref.ref(Node())
            collect_when_due(step)
            assert (node() is None) == (step % COLLECT_EVERY_STEPS == 0)
            assert len(held) == 5000
        gc.callbacks.remove(note)

    loop()
    assert collected == ["start", "stop"] * 2


@manual_collection()
def _fail_inside() -> None:
    assert not gc.isenabled() and gc.get_freeze_count() > 0
    raise ZeroDivisionError


@pytest.mark.parametrize("is_enabled", [True, False])
def test_python_collects_again_afterwards_also_after_an_error(is_enabled: bool) -> None:
    try:
        (gc.enable if is_enabled else gc.disable)()
        with pytest.raises(ZeroDivisionError):
            _fail_inside()
        assert gc.isenabled() == is_enabled
        assert gc.get_freeze_count() == 0
    finally:
        gc.enable()
