"""Ranks that were started by hand agree on device and precision, or end with one line."""

from __future__ import annotations

import pytest

from tests.world import run_world
from turbolm.train.same_plan import difference


def compare(odd: int | None) -> str:
    import os

    import torch.distributed as dist

    from turbolm.errors import UserError
    from turbolm.train.same_plan import check_same_plan

    plan = ("cuda", "fp32") if os.environ["RANK"] == str(odd) else ("cuda", "bf16")
    try:
        check_same_plan(*plan, 60)
    except UserError as error:
        return str(error)
    dist.init_process_group("gloo")  # by the same store
    return f"a world of {dist.get_world_size()}"


def test_ranks_that_agree_go_on() -> None:
    assert run_world(3, compare, None) == ["a world of 3"] * 3


@pytest.mark.parametrize("odd", [0, 2])
def test_every_rank_names_the_one_that_differs(odd: int) -> None:
    lines = run_world(3, compare, odd)
    assert len(set(lines)) == 1 and "\n" not in lines[0]
    assert f"rank {odd} on " in lines[0] and "would train on cuda, fp32, most ranks on cuda, bf16" in lines[0]


def test_a_rank_without_its_gpu_is_named() -> None:
    assert difference(["cuda, bf16"] * 3, ["a", "a", "b"]) is None
    line = difference(["cuda, bf16", "cuda, bf16", "cpu, fp32"], ["a", "a", "b"])
    assert line is not None and "rank 2 on b would train on cpu, fp32" in line
