"""Start a run on this machine through `accelerate launch`, watch it, and stop it cleanly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from turbolm.environment import children_environment, cpu_environment, tell_dropped, use_expandable_segments
from turbolm.errors import EXIT_FAILED, EXIT_REQUEUE, EXIT_STOPPED
from turbolm.launch.job import newest_step
from turbolm.launch.network import free_port
from turbolm.plan.plan import Plan
from turbolm.recipe.execution import Execution
from turbolm.reliability.orphans import LAUNCHER, end_with_parent
from turbolm.reliability.outcome import (
    COMPLETE,
    FAILED,
    FINISHED,
    STOPPED,
    Outcome,
    explain,
    read_outcome,
    write_outcome,
)
from turbolm.reliability.processes import command_of, descendants
from turbolm.reliability.run_lock import RunLock
from turbolm.reliability.stop import STOP_SIGNALS, SignalRequests
from turbolm.report.metrics import read_lines
from turbolm.train.run_directory import RunDirectory
from turbolm.units import format_duration

_POLL_SEC = 0.5
_WATCHDOG_SEC = 60.0  # what the ranks' own watchdog, which knows more, gets to tell of a start that hangs


def launch(plan: Plan, run: RunDirectory, attempt: int, recipe_file: str, overrides: Sequence[str]) -> int:
    """Run the plan to its end, or to a stop request; returns the exit code of the run. Raises UserError.

    The processes live in a session of their own, so that Ctrl-C reaches only this one: it leaves a stop file in the
    attempt's folder, which the ranks notice together. Asked a second time, it ends them at once; what was saved before
    stays.
    """
    RunLock(run.path).wait_until_free()
    folder = run.attempt(attempt)
    arguments = ["--recipe", recipe_file, "--attempt", str(attempt), *overrides, precision_override(plan)]
    command = launch_command(folder / "accelerate.yaml", accelerate_config(plan), free_port(), arguments)
    process = start_ranks(command, process_environment(plan), folder / "launcher.log")
    cut_short = wait_for_ranks(process, Ranks(run, attempt, range(plan.world_size), plan.recipe.execution))
    outcome = read_outcome(folder)
    if outcome is None:
        outcome = cut_short or explain(folder, process.returncode)
        write_outcome(folder, outcome)
    has_told = outcome.status in (FINISHED, COMPLETE) and process.returncode == 0  # else killed during the export
    if outcome.message and not has_told:
        print(f"turbolm: {outcome.message}", file=sys.stderr)
    return outcome.exit_code


def precision_override(plan: Plan) -> str:
    """Return the override that gives all ranks the launcher's precision: nvidia-smi may fail in one of them."""
    return f"train.precision={plan.precision}"


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
    """The environment of a plan's ranks."""
    return rank_environment(plan.device, plan.threads_per_process)


def rank_environment(device: str, num_threads: int) -> dict[str, str]:
    """The environment of ranks: threads that do not fight over cores, and this Python's tools (ninja) on the path.

    On a CPU glibc would give the memory of every large tensor back to the system and fault it in again at the next
    step: 90 of the quickstart's 415 CPU seconds were spent in the kernel, and 20 once glibc was told to keep it.
    """
    inherited, dropped = children_environment(os.environ)
    tell_dropped(dropped)
    scripts = str(Path(sys.executable).parent)
    if device == "cuda":
        use_expandable_segments(inherited)
    keep = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
    return {
        **(keep if device == "cpu" else {}),
        **inherited,
        "OMP_NUM_THREADS": str(num_threads),
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": device,  # else DeepSpeed guesses, and complains where there is no GPU
        **(cpu_environment() if device == "cpu" else {}),
        "PATH": os.pathsep.join([scripts, inherited.get("PATH", os.defpath)]),
    }


def start_ranks(command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start `accelerate launch`, whose errors and those of the ranks before they log go to `log`.

    It must not act on signals itself: torchelastic would kill ranks that take longer than 30 s to save. They are
    ignored (which the ranks inherit until they listen), and torchelastic, which installs handlers of its own, is told
    to mind another one.
    """
    launcher = os.getpid()

    def before_exec() -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        end_with_parent(launcher)

    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            stderr=file,
            env={**environment, "PET_SIGNALS_TO_HANDLE": "SIGQUIT", LAUNCHER: str(launcher)},
            start_new_session=True,
            preexec_fn=before_exec,  # this process has no threads, for which that would be unsafe
        )


@dataclass(frozen=True)
class Ranks:
    """What a launcher knows of the ranks that it starts on this node."""

    run: RunDirectory
    attempt: int
    numbers: range
    execution: Execution

    def have_met(self) -> bool:
        """Whether the world of ranks has formed: only then do they open their logs."""
        return (self.run.attempt(self.attempt) / f"log.rank{self.numbers[0]}.txt").exists()


def wait_for_ranks(process: subprocess.Popen[bytes], ranks: Ranks) -> Outcome | None:
    """Wait for the end; returns how this process ended the ranks, or None where they ended by themselves.

    The first signal asks the ranks to save and stop, or ends them where they have not met yet; another one ends them.
    A world that does not form within `execution.startup_timeout` is ended too.
    """
    ends: list[Outcome] = []

    def first(number: int) -> None:
        if ranks.have_met():
            print("\nstopping: saving after this step (once more to end at once)", file=sys.stderr, flush=True)
            ranks.run.attempt_stop_file(ranks.attempt).touch()
            return
        code = EXIT_STOPPED if number == signal.SIGINT else EXIT_REQUEUE
        ends.append(Outcome(STOPPED, code, "stopped before the first step; nothing had been trained"))
        _end(process)

    def again(_: int) -> None:
        ends.append(Outcome(STOPPED, EXIT_STOPPED, f"ended at once; {_what_is_lost(ranks)}"))
        _end(process)

    with SignalRequests(first, again):
        why = _until_met(process, ranks)
        if why is not None:
            ends.append(Outcome(FAILED, EXIT_FAILED, why))
            _end(process)
        process.wait()
    return ends[-1] if ends else None


def _until_met(process: subprocess.Popen[bytes], ranks: Ranks) -> str | None:
    """Wait until the ranks have met or the process has ended; returns why that took too long, if it did."""
    limit_sec, begun = ranks.execution.startup_timeout, time.monotonic()
    while process.poll() is None and not ranks.have_met():
        waited_sec = time.monotonic() - begun
        if limit_sec is not None and waited_sec > limit_sec:
            started = sum("turbolm.train" in command_of(pid) for pid in descendants({process.pid}))
            if not started or ranks.execution.hang_timeout is None or waited_sec > limit_sec + _WATCHDOG_SEC:
                return (
                    f"the {len(ranks.numbers)} ranks of this machine did not meet within "
                    f"{format_duration(limit_sec)} (execution.startup_timeout): {started} of them were started; "
                    f"logs: {ranks.run.attempt(ranks.attempt)}"
                )
        with suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_SEC)
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the launcher's processes; the watchdog beside the ranks ends by itself, and cleans up."""
    for pid in [process.pid, *descendants({process.pid})]:
        if "turbolm.reliability.watchdog" not in command_of(pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _what_is_lost(ranks: Ranks) -> str:
    """The steps that are trained and not saved, in words."""
    steps = [line["step"] for line in read_lines(ranks.run.metrics) if "train/loss" in line]
    last, saved = (steps[-1] if steps else 0), newest_step(ranks.run)
    if last <= saved:
        return f"nothing after the checkpoint of step {saved} was trained"
    what = f"step {last}" if last == saved + 1 else f"steps {saved + 1} to {last}"
    return f"{what} lost, " + (f"the newest checkpoint is of step {saved}" if saved else "there is no checkpoint")
