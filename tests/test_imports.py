"""The torch-free half stays torch-free: planning on a login node and `--help` must not wait seconds for torch."""

import importlib.util
import pkgutil
import subprocess
import sys

import pytest

import turbolm

TORCH_FREE = [
    "units", "errors", "files", "shipped", "recipe", "plan", "data", "launch", "ablate", "report", "cli",
]  # fmt: skip
HEAVY = ["torch", "transformers", "deepspeed", "accelerate"]


def modules_of(name: str) -> list[str]:
    spec = importlib.util.find_spec(f"turbolm.{name}")
    if spec is None:
        return []
    inside = spec.submodule_search_locations or []
    below = (found.name for found in pkgutil.walk_packages(inside, prefix=f"turbolm.{name}."))
    return [f"turbolm.{name}", *(module for module in below if not module.endswith("__main__"))]


def heavy_modules_after(code: str, *arguments: str) -> str:
    code += f"\nimport sys; print('heavy:', [name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_importing_the_torch_free_half_imports_no_torch():
    modules = [module for name in TORCH_FREE for module in modules_of(name)]
    assert len(modules) > 5
    assert heavy_modules_after("\n".join(f"import {module}" for module in modules)) == "heavy: []"


@pytest.mark.skipif(not modules_of("cli"), reason="there is no command line yet")
def test_help_imports_no_torch():
    code = """
import runpy, sys
sys.argv = ["turbolm", "--help"]
try:
    runpy.run_module("turbolm.cli", run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
"""
    assert heavy_modules_after(code) == "heavy: []"


def test_the_package_has_a_version():
    assert turbolm.__version__
