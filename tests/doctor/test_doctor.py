"""`turbolm doctor` on one machine: what it names, and what it leaves alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from turbolm.doctor.compare import make_report, outliers
from turbolm.doctor.examine import examine
from turbolm.doctor.links import best_offset, rounds
from turbolm.doctor.task import Task
from turbolm.launch.network import free_port

DOCTOR = [sys.executable, "-m", "turbolm.cli", "doctor"]
# index, name, driver, C, SM MHz, its maximum, memory MHz, W, limit, ECC uncorrected, corrected
_SMI = """#!/bin/sh
case "$1" in
*name,compute_cap*) for gpu in 0 1 2; do echo 'NVIDIA H100 80GB HBM3, 9.0'; done ;;
*index,name*) printf '%s\\n' \
    '0, NVIDIA H100 80GB HBM3, 570.1, 45, 1900, 1980, 2619, 400.00, 700.00, 0, 0' \
    '1, NVIDIA H100 80GB HBM3, 570.1, 91, 600, 1980, 2619, 400.00, 700.00, 0, 0' \
    '2, NVIDIA H100 80GB HBM3, 570.1, 45, 1900, 1980, 2619, 400.00, 700.00, 3, [N/A]' ;;
*remapped*) printf '0, 0\\n0, 0\\n0, 0\\n' ;;
*event_reasons*) echo 'Field "clocks_event_reasons.hw_slowdown" is not a valid field to query.'; exit 2 ;;
*throttle_reasons*) printf '%s\\n' \
    'Not Active, Not Active, Not Active, Not Active' \
    'Active, Active, Not Active, Not Active' \
    'Not Active, Not Active, Not Active, Not Active' ;;
*) exit 2 ;;
esac
"""


def test_a_throttled_gpu_and_one_with_ecc_errors_are_named(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text(_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "0"}
    environment = {name: value for name, value in environment.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        [*DOCTOR, "--json"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    report = json.loads(done.stdout)
    named = {(one["check"], one["gpu"]): one["message"] for one in report["findings"] if one["severity"] == "fail"}
    assert named[("throttle", 1)] == ("throttled (hw_slowdown, hw_thermal_slowdown): 600 MHz, 1980 MHz at most, 91 °C")
    assert named[("ecc", 2)] == "3 uncorrected ECC errors since the driver was loaded"
    assert not [key for key in named if key[1] == 0], named
    assert ("torch", None) in named or report["nodes"][0]["ranks"][0]["device"] == "cuda"
    assert not list(tmp_path.glob("**/.turbolm-doctor*")), "what was written to try the disk is gone"


def test_a_node_that_never_answers_is_named_in_time(tmp_path: Path) -> None:
    hosts, port, here = ("here", "gone"), free_port("127.0.0.1"), {"run": str(tmp_path)}
    task = Task(0, hosts, "127.0.0.1", "127.0.0.1", port, num_ranks=1, device="cpu", folders=here, meet_sec=2)
    begun = time.monotonic()
    report = examine(task, "lo")
    assert time.monotonic() - begun < 40
    assert report["silent"] == ["gone"]
    assert not report["ok"]
    assert report["nodes"][0]["ranks"][0]["matmul_flops"] > 0, "the node that is there is measured all the same"


def test_ctrl_c_ends_it_and_leaves_nothing(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    process = subprocess.Popen(DOCTOR, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "1 of 1 nodes answer" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()  # until the last process that has it open has ended
    assert process.wait() == 130
    assert rest.endswith("doctor: stopped\n"), rest


@pytest.mark.parametrize("num", [1, 2, 3, 8, 13, 64])
def test_rounds_hold_every_pair_once_and_no_one_twice(num: int) -> None:
    plan = rounds(num)
    assert len(plan) == (0 if num == 1 else num - 1 + num % 2)
    assert sorted(pair for pairs in plan for pair in pairs) == [(a, b) for a in range(num) for b in range(a + 1, num)]
    assert all(len({player for pair in pairs for player in pair}) == 2 * len(pairs) for pairs in plan)


def test_the_clock_is_read_from_the_quickest_question() -> None:
    times = iter([0.0, 5.0, 10.0, 10.2, 20.0, 23.0, 30.0, 31.0, 40.0, 42.0])  # own clock: asked, answered
    others = iter([2.0, 7.1, 20.0, 28.0, 39.0])  # the second one took 0.2 s, in whose middle the other said 7.1
    assert best_offset(lambda: next(others), lambda: next(times)) == pytest.approx(10.1 - 7.1)


def test_only_what_is_far_from_all_the_others_stands_out() -> None:
    assert outliers({"a": 100, "b": 104, "c": 30, "d": 99}, 0.85) == ["c"]
    assert outliers({"a": 100, "b": 60, "c": 30, "d": 85}, 0.85) == [], "all scatter"
    assert outliers({"a": 100, "b": 40}, 0.5) == ["b"]
    assert outliers({"a": 1.0}, 0.85) == []


def _facts(node: int, **changes: Any) -> dict[str, Any]:
    disk = {"path": "/runs", "write_bytes_per_sec": 1e9, "error": None, "free_bytes": 10**12, "free_files": 10**6}
    return {
        "node": node,
        "local": 0,
        "device": "cuda",
        "error": None,
        "matmul_flops": 7e14,
        "memory_bytes_per_sec": 2.5e12,
        "gpus": [],
        "versions": {"torch": "2.13.0"},
        "limits": {"open_files": 2**20, "locked_bytes": None, "infiniband": True},
        "shm": {"total_bytes": 2**36, "free_bytes": 2**36},
        "disks": {"run": disk},
        "clock_offset_sec": 0.001 * node,
        "sent": {f"{peer}.0": 2e10 for peer in range(4) if peer != node},
        **changes,
    }


@pytest.mark.parametrize(
    ("check", "severity", "changes"),
    [
        ("matmul_flops", "fail", {"matmul_flops": 5e14}),
        ("memory_bytes_per_sec", "fail", {"memory_bytes_per_sec": 1e12}),
        ("versions", "fail", {"versions": {"torch": "2.12.0"}}),
        ("open_files", "fail", {"limits": {"open_files": 64, "locked_bytes": None, "infiniband": True}}),
        ("locked_memory", "warn", {"limits": {"open_files": None, "locked_bytes": 2**16, "infiniband": True}}),
        ("shm", "warn", {"shm": {"total_bytes": 2**26, "free_bytes": 2**26}}),
        ("clock", "warn", {"clock_offset_sec": -7.5}),
        ("error", "fail", {"error": "CUDA error: uncorrectable ECC error encountered"}),
        ("link", "fail", {"sent": {f"{peer}.0": 2e9 for peer in (0, 1, 3)}}),
        ("disk", "fail", {"disks": {"run": {"path": "/runs", "write_bytes_per_sec": None, "error": "read-only"}}}),
    ],
)
def test_the_node_that_differs_is_named(check: str, severity: str, changes: dict[str, Any]) -> None:
    task = Task(0, ("a", "b", "c", "d"), "192.0.2.1", "192.0.2.1", 1, num_ranks=1, device="cuda")
    facts = [_facts(node, **(changes if node == 2 else {})) for node in range(4)]
    healthy = make_report(task, dict.fromkeys(range(4), 1), [_facts(node) for node in range(4)], {})
    assert healthy["findings"] == []
    found = make_report(task, dict.fromkeys(range(4), 1), facts, {})["findings"]
    assert {(one["host"], one["check"], one["severity"]) for one in found} == {("c", check, severity)}, found


def test_a_node_that_goes_silent_is_named_with_what_it_was_at() -> None:
    task = Task(0, ("a", "b"), "192.0.2.1", "192.0.2.1", 1, num_ranks=1, device="cpu")
    report = make_report(task, {0: 1, 1: 1}, [_facts(0, sent={})], {"1.0": "disks"})
    assert report["silent"] == ["b"]
    assert "went silent at: disks" in report["findings"][0]["message"]
