"""What the tests of launchers may rely on: a cluster that talks, requeues, signals, fails and goes away."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from . import cluster as cluster_module
from .cluster import Node, SlurmCluster, remove_stale_clusters, slurm_cluster

# Every task listens, calls every other by name, and answers calls until all have called.
TALK = r"""
import json, os, socket, subprocess, sys, threading
names = subprocess.run(["scontrol", "show", "hostnames"], capture_output=True, text=True, check=True).stdout.split()
server = socket.create_server(("", 29400))
callers = []
def answer():
    while len(callers) < len(names):
        connection, _ = server.accept()
        with connection:
            callers.append(connection.makefile().readline().strip())
thread = threading.Thread(target=answer)
thread.start()
for name in names:
    for attempt in range(100):
        try:
            connection = socket.create_connection((name, 29400), timeout=5)
            break
        except ConnectionRefusedError:  # that task is not listening yet
            threading.Event().wait(0.1)
    with connection:
        connection.sendall((socket.gethostname() + "\n").encode())
thread.join(timeout=20)
address = socket.gethostbyname(socket.gethostname())
print(json.dumps([int(os.environ["SLURM_PROCID"]), socket.gethostname(), address, sorted(callers)]))
"""

ALL_REDUCE = """
import os, torch, torch.distributed as dist
rank, world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
torch.set_num_threads(1)
dist.init_process_group("gloo", rank=rank, world_size=world)
values = torch.full((1_000_000,), float(rank + 1))
dist.all_reduce(values)
print("sum", values.unique().tolist(), flush=True)
dist.destroy_process_group()
"""


def script(*lines: str) -> str:
    return "\n".join(["#!/bin/bash", *lines, ""])


def wait_for_output(cluster: SlurmCluster, job_id: int, text: str, timeout_sec: float = 20) -> None:
    deadline = time.monotonic() + timeout_sec
    while text not in cluster.output(job_id):
        assert time.monotonic() < deadline, cluster.output(job_id)
        time.sleep(0.1)


def test_tasks_have_own_names_and_addresses_and_reach_each_other_by_name(cluster: SlurmCluster) -> None:
    program = cluster.root / "talk.py"
    program.write_text(TALK)
    job_id = cluster.sbatch("--nodes=3", "--ntasks-per-node=1", script=script(f"srun {sys.executable} {program}"))
    cluster.wait(job_id, timeout_sec=30)

    names = [node.name for node in cluster.nodes]
    reports = sorted(json.loads(line) for line in cluster.output(job_id).splitlines())
    assert reports == [[rank, node.name, node.address, names] for rank, node in enumerate(cluster.nodes)]


@pytest.mark.slow
def test_gloo_all_reduce_goes_over_the_nodes_interfaces(cluster: SlurmCluster) -> None:
    program = cluster.root / "all_reduce.py"
    program.write_text(ALL_REDUCE)
    sent_before = [cluster.bytes_on_wire(node)[1] for node in cluster.nodes]
    lines = script(
        "export MASTER_ADDR=$(scontrol show hostnames | head -n 1) MASTER_PORT=29500",
        f"export GLOO_SOCKET_IFNAME={cluster.nodes[0].interface}",
        f"srun {sys.executable} {program}",
    )
    nodes = f"--nodelist={cluster.nodes[0].name},{cluster.nodes[1].name}"
    job_id = cluster.sbatch("--nodes=2", "--ntasks-per-node=1", nodes, script=lines)
    cluster.wait(job_id, timeout_sec=120)

    # torch also warns that it finds no host name for an address.
    assert [line for line in cluster.output(job_id).splitlines() if line.startswith("sum")] == ["sum [3.0]"] * 2
    sent = [cluster.bytes_on_wire(node)[1] - before for node, before in zip(cluster.nodes, sent_before, strict=True)]
    assert min(sent[:2]) > 4_000_000  # a ring of two sends each half of the 4 MB twice
    assert sent[2] < 100_000


@pytest.mark.slow
def test_scontrol_requeue_restarts_the_job_within_seconds(cluster: SlurmCluster) -> None:
    lines = script("echo restarts ${SLURM_RESTART_COUNT:-0}", '[ "$SLURM_RESTART_COUNT" = 1 ] || sleep 100')
    job_id = cluster.sbatch("--open-mode=append", script=lines)
    wait_for_output(cluster, job_id, "restarts 0")
    cluster.run("scontrol", "requeue", str(job_id))
    start = time.monotonic()
    cluster.wait(job_id, timeout_sec=30)
    assert time.monotonic() - start < 20
    assert "restarts 1" in cluster.output(job_id)
    assert cluster.job(job_id)["Restarts"] == "1"


# The shell handles a signal only once its foreground command ended: hence `&` and `wait`.
ON_USR2 = ("trap 'echo got USR2; kill $!; exit 0' USR2", "srun sleep 100 &", "echo ready", "wait")


def test_scancel_sends_a_signal_to_the_batch_shell_alone(cluster: SlurmCluster) -> None:
    job_id = cluster.sbatch("--nodes=2", script=script(*ON_USR2))
    wait_for_output(cluster, job_id, "ready")
    cluster.run("scancel", "--batch", "--signal=USR2", str(job_id))
    cluster.wait(job_id, timeout_sec=20)
    assert "got USR2" in cluster.output(job_id)


def test_gpus_can_be_asked_for_although_there_are_none(cluster: SlurmCluster) -> None:
    job_id = cluster.sbatch("--nodes=2", "--gpus-per-node=8", script=script("echo gpus: $SLURM_GPUS_ON_NODE"))
    cluster.wait(job_id, timeout_sec=20)
    assert cluster.output(job_id) == "gpus: 8\n"


@pytest.mark.slow
def test_a_dead_node_loses_its_job_and_a_killed_slurmd_keeps_its_tasks(cluster: SlurmCluster) -> None:
    """In one silence, which takes the controller some time to notice."""
    head, silent, dead = cluster.nodes
    kept = cluster.sbatch(f"--nodelist={silent.name}", "--no-requeue", script=script("echo ready", "sleep 1234"))
    lines = script("srun hostname", '[ "$SLURM_RESTART_COUNT" = 1 ] || sleep 100')
    moved = cluster.sbatch("--nodes=2", f"--nodelist={head.name},{dead.name}", "--open-mode=append", script=lines)
    wait_for_output(cluster, kept, "ready")
    wait_for_output(cluster, moved, dead.name)

    def tasks() -> list[str]:
        return [command for _, command in cluster.processes_in(silent)]

    cluster.kill_slurmd(silent)
    cluster.crash(dead)
    assert cluster.processes_in(dead) == [] and "sleep 1234" in tasks()
    cluster.wait(kept, timeout_sec=60, until={"NODE_FAIL"})
    cluster.wait_node(dead, timeout_sec=60, until={"DOWN"})
    assert "sleep 1234" in tasks()

    for node in (silent, dead):
        cluster.start_slurmd(node)
    cluster.wait_node(silent, timeout_sec=30, until={"IDLE"})
    cluster.wait_node(dead, timeout_sec=30, until={"IDLE", "ALLOCATED", "MIXED"})
    deadline = time.monotonic() + 20
    while tasks() != ["slurmd -D"]:
        assert time.monotonic() < deadline, tasks()
        time.sleep(0.2)
    cluster.wait(moved, timeout_sec=40)
    assert cluster.job(moved)["Restarts"] == "1"


def test_link_down_and_up(cluster: SlurmCluster) -> None:
    a, b = cluster.nodes[:2]
    code = f"import socket; socket.create_connection(('{b.name}', 6818), timeout=1)"  # the port of slurmd

    def connects(node: Node) -> bool:
        try:
            cluster.run_on(node, sys.executable, "-c", code)
        except subprocess.CalledProcessError:
            return False
        return True

    assert connects(a)
    cluster.link_down(b)
    assert not connects(a)
    cluster.link_up(b)
    assert connects(a)


def traces_of(cluster: SlurmCluster) -> list[str]:
    """Everything on this machine that names the cluster: interfaces, namespaces, processes, hosts entries."""
    found = [name for _, name in socket.if_nameindex() if cluster.id in name]
    found += [path.name for path in Path("/run/netns").glob(f"{cluster.id}*")]
    found += [str(path) for path in Path("/proc").glob("[0-9]*") if f"{cluster.root}/" in environment_of(path)]
    found += [line for line in Path("/etc/hosts").read_text().splitlines() if cluster.id in line]
    found += [path.name for path in cluster_module._STATE_DIR.glob(f"{cluster.id}*")]
    return found


def environment_of(process: Path) -> str:
    try:
        return (process / "environ").read_text(errors="replace")
    except OSError:
        return ""


def test_close_leaves_nothing(slurm_machine: None, tmp_path: Path) -> None:
    with slurm_cluster(num_nodes=2, root=tmp_path) as second:
        second.sbatch("--nodes=2", script=script("srun sleep 100"))
        assert len(traces_of(second)) >= 1 + 3 + 4 + 1  # interface, namespaces, daemons, state file
    assert traces_of(second) == []


def test_a_failed_start_leaves_nothing(slurm_machine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: SlurmCluster, node: Node) -> None:
        raise RuntimeError("no slurmd today")

    monkeypatch.setattr(SlurmCluster, "start_slurmd", fail)
    half = SlurmCluster(2, tmp_path)
    with pytest.raises(RuntimeError, match="no slurmd today"):
        half.start()
    assert traces_of(half)
    half.close()
    assert traces_of(half) == []


def test_what_a_killed_run_left_is_removed_and_live_clusters_stay(cluster: SlurmCluster, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from slurm.cluster import SlurmCluster\n"
        "left = SlurmCluster(1, Path(sys.argv[1])); left.start(); print(left.id, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    killed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    cluster_id = killed.stdout.strip()
    assert list(Path("/run/netns").glob(f"{cluster_id}-*"))
    remove_stale_clusters()
    assert list(Path("/run/netns").glob(f"{cluster_id}-*")) == []
    assert f"{cluster_id}host" not in [name for _, name in socket.if_nameindex()]
    assert cluster.node_state(cluster.nodes[0]) <= {"IDLE", "ALLOCATED", "MIXED"}
