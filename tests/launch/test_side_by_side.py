"""Runs side by side, each a small process that only tells what it was given, and the shares of a machine."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launch.harness import RECIPE
from turbolm.ablate.runner import Done, Task
from turbolm.errors import UserError
from turbolm.launch.network import PORTS_PART, free_port
from turbolm.launch.side_by_side import SideBySide, train_command
from turbolm.plan.machine import Machine
from turbolm.plan.shares import Share, share_machine
from turbolm.recipe.schema import Recipe
from turbolm.units import Span

HERE = frozenset(os.sched_getaffinity(0))
TELL = "import os, time; print(sorted(os.sched_getaffinity(0)), os.environ.get('CUDA_VISIBLE_DEVICES'), flush=True)"
LISTEN = "import os, signal, sys, time; signal.signal(15, lambda *_: (print('saved'), sys.exit(75))); "


def machine(num_gpus: int = 0, num_cpus: int = len(HERE)) -> Machine:
    return Machine(num_gpus, "GPU" if num_gpus else None, None, num_cpus, cpu_has_bf16=True, memory_bytes=2**34)


def recipe(name: str = "tiny", **sections: Any) -> Recipe:
    return Recipe.model_validate({**RECIPE, "name": name, **sections})


class Scripts:
    """Tasks whose commands are these programs, and the runner that starts them."""

    def __init__(self, shares: list[Share], **programs: str) -> None:
        self.tasks = [Task(recipe(name), Path(f"{name}.yaml")) for name in programs]
        self.started: list[str] = []
        self.prepared: list[str] = []
        self.lines: list[str] = []
        self.programs = programs
        self.runner = SideBySide(shares, self.lines.append, self.command, lambda t: self.prepared.append(t.recipe.name))

    def command(self, task: Task) -> list[str]:
        self.started.append(task.recipe.name)
        return [sys.executable, "-S", "-E", "-c", self.programs[task.recipe.name]]

    def run(self) -> dict[str, Done]:
        return {done.task.recipe.name: done for done in self.runner(iter(self.tasks))}

    def of(self, name: str) -> list[str]:
        return [line.removeprefix(f"{name}  ") for line in self.lines if line.startswith(f"{name}  ")]


def test_each_run_has_its_share_its_name_and_its_times() -> None:
    """The first two run side by side; the failure of one frees its share for the third, and stops nobody."""
    one, other = frozenset([min(HERE)]), frozenset([max(HERE)])
    busy = "t = time.process_time()\nwhile time.process_time() < t + 0.3: pass"
    scripts = Scripts(
        [Share(one, ("4", "5")), Share(other, ("6", "7"))],
        fails=f"{TELL}; print('no end', end='', flush=True); time.sleep(0.4); raise SystemExit(3)",
        works=f"{TELL}\nprint('é' * 3)\n{busy}\ntime.sleep(1)",
        third=f"{TELL}; time.sleep(0.2)",
    )
    done = scripts.run()
    assert scripts.prepared == ["fails"] and scripts.started == ["fails", "works", "third"]
    assert {name: one.exit_code for name, one in done.items()} == {"fails": 3, "third": 0, "works": 0}
    assert scripts.of("fails") == [f"{sorted(one)} 4,5", "no end"]
    assert scripts.of("works") == [f"{sorted(other)} 6,7", "ééé"]
    assert scripts.of("third") == [f"{sorted(one)} 4,5"]
    assert 0.3 <= done["works"].cpu_sec < 0.6 and done["third"].cpu_sec < 0.3
    assert done["works"].whole_sec > 0.5 and done["fails"].neighbors > 0.7 and done["works"].neighbors < 0.9


def test_a_stop_signal_lets_every_run_save_and_starts_no_other() -> None:
    shares = [Share(HERE)] * 2
    scripts = Scripts(
        shares,
        one=f"{LISTEN} print('ready', flush=True); os.kill(os.getppid(), 2); time.sleep(30)",
        two="import time; time.sleep(30)",  # does not listen yet, as `train` does not while it imports
        three="",
    )
    before = signal.getsignal(signal.SIGINT)
    done = scripts.run()
    assert {name: one.exit_code for name, one in done.items()} == {"one": 75, "two": 75}
    assert scripts.of("one")[-1] == "saved" and scripts.started == ["one", "two"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_killed_run_stops_the_others_too() -> None:
    scripts = Scripts(
        [Share(HERE)] * 2,
        one=f"{LISTEN} time.sleep(30)",
        two="import os, time; time.sleep(0.3); os.kill(os.getpid(), 9)",
        three="",
    )
    done = scripts.run()
    assert {name: one.exit_code for name, one in done.items()} == {"two": 137, "one": 75}
    assert scripts.started == ["one", "two"]


def test_no_run_outlives_an_error_of_the_ablation() -> None:
    scripts = Scripts([Share(HERE)] * 2, one="import time; time.sleep(0.4)", two=f"{LISTEN} time.sleep(30)")

    def fail() -> None:
        for done in scripts.runner(iter(scripts.tasks)):
            raise UserError(done.task.recipe.name)

    with pytest.raises(UserError, match="^one$"):
        fail()
    gc.collect()  # the generator that was left
    assert not scripts.runner._running and scripts.of("two") == ["saved"]


def test_a_start_that_stops_early_says_so_on_its_command_line() -> None:
    early = recipe(execution={"stop_after": Span(2048, "tokens")})
    assert train_command(Task(early, Path("a.yaml")))[-3:] == ["train", "a.yaml", "execution.stop_after=2048"]
    assert train_command(Task(recipe(), Path("a.yaml")))[-2:] == ["train", "a.yaml"]


def test_neighbors_take_ports_of_different_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for part in range(3):
        monkeypatch.setenv(PORTS_PART, f"{part}/3")
        assert {free_port() % 3 for _ in range(20)} == {(10_000 + part) % 3}


# -------------------------------------------------------------------------------------------------------------- shares


def test_cores_are_divided_evenly_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads k and k+4 are one core; of eight CPUs the control group grants six."""
    for cpu in range(8):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    part, shares = share_machine(recipe(), machine(num_cpus=8), 2, tmp_path)
    assert [share.cpus for share in shares] == [{0, 1, 4, 5}, {2, 3, 6, 7}] and part.num_cpus == 4
    part, shares = share_machine(recipe(), machine(num_cpus=6), 2, tmp_path)
    assert [share.cpus for share in shares] == [{0, 4, 1}, {2, 6, 3}] and part.num_cpus == 3
    assert part.memory_bytes == 2**33
    assert share_machine(recipe(), machine(num_cpus=6), 1, tmp_path)[0].num_cpus == 6


def test_gpus_are_divided_with_the_cores_near_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sockets with two GPUs each; CUDA_VISIBLE_DEVICES names them in another order."""
    for number, cpus in enumerate(("0-3", "0-3", "4-7", "4-7")):
        (tmp_path / f"proc/driver/nvidia/gpus/0000:{number:02}:00.0").mkdir(parents=True)
        device = tmp_path / f"sys/bus/pci/devices/0000:{number:02}:00.0"
        device.mkdir(parents=True)
        (device / "local_cpulist").write_text(cpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    part, shares = share_machine(recipe(), machine(4, 8), 2, tmp_path)
    assert [(share.gpus, share.cpus) for share in shares] == [(("0", "1"), {0, 1, 2, 3}), (("2", "3"), {4, 5, 6, 7})]
    assert (part.num_gpus, part.num_cpus) == (2, 4)
    single = recipe(cluster={"processes_per_node": 1})
    part, shares = share_machine(single, machine(4, 8), 3, tmp_path)
    assert [share.gpus for share in shares] == [("0",), ("1",), ("2",)] and part.num_gpus == 1
    assert len(frozenset().union(*(share.cpus for share in shares))) == sum(len(share.cpus) for share in shares)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,0,GPU-abc,2")
    assert [share.gpus for share in share_machine(recipe(), machine(4, 8), 2, tmp_path)[1]] == [
        ("3", "0"),
        ("GPU-abc", "2"),
    ]


@pytest.mark.parametrize(
    ("num_gpus", "processes", "jobs", "message"),
    [
        (0, "auto", 9, "--jobs 9: 9 runs of 1 processes (cluster.processes_per_node=auto) need 9 cores, and 8 are"),
        (0, 4, 3, "need 12 cores, and 8 are here; use --jobs 2 at most"),
        (4, 2, 3, "--jobs 3: 3 runs of 2 processes (cluster.processes_per_node=2) need 6 GPUs, and 4 are here"),
        (4, "auto", 5, "need 5 GPUs, and 4 are here; use --jobs 4 at most"),
    ],
)
def test_more_jobs_than_fit_are_refused(num_gpus: int, processes: Any, jobs: int, message: str) -> None:
    with pytest.raises(UserError) as refused:
        share_machine(recipe(cluster={"processes_per_node": processes}), machine(num_gpus, 8), jobs)
    assert message in str(refused.value)
