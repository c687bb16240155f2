"""The command a newcomer types: it trains, stops when asked, resumes to the bit, exports, and refuses what it must."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.plan.test_traffic import llama_tensors
from tests.train.harness import make_recipe, train_in_world
from turbolm.data.prepare.build import prepare
from turbolm.plan import profiles
from turbolm.plan.count import answer_file, read_model_config
from turbolm.plan.profile import Activations, Cost, LayerKind, LossBytes, ModelProfile, Peak
from turbolm.recipe.contract import canonical_json
from turbolm.recipe.load import dump_recipe, load_recipe
from turbolm.recipe.schema import Recipe

ROOT = Path(__file__).parents[1]
TURBOLM = [sys.executable, "-m", "turbolm.cli"]
STEPS = 120
CANARY = "c4n4ry-5d1f0c7e9b"
SECRETS = dict.fromkeys(("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"), CANARY)
CHILD_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", **SECRETS}
PRINTED: list[str] = []


def run(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        arguments, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, env=CHILD_ENVIRONMENT, **settings
    )
    PRINTED.append(done.stdout + done.stderr)
    return done


def train(folder: Path, *overrides: str) -> int | str:
    """Train on the ranks alone, where a test is not about the command or its launcher."""
    recipe = load_recipe(folder / "recipe.yaml", overrides)
    prepare(recipe)
    return train_in_world(recipe)


def keep_profile(recipe: Recipe) -> None:
    """Leave a profile of the model in the cache, as if it had been traced: true tensors, and 5 bytes a token saved."""
    saved, none = Cost(per_token=5), Cost()
    ways = (Activations("none", "sdpa", 4, saved, Peak(()), none, none),)
    loss = (LossBytes("full", 4, none, Peak((none,)), Peak((none,)), none),)
    layers = (LayerKind("full_attention", 2, 20_832, "full", None, 2 * 20_736, 2 * (48 + 48), ways),)
    profile = ModelProfile("llama", tuple(llama_tensors()), 0, False, 2 * 300 * 48, layers, ways, loss, {})
    config, _ = read_model_config(recipe, "recipe")
    assert config is not None
    request = canonical_json(profiles.profile_request(config, recipe.model.dropout))
    path = answer_file(
        recipe.execution.cache_dir, request, ("torch", "transformers"), profiles._TRACERS, ".profile.json"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(profile.to_json(), encoding="utf-8")


def steps_of(run_folder: Path) -> list[dict[str, Any]]:
    """Training lines by step; a later attempt's line replaces an earlier one's."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    latest = {line["step"]: line for line in lines if "train/loss" in line}
    return [latest[step] for step in sorted(latest)]


def learned(run_folder: Path) -> list[tuple[Any, ...]]:
    """What must not depend on how the run was carried out."""
    return [
        (s["step"], s["train/loss"], s["train/grad_norm"], s["train/lr"], s["data/samples"])
        for s in steps_of(run_folder)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("end-to-end")
    recipe = make_recipe(
        folder,
        train={"budget": STEPS * 160, "global_batch": 160},
        data={"seq_len": 32},
        logging={"every_steps": 1, "sample_tokens": 8},
        checkpoint={"every": "25 steps"},
        execution={"zero_stage": 2},
        cluster={"device": "cpu", "processes_per_node": 2},
    )
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    keep_profile(recipe)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Path:
    """The reference run, started by hand through `accelerate launch`."""
    recipe = str(folder / "recipe.yaml")
    assert run(*TURBOLM, "prepare", recipe).returncode == 0
    done = run(
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu.yaml"),
        *("--main_process_port", "0", "-m", "turbolm.train", "--recipe", recipe, "name=uninterrupted"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bits per byte" in done.stdout
    return folder / "runs" / "uninterrupted"


def interrupt(command: list[str], target: Path, attempt: int, send: Callable[[subprocess.Popen[str]], None]) -> str:
    """Start a run, `send` it a signal once this attempt has trained some steps; returns what it printed."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=CHILD_ENVIRONMENT
    )
    deadline = time.monotonic() + 120
    metrics = target / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text(encoding="utf-8").count(f'"attempt": {attempt},') >= 5):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout and process.stdout.read()
        time.sleep(0.05)
    send(process)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "the same command resumes there" in output
    return output


def process_of_rank(name: str, rank: int) -> int:
    """The process number of one rank of a run."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"turbolm.train" in command and f"name={name}".encode() in command and f"RANK={rank}".encode() in variables:
            return int(process.name)
    raise AssertionError(f"rank {rank} of {name} does not run")


@pytest.fixture(scope="module")
def resumed(folder: Path) -> Path:
    """The same through `turbolm train`, interrupted by Ctrl-C, then by TERM to one of its ranks; the rest on ranks."""
    overrides, target = ["name=resumed", "logging.trackers=[tensorboard]"], folder / "runs" / "resumed"
    command = [*TURBOLM, "train", str(folder / "recipe.yaml"), *overrides]
    interrupt(command, target, 1, lambda process: process.send_signal(signal.SIGINT))
    first = len(steps_of(target))
    output = interrupt(command, target, 2, lambda _: os.kill(process_of_rank("resumed", 1), signal.SIGTERM))
    assert "asked to stop by another rank" in output
    assert "resumed from" in output and "runs/resumed" in output
    assert first < len(steps_of(target)) < STEPS
    assert train(folder, *overrides) == 0
    return target


def test_an_interrupted_run_equals_an_uninterrupted_one(uninterrupted: Path, resumed: Path) -> None:
    expected = learned(uninterrupted)
    assert len(expected) == STEPS
    assert learned(resumed) == expected
    last = f"checkpoints/step-{STEPS:08d}"
    for name in ("fragments-00000.safetensors", "fragments-00001.safetensors"):
        assert (resumed / last / name).read_bytes() == (uninterrupted / last / name).read_bytes()


def test_tensorboard_shows_the_metrics_of_an_interrupted_run(resumed: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(resumed / "trackers" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    written = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for name in ("train/loss", "train/lr", "train/grad_norm", "tokens_seen", "perf/tokens_per_sec", "eval/loss"):
        lines = {line["step"]: line[name] for line in written if name in line}
        shown = {event.step: event.value for event in events.Scalars(name)}
        assert shown == pytest.approx(lines, rel=1e-6), name


def test_a_run_says_what_was_planned_and_what_happened(uninterrupted: Path) -> None:
    """ZeRO-2 in fp32 on two ranks reduces 4 bytes a weight and gathers 4, with a few flags; both are counted."""
    planned = json.loads((uninterrupted / "attempts/1/plan.json").read_text(encoding="utf-8"))["planned"]
    found = json.loads((uninterrupted / "results.json").read_text(encoding="utf-8"))["planned"]
    num_parameters = sum(tensor.num_parameters for tensor in llama_tensors())
    assert 8 * num_parameters <= planned["collective_bytes"] < 8 * num_parameters + 1000
    assert found["collective_bytes"] == dict.fromkeys(("planned", "measured"), planned["collective_bytes"])
    # Weights, gradients of the share, master copy and moments of the share, and what is saved of 96 tokens.
    assert planned["peak_bytes"] > (4 + (4 + 4 + 8) / 2) * num_parameters + 3 * 96 * 5
    assert found["resident_bytes"]["planned"] == planned["peak_bytes"] < found["resident_bytes"]["measured"]
    seconds = sorted(160 / step["perf/tokens_per_sec"] for step in steps_of(uninterrupted)[2:])
    assert found["step_sec"]["measured"] == pytest.approx(statistics.median(seconds), rel=0.05)
    assert found["step_sec"]["planned"] is None and "no time is planned: not calibrated; " in found["notes"][0]
    log = (uninterrupted / "attempts/1/log.rank0.txt").read_text(encoding="utf-8")
    (line,) = [line for line in log.splitlines() if line.startswith("  planned ")]
    assert "collectives" in line and "(+0.0%); no time is planned: not calibrated" in line
    assert "<h2>Planned / measured</h2>" in (uninterrupted / "report.html").read_text(encoding="utf-8")


def test_torchrun_starts_the_same_training(folder: Path, uninterrupted: Path) -> None:
    """Its first steps are those of the long run: with a constant rate from the start, a budget changes nothing."""
    constant = ["schedule.name=constant", "schedule.warmup=0"]
    done = run(
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", "localhost:0", "-m", "turbolm.train", "--recipe", str(folder / "recipe.yaml")),
        *("name=torchrun", "train.budget=1600", *constant),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert train(folder, "name=longer", "train.budget=3200", *constant) == 0
    assert len(learned(folder / "runs" / "torchrun")) == 10
    assert learned(folder / "runs" / "torchrun") == learned(folder / "runs" / "longer")[:10]
    samples = [step[4] for step in learned(uninterrupted)]
    assert [step[4] for step in learned(folder / "runs" / "longer")] == samples[:20]


def test_a_finished_run_says_so_and_leaves_everything(folder: Path, resumed: Path) -> None:
    before = (resumed / "metrics.jsonl").read_bytes()
    done = run(*TURBOLM, "train", str(folder / "recipe.yaml"), "name=resumed")
    assert done.returncode == 0 and "is complete" in done.stdout
    assert (resumed / "metrics.jsonl").read_bytes() == before
    for name in (
        "recipe.yaml",
        "contract.json",
        "results.json",
        "report.html",
        "export/config.json",
        "export/README.md",
    ):
        assert (resumed / name).stat().st_size > 0, name
    verified = run(*TURBOLM, "verify", str(resumed / "checkpoints" / f"step-{STEPS:08d}"))
    assert verified.returncode == 0 and "intact" in verified.stdout


def test_a_changed_contract_is_refused_with_the_changed_keys(folder: Path, resumed: Path) -> None:
    changes = ["name=resumed", "optimizer.lr=1e-4", "train.seed=9", "execution.zero_stage=1"]
    before = (resumed / "contract.json").read_bytes()
    done = run(*TURBOLM, "train", str(folder / "recipe.yaml"), *changes)
    assert done.returncode == 2
    assert "optimizer.lr: 0.003 -> 0.0001" in done.stderr and "train.seed: 3 -> 9" in done.stderr
    assert "zero_stage" not in done.stderr and "Traceback" not in done.stderr
    assert (resumed / "contract.json").read_bytes() == before


def test_a_larger_budget_extends_a_finished_run(folder: Path, uninterrupted: Path, tmp_path: Path) -> None:
    target = folder / "runs" / "extended"
    shutil.copytree(uninterrupted, target)
    assert train(folder, "name=extended", f"train.budget={(STEPS + 20) * 160}", "execution.zero_stage=3") == 0
    trained = learned(target)
    assert len(trained) == STEPS + 20
    assert trained[:STEPS] == learned(uninterrupted)
    # By hand: 20 more steps with 2% warmup (0.4 of a step) from the floor, then cosine to a tenth.
    expected = [3e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (i + 0.5 - 0.4) / 19.6))) for i in range(20)]
    assert [step[3] for step in trained[STEPS:]] == pytest.approx(expected)


def test_the_export_has_the_same_loss_in_plain_transformers(uninterrupted: Path) -> None:
    """Another process, no turbolm model code: every held-out document by itself through `AutoModelForCausalLM`."""
    script = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from turbolm.data.prepare.build import find_store
from turbolm.data.store.token_store import open_store
from turbolm.recipe.load import load_recipe
run = sys.argv[1]
recipe = load_recipe(run + "/recipe.yaml")
store = open_store(find_store(recipe))
model = AutoModelForCausalLM.from_pretrained(run + "/export", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(run + "/export")
total = count = 0
for document, length in enumerate(store.lengths("validation").tolist()):
    for start in range(0, length, recipe.data.seq_len):
        tokens = store.read("validation", document, start, min(recipe.data.seq_len, length - start)).astype("int64")
        tokens = torch.from_numpy(tokens)[None]
        with torch.no_grad():
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        total, count = total + loss.item() * (tokens.shape[1] - 1), count + tokens.shape[1] - 1
prompt = tokenizer("alpha", return_tensors="pt")
generated = model.generate(**prompt, max_new_tokens=5, do_sample=False)
print(json.dumps({"loss": total / count, "count": count, "generated": generated.shape[1] - prompt.input_ids.shape[1]}))
"""
    done = run(sys.executable, "-c", script, str(uninterrupted))
    assert done.returncode == 0, done.stderr
    plain = json.loads(done.stdout.splitlines()[-1])
    results = json.loads((uninterrupted / "results.json").read_text(encoding="utf-8"))
    assert plain["count"] == results["eval_targets"]
    assert plain["loss"] == pytest.approx(results["eval_loss"], abs=1e-4)
    assert 0 < plain["generated"] <= 5


def test_damaged_checkpoints_are_passed_over_and_none_left_stops_the_run(folder: Path, uninterrupted: Path) -> None:
    target = folder / "runs" / "damaged"
    shutil.copytree(uninterrupted, target)
    (target / "results.json").unlink()  # as if the process had died before it
    newest = target / "checkpoints" / f"step-{STEPS:08d}"
    tensors = newest / "fragments-00001.safetensors"
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 1
    tensors.write_bytes(bytes(content))
    assert train(folder, "name=damaged") == 0
    said = (target / "attempts/2/log.rank0.txt").read_text(encoding="utf-8")
    assert f"step-{STEPS:08d}: fragments-00001.safetensors: content changed" in said
    assert "resumed from" in said and "step-00000100" in said
    assert learned(target) == learned(uninterrupted)

    (target / "results.json").unlink()
    for checkpoint in (target / "checkpoints").iterdir():
        (checkpoint / "manifest.json").write_text("{", encoding="utf-8")
    assert "no checkpoint of" in str(train(folder, "name=damaged"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lrr=1"], "did you mean 'lr'"),
        (["cluster.device=cuda"], "no GPU is visible"),
        (["model.config.num_hidden_layer=3", "name=typo"], "did you mean 'num_hidden_layers'"),
        (["train.global_batch=32"], "too few for"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(overrides: list[str], message: str, folder: Path) -> None:
    done = run(*TURBOLM, "train", str(folder / "recipe.yaml"), *overrides)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_no_secret_of_the_environment_is_written_or_printed(folder: Path, uninterrupted: Path, resumed: Path) -> None:
    """Logs, recipes, environment.json, metrics, checkpoints, the export with its model card, the report, the store."""
    written = [path for path in folder.rglob("*") if path.is_file()]
    for name in ("environment.json", "launcher.log", "log.rank1.txt", "manifest.json", "README.md", "report.html"):
        assert name in {path.name for path in written}
    assert not [path for path in written if CANARY.encode() in path.read_bytes()]
    assert PRINTED and not any(CANARY in text for text in PRINTED)


def test_a_model_with_dropout_is_not_taken_for_one_that_leaks(folder: Path) -> None:
    """The isolation check compares two forward passes, which dropout would tell apart."""
    assert train(folder, "name=dropout", "model.dropout=0.2", "train.budget=1600") == 0
    assert len(steps_of(folder / "runs" / "dropout")) == 10


@pytest.mark.slow
def test_what_ranks_refuse_comes_through_the_launcher(folder: Path) -> None:
    """As exit code 2 and one message."""
    broken = folder / "runs" / "broken" / "checkpoints" / "step-00000010"
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text("{")
    done = run(*TURBOLM, "train", str(folder / "recipe.yaml"), "cluster.processes_per_node=1", "name=broken")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "no checkpoint of" in done.stderr and "Traceback" not in done.stderr + done.stdout
    assert (broken / "manifest.json").read_text() == "{"
