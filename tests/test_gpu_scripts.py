"""What measures a GPU runs on a CPU too, with tiny models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run_script(*arguments: str, code: int = 0) -> str:
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = ["sh", "benchmarks/gpu.sh", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_a_row_is_measured_once_and_profiled(tmp_path: Path) -> None:
    arguments = ("--smoke", "--only", "gpt2-124m turbolm", "--out", str(tmp_path))
    first = json.loads(run_script(*arguments).splitlines()[-1])["rows"]
    assert list(first) == ["gpt2-124m turbolm"]
    assert "matrix products" in first["gpt2-124m turbolm"]["profile"]
    assert (tmp_path / "gpt2-124m-turbolm.trace.json.gz").is_file()
    again = run_script(*arguments, "--budget-sec", "0")  # no time to measure anything
    assert json.loads(again.splitlines()[-1])["rows"] == first
    late = run_script("--smoke", "--only", "llama-1b turbolm", "--out", str(tmp_path), "--budget-sec", "0", code=1)
    assert "| llama-1b turbolm | not measured: no time left |" in late
