"""The rank that all others wait for is named: in words at the right moment, and in a real run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.train.harness import BINS_PER_BATCH, SEQ_LEN, make_recipe
from tests.world import run_world
from turbolm.data.prepare.build import prepare
from turbolm.recipe.schema import Recipe
from turbolm.reliability.stragglers import Slowest, StragglerWatch, find_slowest
from turbolm.train.pace import Pace

HOSTS = ["a", "a", "b", "b"]
STEPS = 16


def test_a_rank_alone_keeps_no_times() -> None:
    """They would only be let go after a comparison, which never comes."""
    gone = []

    class Forward:
        def __del__(self) -> None:
            gone.append(1)

        def seconds(self) -> float:
            return 1.0

    pace = Pace(["here"])
    for _ in range(100):
        pace.add_step(Forward(), 2.0)  # type: ignore[arg-type]
    assert len(gone) == 100
    assert len(pace.take()) == 0


def test_the_slowest_is_compared_with_the_median_of_the_others() -> None:
    assert find_slowest([1.0, 1.1, 3.0, 0.9], stretch_sec=10.0) == Slowest(2, 3.0, 0.2)
    assert find_slowest([2.0, 1.0], stretch_sec=4.0) == Slowest(0, 2.0, 0.25)  # of two, against the other one
    assert find_slowest([0.0, 0.0], stretch_sec=4.0).factor == 1.0


def said(*reports: tuple[int, float, float]) -> list[tuple[int, str]]:
    watch = StragglerWatch(HOSTS)
    answers = [watch.observe(Slowest(*report)) for report in reports]
    return [(number, text) for number, text in enumerate(answers, start=1) if text]


def test_a_straggler_is_told_once_when_it_persists_and_once_when_it_is_over() -> None:
    slow, fast = (2, 1.5, 0.2), (1, 1.1, 0.02)
    messages = said(slow, slow, *[slow] * 5, *[fast] * 5, *[slow] * 3)
    assert [number for number, _ in messages] == [3, 10, 15]
    assert "rank 2 on b is slower than the others" in messages[0][1] and "1.50 times their median" in messages[0][1]
    assert messages[1][1] == "rank 2 on b keeps up with the others again"


def test_chance_and_trifles_are_not_told() -> None:
    assert not said(*[(2, 1.5, 0.2), (2, 1.5, 0.2), (1, 1.1, 0.0)] * 5)  # never three times in a row
    assert not said(*[(rank, 1.5, 0.2) for rank in (0, 1, 2, 3)] * 5)  # another one each time
    assert not said(*[(2, 5.0, 0.01)] * 9)  # five times as slow at what takes no time
    assert not said(*[(2, 1.15, 0.3)] * 9)


def _train_with_a_slow_rank(recipe: Recipe, what: str) -> int:
    import torch.distributed as dist

    from turbolm.train.worker import run_worker

    module, _, name = what.rpartition(".")
    original: Any = getattr(__import__(module, fromlist=[name]), name)

    def slower(*arguments: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == 1:
            time.sleep(0.1)
        return original(*arguments, **kwargs)

    with patch(what, slower), patch("turbolm.train.pace._MIN_STEPS", STEPS // 4):
        return run_worker(recipe)


@pytest.mark.parametrize(
    ("zero_stage", "what"),
    [
        pytest.param(2, "turbolm.train.step.micro_batch_loss", id="slow forward"),
        pytest.param(3, "turbolm.train.loop.agree_to_stop", id="late at ZeRO-3", marks=pytest.mark.slow),
    ],
)
def test_a_slow_rank_of_a_run_is_named_in_log_and_metrics(zero_stage: int, what: str, tmp_path: Path) -> None:
    recipe = make_recipe(
        tmp_path,
        train={"budget": STEPS * BINS_PER_BATCH * SEQ_LEN},
        execution={"zero_stage": zero_stage},
        logging={"every_steps": STEPS // 4, "sample_tokens": 0},
        evaluation={"every": "100%", "tokens": 200},
        checkpoint={"every": "100%"},
    )
    prepare(recipe)
    assert run_world(2, _train_with_a_slow_rank, recipe, what) == [0, 0]
    run = tmp_path / "runs" / "cell"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    slowest = {line["step"]: line for line in lines if "perf/slowest_rank" in line}
    assert sorted(slowest) == [8, 12, 16]  # the first stretch is left out
    assert all(line["perf/slowest_rank"] == 1 and line["perf/slowest_factor"] > 1.2 for line in slowest.values())
    log = (run / "attempts" / "1" / "log.rank0.txt").read_text()
    assert log.count("rank 1 on ") == 1 and "step 16  rank 1 on " in log
