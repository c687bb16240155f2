"""Settings of all tests, and how tests are dealt to the processes of `pytest -n`."""

from __future__ import annotations

import multiprocessing.process
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Before anything imports torch: models are tiny, and on a busy machine threads mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The machine that runs them may be busy: how long an example takes says nothing about the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# One unit each: their tests share what takes long to make, such as a training run or a Slurm. The largest goes first.
TOGETHER = (
    "tests/test_end_to_end.py", "tests/slurm/", "tests/train/", "tests/checkpoint/", "tests/chaos/", "tests/gpu/",
    "tests/recipes/test_shrunken.py", "tests/docs/test_running.py",
)  # fmt: skip


def unit_of(nodeid: str) -> str:
    """Tests of one unit run in one process, one after the other."""
    return next((prefix for prefix in TOGETHER if nodeid.startswith(prefix)), nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal out whole units. `--dist loadgroup` would, but pytest-xdist 3.8 ignores its marks under pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class UnitScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit_of(nodeid)

    return UnitScheduling(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast", action="store_true", help="skip each test the moment it starts ranks, a Python, a shell or a compiler"
    )


GPUS_OF_TESTS = "TURBOLM_GPUS_OF_TESTS"  # what CUDA_VISIBLE_DEVICES was before `hide_gpus`; empty: not set


def hide_gpus(arguments: list[str]) -> None:
    """Keep this process and its children off the GPUs, unless only tests/gpu is run; before torch is imported.

    CPU tests fork and count processes; tests/test_gpu_process.py runs tests/gpu in a process that sees the GPUs.
    """
    folder = Path(__file__).parent / "gpu"
    if all(Path(argument.partition("::")[0]).resolve().is_relative_to(folder) for argument in arguments):
        return
    os.environ.setdefault(GPUS_OF_TESTS, os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    os.environ.update({"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"})


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs. With `--fast`, skip tests by what they do, so that no list of them can be out of date."""
    hide_gpus(config.args)
    deals_out = config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput")  # it starts the workers
    if not config.getoption("--fast") or deals_out:
        return
    start_program = subprocess.Popen.__init__

    def start_or_skip(self: Any, args: Any, *others: Any, **settings: Any) -> None:
        program = args if isinstance(args, str | bytes | os.PathLike) else args[0]
        name = Path(os.fsdecode(program).partition(" ")[0]).name
        if name.startswith("python") or name in ("bash", "sh", "g++", "turbolm", "accelerate", "torchrun"):
            pytest.skip(f"starts {name}")
        start_program(self, args, *others, **settings)

    def skip(*_: Any) -> None:
        pytest.skip("starts a process")

    subprocess.Popen.__init__ = start_or_skip  # type: ignore[method-assign]
    multiprocessing.process.BaseProcess.start = skip  # type: ignore[method-assign]
