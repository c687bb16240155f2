"""Run a selection of the tests with other versions of what the project stands on: `make matrix`, by hand.

    make matrix                                                 # every cell below; finished ones are kept
    make matrix ARGS='oldest liger'                             # these cells
    make matrix ARGS='--with torch===2.12.1 transformers==5.19.0'   # a cell of your own
    make matrix ARGS='--again oldest'                           # run a finished cell again

Each cell is a virtual environment under .matrix/ that holds only what differs from .venv and sees the rest there, so a
cell costs what its packages weigh (a CUDA build of torch is 5 GB on disk). The output of pip and of the tests is kept
beside it. Exits with 1 if a cell failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CELLS_DIR = ROOT / ".matrix"
SELECTION = ("tests/models", "tests/engine", "tests/optim", "tests/checkpoint", "tests/train", "tests/test_old_runs.py")


@dataclass(frozen=True)
class Cell:
    """`requirements` for pip, the tests to run, those known to fail, and variables of the environment."""

    requirements: tuple[str, ...]
    tests: tuple[str, ...] = SELECTION
    known: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


# What Transformers 5.17 lacks. It does not mark modules of experts, so their load is not recorded, and its Doge fails
# in eager attention (both fixed in 5.18); its Llama 4 runs all experts on all tokens, which a step's FLOPs do not count
# (5.19); its Dbrx refuses the configuration that it writes (5.20, the bound in pyproject.toml).
ROUTER = "tests/models/test_router.py"
BELOW_THE_BOUND = (
    f"{ROUTER}::test_of_one_sequence_it_is_transformers_own[doge]",
    f"{ROUTER}::test_it_is_a_sum_over_sequences_however_they_are_batched",
    f"{ROUTER}::test_the_load_is_the_choices_of_tokens_that_are_not_padding",
    f"{ROUTER}::test_a_type_without_a_router_loss_says_so[glm4_moe]",
    f"{ROUTER}::test_a_balancing_bias_that_is_a_parameter_becomes_a_buffer",
    f"{ROUTER}::test_flops_are_those_that_torch_counts",
    "tests/models/test_config.py::test_what_a_class_writes_down_of_itself_is_accepted",
)

# `===` is the version to the letter: else pip takes a local +cpu build of it, if it has one. What PyPI has of torch is
# the CUDA build, so every cell with a torch also shows that build without a device.
CELLS = {
    "oldest": Cell(("torch===2.11.0", "transformers==5.20.0")),
    "torch-2.12": Cell(("torch===2.12.1",)),
    "torch-cuda": Cell(("torch===2.13.0",)),
    "gpu-machine": Cell(("torch===2.11.0", "transformers==5.17.0"), known=BELOW_THE_BOUND),
    "liger": Cell(
        ("triton==3.7.1", "liger-kernel==0.8.5"), ("tests/models/test_liger.py",), (), {"TRITON_INTERPRET": "1"}
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", help=f"of {', '.join(CELLS)} (default: all)")
    parser.add_argument("--with", dest="requirements", nargs="+", metavar="REQUIREMENT", help="a cell of your own")
    parser.add_argument("--again", action="store_true", help="run finished cells again")
    arguments = parser.parse_args()
    if unknown := set(arguments.cells) - set(CELLS):
        parser.error(f"no such cell: {', '.join(sorted(unknown))}; there are {', '.join(CELLS)}")
    if arguments.requirements:
        name = "_".join(arguments.requirements).replace("=", "").replace("/", "")
        cells = {name: Cell(tuple(arguments.requirements))}
    else:
        cells = {name: CELLS[name] for name in arguments.cells or CELLS}
    results = []
    for name, cell in cells.items():
        results.append(finished(name, cell, again=arguments.again))
        print_table(results)
    return int(any(result["rc"] for result in results))


def finished(name: str, cell: Cell, *, again: bool) -> dict:
    """The result of a cell: the one that is kept if its definition is the same, else a new one."""
    folder = CELLS_DIR / name
    kept, definition = folder / "result.json", repr(cell)
    if kept.exists() and not again:
        result = json.loads(kept.read_text())
        if result["definition"] == definition:
            return result
    result = {"name": name, "definition": definition, **run_cell(folder, cell)}
    kept.write_text(json.dumps(result, indent=2))
    return result


def run_cell(folder: Path, cell: Cell) -> dict:
    """Make the cell's environment and run its tests; logs go to `folder`."""
    python = folder / "venv/bin/python"
    if not python.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        # Behind the cell's own packages on the path: what it does not install itself comes from .venv.
        beneath = folder / "venv/lib" / version / "site-packages/beneath.pth"
        beneath.write_text(sysconfig.get_path("purelib") + "\n")
        (folder / "venv/bin/ninja").symlink_to(Path(sys.executable).parent / "ninja")
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "-q", *cell.requirements]
    with (folder / "pip.log").open("w") as log:
        rc = subprocess.run(pip, stdout=log, stderr=subprocess.STDOUT).returncode
    if rc:
        return {"rc": rc, "tests": f"pip failed: {folder / 'pip.log'}", "versions": {}, "seconds": 0}
    environment = {
        **os.environ,
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),  # torch names them after Python, not after itself
        **cell.environment,
    }
    started = time.monotonic()
    with (folder / "tests.log").open("w") as log:
        left_out = [f"--deselect={test}" for test in cell.known]
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *left_out, *cell.tests]
        rc = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    lines = (folder / "tests.log").read_text().splitlines()
    return {
        "rc": rc,
        "tests": lines[-1].strip("= ") if lines else "",
        "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
        "versions": versions(python, environment),
        "seconds": round(time.monotonic() - started),
    }


def versions(python: Path, environment: dict[str, str]) -> dict[str, str]:
    """What the tests of a cell imported."""
    names = ("torch", "transformers", "deepspeed", "accelerate", "triton", "liger-kernel")
    program = (
        "import json, sys; from importlib.metadata import version, PackageNotFoundError as Absent\n"
        "found = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = version(name)\n"
        "    except Absent: pass\n"
        "print(json.dumps(found))"
    )
    output = subprocess.run([python, "-c", program, *names], env=environment, capture_output=True, check=True)
    return json.loads(output.stdout)


def print_table(results: list[dict]) -> None:
    """One row for each cell."""
    print("\n| cell | versions | tests | seconds |\n|---|---|---|---|")
    for result in results:
        found = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        print(f"| {result['name']} | {found} | {result['tests']} | {result['seconds']} |")
        for line in result.get("failed", ()):
            print(f"    {line}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
