"""Which CPUs the ranks of a node get, from made-up /proc and /sys."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from turbolm.plan.affinity import gpu_cpus, parse_cpus, rank_cpus

# Two sockets of 8 cores; CPU n and n + 16 are threads of one core.
CORES = {cpu: cpu % 16 for cpu in range(32)}
SOCKETS = [parse_cpus("0-7,16-23"), parse_cpus("8-15,24-31")]
NODE = SOCKETS[0] | SOCKETS[1]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, address in enumerate(["0000:1B:00.0", "0000:43:00.0", "0000:9B:00.0", "0000:C3:00.0"]):
        (tmp_path / "proc/driver/nvidia/gpus" / address).mkdir(parents=True)
        device = tmp_path / "sys/bus/pci/devices" / address.lower()
        device.mkdir(parents=True)
        (device / "local_cpulist").write_text(["0-7,16-23\n", "8-15,24-31\n"][number // 2])
    return tmp_path


def test_each_rank_gets_whole_cores_near_its_gpu(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = rank_cpus(4, NODE, gpu_cpus(root), CORES)
    assert found == [parse_cpus(text) for text in ("0-3,16-19", "4-7,20-23", "8-11,24-27", "12-15,28-31")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,0")
    assert rank_cpus(2, NODE, gpu_cpus(root), CORES) == [SOCKETS[1], SOCKETS[0]]


def test_never_outside_of_what_is_allowed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    inside = parse_cpus("4-11")  # four cores of each socket, as a control group gives
    assert rank_cpus(4, inside, gpu_cpus(root), CORES) == [{4, 5}, {6, 7}, {8, 9}, {10, 11}]
    one_socket = parse_cpus("0-7")  # nothing near two of the GPUs: an even split
    assert rank_cpus(4, one_socket, gpu_cpus(root), CORES) == [{0, 1}, {2, 3}, {4, 5}, {6, 7}]
    assert rank_cpus(8, parse_cpus("3"), [], CORES) == [{3}] * 8


@pytest.mark.parametrize("visible", ["GPU-8f1c", "0,9", ""])
def test_gpus_that_cannot_be_placed_split_evenly(visible: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_cpus(root) == []
    assert rank_cpus(2, NODE, [], CORES) == SOCKETS


def test_a_process_is_bound_within_its_own_set(tmp_path: Path) -> None:
    script = "from turbolm.plan.affinity import bind_to_gpu; import os, pathlib, sys;"
    script += "own = bind_to_gpu(0, 1, pathlib.Path(sys.argv[1])); print(own == os.sched_getaffinity(0), *sorted(own))"
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", *map(str, sorted(os.sched_getaffinity(0)))]


@pytest.mark.parametrize(
    ("slurm", "says"),
    [({}, "is not set"), ({"cpus_per_task": 4}, "is 4"), ({"cpus_per_task": 8}, None), ({"exclusive": True}, None)],
)
def test_a_job_whose_ranks_would_share_a_core_is_warned_of(slurm: dict[str, object], says: str | None) -> None:
    from turbolm.plan.machine import cpu_request_note
    from turbolm.recipe.schema import Recipe

    cluster = {"gpus_per_node": 8, "gpu": "H100-80GB", "slurm": slurm}
    values = {"name": "r", "model": {"config": {"model_type": "llama"}}, "tokenizer": {"train": {}}}
    values |= {"cluster": cluster, "data": {"seq_len": 64}, "train": {"budget": 1024, "global_batch": 1024}}
    note = cpu_request_note(Recipe.model_validate(values))
    assert note is None if says is None else note is not None and says in note and "such as 64" in note
