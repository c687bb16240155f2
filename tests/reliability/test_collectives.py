"""What torch's flight recorder holds of a job that hangs: on, in the run's folder, read by the watchdog, in bounds."""

from __future__ import annotations

import json
import mmap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.chaos.test_hangs import state
from tests.world import run_world
from turbolm.environment import use_flight_recorder
from turbolm.reliability import collectives, heartbeat
from turbolm.reliability.collectives import in_words, summarize
from turbolm.reliability.hang import judge
from turbolm.reliability.heartbeat import read_signs
from turbolm.reliability.watchdog import Watchdog, report

PENDING = ["all_reduce 9 (1 Float, started)"]
GROUP = {"group": "nccl group default_pg", "entered": 9, "finished": 8, "pending": PENDING}


def hang_in_a_collective(folder: Path) -> list[Any]:
    """Rank 1 does not enter what rank 0 waits in; rank 0 also does the watchdog's part, and tells what it found."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    heartbeat.start(folder, rank)
    dist.all_reduce(torch.ones(3))
    dist.send(torch.ones(1), 1) if rank == 0 else dist.recv(torch.ones(1), 0)  # a message is no collective operation
    ended = folder / "ended"
    if rank == 1:
        while not ended.exists():
            time.sleep(0.05)
        dist.all_reduce(torch.ones(64, 7))
        return []
    waiting = threading.Thread(target=dist.all_reduce, args=(torch.ones(64, 7),))
    waiting.start()
    while len(read_signs(folder)) < 2 or not in_words(collectives.recorded()).startswith("in all_reduce"):
        time.sleep(0.05)
    dog = Watchdog(folder, folder, hang_sec=1, startup_sec=1, num_ranks=2, world_size=2)
    found = dog._examine(read_signs(folder))
    verdict = judge(found)
    ended.touch()
    waiting.join()
    return [verdict.culprits, verdict.reason, report(verdict, found), found[0].collectives, found[1].collectives]


def test_the_rank_that_did_not_enter_a_collective_is_named_with_what_the_others_hold(tmp_path: Path) -> None:
    culprits, reason, text, held, other = run_world(2, hang_in_a_collective, tmp_path)[0]
    assert culprits == (1,) and reason == "has not entered a collective operation that others are in"
    name = "gloo group default_pg"
    pending = ["all_reduce 2 (64x7 Float, scheduled)"]
    assert held == [{"group": name, "entered": 2, "finished": 1, "pending": pending}]
    assert other == [{"group": name, "entered": 1, "finished": 1, "pending": []}]
    lines = text.splitlines()
    assert lines[0] == "rank 1 hangs: it has not entered a collective operation that others are in"
    assert lines[1].endswith("; in all_reduce 2 (64x7 Float, scheduled) of gloo group default_pg")
    assert lines[2].endswith(f"; in no collective operation; the last was 1 of {name}")


def test_a_dump_of_nccl_is_read() -> None:
    """As `_dump_nccl_trace_json` of a CUDA build gives it: `retired` comes only from its watchdog thread."""
    entry = {
        "process_group": ["0", "default_pg"], "profiling_name": "nccl:_all_gather_base", "is_p2p": False,
        "input_sizes": [[1024]], "input_dtypes": ["BFloat16"],
    }  # fmt: skip
    states = [("completed", True), ("completed", False), ("started", False), ("scheduled", False), ("scheduled", False)]
    entries = [
        {**entry, "collective_seq_id": number, "state": name, "retired": retired}
        for number, (name, retired) in enumerate(states, start=41)
    ]
    [group] = summarize(entries)
    assert (group["group"], group["entered"], group["finished"]) == ("nccl group default_pg", 45, 42)
    first, second = "_all_gather_base 43 (1024 BFloat16, started)", "_all_gather_base 44 (1024 BFloat16, scheduled)"
    assert group["pending"] == [first, second]
    assert in_words([group]) == f"in {first} of nccl group default_pg, {second} of nccl group default_pg"
    assert summarize([]) == [] and in_words([]) == ""


def test_ranks_without_a_recorder_are_judged_as_before() -> None:
    assert judge([state(0), state(1)]).culprits == ()
    assert judge([state(0, collectives=[GROUP]), state(1)]).culprits == ()  # of rank 1 nothing is known
    behind = {**GROUP, "entered": 8, "pending": []}
    assert judge([state(0, collectives=[GROUP]), state(1, collectives=[behind]), state(2)]).culprits == (1,)
    alone = {**GROUP, "group": "nccl group of another node"}
    assert judge([state(0, collectives=[GROUP]), state(1, collectives=[alone])]).culprits == ()


def test_the_report_of_512_ranks_is_short() -> None:
    behind = {**GROUP, "entered": 8, "pending": []}
    ranks = [state(rank, collectives=[behind if rank == 300 else GROUP]) for rank in range(512)]
    lines = report(judge(ranks), ranks).splitlines()
    assert lines[0].startswith("rank 300 hangs") and lines[1].startswith("  rank 300 on a (process 400): step, after")
    assert len(lines) == 3 and lines[2].startswith("  ranks 0-299, 301-511: step, after step 7, at all_reduce (")
    assert lines[2].endswith("in all_reduce 9 (1 Float, started) of nccl group default_pg")
    for rank in ranks:  # each at a place of its own
        object.__setattr__(rank, "frames", (f"f{rank.rank} (a.py:1)",))
    assert len(report(judge(ranks), ranks).splitlines()) <= 35


def test_the_recorder_is_on_and_writes_to_the_run_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    given: dict[str, str] = {}
    use_flight_recorder(given, None)
    assert given == {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    use_flight_recorder(given, tmp_path)
    assert given["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "nccl_trace.rank")  # torch appends the rank
    own = {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/a",
    }  # fmt: skip
    use_flight_recorder(own, tmp_path)
    assert len(own) == 3


@pytest.mark.parametrize("name", ["TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DUMP_ON_TIMEOUT"])
def test_torch_reads_the_variable(name: str) -> None:
    root = Path(torch.__file__).parent
    if any(name in path.read_text() for path in (root / "include/torch/csrc/distributed/c10d").glob("*.hpp")):
        return
    with (root / "lib" / "libtorch_cpu.so").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as lib:
        assert lib.find(name.encode()) > 0


def test_torch_has_the_dump_that_is_read() -> None:
    found = json.loads(torch._C._distributed_c10d._dump_fr_trace_json())  # type: ignore[attr-defined]
    assert "pg_status" in found and collectives.recorded() == summarize(found.get("entries", ()))


def test_bytes_are_counted_only_where_nothing_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: 10 and 4 floats gathered to 28, an exchange in bf16; a barrier and a message do not count."""

    def entry(number: int, name: str, sent: Any, received: Any, dtype: str = "Float") -> dict[str, Any]:
        sides = {"input_sizes": sent, "output_sizes": received, "input_dtypes": [dtype], "output_dtypes": [dtype]}
        return {"record_id": number, "profiling_name": name, "is_p2p": name.endswith("send"), **sides}

    entries = [
        entry(6, "nccl:all_reduce", [[1000]], [[1000]]),  # before
        entry(7, "nccl:all_gather_into_tensor_coalesced", [[10], [2, 2]], [[20], [2, 4]]),
        entry(8, "nccl:all_to_all", [[5]], [[5]], "BFloat16"),
        entry(9, "nccl:all_reduce_barrier", [[1]], [[1]]),
        entry(10, "nccl:send", [[99]], [[99]]),
        entry(11, "nccl:_reduce_scatter_base", [[8]], [[4]]),
    ]
    monkeypatch.setattr(collectives, "_entries", lambda: [entries, []])
    assert collectives.last_records() == [11, -1]
    assert collectives.bytes_since([6, -1]) == 28 * 4 + 5 * 2 + 8 * 4
    assert collectives.bytes_since([11, -1]) == 0
    assert collectives.bytes_since([4, -1]) is None, "5 was dropped"
    entries.append(entry(12, "nccl:all_reduce", [[1]], [[1]], "Float8_e4m3fn"))
    assert collectives.bytes_since([6, -1]) is None, "a type without a size"
    monkeypatch.setattr(collectives, "_entries", lambda: [[], []])
    assert collectives.bytes_since([-1, -1]) is None, "recorders that are off"
