"""The mean of the weights that a run keeps is that of its steps, at every ZeRO stage, and training does not see it.

torch's `AveragedModel` is the reference, on the weights of the checkpoints that a run saves after every step.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tests.checkpoint.test_resume import read_tensors
from tests.train.harness import BINS_PER_BATCH, MODELS, SEQ_LEN, make_recipe
from tests.train.test_evaluation import QUESTIONS, Plain, write_lines
from tests.train.test_exports import loss_of_each_slice
from tests.world import run_world
from turbolm.checkpoint.average import average_checkpoints, average_command
from turbolm.checkpoint.export import export_from_run
from turbolm.checkpoint.export_folder import Origin, read_origin
from turbolm.checkpoint.load import CheckpointReader
from turbolm.cli import app
from turbolm.data.batch.scored import TaskScore
from turbolm.data.prepare.build import find_store, prepare
from turbolm.data.store.token_store import open_store
from turbolm.errors import UserError
from turbolm.plan.machine import Machine
from turbolm.plan.plan import build_plan
from turbolm.recipe.load import load_recipe
from turbolm.recipe.schema import Recipe
from turbolm.train.run_directory import run_directory
from turbolm.train.weight_average import RunningAverage

STEPS, RESUMED = 6, 4
TAIL: dict[str, Any] = {"last": "4 steps", "export": True}  # the weights after steps 3 to 6
EXPONENTIAL: dict[str, Any] = {"last": "100%", "half_life": "1 steps", "every_steps": 2}  # after steps 1, 3, 5
Start = tuple[Recipe, Path | None]  # a run, and the run whose first checkpoints it goes on from


def recipe_of(folder: Path, name: str, stage: int, average: dict[str, Any] | None = TAIL, **execution: Any) -> Recipe:
    precision, tasks = execution.pop("precision", "fp32"), execution.pop("tasks", [])
    made = make_recipe(
        folder,
        model={"config": {**MODELS["llama"], "tie_word_embeddings": True}},
        train={"budget": STEPS * BINS_PER_BATCH * SEQ_LEN, "precision": precision},
        optimizer={"lr": 3e-2},
        execution={"zero_stage": stage, "micro_batch": 2 * SEQ_LEN, "adam_kernel": "torch", **execution},
        evaluation={"every": "2 steps", "tasks": tasks, **({"weight_average": average} if average else {})},
        checkpoint={"every": "1 steps", "keep_last": 9},
        logging={"sample_tokens": 0},
    )
    return made.model_copy(update={"name": name})


def train(starts: list[Start], world_size: int = 2) -> None:
    prepare(starts[0][0])
    assert run_world(world_size, _train, starts)[0] == [0] * len(starts)


def _train(starts: list[Start]) -> list[int]:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from turbolm.train.worker import run_worker

    codes = []
    for recipe, source in starts:
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        gc.collect()
        if source is not None:  # there was a start before, and so there is a process group
            if dist.get_rank() == 0:
                start_from(source, run_directory(recipe).path)
            dist.barrier()
        codes.append(run_worker(recipe))
    return codes


def start_from(source: Path, run: Path) -> None:
    """A run directory as that of `source` was after step RESUMED."""
    run.mkdir(parents=True)
    shutil.copy(source / "contract.json", run)
    for step in range(1, RESUMED + 1):
        shutil.copytree(source / f"checkpoints/step-{step:08d}", run / f"checkpoints/step-{step:08d}")


def weights_after(run: Path, step: int) -> dict[str, torch.Tensor]:
    return {
        name.partition("/")[2]: value
        for name, value in read_tensors(run / f"checkpoints/step-{step:08d}").items()
        if name.startswith("weight/")
    }


def average_of(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    tensors = read_tensors(run / f"checkpoints/step-{step:08d}")
    return {name.partition("/")[2]: value for name, value in tensors.items() if name.startswith("weight_average/")}


def reference(run: Path, steps: list[int], decay: float | None = None) -> dict[str, torch.Tensor]:
    """What torch makes of the weights after these steps, equal or exponential."""

    class Holder(nn.Module):
        def __init__(self, tensors: dict[str, torch.Tensor]):
            super().__init__()
            self.all = nn.ParameterList(tensors.values())

    def exponential(average: torch.Tensor, weight: torch.Tensor, num: Any) -> torch.Tensor:
        share = max(1 / (int(num) + 1), 1 - (decay or 0))
        return average + share * (weight - average)

    holders = [Holder(weights_after(run, step)) for step in steps]
    averaged = AveragedModel(holders[0], avg_fn=exponential if decay is not None else None)
    for holder in holders:
        averaged.update_parameters(holder)
    return dict(zip(weights_after(run, steps[0]), (p.detach() for p in averaged.module.all), strict=True))


def check_average(run: Path, steps: list[int], decay: float | None = None) -> None:
    ours, expected = average_of(run), reference(run, steps, decay)
    assert ours.keys() == expected.keys()
    last = weights_after(run, STEPS)
    assert max(float((last[name] - expected[name]).abs().max()) for name in ours) > 5e-3, "they must differ"
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=f"{run.name}: {name}")


def evaluations(run: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "eval/loss" in line}


def steps_of(run: Path) -> list[tuple[float, ...]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["train/loss"], line["train/grad_norm"]) for line in lines if "train/loss" in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs at three stages, one without an average, and one that goes on at another stage."""
    folder = tmp_path_factory.mktemp("averages")
    greek = {"name": "greek", "path": write_lines(folder / "greek.jsonl", QUESTIONS)}
    zero3 = recipe_of(folder, "zero3", 3, tasks=[greek])
    moved = recipe_of(folder, "moved", 0)
    bf16 = recipe_of(folder, "bf16", 1, EXPONENTIAL, precision="bf16")
    plain = recipe_of(folder, "plain", 3, None)
    train([(zero3, None), (plain, None), (bf16, None), (moved, folder / "runs/zero3")])
    return folder


def test_it_is_the_mean_of_the_last_steps_and_of_all_with_a_half_life(folder: Path) -> None:
    check_average(folder / "runs/zero3", [3, 4, 5, 6])
    assert average_of(folder / "runs/zero3", step=2) == {}, "nothing is kept before"
    check_average(folder / "runs/bf16", [1, 3, 5], decay=0.5**2)  # two steps lie between them


def test_training_does_not_see_it(folder: Path) -> None:
    averaged, plain = folder / "runs/zero3", folder / "runs/plain"
    assert steps_of(averaged) == steps_of(plain)
    theirs = read_tensors(plain / f"checkpoints/step-{STEPS:08d}")
    ours = read_tensors(averaged / f"checkpoints/step-{STEPS:08d}")
    assert {name.partition("/")[0] for name in ours.keys() - theirs.keys()} == {"weight_average"}
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    raw = [{step: line["eval/loss"] for step, line in evaluations(run).items()} for run in (averaged, plain)]
    assert raw[0] == raw[1]
    assert [step for step, line in evaluations(averaged).items() if "eval/average_loss" in line] == [4, 6]


def test_the_export_has_the_mean_and_its_loss(folder: Path) -> None:
    run = folder / "runs/zero3"
    results = json.loads((run / "results.json").read_text())
    average, evaluated = results["weight_average"], evaluations(run)[STEPS]
    assert (average["first_step"], average["every_steps"], average["count"]) == (3, 1, 4)
    assert average["exported"] and average["eval_loss"] == evaluated["eval/average_loss"] != results["eval_loss"]
    model = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    for name, value in average_of(run).items():
        assert torch.equal(model.get_parameter(name).detach().flatten(), value), name
    recipe = load_recipe(run / "recipe.yaml")
    loss, _ = loss_of_each_slice(model, recipe)
    assert loss == pytest.approx(average["eval_loss"], rel=1e-6)
    plain = Plain(recipe, open_store(find_store(recipe) or "missing"))
    plain.model = model.eval()
    bits_per_byte, accuracy = plain.questions(QUESTIONS)
    score = average["eval_tasks"]["greek"]
    assert score == {"bits_per_byte": pytest.approx(bits_per_byte, rel=1e-5), "accuracy": accuracy, "questions": 3}
    assert score["bits_per_byte"] == evaluated["eval/average/greek/bits_per_byte"]
    assert score["bits_per_byte"] != evaluated["eval/greek/bits_per_byte"]
    assert f"step {STEPS}  averaged weights  greek: {TaskScore(**score)}" in log_of(run)
    card = (run / "export/README.md").read_text()
    assert "| weights | the mean of 4 from step 3 on (evaluation.weight_average); the figures of this table are" in card
    for row in (f"eval loss | {average['eval_loss']:.4f} nats", f"task greek | {TaskScore(**score)}"):
        assert f"| {row}" in card, "the mean's"
    bf16 = json.loads((folder / "runs/bf16/results.json").read_text())
    assert not bf16["weight_average"]["exported"] and bf16["weight_average"]["count"] == 3
    model = AutoModelForCausalLM.from_pretrained(folder / "runs/bf16/export", dtype=torch.bfloat16)
    for name, value in weights_after(folder / "runs/bf16", STEPS).items():
        assert torch.equal(model.get_parameter(name).detach().flatten(), value.bfloat16()), name


def test_any_checkpoint_that_has_a_mean_is_exported_with_it(folder: Path, tmp_path: Path) -> None:
    run = folder / "runs/zero3"
    with_mean, without = (str(run / f"checkpoints/step-{step:08d}") for step in (4, 2))
    shown = CliRunner().invoke(app, ["export", with_mean, str(tmp_path / "out"), "--average"])
    assert shown.exit_code == 0, shown.output
    assert read_origin(tmp_path / "out") == Origin("zero3", "step-00000004", averaged=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, value in average_of(run, step=4).items():
        assert torch.equal(model.get_parameter(name).detach().flatten(), value), name
    with pytest.raises(UserError, match="step-00000002 has no average of the weights: evaluation.weight_average was"):
        export_from_run(Path(without), tmp_path / "none", averaged=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def check_resumed(run: Path, source: Path, atol: float) -> None:
    assert f"resumed from {run}/checkpoints/step-{RESUMED:08d}" in log_of(run)
    ours, theirs = average_of(run), average_of(source)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=atol, msg=f"{run.name}: {name}")
    ends = [evaluations(one)[STEPS]["eval/average_loss"] for one in (run, source)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-5 if atol else 0, abs=0)


def log_of(run: Path) -> str:
    return (max((run / "attempts").iterdir()) / "log.rank0.txt").read_text()


def test_another_stage_goes_on_with_it(folder: Path) -> None:
    check_resumed(folder / "runs/moved", folder / "runs/zero3", atol=2e-5)


@pytest.mark.slow
def test_other_stages_keep_it_and_resume_it_anywhere(tmp_path: Path) -> None:
    runs, stages = tmp_path / "runs", {"zero0": 0, "zero1": 1, "zero2": 2, "offloaded": 2}
    offloaded: dict[str, dict[str, Any]] = {"offloaded": {"offload_optimizer": True}}
    starts: list[Start] = [(recipe_of(tmp_path, n, s, **offloaded.get(n, {})), None) for n, s in stages.items()]
    starts += [(recipe_of(tmp_path, "again", 2), runs / "zero2"), (recipe_of(tmp_path, "moved", 3), runs / "offloaded")]
    train(starts)
    for name in stages:
        check_average(runs / name, [3, 4, 5, 6])
    check_resumed(runs / "again", runs / "zero2", atol=0)
    check_resumed(runs / "moved", runs / "offloaded", atol=2e-5)
    for world_size, stage in ((1, 1), (3, 3)):
        start_from(runs / "zero2", runs / f"by-{world_size}")
        train([(recipe_of(tmp_path, f"by-{world_size}", stage), None)], world_size)
        check_resumed(runs / f"by-{world_size}", runs / "zero2", atol=2e-5)


def test_where_it_cannot_work_the_recipe_is_refused() -> None:
    quickstart = Path(__file__).parents[2] / "recipes/quickstart/config.yaml"
    with pytest.raises(UserError, match=r"evaluation\.weight_average\.last: must be at most train\.budget .*400 steps"):
        load_recipe(quickstart, ["evaluation.weight_average.last=400 steps"])
    with pytest.raises(UserError, match=r"evaluation\.weight_average: has no use: data\.validation is 0"):
        load_recipe(quickstart, ["evaluation.weight_average={}", "data.validation=0"])
    load_recipe(quickstart, ["evaluation.weight_average={export: true}", "data.validation=0"])


def running(average: str, *overrides: str) -> RunningAverage:
    """Of 100 steps of 10k tokens, around an engine that notes what it is asked for."""
    quickstart = Path(__file__).parents[2] / "recipes/quickstart/config.yaml"
    sizes = ["train.budget=1024k", "train.global_batch=10240", "execution.micro_batch=auto"]
    recipe = load_recipe(quickstart, [*sizes, f"evaluation.weight_average={average}", *overrides])
    return RunningAverage(
        Mock(averaged=Mock(is_empty=False)), build_plan(recipe, Machine(0, None, None, 2, True, 2**34), 1)
    )


def shares(average: RunningAverage, steps: range) -> list[float]:
    for step in steps:
        average.add(step)
    return [call.args[0] for call in average.engine.add_to_average.call_args_list]  # type: ignore[attr-defined]


def test_which_steps_count_and_how_much() -> None:
    firsts = [running(average).plan.first_averaged_step for average in ("{}", "{last: 25%}", "{last: 100%}")]
    assert firsts == [91, 76, 1]
    assert shares(running("{last: 30k}"), range(1, 101)) == [1, 1 / 2, 1 / 3]  # 98 to 100
    assert shares(running("{last: 10 steps, every_steps: 4}"), range(1, 101)) == [1, 1 / 2, 1 / 3]  # 91, 95, 99
    exponential = shares(running("{last: 100%, half_life: 2 steps}"), range(1, 101))
    assert exponential[:5] == pytest.approx([1, 1 / 2, 1 / 3, 1 - 0.5**0.5, 1 - 0.5**0.5])  # equal while that is more


def test_a_mean_of_other_steps_begins_anew_and_says_so() -> None:
    average = running("{last: 20%}")
    saved = {"first_step": 81, "every_steps": 1, "count": 5, "planned_first_step": 81, "half_life_tokens": None}
    assert average.restore(saved, 85) is None and average.count == 5 and average.state() == saved
    assert running("{last: 20%, half_life: 2 steps}").restore(saved, 85) is not None
    others = [{"planned_first_step": 80}, {"every_steps": 2}, {"half_life_tokens": 20480.0}, {"every_steps": None}]
    unknown = {key: value for key, value in saved.items() if key != "planned_first_step"}
    for other in (None, unknown, *({**saved, **one} for one in others)):
        message = average.restore(other, 85)
        assert message is not None and "begins after step 85, not 81" in message and average.state() == {}
    assert average.restore({**saved, "planned_first_step": 41}, 60) is None and average.count == 0, (
        "a longer run, not there yet"
    )


def test_a_mean_that_begins_late_says_its_first_step_and_goes_on() -> None:
    average = running("{last: 20%, every_steps: 2}")  # 81, 83, ...
    assert average.restore(None, 85) is not None
    shares(average, range(86, 91))
    assert (average.state()["first_step"], average.state()["count"]) == (87, 2)
    again = running("{last: 20%, every_steps: 2}")
    assert again.restore(average.state(), 90) is None and again.state() == average.state()


def test_the_plan_counts_it(tmp_path: Path) -> None:
    from tests.plan.test_zero_memory import TENSORS
    from turbolm.plan.zero_memory import estimate_zero_memory

    for stage, offload, owned in ((0, False, 92), (1, False, 46), (3, True, 46)):
        extra = []
        for average in (None, {"last": "10%"}):
            recipe = recipe_of(tmp_path, "x", stage, average, offload_optimizer=offload)
            state = estimate_zero_memory(TENSORS, build_plan(recipe, Machine(0, None, None, 2, True, 2**34), 2))
            extra.append(state.host_bytes if offload else state.optimizer)
        assert extra[1] - extra[0] == 4 * owned, stage


def checkpoints_of(run: Path, *steps: int) -> list[Path]:
    return [run / f"checkpoints/step-{step:08d}" for step in steps]


def plain_mean(run: Path, steps: list[int], weights: list[float]) -> dict[str, torch.Tensor]:
    each = [weights_after(run, step) for step in steps]
    total = sum(weights)
    return {
        name: torch.stack([one[name].double() * weight for one, weight in zip(each, weights, strict=True)]).sum(0)
        / total
        for name in each[0]
    }


def test_checkpoints_are_averaged_in_slices(folder: Path, tmp_path: Path) -> None:
    """Never more of a checkpoint than a slice; what interrupted calls left behind goes."""
    run, read, sizes = folder / "runs/zero3", CheckpointReader.read, []

    def noted(reader: CheckpointReader, state: str, name: str, start: int, numel: int) -> torch.Tensor:
        sizes.append(numel)
        return read(reader, state, name, start, numel)

    (tmp_path / ".tmp-out.average/left").mkdir(parents=True)
    with (
        patch("turbolm.checkpoint.average._SLICE_ELEMENTS", 1000),
        patch("turbolm.checkpoint.average._PART_BYTES", 10_000),
        patch.object(CheckpointReader, "read", noted),
    ):
        average_checkpoints(checkpoints_of(run, 6, 3, 5), tmp_path / "out", [3, 1, 0.5])
    assert max(sizes) == 1000
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    for name, value in plain_mean(run, [6, 3, 5], [3, 1, 0.5]).items():
        torch.testing.assert_close(model.get_parameter(name).detach().flatten(), value.float(), rtol=1e-6, atol=0)
    note = json.loads((tmp_path / "out/turbolm_average.json").read_text())
    assert [(one["step"], one["share"]) for one in note["checkpoints"]] == [(3, 1 / 4.5), (5, 0.5 / 4.5), (6, 3 / 4.5)]
    manifest = checkpoints_of(run, 6)[0] / "manifest.json"
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    assert note["checkpoints"][-1]["manifest_sha256"] == digest and digest in (tmp_path / "out/README.md").read_text()


def test_the_master_weights_are_averaged_not_the_halves(folder: Path, tmp_path: Path) -> None:
    run = folder / "runs/bf16"
    shown = CliRunner().invoke(app, ["average", str(run), str(tmp_path / "out"), "--last", "3"])
    assert shown.exit_code == 0 and shown.stdout.endswith(f"exported to {tmp_path / 'out'}\n"), shown.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    differs = False
    for name, value in plain_mean(run, [4, 5, 6], [1, 1, 1]).items():
        assert torch.equal(model.get_parameter(name).detach().flatten(), value.bfloat16()), name
        halves = torch.stack([weights_after(run, step)[name].bfloat16().double() for step in (4, 5, 6)]).mean(0)
        differs = differs or not torch.equal(halves.bfloat16(), value.bfloat16())
    assert differs


def edit_weights(checkpoint: Path, change: Callable[[torch.Tensor], None]) -> None:
    """Change what rank 0 saved of the last norm, and the manifest with it."""
    path, name = checkpoint / "fragments-00000.safetensors", "weight/model.norm.weight"
    tensors = load_file(path)
    change(tensors[name])
    save_file(tensors, path)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    content = path.read_bytes()
    manifest["files"][path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_an_unknown_precision_is_refused_before_any_checkpoint_is_read(tmp_path: Path) -> None:
    checkpoints = checkpoints_of(tmp_path / "run", 3, 4)
    for checkpoint in checkpoints:
        checkpoint.mkdir(parents=True)
    record = {"fingerprint": "f", "contract": {"train": {"precision": "int8"}}}
    (tmp_path / "run/contract.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="run/contract.json: contract.train.precision: expected fp32, bf16 or fp16"):
        average_checkpoints(checkpoints, tmp_path / "out")


def test_what_cannot_be_averaged_is_refused_and_nothing_is_left(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs/zero3"
    shutil.copytree(folder / "runs/zero3", run)
    good, other, out = checkpoints_of(run, 3, 4), checkpoints_of(folder / "runs/bf16", 3)[0], tmp_path / "new/out"
    copy, corrupt, infinite, reshaped = checkpoints_of(run, 2, 5, 6, 1)
    shutil.copytree(good[0], tmp_path / "copy")
    shutil.rmtree(copy)
    (copy).mkdir()
    (corrupt / "trainer.json").write_text("{}")
    edit_weights(infinite, lambda weight: weight.fill_(float("inf")))
    manifest = json.loads((reshaped / "manifest.json").read_text())
    manifest["parameters"]["model.norm.weight"] = [47]
    (reshaped / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "there").mkdir()
    cases: list[tuple[list[Path], Path, str | None, str]] = [
        (good[:1], out, None, "expected two or more checkpoints to average, got 1"),
        (good, tmp_path / "there", None, f"{tmp_path}/there exists; choose another folder"),
        (good, out, "1", "--weights: expected one for each of 2 checkpoints, got 1"),
        (good, out, "1,-1", "--weights: expected numbers above 0, got 1, -1"),
        (good, out, "1,x", "--weights: expected numbers such as 1,2,4, got '1,x'"),
        ([*good, tmp_path / "copy"], out, None, f"{tmp_path}/copy: of step 3, as is {good[0]}"),
        ([*good, copy], out, None, f"{copy}: no manifest.json; not a complete checkpoint"),
        ([*good, other], out, None, f"{other}: saved under another learning contract than that of the first"),
        ([*good, reshaped], out, None, f"{reshaped}: its parameters are not those of {good[0]}, first model.n"),
        ([*good, corrupt], out, None, f"{corrupt}: trainer.json: 2 bytes instead of "),
        ([*good, infinite], out, None, f"{infinite}: model.norm.weight has a weight that is not finite; leave this "),
        ([tmp_path / "copy", good[0]], out, None, f"{tmp_path}/copy: expected a checkpoint inside a run directory; "),
    ]  # fmt: skip
    before = sorted(path for path in tmp_path.rglob("*"))
    for checkpoints, target, weights, message in cases:
        with pytest.raises(UserError) as refusal:
            average_command([*checkpoints, target], None, weights)
        assert str(refusal.value).startswith(message) and "\n" not in str(refusal.value), refusal.value
    with pytest.raises(
        UserError, match=r"--last 9: .*zero3 has 6 checkpoints; a run keeps more with checkpoint\.keep_l"
    ):
        average_command([run, out], 9, None)
    with pytest.raises(UserError) as refusal:
        average_command([*good, copy, other, out], None, None)
    assert str(refusal.value).count("\n") == 1, "both at once"
    with (
        patch("turbolm.checkpoint.average.export_weights", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        average_command([*good, out], None, None)
    assert sorted(path for path in tmp_path.rglob("*") if path != out.parent) == before
