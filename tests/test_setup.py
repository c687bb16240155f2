"""Set-up says in one line what is missing, and the scripts are plain shell."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = ["launch/setup.sh", "launch/local.sh", "launch/ssh.sh", ".ci/run"]
TOOLS = ["sh", "dirname", "date", "cat", "cksum", "rm", "awk", "grep"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_pass_shellcheck(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout without .venv, and a PATH with all that setup looks for."""
    (tmp_path / "launch").mkdir()
    for name in ("launch/setup.sh", "requirements.lock", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    for tool in ("make", "cc", "c++"):
        fake(tmp_path, tool, "exit 0")
    fake(tmp_path, "python3", f'exec "{sys.executable}" "$@"')
    return tmp_path


def fake(checkout: Path, name: str, body: str) -> None:
    path = checkout / "bin" / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def setup(checkout: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["/bin/sh", "launch/setup.sh"],
        cwd=checkout,
        env={"PATH": str(checkout / "bin")} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("tool", "package"), [("cc", "gcc"), ("c++", "g++"), ("make", "make")])
def test_a_missing_tool_is_one_line_with_its_package(checkout, tool, package):
    (checkout / "bin" / tool).unlink()
    done = setup(checkout)
    lines = [line for line in done.stderr.splitlines() if "note:" not in line]
    assert done.returncode == 2
    assert len(lines) == 1
    assert lines[0].endswith(f"is missing: apt-get install {package}")
    assert not (checkout / ".venv").exists()


def test_a_python_without_venv(checkout):
    fake(checkout, "python3", f'case $* in *ensurepip*) exit 1 ;; esac\nexec "{sys.executable}" "$@"')
    done = setup(checkout)
    assert done.returncode == 2
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"Python's venv module is missing: apt-get install python{version}-venv" in done.stderr


def test_an_old_python_and_all_that_is_missing_at_once(checkout):
    fake(checkout, "python3", "exit 1")
    (checkout / "bin/cc").unlink()
    done = setup(checkout)
    assert done.returncode == 2
    assert "Python 3.11 or newer is missing: apt-get install python3 python3-venv" in done.stderr
    assert "apt-get install gcc" in done.stderr
    fake(checkout, "old", "exit 1")
    assert "PYTHON=old" in setup(checkout, PYTHON="old").stderr


def test_a_later_python_on_path_is_found(checkout):
    fake(checkout, "python3", "exit 1")
    fake(checkout, "python3.12", f'case $* in *ensurepip*) exit 1 ;; esac\nexec "{sys.executable}" "$@"')
    assert "venv module is missing" in setup(checkout).stderr


@pytest.mark.parametrize("variable", ["TURBOLM_TORCH", "TURBOLM_TORCH_BUILD"])
def test_an_unsupported_torch_is_refused(checkout, variable):
    done = setup(checkout, **{variable: "2.5.0"})
    assert done.returncode == 2
    assert f"{variable}=2.5.0 is not supported" in done.stderr


def test_a_finished_setup_returns_at_once_until_something_changes(checkout):
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/bin/python").symlink_to(sys.executable)
    (checkout / "bin/cc").unlink()  # would stop a set-up that does any work
    script = (checkout / "launch/setup.sh").read_text()
    key = re.search(r"^key=.*$", script, re.MULTILINE)[0]
    stamp = f"torch_version=2.13.0; {key}; printf '%s\\n%s\\n' \"$key\" cuda > .venv/.turbolm-setup"
    subprocess.run(["sh", "-c", stamp], cwd=checkout, check=True)
    assert setup(checkout).returncode == 0
    assert setup(checkout, TURBOLM_TORCH_BUILD="cpu").returncode == 0  # the CUDA build serves a CPU too
    assert setup(checkout, TURBOLM_TORCH="2.12.0").returncode == 2
    with (checkout / "requirements.lock").open("a") as lock:
        lock.write("# changed\n")
    assert setup(checkout).returncode == 2


def test_the_lock_holds_hashes_and_nothing_of_the_machine_it_was_made_on():
    lock = (REPOSITORY / "requirements.lock").read_text()
    assert not re.search(r"://|index-url|find-links|^/|\s/", lock)
    pinned = re.findall(r"^([a-z0-9-]+)==\S+.*\\\n +--hash=sha256:", lock, re.MULTILINE)
    assert len(pinned) == len(re.findall(r"^[a-z]", lock, re.MULTILINE))
    assert {"deepspeed", "accelerate", "ninja", "setuptools", "sympy", "pytest"} <= set(pinned)
    assert not {name for name in pinned if name == "torch" or name.startswith("nvidia")}
