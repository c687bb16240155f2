"""A world of ranks for a test, at the cost of a fork: imports are paid once for each test process, not by every rank.

    def add(base: int) -> float:  # a function of a module, run by every rank
        dist.init_process_group("gloo")
        total = torch.tensor(base + dist.get_rank())
        dist.all_reduce(total)
        return float(total)

    assert run_world(2, add, 10) == [21.0, 21.0]

With KEEP_LOGS=1 the logs of the ranks of a failing world stay, and the error says where.

The ranks find the environment that torchrun gives: RANK, WORLD_SIZE and the rest. What a launcher itself does is tested
with the launcher (tests/test_end_to_end.py, tests/slurm).
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

PRELOADED = (
    "turbolm.train.worker",  # torch, Accelerate, DeepSpeed, Transformers: about 7 s
    "deepspeed.runtime.zero.muon.original_muon",  # imported by every engine of ZeRO 1 to 3; brings Inductor: 3 s
)


def run_world(
    world_size: int, function: Callable[..., Any], *arguments: Any, device: str = "cpu", timeout_sec: float = 300
) -> list[Any]:
    """What `function(*arguments)` returned on every rank, by rank; the first error of a rank ends all and is raised."""
    forked = device == "cpu"  # CUDA does not survive a fork
    context: Any = multiprocessing.get_context("forkserver" if forked else "spawn")
    if forked:
        context.set_forkserver_preload(list(PRELOADED))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # free of races for a port
    world = _environment(world_size, store.port, device)
    processes, receivers = [], {}
    with _logs_folder() as folder, patch.dict(os.environ, world):
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(world_size)]
        try:
            for rank, log in enumerate(logs):
                receiver, sender = context.Pipe(duplex=False)
                variables = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                process = context.Process(target=_run_rank, args=(sender, log, variables, function, arguments))
                process.start()
                sender.close()  # the rank has the only other one, so its death is seen here
                processes.append(process)
                receivers[receiver] = rank
            return _gather(receivers, logs, timeout_sec)
        except BaseException:
            for process in processes:  # one that compiles an extension lets go of its lock, which others wait for
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGINT)
            raise
        finally:
            for process in processes:
                process.join(timeout=3)
                process.kill()
                process.join()


@contextlib.contextmanager
def _logs_folder() -> Iterator[str]:
    """A folder for the ranks' logs; with KEEP_LOGS=1 it stays where a test fails, and the error says where it is."""
    folder = tempfile.mkdtemp(prefix="turbolm-ranks-")
    try:
        yield folder
    except BaseException as error:
        if os.environ.get("KEEP_LOGS"):
            error.add_note(f"logs of the ranks: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _environment(world_size: int, port: int, device: str) -> dict[str, str]:
    return {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is this process's, as torchrun's is its own
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": device,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # ninja is there
    }


def _gather(receivers: dict[Connection, int], logs: list[Path], timeout_sec: float) -> list[Any]:
    """The results by rank, from ranks that may answer in any order, or not at all."""
    results: list[Any] = [None] * len(logs)
    deadline = time.monotonic() + timeout_sec
    waiting = dict(receivers)
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {sorted(waiting.values())} did not end within {timeout_sec} s:\n{_ends(logs)}"
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = waiting.pop(receiver)
            try:
                results[rank] = receiver.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} failed:\n{_ends(logs[rank : rank + 1])}") from None
    return results


def _ends(logs: list[Path]) -> str:
    return "\n".join(log.read_text(errors="replace")[-6000:] for log in logs if log.exists())


def _run_rank(
    sender: Connection, log: Path, variables: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(variables)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    gc.freeze()  # what was imported stays: a full collection, as ZeRO-3 asks for, takes a second otherwise
    try:
        sender.send(function(*arguments))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)  # as the trainer ends, and for its reason
