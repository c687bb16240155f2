"""The one task of each node of a job: meet the other nodes, start this node's ranks, say how they ended.

    srun --ntasks-per-node=1 python -m turbolm.launch.node --recipe FILE --attempt N --hosts a,b,c

The nodes meet through files in the attempt's folder (a shared file system is needed anyway), before any rank starts: a
node that is missing, has another number of GPUs or cannot be reached is a message within the start-up, not a hang.
Each launcher keeps a port open while it lives, so that after a failure the others can tell who is silent.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbolm.environment import drop_foreign
from turbolm.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_OK, EXIT_REQUEUE, UserError, exit_code_of
from turbolm.files import read_json, write_json
from turbolm.launch.doctor import preflight
from turbolm.launch.local import (
    Ranks,
    accelerate_config,
    launch_command,
    precision_override,
    process_environment,
    start_ranks,
    wait_for_ranks,
)
from turbolm.launch.network import free_port, interface_of, own_address, probe
from turbolm.plan.machine import check_machine, detect_machine
from turbolm.plan.plan import Plan, build_plan
from turbolm.recipe.load import load_recipe
from turbolm.recipe.paths import use_path
from turbolm.recipe.schema import Recipe
from turbolm.redaction import redact
from turbolm.reliability.build_locks import clear_stale_locks, extensions_root
from turbolm.reliability.late import HOSTS, Notices, name_some
from turbolm.reliability.open_files import raise_open_files
from turbolm.reliability.outcome import read_rank_ends
from turbolm.train.run_directory import RunDirectory, run_directory

_FAILED = "failed"  # in the attempt's folder: the batch shell need not wait long for a node that does not answer
_MET = "met.json"  # in the folder of the nodes' records: all of them, or why they did not meet
_POLL_SEC = 0.5
_HEAD_GRACE_SEC = 10  # the head knows who is late; the others wait a little longer for its word
_MEET_TIMEOUT_SEC = 600  # slow images and module loads; a recipe's process_group_timeout may shorten it


@dataclass(frozen=True)
class Place:
    """Where this launcher stands among the job's nodes."""

    node: int
    hosts: tuple[str, ...]

    @property
    def host(self) -> str:
        return self.hosts[self.node]


def find_place(recipe: Recipe, hosts: str) -> Place:
    """This task's place, from Slurm's variables inside the task: the batch shell's are those of the first node."""
    names = tuple(name for name in hosts.split(",") if name)
    node, num_nodes = os.environ.get("SLURM_NODEID", ""), recipe.cluster.num_nodes
    if not node.isdigit():
        raise UserError("SLURM_NODEID is not set; this is started by srun, once on each node")
    if len(names) != num_nodes or int(node) >= num_nodes:
        raise UserError(
            f"the job has {len(names)} nodes ({hosts or 'none'}), and cluster.num_nodes is {num_nodes}; "
            "`scontrol show hostnames` must list one host for each"
        )
    return Place(int(node), names)


def run_node(recipe: Recipe, recipe_file: str, attempt: int, place: Place) -> int:
    """Start this node's ranks and wait for them; returns 0 when all of them ended cleanly.

    However that ends, the node's record in the attempt's folder tells.
    """
    folder = run_directory(recipe).attempt(attempt)
    mine: dict[str, Any] = {"node": place.node, "host": place.host}

    def record(**ends: Any) -> None:
        write_json(folder / "nodes" / f"{place.node}.json", {**mine, **ends})
        if ends.get("exit_code", EXIT_OK) != EXIT_OK:
            (folder / _FAILED).touch()

    with ExitStack() as doors:  # open until the record tells the others how this node ended
        try:
            mine["address"] = own_address(place.node, place.hosts)
            mine["port"] = doors.enter_context(open_door(mine["address"])).getsockname()[1]
            plan = _plan_here(recipe, place, mine)
            if place.node == 0:
                mine["main_port"] = free_port(mine["address"])
                mine["doctor_port"] = free_port(mine["address"])
            record()
            nodes = meet(folder / "nodes", place, _meet_timeout_sec(recipe))
            check_same(nodes)
            if len(nodes) > 1 and recipe.cluster.slurm is not None and recipe.cluster.slurm.preflight:
                preflight(plan, place.node, nodes)
            code, lost = _train_here(plan, recipe_file, attempt, place, nodes)
            record(exit_code=code, lost=lost)
            return code
        except UserError as error:
            record(refused=str(error))
            raise
        except TimeoutError as error:
            print(f"turbolm: {error}", file=sys.stderr)
            record(exit_code=EXIT_FAILED, lost=[str(error)])
            return EXIT_FAILED
        except Exception as error:
            record(exit_code=EXIT_FAILED, lost=[redact(f"{place.host}: {type(error).__name__}: {error}")])
            raise


def open_door(address: str) -> socket.socket:
    """A listening port of this node: the kernel answers, and nothing needs to accept."""
    door = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    door.bind((address, 0))
    door.listen(4096)  # nobody accepts, so what asked stays in the queue: twice the other nodes
    return door


def _meet_timeout_sec(recipe: Recipe) -> float:
    execution = recipe.execution
    return min(_MEET_TIMEOUT_SEC, execution.process_group_timeout, execution.startup_timeout or _MEET_TIMEOUT_SEC)


def _train_here(
    plan: Plan, recipe_file: str, attempt: int, place: Place, nodes: Sequence[dict[str, Any]]
) -> tuple[int, list[str]]:
    """Start the ranks of this node and wait for their end; returns what `_judge` does."""
    recipe = plan.recipe
    run, folder = run_directory(recipe), run_directory(recipe).attempt(attempt)
    environment = process_environment(plan) | _extensions_folder(recipe)
    build_extensions(plan, environment)
    command = node_command(folder, plan, recipe_file, attempt, place, nodes)
    environment |= _network_environment(plan, nodes[place.node]["address"])
    environment[HOSTS] = ",".join(place.hosts)  # so that ranks can name a node that none of them hears from
    process = start_ranks(command, environment, folder / f"launcher.node{place.node}.log")
    numbers = range(place.node * plan.processes_per_node, (place.node + 1) * plan.processes_per_node)
    cut_short = wait_for_ranks(process, Ranks(run, attempt, numbers, recipe.execution))
    if cut_short is not None:
        return EXIT_FAILED, [f"{place.host}: {cut_short.message}"]
    return _judge(run, attempt, plan, place, nodes)


def _plan_here(recipe: Recipe, place: Place, mine: dict[str, Any]) -> Plan:
    """The plan on this node; what must be the same on every node is noted in `mine`."""
    machine = detect_machine()
    try:
        check_machine(recipe, machine)
        plan = build_plan(recipe, machine)
        if machine.num_cpus < plan.processes_per_node:
            print(
                f"turbolm: {place.host}: {plan.processes_per_node} processes share {machine.num_cpus} CPUs; set "
                "cluster.slurm.cpus_per_task",
                file=sys.stderr,
            )
    except UserError as error:
        raise UserError(f"{place.host}: {error}") from None
    mine |= {"device": plan.device, "processes": plan.processes_per_node, "precision": plan.precision}
    return plan


def meet(folder: Path, place: Place, timeout_sec: float) -> list[dict[str, Any]]:
    """The records of all nodes, once they are all there and this node reaches the head. Raises UserError.

    The head reads each record once and writes them into one file, which is all that the others look for: 64 nodes that
    each read 64 files twice a second would keep a shared file system busy.
    """
    if place.node == 0:
        return _gather(folder, place, timeout_sec)
    deadline = time.monotonic() + timeout_sec + _HEAD_GRACE_SEC
    while (met := read_json(folder / _MET)) is None:
        head = read_json(folder / "0.json") or {}
        if "refused" in head:
            raise UserError(head["refused"])
        if time.monotonic() > deadline:
            raise TimeoutError(f"no sign of {place.hosts[0]} within {timeout_sec:.0f} s")
        time.sleep(_POLL_SEC)
    if "refused" in met:
        raise UserError(met["refused"])
    if "late" in met:
        raise TimeoutError(met["late"])
    head = met["nodes"][0]
    if probe(head["address"], head["port"]) != "open":
        raise TimeoutError(f"{place.host} cannot reach {head['host']} ({head['address']})")
    return list(met["nodes"])


def _gather(folder: Path, place: Place, timeout_sec: float) -> list[dict[str, Any]]:
    """`meet` on the head; it says meanwhile which nodes are late."""
    here: dict[int, dict[str, Any]] = {}
    notices = Notices()
    while True:
        names = {path.name for path in folder.iterdir()}
        new = [node for node in range(len(place.hosts)) if node not in here and f"{node}.json" in names]
        here |= {node: record for node in new if (record := read_json(folder / f"{node}.json")) is not None}
        refused = [record["refused"] for record in here.values() if "refused" in record]
        if refused:
            write_json(folder / _MET, {"refused": refused[0]})
            raise UserError(refused[0])
        if len(here) == len(place.hosts):
            break
        silent = name_some([host for node, host in enumerate(place.hosts) if node not in here])
        if notices.waited_sec > timeout_sec:
            late = f"no sign of {silent} within {timeout_sec:.0f} s"
            write_json(folder / _MET, {"late": late})
            raise TimeoutError(late)
        if notices.is_due():
            num = f"{len(place.hosts) - len(here)} of {len(place.hosts)} nodes"
            print(f"turbolm: {num} have not come after {notices.waited_sec:.0f} s: {silent}", file=sys.stderr)
        time.sleep(_POLL_SEC)
    nodes = [here[node] for node in range(len(place.hosts))]
    write_json(folder / _MET, {"nodes": nodes})
    return nodes


def check_same(nodes: Sequence[dict[str, Any]]) -> None:
    """Every node starts the same number of ranks, on the same kind of device."""
    for key, what in (("device", "device"), ("processes", "number of processes"), ("precision", "precision")):
        values = {node["host"]: node[key] for node in nodes}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{host}: {value}" for host, value in values.items())
            raise UserError(f"the nodes differ in their {what} ({listed}); set it in the recipe")


def node_command(
    folder: Path, plan: Plan, recipe_file: str, attempt: int, place: Place, nodes: Sequence[dict[str, Any]]
) -> list[str]:
    """The `accelerate launch` of this node."""
    head, several = nodes[0], []
    if len(nodes) > 1:  # rdzv_backend and same_network are read from the command line only
        several = ["--deepspeed_multinode_launcher", "standard", "--machine_rank", str(place.node)]
        several += ["--main_process_ip", head["address"], "--rdzv_backend", "static", "--same_network"]
    config_file = folder / f"accelerate.node{place.node}.yaml"
    arguments = ["--recipe", recipe_file, "--attempt", str(attempt), precision_override(plan)]
    config = accelerate_config(plan, len(nodes), place.node)
    return launch_command(config_file, config, head["main_port"], arguments, several)


def build_extensions(plan: Plan, environment: dict[str, str]) -> None:
    """Compile DeepSpeed's Adam once on this node: left to the ranks, all nodes would wait for the slowest."""
    execution = plan.recipe.execution
    if execution.adam_kernel == "torch" or (execution.adam_kernel == "auto" and not execution.offload_optimizer):
        return
    if plan.recipe.optimizer.name != "adamw":
        return
    on_host = execution.offload_optimizer or plan.device == "cpu"
    builder = "CPUAdamBuilder" if on_host else "FusedAdamBuilder"
    ended = threading.Event()
    clear_stale_locks(extensions_root(environment), lambda text: print(f"turbolm: {text}", file=sys.stderr), ended)
    code = f"from deepspeed.ops.op_builder import {builder}; {builder}().load()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    ended.set()
    if done.returncode:
        raise UserError(f"DeepSpeed's {builder} cannot be built here:\n{done.stderr.strip()[-2000:]}")


def _extensions_folder(recipe: Recipe) -> dict[str, str]:
    """Compiled for this node's own processor, so each node has its own unless the user says otherwise."""
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return {}
    cache = use_path(recipe.execution.cache_dir, "execution.cache_dir")
    folder = cache / "torch_extensions" / socket.gethostname()
    return {"TORCH_EXTENSIONS_DIR": str(folder.absolute())}


def _network_environment(plan: Plan, address: str) -> dict[str, str]:
    """gloo takes the interface of the host's name, which is the loopback on many distributions."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return {}
    interface = interface_of(address)
    return {"GLOO_SOCKET_IFNAME": interface} if interface else {}


def _judge(
    run: RunDirectory, attempt: int, plan: Plan, place: Place, nodes: Sequence[dict[str, Any]]
) -> tuple[int, list[str]]:
    """This task's exit code, and which nodes and ranks are lost as seen from here, in words."""
    folder = run.attempt(attempt)
    own = range(place.node * plan.processes_per_node, (place.node + 1) * plan.processes_per_node)
    ends = {end.rank: end for end in read_rank_ends(folder, own)}
    codes = [ends[rank].exit_code if rank in ends else EXIT_FAILED for rank in own]
    if all(code in (EXIT_OK, EXIT_REQUEUE) for code in codes):
        return EXIT_OK, []
    lost = [f"rank {rank} on {place.host} was killed" for rank in own if rank not in ends]
    for node in nodes:
        answer = probe(node["address"], node["port"]) if node["node"] != place.node else "open"
        record = read_json(folder / "nodes" / f"{node['node']}.json") or {}
        if answer == "silent" or (answer == "closed" and "exit_code" not in record):  # else it ended by itself
            lost.append(f"node {node['node']}, {node['host']} ({node['address']}), does not answer")
    for end in (ends[rank] for rank in own if rank in ends):
        print(f"rank {end.rank} on {place.host}: {end.kind}: {end.message}", file=sys.stderr)
    print("\n".join(lost), file=sys.stderr)
    return (EXIT_BAD_INPUT if EXIT_BAD_INPUT in codes else EXIT_FAILED), lost


def main() -> int:
    """Parse the arguments and run this node."""
    parser = argparse.ArgumentParser(prog="python -m turbolm.launch.node", description=__doc__)
    parser.add_argument("--recipe", required=True, help="the job's resolved recipe")
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--hosts", required=True, help="the job's hosts by node number, with commas")
    arguments = parser.parse_args()
    raise_open_files()

    def run() -> int:
        recipe = load_recipe(arguments.recipe)
        place = find_place(recipe, arguments.hosts)
        drop_foreign(in_own_step=True)
        return run_node(recipe, arguments.recipe, arguments.attempt, place)

    return exit_code_of(run)


if __name__ == "__main__":
    sys.exit(main())
