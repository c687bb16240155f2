"""Time from `turbolm submit` to the first step on three nodes, part by part, and how each part grows with the ranks.

    python benchmarks/start_time.py [--processes 1] [--rounds 2] [--ranks 8 16 32 64]

A real Slurm of three nodes on this machine (tests/slurm/cluster.py; needs root) runs a job of a tiny model, prepared
before. The parts come from what a run leaves anyway: Slurm's times of the job (whole seconds), the files of the
attempt, and its start-up.json. All nodes share the cores of this machine, so parts that compute take longer than on
nodes of their own: the processor time of rank 0 is beside them. `--ranks` measures by itself what grows with the world:
forked processes that do nothing but meet in the store and build the gloo group. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

NODES = 3
# Of each part, how it grows with n nodes, N ranks, P parameters.
FORMULAS = {
    "queue": "the cluster's",
    "batch shell: prepare checks, attempt opened": "constant",
    "nodes start and meet": "the slowest node, at most 0.5 s between looks; the head reads n files once, others 1 file",
    "preflight (turbolm doctor)": "min(n - 1, 8) rounds of pairs; off in `without preflight`",
    "launcher starts ranks": "constant on a node; n requests at torchrun's store",
    "imports": "constant a rank; N ranks read the same files",
    "plan and token store": "constant a rank",
    "wait for all ranks": "the slowest rank; 4 requests a rank (4N at the store)",
    "process groups": "N connections a rank, N^2 addresses read at the store; NCCL log2 N",
    "run directory": "constant on rank 0, then one broadcast: log2 N",
    "model": "P (stage 3: P/N, and a message of each tensor from rank 0 when weights are drawn)",
    "engine": "P (stages 1 and 2: P/N moments)",
    "checks of the model": "a few forward passes: constant a rank",
    "order, log, trackers": "constant a rank; N host names gathered once",
    "resume": "P/N read a rank; nothing in a fresh run",
    "first step": "as any step, with what is built at first use",
}


def run_job(cluster: Any, work: Path, name: str, overrides: list[str]) -> dict[str, float]:
    """Submit a prepared job of three nodes; returns the seconds of each part."""
    command = [sys.executable, "-m", "turbolm.cli", "submit", "recipe.yaml", f"name={name}", *overrides]
    began = time.time()
    done = subprocess.run(command, cwd=work, env=cluster.env, capture_output=True, text=True, check=True)
    job_id = int(done.stdout.split()[2].rstrip(":"))
    submitted = time.time()
    cluster.wait(job_id, timeout_sec=600)
    attempt, job = work / "runs" / name / "attempts" / "1", cluster.job(job_id)
    started = datetime.fromisoformat(job["StartTime"]).timestamp()
    ranks = json.loads((attempt / "start-up.json").read_text())
    at = {file: (attempt / file).stat().st_mtime for file in ("start.json", "nodes/met.json", "accelerate.node0.yaml")}
    moments = {
        "turbolm submit": submitted,
        "queue": max(started, submitted),
        "batch shell: prepare checks, attempt opened": at["start.json"],
        "nodes start and meet": at["nodes/met.json"],
        "preflight (turbolm doctor)": at["accelerate.node0.yaml"],
        "launcher starts ranks": ranks["begun"],
    }
    ends = [began, *moments.values()]
    parts = {part: end - begin for (part, end), begin in zip(moments.items(), ends, strict=False)}
    cpu = {f"{part}, processor": seconds for part, seconds in ranks["cpu_seconds"].items()}
    return {**parts, **ranks["seconds"], "all": ranks["ended"] - began, **cpu}


def measure_jobs(processes: int, rounds: int) -> dict[str, dict[str, float]]:
    """The median of each part, with preflight and without."""
    from tests.slurm.cluster import slurm_cluster
    from tests.train.harness import SEQ_LEN, make_recipe

    from turbolm.data.prepare.build import prepare
    from turbolm.recipe.load import dump_recipe

    found: dict[str, dict[str, float]] = {}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory(prefix="st-") as made, slurm_cluster(NODES, Path(made) / "s") as cluster:
        work = Path(made)
        world_size = NODES * processes
        recipe = make_recipe(
            work,
            train={"budget": 4 * world_size * SEQ_LEN, "global_batch": world_size * SEQ_LEN},
            execution={"cache_dir": "cache", "runs_dir": "runs", "zero_stage": 2, "threads_per_process": 1},
            cluster={"device": "cpu", "num_nodes": NODES, "processes_per_node": processes, "slurm": {}},
            logging={"every_steps": 1, "sample_tokens": 0},
        )
        os.chdir(work)
        (work / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        prepare(recipe)
        for kind, overrides in (("without preflight", ["cluster.slurm.preflight=false"]), ("with preflight", [])):
            all_of = []
            for number in range(rounds):
                all_of.append(run_job(cluster, work, f"{kind.split()[0]}-{number}", overrides))
                print(kind, {part: round(seconds, 2) for part, seconds in all_of[-1].items()}, flush=True)
            found[kind] = {part: round(statistics.median(one[part] for one in all_of), 2) for part in all_of[0]}
        os.chdir(ROOT)
    return found


def measure_meeting(world_size: int) -> dict[str, float]:
    """Processor and clock seconds of a world of processes on this machine that meet and build one gloo group."""
    import torch.distributed as dist

    from turbolm.launch.network import free_port
    from turbolm.train.arrival import meet_ranks

    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port("127.0.0.1")), "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }  # fmt: skip
    receiver, sender = os.pipe()
    children = []
    for rank in range(world_size):
        pid = os.fork()
        if not pid:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            began, cpu = time.monotonic(), time.process_time()
            kept = meet_ranks("cpu", "fp32", 300)
            met, met_cpu = time.monotonic(), time.process_time()
            dist.init_process_group("gloo")
            del kept
            times = [met - began, met_cpu - cpu, time.monotonic() - met, time.process_time() - met_cpu]
            times = [rank, *times]
            os.write(sender, (json.dumps(times) + "\n").encode())
            dist.barrier()
            if rank == 0:  # it serves the store
                time.sleep(0.5)
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    os.close(sender)
    with os.fdopen(receiver) as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == world_size
    [server] = [row for row in rows if row[0] == 0]
    _, meet, meet_cpu, group, group_cpu = zip(*(row for row in rows if row[0]), strict=True)
    return {
        "meeting_clock_s": max(meet), "meeting_cpu_ms_a_rank": 1e3 * statistics.mean(meet_cpu),
        "gloo_clock_s": max(group), "gloo_cpu_ms_a_rank": 1e3 * statistics.mean(group_cpu),
        "rank_0_that_serves_cpu_ms": 1e3 * (server[2] + server[4]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1, help="of each node")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 16, 32, 64])
    arguments = parser.parse_args()
    jobs = measure_jobs(arguments.processes, arguments.rounds) if arguments.rounds else {}
    meetings = {}
    for world_size in arguments.ranks:  # torch is imported once, here
        meetings[str(world_size)] = {name: round(value, 4) for name, value in measure_meeting(world_size).items()}
        print(world_size, meetings[str(world_size)], flush=True)
    for part, formula in FORMULAS.items():
        found = [f"{kind} {one.get(part)} s ({one.get(f'{part}, processor')})" for kind, one in jobs.items()]
        print(f"{part}: {formula}; {', '.join(found)}")
    figures = {"nodes": NODES, "processes": arguments.processes, "jobs": jobs, "ranks": meetings, "formulas": FORMULAS}
    print(json.dumps({"bench": "start_time", "figures": figures, "rivals": {}, "targets": {}, "met": {}}))


if __name__ == "__main__":
    main()
