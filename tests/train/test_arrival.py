"""The ranks meet before their process groups: late ones are named, and all agree on device and precision."""

from __future__ import annotations

import contextlib
import io
import re
import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from tests.world import run_world
from turbolm.reliability.late import HOSTS, Notices, name_ranks, name_some
from turbolm.reliability.outcome import LOST_PEER, LateRanksError, classify
from turbolm.train.arrival import arrive, difference, name_missing


def meet(odd: int | None, late_rank: int | None, late_sec: float, notice_sec: float, timeout_sec: float) -> str:
    """What a rank of a world sees: what it printed, then how the meeting ended."""
    import os

    from turbolm.errors import RunError, UserError
    from turbolm.reliability import late
    from turbolm.train.arrival import meet_ranks

    late._FIRST_NOTICE_SEC = notice_sec
    rank = os.environ["RANK"]
    plan, printed = ("cuda", "fp32" if rank == str(odd) else "bf16", "0f2c"), io.StringIO()
    if rank == str(late_rank):
        time.sleep(late_sec)
    with contextlib.redirect_stdout(printed):
        try:
            kept = meet_ranks(*plan, timeout_sec)
        except (UserError, RunError) as error:
            return f"{printed.getvalue()}{type(error).__name__}: {error}"
    dist.init_process_group("gloo")  # by the same store
    del kept
    return f"{printed.getvalue()}a world of {dist.get_world_size()}"


@pytest.mark.slow  # every start of ranks goes this way
def test_ranks_that_agree_go_on_without_a_word() -> None:
    assert run_world(3, meet, None, None, 0.0, 60.0, 60.0) == ["a world of 3"] * 3


def test_every_rank_names_the_one_that_differs() -> None:
    lines = run_world(3, meet, 0, None, 0.0, 60.0, 60.0)
    assert len(set(lines)) == 1 and "\n" not in lines[0]
    assert "UserError: train.precision, cluster.device: rank 0 on " in lines[0]
    assert "would train on cuda, fp32, most ranks on cuda, bf16" in lines[0]


def test_a_rank_that_comes_late_is_named_by_one_that_is_there() -> None:
    told = [text for text in run_world(3, meet, None, 0, 2.0, 0.5, 60.0) if text != "a world of 3"]
    assert len(told) == 1, told  # rank 0 is the late one, so another rank tells
    assert re.search(r"^turbolm: [12] of 3 ranks have not arrived after \d+ s: ranks? 0 \(", told[0]), told
    assert re.search(r"^turbolm: all 3 ranks are there after \d+ s; late were ranks? 0 \(", told[0], re.MULTILINE), told
    assert told[0].endswith("a world of 3")


@pytest.mark.slow
def test_a_rank_that_never_comes_ends_all_with_one_line() -> None:
    ends = [text.splitlines()[-1] for text in run_world(3, meet, None, 2, 4.0, 60.0, 1.5)]
    assert len(set(ends)) == 1
    assert re.match(r"LateRanksError: 1 of 3 ranks have not arrived after \d+ s: rank 2 \(", ends[0]), ends
    assert classify(LateRanksError("x"))[1] == LOST_PEER  # so that a job is started again


class CountingStore:
    """Counts the requests to a store."""

    def __init__(self, store: dist.Store) -> None:
        self.store, self.num_requests = store, 0

    def __getattr__(self, name: str) -> Any:
        self.num_requests += 1
        return getattr(self.store, name)


def test_512_ranks_arrive_in_a_few_requests_each_and_the_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    missing, requests = {64, 300, *range(8, 16)}, []
    for rank in sorted(set(range(512)) - missing):
        counting: Any = CountingStore(store)
        arrive(counting, "start", rank, "cuda, bf16", f"node{rank // 8:02}")
        requests.append(counting.num_requests)
    assert max(requests) == requests[0] == 5 and set(requests[1:]) == {4}  # whatever the number of ranks
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.delenv(HOSTS, raising=False)  # the host of 8-15 is then known to nobody
    assert name_missing(store, "start", 512) == "ranks 8-15, 64 (node08), 300 (node37)"
    monkeypatch.setenv(HOSTS, ",".join(f"host{node}" for node in range(64)))
    assert name_missing(store, "start", 512) == "ranks 8-15 (host1), 64 (host8), 300 (host37)"


def test_a_rank_without_its_gpu_is_named() -> None:
    line = difference({"cuda, bf16": ["0|a", "1|a", "3|b"], "cpu, fp32": ["4|b", "2|b"]})
    assert "rank 2 on b would train on cpu, fp32, most ranks on cuda, bf16" in line


def test_a_node_with_another_token_store_is_named() -> None:
    line = difference({"cpu, fp32; token store aaaa": ["0|a", "1|a"], "cpu, fp32; token store bbbb": ["2|b", "3|b"]})
    assert line.startswith("execution.cache_dir: rank 2 on b has token store bbbb, most ranks have aaaa.")


def test_what_is_said_of_the_late_is_bounded() -> None:
    assert name_ranks([7]) == "rank 7"
    assert name_ranks(range(6, 10), 8, {0: "a", 1: "b"}) == "ranks 6-7 (a), 8-9 (b)"
    assert name_ranks(range(0, 512, 2), 8) == "ranks 0, 2, 4, 6, 8, 10, 12, 14 and 248 more"
    assert name_some(["a", "b"]) == "a, b" and name_some([str(i) for i in range(64)]).endswith("6, 7 and 56 more")


def test_notices_come_after_30_s_and_then_less_and_less_often() -> None:
    now = 0.0
    notices, told = Notices(lambda: now), []
    for second in range(7200):
        now = float(second)
        if notices.is_due():
            told.append(second)
    assert told[:6] == [30, 90, 210, 450, 930, 1530] and told[-1] - told[-2] == 600
