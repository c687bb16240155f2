"""On a machine with GPUs: tests/gpu beside the CPU tests, in a process of its own that sees the GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import GPUS_OF_TESTS
from turbolm.plan.machine import detect_machine

TESTS = Path(__file__).parent


def sees_gpus() -> dict[str, str]:
    """The environment of this process before GPUs were hidden from it."""
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")}
    visible = environment.pop(GPUS_OF_TESTS, "")
    return environment | ({"CUDA_VISIBLE_DEVICES": visible} if visible else {})


def test_gpu_tests_pass_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", sees_gpus())
    if not detect_machine().num_gpus:
        pytest.skip("needs an NVIDIA GPU")
    command = [sys.executable, "-m", "pytest", "-q", str(TESTS / "gpu")]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize(("argument", "visible"), [("gpu", "0,1"), ("units", ""), ("", "")])
def test_only_gpu_tests_see_the_gpus(argument: str, visible: str, tmp_path: Path) -> None:
    """In a process as of a machine with two GPUs."""
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    (tmp_path / "tests" / "units").mkdir()
    (tmp_path / "tests" / "conftest.py").write_bytes((TESTS / "conftest.py").read_bytes())
    look = f"import os\ndef test_it(): assert os.environ['CUDA_VISIBLE_DEVICES'] == {visible!r}\n"
    for folder in [argument] if argument else ["gpu", "units"]:
        (tmp_path / "tests" / folder / f"test_{folder}.py").write_text(look)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{argument}"]
    environment = sees_gpus() | {"CUDA_VISIBLE_DEVICES": "0,1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
