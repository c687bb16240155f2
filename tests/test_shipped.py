"""Shipped files and recipes by name in a checkout (in a wheel: tests/test_wheel.py), and options of all commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from turbolm import __version__, shipped
from turbolm.cli import app
from turbolm.errors import UserError
from turbolm.shipped import find_recipe

ROOT = Path(__file__).parents[1]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with two recipes of one model, one of another, two of a third that nothing pretrains, and a piece."""
    for name in ("big/pretrain", "big/continue", "small/pretrain", "taken/continue", "taken/long", "_base"):
        (tmp_path / "home/recipes" / name).mkdir(parents=True)
        (tmp_path / "home/recipes" / name / "config.yaml").touch()
    monkeypatch.setenv("TURBOLM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_a_checkout_reads_its_own_files_even_beside_stale_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TURBOLM_HOME", raising=False)
    assert shipped.shipped("recipes") == ROOT / "recipes"
    assert not (ROOT / "src/turbolm/share").exists(), "copies belong into wheels alone"
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path)
    (tmp_path / "share").mkdir()
    assert shipped.shipped("recipes") == tmp_path / "share/recipes"  # as in a wheel


def test_a_name_stands_for_a_shipped_recipe(home: Path) -> None:
    assert find_recipe("big/continue") == "home/recipes/big/continue/config.yaml"
    assert find_recipe("small") == "home/recipes/small/pretrain/config.yaml"
    assert find_recipe("big") == "home/recipes/big/pretrain/config.yaml", "of several the one from scratch"


def test_a_path_wins(home: Path) -> None:
    assert find_recipe("mine/config.yaml") == "mine/config.yaml"  # the reader says that it is missing
    Path("small").touch()
    assert find_recipe("small") == "small"


def test_a_folder_of_that_name_is_no_recipe(home: Path) -> None:
    Path("small").mkdir()
    assert find_recipe("small").endswith("small/pretrain/config.yaml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("taken", "taken names several recipes: taken/continue, taken/long"),
        ("smal", "'smal' is neither a file nor a shipped recipe; did you mean 'small'"),
        ("big/pretain", "did you mean 'big/pretrain'"),
        ("xyz", r"neither a file nor a shipped recipe \(known: big/continue, big/pretrain, small/pretrain, .*\)"),
        ("_base", "neither a file nor a shipped recipe"),
    ],
)
def test_other_names_are_refused_with_the_nearest(home: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_recipe(name)


def test_the_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"turbolm {__version__}\n"


@pytest.mark.parametrize("command", ["schema", "--version"])
def test_a_reader_that_leaves_is_no_error(command: str) -> None:
    """`turbolm schema | head -1`: output that fills the pipe, and output that is left for the end."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "turbolm.cli", command], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
