"""The process dies, or the power, at every file operation of a save: a valid checkpoint is always there."""

from __future__ import annotations

import builtins
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.toy import CONTRACT, Engine, one_process
from turbolm.checkpoint.load import CheckpointReader
from turbolm.checkpoint.manifest import clear_leftovers
from turbolm.checkpoint.ranks import ALONE
from turbolm.checkpoint.retention import Retention
from turbolm.checkpoint.save import write_checkpoint
from turbolm.checkpoint.snapshot import take_snapshot
from turbolm.checkpoint.verify import find_newest_valid, verify_checkpoint

pytestmark = pytest.mark.chaos
OPERATIONS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "posix_fadvise", "close")
DIED = 77


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    with one_process():
        yield


class Shim:
    """Counts the file operations of this process and ends it just before one of them, or in the middle of a write.

    With `power_cut` every file written since its last fsync loses what was written.
    """

    def __init__(self, dies_at: int, power_cut: bool = False):
        self.dies_at, self.power_cut, self.log = dies_at, power_cut, []  # type: ignore[var-annotated]
        self.paths: dict[int, str] = {}
        self.dirty: set[str] = set()

    def install(self) -> None:
        for name in OPERATIONS:
            setattr(os, name, self.wrap(name, getattr(os, name)))
        builtins_open = builtins.open

        def no_other_way(file: Any, mode: str = "r", *rest: Any, **settings: Any) -> Any:
            assert not set(mode) & set("wax+"), f"{file} is written past the shim"
            return builtins_open(file, mode, *rest, **settings)

        builtins.open = no_other_way  # type: ignore[assignment]

    def wrap(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **settings: Any) -> Any:
            self.log.append(name)
            if len(self.log) == self.dies_at:
                if name == "write":
                    operation(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                self.die()
            result = operation(*arguments, **settings)
            if name == "open":
                self.paths[result] = str(arguments[0])
            elif name == "write":
                self.dirty.add(self.paths[arguments[0]])
            elif name == "fsync":
                self.dirty.discard(self.paths[arguments[0]])
            return result

        return counted

    def die(self) -> None:
        for path in list(self.dirty) if self.power_cut else ():  # other threads go on writing
            renamed = path.replace(".tmp-", "")
            os.truncate(path if os.path.exists(path) else renamed, 0)
        os._exit(DIED)


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked process; returns its exit code."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    with CheckpointReader(checkpoint) as reader:
        return {name: reader.read_whole(name).clone() for name in reader.shapes}


def save(folder: Path, engine: Engine, step: int, keep_last: int = 1) -> None:
    """What the trainer's thread does. Without the process group, whose threads a fork does not copy."""
    snapshot = take_snapshot(engine, step, {"step": step, "tokens_seen": step, "order_digest": ""})
    about = {"contract": CONTRACT, "eval_loss": None}
    write_checkpoint(folder, snapshot, about, Retention(keep_last), agree=ALONE)


def start(folder: Path, steps: list[int]) -> dict[int, Engine]:
    """Engines after these steps and one more; the steps are saved in `folder`."""
    engines = {}
    for step in (*steps, steps[-1] + 1):
        engines[step] = Engine()
        engines[step].train(step)
    for step in steps:
        save(folder, engines[step], step, keep_last=9)
    return engines


@pytest.mark.parametrize("power_cut", [False, True], ids=["process", "power"])
@pytest.mark.parametrize("is_damaged", [False, True], ids=["new", "again"])
def test_death_at_every_file_operation(power_cut: bool, is_damaged: bool, tmp_path: Path) -> None:
    """`again`: the step's checkpoint is there already, but damaged, which the new one replaces."""
    operation, deaths, log_file = 0, 0, tmp_path / "log"
    engines = start(tmp_path / "start", [1, 2, 3] if is_damaged else [1, 2])
    if is_damaged:
        (tmp_path / "start" / "step-00000003" / "trainer.json").unlink()
    while True:
        operation += 1
        folder = tmp_path / str(operation)
        shutil.copytree(tmp_path / "start", folder)
        shim = Shim(operation, power_cut)

        def work(folder: Path = folder, shim: Shim = shim) -> None:
            log = os.open(log_file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            write = os.write
            shim.install()
            save(folder, engines[3], 3)
            write(log, " ".join(shim.log).encode())

        code = in_child(work)
        found, rejected = find_newest_valid(folder, {CONTRACT})
        assert found is not None, (operation, rejected)
        step = int(found.name.removeprefix("step-"))
        assert step in (2, 3)
        assert not [reason for reason in rejected if not is_damaged or "trainer.json: missing" not in reason]
        expected = engines[step].module
        assert all(torch.equal(tensor, expected.get_parameter(name)) for name, tensor in weights(found).items())
        if code == 0:
            assert step == 3
            break
        assert code == DIED
        deaths += 1
        clear_leftovers(folder)  # as the next start does, before it comes to the same step
        save(folder, engines[3], 3)
        assert find_newest_valid(folder, {CONTRACT}) == (folder / "step-00000003", [])
        assert verify_checkpoint(folder / "step-00000003") == []
    operations = log_file.read_text().split()
    assert deaths == len(operations)
    assert {"open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir"} <= set(operations)
    assert operations.count("fsync") >= 7, "four kinds of files, the manifest, the folder and its parent"
