"""What `pip install` brings: a wheel that works outside a checkout, with its own recipes, bases and templates."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from turbolm import __version__

ROOT = Path(__file__).parents[1]
FOLDERS = {"src/turbolm": "turbolm", "recipes": "turbolm/share/recipes", "ds_configs": "turbolm/share/ds_configs"}
COMMANDS = """
import sys
from typer.testing import CliRunner
from turbolm.cli import app
assert sys.modules["turbolm"].__file__.startswith(sys.argv[1])
for line in sys.argv[2:]:
    done = CliRunner().invoke(app, line.split(), catch_exceptions=False)
    assert done.exit_code == 0, (line, done.output)
    print(done.output)
"""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="hatchling is not installed; `make setup` does"
)


def build(kind: str, source: Path, target: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = target.iterdir()
    return built


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return {name for name in file.namelist() if not name.endswith(".dist-info/RECORD")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as it lies in site-packages."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


def outside(installed: Path, folder: Path, *command: str) -> str:
    """What a command prints that sees this turbolm alone, and runs outside of any checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "TURBOLM_HOME"}
    environment |= {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_file_ships(wheel: Path) -> None:
    tracked = subprocess.run(["git", "ls-files", *FOLDERS], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    there = [name for name in tracked.stdout.splitlines() if (ROOT / name).is_file()]
    assert len(there) > 200
    expected = {
        f"{target}/{name.removeprefix(f'{source}/')}"
        for name in there
        for source, target in FOLDERS.items()
        if name.startswith(f"{source}/")
    }
    assert not expected - names_in(wheel)
    assert "turbolm/share/launch/slurm.sbatch.j2" in names_in(wheel)


def test_a_source_distribution_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    sdist = build("sdist", ROOT, tmp_path / "sdist")
    shutil.unpack_archive(sdist, tmp_path / "unpacked")
    (source,) = (tmp_path / "unpacked").iterdir()
    again = build("wheel", source, tmp_path / "wheel")
    assert again.name == wheel.name
    assert names_in(again) == names_in(wheel)
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert [name for name in names_in(wheel) if one.read(name) != other.read(name)] == []


def test_commands_find_what_ships(installed: Path, tmp_path: Path) -> None:
    commands = ["plan quickstart", "recipes", "submit llama3.1-8b --dry-run", "--version"]
    output = outside(installed, tmp_path, "-c", COMMANDS, str(installed), *commands)
    assert f"quickstart: {installed}/turbolm/share/recipes/quickstart/config.yaml" in output
    assert "| [llama3.1-8b/pretrain]" in output
    assert "#SBATCH --nodes=8" in output
    assert output.strip().endswith(f"turbolm {__version__}")


@pytest.mark.slow
def test_a_run_outside_a_checkout(installed: Path, tmp_path: Path) -> None:
    command = ["-m", "turbolm.cli", "train", "quickstart", "train.budget=100k", f"execution.cache_dir={tmp_path}/cache"]
    assert "finished  1.38M parameters" in outside(installed, tmp_path, *command)
    assert (tmp_path / "runs/quickstart/report.html").is_file()
