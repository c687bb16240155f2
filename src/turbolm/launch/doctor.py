"""Where `turbolm doctor` runs: here, on every node of an allocation, before the ranks of a job. Torch-free."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from turbolm.doctor.examine import examine
from turbolm.doctor.render import describe_findings, render_report
from turbolm.doctor.task import PREFLIGHT_ROUNDS, Task
from turbolm.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_OK, EXIT_STOPPED, UserError
from turbolm.launch.network import free_port, interface_of, own_address, resolve
from turbolm.plan.machine import detect_machine, resolve_device, resolve_processes_per_node
from turbolm.plan.plan import Plan
from turbolm.recipe.execution import Execution
from turbolm.recipe.load import load_recipe
from turbolm.recipe.paths import use_path
from turbolm.recipe.schema import Recipe
from turbolm.reliability.stop import SignalRequests

_SPECIAL_STEPS = 0xFFFFFFF0  # slurm.h: SLURM_BATCH_SCRIPT, SLURM_INTERACTIVE_STEP and others lie above
_SRUN_WAIT = 30  # seconds that srun waits for the other nodes once one has ended


def doctor(recipe_file: str | None, overrides: Sequence[str], timeout_sec: float, *, as_json: bool) -> int:
    """Examine, and print the report on one node; returns the exit code. Raises UserError.

    In an allocation it starts itself once on each node; started by srun it examines the nodes of that step together.
    """

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    try:
        with SignalRequests(stop, stop):
            if "SLURM_JOB_ID" in os.environ and not _in_step():
                return _on_every_node()
            return _here(recipe_file, overrides, timeout_sec, as_json=as_json)
    except KeyboardInterrupt:
        print("doctor: stopped", file=sys.stderr)
        return EXIT_STOPPED


def preflight(plan: Plan, node: int, nodes: Sequence[Mapping[str, Any]]) -> None:
    """Examine a job's nodes before training. Raises UserError with what fails, TimeoutError where a node is silent."""
    task = Task(
        node=node,
        hosts=tuple(str(one["host"]) for one in nodes),
        head=str(nodes[0]["address"]),
        address=str(nodes[node]["address"]),
        port=int(nodes[0]["doctor_port"]),
        num_ranks=plan.processes_per_node,
        device=plan.device,
        folders=_folders(plan.recipe),
        max_rounds=PREFLIGHT_ROUNDS,
    )
    report = examine(task, interface_of(task.address))
    if node == 0:
        print(render_report(report), file=sys.stderr, flush=True)
    if report["silent"]:
        raise TimeoutError("\n".join(["preflight:", *describe_findings(report, only_failures=True)]))
    if not report["ok"]:
        raise UserError(
            "\n".join(["preflight (cluster.slurm.preflight):", *describe_findings(report, only_failures=True)])
        )


def _on_every_node() -> int:
    """Start this command once on each node of the allocation."""
    num_nodes = os.environ.get("SLURM_JOB_NUM_NODES") or os.environ.get("SLURM_NNODES", "1")
    if shutil.which("srun") is None:
        raise UserError("this is a Slurm job without srun on PATH; start it with srun --ntasks-per-node=1")
    sizes = (f"--nodes={num_nodes}", f"--ntasks={num_nodes}", "--ntasks-per-node=1", f"--wait={_SRUN_WAIT}")
    command = ["srun", *sizes, sys.executable, "-m", "turbolm.cli", *sys.argv[1:]]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()  # srun ends its tasks
        process.wait()
        raise


def _here(recipe_file: str | None, overrides: Sequence[str], timeout_sec: float, *, as_json: bool) -> int:
    recipe = load_recipe(recipe_file, overrides) if recipe_file else None
    hosts, node = _step()
    if int(os.environ.get("SLURM_LOCALID", "0") or 0):
        return EXIT_OK  # one task a node is enough
    address = own_address(node, hosts)
    machine = detect_machine()
    if recipe is None:
        device = "cuda" if machine.num_gpus else "cpu"
        num_ranks = machine.num_gpus or min(2, machine.num_cpus)
    else:
        device = resolve_device(recipe, machine)
        num_ranks = resolve_processes_per_node(recipe, machine, device)
    folders = _folders(recipe)
    task = Task(
        node=node,
        hosts=hosts,
        head=address if node == 0 else resolve(hosts[0]),
        address=address,
        port=_step_port() if len(hosts) > 1 else free_port(address),
        num_ranks=num_ranks,
        device=device,
        folders=folders,
        meet_sec=timeout_sec,
    )
    try:
        report = examine(task, interface_of(address))
    except TimeoutError as error:
        print(f"turbolm: {error}", file=sys.stderr)
        return EXIT_FAILED
    if node:
        return EXIT_OK
    print(json.dumps(report, indent=1) if as_json else render_report(report), flush=True)
    return EXIT_OK if report["ok"] else EXIT_BAD_INPUT


def _step() -> tuple[tuple[str, ...], int]:
    """The hosts of this step of a Slurm job, and which of them this is; outside a step, this machine."""
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if not nodes or not _in_step():
        return (os.uname().nodename,), 0
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"scontrol, which lists the hosts of this step, does not work here: {error}") from None
    return tuple(done.stdout.split()), int(os.environ["SLURM_NODEID"])


def _in_step() -> bool:
    """Whether srun started this process; the shells of sbatch and salloc have no step, or a special one."""
    step = os.environ.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < _SPECIAL_STEPS


def _step_port() -> int:
    """A port that all nodes of the step know without asking; another step gets another one."""
    step = f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    return 10_000 + zlib.crc32(step.encode()) % 20_000


def _folders(recipe: Recipe | None) -> dict[str, str]:
    """The folders that a run writes to, by what they are for."""
    execution = Execution() if recipe is None else recipe.execution
    named = {"run": (execution.runs_dir, "runs_dir"), "cache": (execution.cache_dir, "cache_dir")}
    return {name: str(Path.cwd() / use_path(text, f"execution.{key}")) for name, (text, key) in named.items()}
