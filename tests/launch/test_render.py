"""What `turbolm submit` writes: six set-ups as they are, clean in shellcheck; what it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from turbolm.cli import app
from turbolm.errors import UserError
from turbolm.launch.slurm import Submitted, submit
from turbolm.recipe.load import RecipeError, load_recipe

from .harness import make_programs, read_directives, render, write_recipe

GOLDEN = Path(__file__).parent / "golden"
GPUS = {"num_nodes": 2, "gpus_per_node": 8, "gpu": "H100-80GB"}
SETUPS: dict[str, dict[str, Any]] = {
    "plain": {"num_nodes": 2, "slurm": {}},
    "gres": GPUS
    | {
        "slurm": {
            "partition": "gpu",
            "account": "lab-7",
            "qos": "long",
            "time": "2d",
            "mem": "0",
            "cpus_per_task": 96,
            "gpu_type": "h100",
            "exclusive": True,
            "constraint": "ib&ssd",
            "exclude": "node[03,07-09]",
        }
    },
    "gpus_per_node": GPUS
    | {
        "slurm": {
            "gpu_request": "gpus_per_node",
            "reservation": "course",
            "dependency": "afterok:12:13",
            "nodelist": "a1,a2",
            "requeue": False,
            "stop_grace": "10m",
        }
    },
    "modules": {
        "num_nodes": 1,
        "slurm": {
            "modules": ["cuda/12.8", "gcc/13"],
            "setup": ["ulimit -l unlimited", 'export SCRATCH="/scratch/$USER"'],
            "environment": {"NCCL_SOCKET_IFNAME": "ib0", "NOTE": "it's a $HOME `x`"},
        },
    },
    "pyxis_seeds": GPUS
    | {
        "slurm": {
            "seeds": [1, 2, 30],
            "container": {
                "runtime": "pyxis",
                "image": "docker://nvcr.io#nvidia/pytorch:25.01-py3",
                "mounts": ["/data:/data", "/home:/home"],
                "python": "/opt/venv/bin/python",
            },
        }
    },
    "apptainer": GPUS
    | {"slurm": {"container": {"runtime": "apptainer", "image": "/images/a b.sif", "mounts": ["/data:/data"]}}},
}


@pytest.mark.parametrize("name", SETUPS)
def test_golden(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TURBOLM_GOLDEN=write renders them anew; read the difference before you commit it."""
    submission = render(tmp_path, monkeypatch, cluster=SETUPS[name])
    scripts = {f"{name}.slurm": submission.script}
    if submission.prepare is not None:
        scripts[f"{name}.prepare.slurm"] = submission.prepare.script
    for golden, script in scripts.items():
        text, path = script.read_text(encoding="utf-8").replace(str(tmp_path), "/home/me/project"), GOLDEN / golden
        if os.environ.get("TURBOLM_GOLDEN") == "write":
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8")
    has_job = (GOLDEN / f"{name}.prepare.slurm").exists()
    assert has_job == (submission.prepare is not None) == (name != "modules"), "one node without GPUs prepares itself"


@pytest.mark.parametrize("path", sorted(GOLDEN.iterdir()), ids=lambda path: path.stem)
def test_golden_passes_shellcheck(path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_dry_run_prints_the_script_it_leaves_in_the_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, cluster=SETUPS["plain"])
    done = CliRunner().invoke(app, ["submit", "--dry-run", str(recipe), "train.seed=5", "name=other"])
    assert done.exit_code == 0, done.output
    folder = tmp_path / "runs" / "other" / "submissions" / "1"
    assert done.stdout == (folder / "submit.slurm").read_text(), "it can be saved as a script"
    assert f"1. sbatch {folder / 'prepare.slurm'}" in done.stderr
    assert f"2. sbatch --dependency=afterok:ID --kill-on-invalid-dep=yes {folder / 'submit.slurm'}" in done.stderr
    assert load_recipe(folder / "recipe.yaml") == load_recipe(recipe, ["train.seed=5", "name=other"])


def test_submit_hands_the_script_to_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_programs(tmp_path)
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >asked\necho "41;east"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    submission = render(tmp_path, monkeypatch, cluster={"slurm": {}})
    assert submit(submission) == Submitted("41")
    assert (tmp_path / "asked").read_text().splitlines() == ["--parsable", str(submission.script)]
    sbatch.write_text("#!/bin/sh\necho 'Invalid partition' >&2\nexit 1\n")
    with pytest.raises(UserError, match="Invalid partition"):
        submit(submission)


def test_a_seed_is_a_run_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submission = render(tmp_path, monkeypatch, cluster=SETUPS["pyxis_seeds"])
    assert [run.path.name for run in submission.runs] == ["tiny-seed1", "tiny-seed2", "tiny-seed30"]
    recipes = [load_recipe(run.path / "submissions" / "1" / "recipe.yaml") for run in submission.runs]
    assert [(one.name, one.train.seed) for one in recipes] == [
        ("tiny-seed1", 1),
        ("tiny-seed2", 2),
        ("tiny-seed30", 30),
    ]
    assert read_directives(submission.text)["array"] == "0-2"


@pytest.mark.parametrize(
    ("slurm", "message"),
    [
        ({"partition": "-gpu"}, "not starting with '-'"),
        ({"partition": "gpu\nx"}, "without line breaks"),
        ({"constraint": "a b"}, "without blanks"),
        ({"mem": "lots"}, "a size as Slurm writes it"),
        ({"time": "1m", "stop_grace": "5m"}, "longer than `stop_grace`"),
        ({"seeds": [1, 1]}, "every seed once"),
        ({"environment": {"SLURM_NODEID": "0"}}, "neither Slurm nor the shell"),
        ({"container": {"runtime": "pyxis", "image": "--x"}}, "does not start with '-'"),
        ({"container": {"runtime": "pyxis", "image": "a", "mounts": ["/a:/a,/b:/b"]}}, "one mount"),
        ({"container": {"runtime": "pyxis", "image": "~/x.sqsh"}}, "a path written out"),
        ({"container": {"runtime": "pyxis", "image": "a", "mounts": ["$SCRATCH:/data"]}}, "a path written out"),
    ],
)
def test_refused_values(slurm: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=message):
        render(tmp_path, monkeypatch, cluster={"slurm": slurm})


def test_exclusive_nodes_are_asked_for_with_all_their_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch(1): `--exclusive` gives all CPUs, but only as much memory as was requested."""
    for slurm, mem in (({"exclusive": True}, "0"), ({"exclusive": True, "mem": "64G"}, "64G"), ({}, None)):
        submission = render(tmp_path, monkeypatch, cluster={"slurm": slurm})
        assert read_directives(submission.text).get("mem") == mem


def test_a_recipe_without_slurm_or_with_too_small_a_batch_is_not_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="add a `slurm` mapping below `cluster`"):
        render(tmp_path, monkeypatch)
    with pytest.raises(UserError, match="too few for 40 processes"):
        render(tmp_path, monkeypatch, cluster={"num_nodes": 5, "processes_per_node": 8, "slurm": {}})
    with pytest.raises(UserError, match="backslash"):
        render(tmp_path, monkeypatch, cluster={"slurm": {}}, execution={"runs_dir": "a\\b"})
