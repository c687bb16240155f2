"""What the environment of a launcher decides: nothing that the recipe decides, and nothing silently."""

from __future__ import annotations

import json
import os
import random
import stat
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.launch.harness import RECIPE, make_programs, read_directives, render, run_script, write_recipe
from turbolm.cli import app
from turbolm.environment import children_environment, cpu_environment, drop_foreign, sbatch_environment
from turbolm.errors import UserError, exit_code_of
from turbolm.launch.local import process_environment
from turbolm.launch.train import refuse_several_nodes
from turbolm.plan.machine import Machine
from turbolm.plan.plan import Plan, build_plan
from turbolm.recipe.load import load_recipe
from turbolm.recipe.schema import Recipe

# (who exports it, variables, whether the children of a launcher get them)
CASES = [
    ("Kubeflow's PyTorchJob", "PET_NNODES PET_NODE_RANK PET_MASTER_ADDR PET_NPROC_PER_NODE", 0),
    ("a shell in a torchrun job", "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE", 0),
    ("the same", "ROLE_RANK ROLE_NAME ROLE_WORLD_SIZE TORCHELASTIC_RUN_ID TORCHELASTIC_USE_AGENT_STORE", 0),
    ("an older start's leftovers", "MASTER_ADDR MASTER_PORT NODE_RANK NNODES", 0),
    ("a shell that set Accelerate up", "ACCELERATE_DYNAMO_BACKEND ACCELERATE_MIXED_PRECISION", 0),
    ("the same", "ACCELERATE_USE_FSDP FSDP_OFFLOAD_PARAMS MEGATRON_LM_TP_DEGREE PARALLELISM_CONFIG_TP_SIZE", 0),
    ("the same", "ACCELERATE_USE_CPU ACCELERATE_DEEPSPEED_ZERO_STAGE ACCELERATE_GRADIENT_ACCUMULATION_STEPS", 0),
    ("mpirun", "OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE PMI_RANK PMI_SIZE PMIX_RANK MV2_COMM_WORLD_SIZE", 0),
    ("an outer srun", "SLURM_PROCID SLURM_LOCALID SLURM_NODEID SLURM_NTASKS SLURM_STEP_ID SLURM_CPU_BIND", 0),
    ("sbatch's own settings", "SBATCH_TIMELIMIT SBATCH_PARTITION SBATCH_ACCOUNT", 0),
    ("NCCL's rendezvous of another world", "NCCL_COMM_ID", 0),
    ("DeepSpeed, which would guess", "DS_ACCELERATOR CROSS_RANK CROSS_SIZE DLTS_JOB_ID", 0),
    ("a Slurm job, which the run lock knows", "SLURM_JOB_ID SLURM_RESTART_COUNT SLURM_ARRAY_TASK_ID SLURM_CONF", 1),
    ("a user who tunes NCCL", "NCCL_SOCKET_IFNAME NCCL_DEBUG NCCL_IB_DISABLE GLOO_SOCKET_IFNAME TORCH_NCCL_TRACE", 1),
    ("a user who chooses GPUs, caches, tokens", "CUDA_VISIBLE_DEVICES HF_HOME HF_TOKEN TORCH_EXTENSIONS_DIR", 1),
    ("a user whose variables look alike", "MY_RANK RANKING WORLD_SIZES MASTER_KEY PETS SLURMX ACCELERATE", 1),
]
MACHINE = Machine(0, None, None, 4, False, 10**9)


@pytest.mark.parametrize(
    ("who", "names", "stays"), CASES, ids=[f"{who}: {names.split()[0]}" for who, names, _ in CASES]
)
def test_what_the_ranks_get(who: str, names: str, stays: bool, capsys: pytest.CaptureFixture[str]) -> None:
    environment = dict.fromkeys(names.split(), "1") | {"PATH": "/bin"}
    kept, dropped = children_environment(environment)
    assert sorted(kept) == sorted(environment if stays else ["PATH"])
    assert dropped == ([] if stays else sorted(names.split()))
    drop_foreign(environment)
    assert environment == kept
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (0 if stays else 1) and all(name in lines[0] for name in dropped), "one line names them all"


def test_inside_its_own_step_slurm_is_expected_and_the_rest_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    environment = {"SLURM_PROCID": "1", "PMI_RANK": "1", "SLURM_JOB_ID": "7", "PET_NNODES": "2"}
    drop_foreign(environment, in_own_step=True)
    assert environment == {"SLURM_JOB_ID": "7"}
    assert capsys.readouterr().err == "turbolm: not passed on, since the recipe decides: PET_NNODES\n"


def test_submit_inside_a_job_submits_as_from_a_login_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command, with an sbatch that writes down what it was given."""
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\nimport json, os\njson.dump(dict(os.environ), open('given', 'w'))\nprint(12)\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    stays = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_CLUSTERS": "big", "HF_HOME": "/hf"}
    leaks = "SLURM_JOB_ID SLURM_CPU_BIND SLURM_ARRAY_TASK_ID SLURM_CPUS_PER_TASK SLURM_MEM_PER_CPU SLURM_NTASKS"
    outer = dict.fromkeys([*leaks.split(), "SBATCH_TIMELIMIT", "SBATCH_ACCOUNT", "MASTER_ADDR", "RANK"], "1")
    for name, value in (outer | stays).items():
        monkeypatch.setenv(name, value)
    recipe = write_recipe(tmp_path, cluster={"slurm": {"partition": "gpu"}})
    done = CliRunner().invoke(app, ["submit", str(recipe)])
    assert done.exit_code == 0, done.output
    given = json.loads(Path("given").read_text())
    assert not outer.keys() & given.keys()
    assert stays.items() <= given.items()
    (line,) = [line for line in done.output.splitlines() if "not passed on" in line]
    assert all(name in line for name in outer)
    assert json.loads((tmp_path / "runs/tiny/submissions/1/job.json").read_text()) == {"job_id": "12"}


def test_a_users_defaults_of_where_to_submit_hold_where_the_recipe_leaves_them_open() -> None:
    variables = dict.fromkeys(["SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_TIMELIMIT", "SBATCH_ARRAY_INX"], "x")
    kept, dropped = sbatch_environment(variables, {"partition", "time"})
    assert sorted(kept) == ["SBATCH_ACCOUNT"]
    assert dropped == ["SBATCH_ARRAY_INX", "SBATCH_PARTITION", "SBATCH_TIMELIMIT"]


@pytest.mark.parametrize("seeds", [[], [1, 2]])
def test_only_an_array_reads_the_index_of_an_array(
    seeds: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_programs(tmp_path)
    submission = render(tmp_path, monkeypatch, cluster={"slurm": {"seeds": seeds}})
    assert ("SLURM_ARRAY_TASK_ID" in submission.text) == bool(seeds)
    assert ("array" in read_directives(submission.text)) == bool(seeds)
    if not seeds:
        real = {**os.environ}
        monkeypatch.setattr(os, "environ", real | {"SLURM_ARRAY_TASK_ID": "7"})
        assert run_script(submission.script, tmp_path).code == 0


@pytest.mark.parametrize("overrides", [[], ["name=other run".replace(" ", "-"), "train.seed=3"]])
def test_several_nodes_are_refused_with_the_commands_that_train_on_them(overrides: list[str], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, cluster={"num_nodes": 3, "processes_per_node": 2})
    done = CliRunner().invoke(app, ["train", str(path), *overrides])
    assert isinstance(done.exception, UserError)
    text = str(done.exception)
    for command in (
        "turbolm submit",
        "launch/ssh.sh HOSTFILE",
        "accelerate launch --config_file",
        "cluster.num_nodes=1",
    ):
        assert command in text
    assert "--num_machines 3 --num_processes 6 " in text and all(override in text for override in overrides)
    refuse_several_nodes(load_recipe(path, ["cluster.num_nodes=1"]), str(path), [])


def _launch(launcher: str, plan: Plan, got: dict[str, str]) -> int:
    if launcher == "turbolm submit":
        got.update(sbatch_environment(os.environ, {"time", "nodes"})[0])
    else:
        drop_foreign(os.environ, in_own_step=launcher == "the node launcher")
        got.update(process_environment(plan))
    return 0


def test_seeded_environments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """2,500 environments x launchers through the functions that the launchers call: nothing escapes, nothing is lost.

    The rule is told here a second time, by plain lists of names.
    """
    seed, rng = 20, random.Random(20)
    foreign = [name for _, names, stays in CASES if not stays for name in names.split()]
    kept_names = [name for _, names, stays in CASES if stays for name in names.split()]
    own = ["PATH", "HOME", "LANG", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR", "TMPDIR", "A B", "é", "lower_rank"]
    values = ["", "0", "1", "-1", "99999999999999999999", "localhost", "no", "true", "\n", "é ☃", "$(id)", "a" * 5000]
    plan = build_plan(Recipe.model_validate(RECIPE | {"cluster": {"device": "cpu"}}), MACHINE)
    begun = time.monotonic()
    for number in range(2500):
        names = [name for pool in (foreign, kept_names, own) for name in rng.sample(pool, rng.randrange(len(pool)))]
        environment = {name: rng.choice(values) for name in rng.sample(names, len(names))}
        monkeypatch.setattr(os, "environ", dict(environment))
        launcher, got = rng.choice(["turbolm train", "the node launcher", "turbolm submit"]), dict[str, str]()
        assert exit_code_of(partial(_launch, launcher, plan, got)) in (0, 2, 75), (seed, number)
        told = capsys.readouterr().err
        assert told.count("\n") <= 1, "one line"
        set_by_us = {"OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "PATH", *cpu_environment()}
        for name in environment:
            if name in foreign and launcher != "turbolm submit" and name not in set_by_us:
                assert name not in got, (seed, number, name)
                assert name in told or launcher == "the node launcher", (seed, number, name)
            elif name in kept_names + own and launcher != "turbolm submit" and name not in set_by_us:
                assert got[name] == environment[name], (seed, number, name)
            elif launcher == "turbolm submit" and name.startswith("SLURM_") and name != "SLURM_CONF":
                assert name not in got, (seed, number, name)
        if launcher != "turbolm submit":
            assert got["DS_ACCELERATOR"] == "cpu" and got["OMP_NUM_THREADS"] == str(plan.threads_per_process)
    assert time.monotonic() - begun < 60


@pytest.mark.slow
def test_seeded_environments_through_the_command(tmp_path: Path) -> None:
    """No traceback, no wait, exit codes 0, 2 or 75."""
    rng = random.Random(21)
    Path(tmp_path / "text.txt").write_text("words and words " * 300)
    sources = [{"type": "text", "path": str(tmp_path / "text.txt")}]
    execution = {"cache_dir": str(tmp_path / "cache"), "runs_dir": str(tmp_path / "runs"), "prepare_workers": 1}
    cluster = {"num_nodes": 2, "device": "cpu", "processes_per_node": 1, "slurm": {}}
    data = {"seq_len": 64, "sources": sources, "validation": 0}
    recipe = str(write_recipe(tmp_path, data=data, execution=execution, cluster=cluster))
    foreign = [name for _, names, stays in CASES if not stays for name in names.split()]
    verbs = (["prepare", recipe], ["submit", recipe, "--dry-run"], ["train", recipe], ["stop", f"{tmp_path}/runs/tiny"])
    for number in range(10):
        leaked = {name: rng.choice(["0", "2", "", "x", "é"]) for name in rng.sample(foreign, 12)}
        begun = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "turbolm.cli", *verbs[number % 4]],
            env={**os.environ, **leaked}, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode in (0, 2, 75), (number, done.stderr)
        assert "Traceback" not in done.stderr, (number, done.stderr)
        assert done.stdout or time.monotonic() - begun < 60
