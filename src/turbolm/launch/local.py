"""Start a run on this machine through `accelerate launch`, watch it, and stop it cleanly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import yaml

from turbolm.launch.network import free_port
from turbolm.plan.machine import Machine
from turbolm.plan.plan import Plan
from turbolm.reliability.orphans import END_WITH_PARENT, end_with_parent
from turbolm.reliability.outcome import FAILED, HUNG, REFUSED, explain, read_outcome, write_outcome
from turbolm.reliability.run_lock import RunLock
from turbolm.train.run_directory import RunDirectory, open_attempt, refuse_links_out

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


def launch(plan: Plan, machine: Machine, run: RunDirectory, recipe_file: str, overrides: Sequence[str]) -> int:
    """Run the plan to its end, or to a stop request; returns the exit code of the run. Raises UserError.

    The processes live in a session of their own, so that Ctrl-C reaches only this one: it leaves a stop file, which
    the ranks notice together. Asked a second time, it ends them at once; what was saved before stays.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    refuse_links_out(run)
    RunLock(run.path).wait_until_free()
    attempt = open_attempt(run)
    folder = run.attempt(attempt)
    arguments = ["--recipe", recipe_file, "--attempt", str(attempt), *overrides]
    command = launch_command(folder / "accelerate.yaml", accelerate_config(plan), free_port(), arguments)
    process = start_ranks(command, process_environment(plan), folder / "launcher.log")
    wait_for_ranks(process, run)
    run.stop_file.unlink(missing_ok=True)
    outcome = read_outcome(folder)
    if outcome is None:
        outcome = explain(folder, process.returncode)
        write_outcome(folder, outcome)
    if outcome.status in (HUNG, REFUSED, FAILED):  # of all else the ranks have told
        print(f"turbolm: {outcome.message}", file=sys.stderr)
    return outcome.exit_code


def accelerate_config(plan: Plan, num_nodes: int = 1, node: int = 0) -> dict[str, object]:
    """The Accelerate configuration of one node of a run; the recipe's DeepSpeed settings do not belong here."""
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "num_machines": num_nodes,
        "num_processes": plan.processes_per_node * num_nodes,
        "machine_rank": node,
        "main_training_function": "main",
        "use_cpu": False,
    }


def launch_command(
    config_file: Path, config: dict[str, object], port: int, arguments: Sequence[str], several: Sequence[str] = ()
) -> list[str]:
    """The exact command that starts the ranks with these `arguments`; writes its configuration file.

    `several` are the options of a run on several nodes.
    """
    config_file.write_text(yaml.safe_dump(config), encoding="utf-8")
    sizes = ("--num_processes", str(config["num_processes"]), "--num_machines", str(config["num_machines"]))
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config_file), *sizes),
        *("--main_process_port", str(port), *several, "-m", "turbolm.train", *arguments),
    ]


def process_environment(plan: Plan) -> dict[str, str]:
    """The ranks' environment: threads that do not fight over cores, and this Python's tools (ninja) on the path.

    On a CPU glibc would give the memory of every large tensor back to the system and fault it in again at the next
    step: 90 of the quickstart's 415 CPU seconds were spent in the kernel, and 20 once glibc was told to keep it.
    """
    scripts = str(Path(sys.executable).parent)
    keep = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
    return {
        **(keep if plan.device == "cpu" else {}),
        **os.environ,
        "OMP_NUM_THREADS": str(plan.threads_per_process),
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": plan.device,  # else DeepSpeed guesses, and complains where there is no GPU
        "PATH": os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)]),
    }


def start_ranks(command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start `accelerate launch`, whose errors and those of the ranks before they log go to `log`.

    It must not act on signals itself: torchelastic would kill ranks that take longer than 30 s to save. They are
    ignored (which the ranks inherit until they listen), and torchelastic, which installs handlers of its own, is told
    to mind another one.
    """
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            stderr=file,
            env={**environment, "PET_SIGNALS_TO_HANDLE": "SIGQUIT", END_WITH_PARENT: "1"},
            start_new_session=True,
            preexec_fn=_before_exec,  # this process has no threads, for which that would be unsafe
        )


def _before_exec() -> None:
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def wait_for_ranks(process: subprocess.Popen[bytes], run: RunDirectory) -> None:
    """Wait for the end; the first signal asks the ranks to save and stop, another one kills them."""
    requests = 0

    def on_signal(number: int, _: FrameType | None) -> None:
        nonlocal requests
        requests += 1
        if requests == 1:
            print("\nstopping: saving after this step (once more to end at once)", file=sys.stderr, flush=True)
            run.stop_file.touch()
        else:
            os.killpg(process.pid, signal.SIGKILL)

    before = {number: signal.signal(number, on_signal) for number in _STOP_SIGNALS}
    try:
        process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
