"""Ablations with a runner that writes what a training would leave behind."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launch.harness import RECIPE
from tests.report.page import assert_loads_nothing, chart_data
from turbolm.ablate import verdict
from turbolm.ablate.measure import Evaluation, RunMeasures, measure_run
from turbolm.ablate.render import render_table
from turbolm.ablate.results import collect_results
from turbolm.ablate.run import run_ablation
from turbolm.ablate.runner import Done, Task, one_by_one
from turbolm.ablate.settings import Ablation, Options, Sweep
from turbolm.ablate.tricks import parse_tricks
from turbolm.errors import UserError
from turbolm.files import write_json
from turbolm.plan.machine import Machine
from turbolm.plan.plan import build_plan
from turbolm.report.metrics import read_lines
from turbolm.train.run_directory import run_directory

CPUS = Machine(0, None, None, num_cpus=2, cpu_has_bf16=True, memory_bytes=2**34)
NUM_EVALUATIONS = 10
AWAY = {"checkpoint": {"mirror": "file:///mirror"}, "export": {"push_to": "me/it"}}


class FakeRunner:
    """Trains nothing: leaves a straight loss curve from 6 to `losses[...]`, at `speeds[...]` tokens a second.

    A run that stopped goes on from where it was; `trained` counts the steps of all of them.
    """

    def __init__(self, losses: dict[str, float] | None = None, speeds: dict[str, float] | None = None) -> None:
        self.losses, self.speeds = losses or {}, speeds or {}
        self.codes: dict[str, int] = {}
        self.names: list[str] = []
        self.trained = 0

    def __call__(self, tasks: Iterator[Task]) -> Iterator[Done]:
        return one_by_one(self.train)(tasks)

    def train(self, task: Task) -> int:
        recipe, file = task.recipe, task.file
        self.names.append(recipe.name)
        path = run_directory(recipe).path
        path.mkdir(parents=True, exist_ok=True)
        assert yaml.safe_load(file.read_text())["name"] == recipe.name
        written = yaml.safe_load(file.read_text())
        assert written["execution"]["stop_after"] is None
        assert written["checkpoint"]["mirror"] is None and written["export"]["push_to"] is None, "it stays here"
        if code := self.codes.pop(recipe.name, 0):
            return code
        arm = recipe.name.partition("-seed")[0]
        speed = self.speeds.get(arm, 1000.0) * (1 + 0.001 * recipe.train.seed)
        end = self.losses.get(arm, 4.0) + 0.001 * recipe.train.seed
        batch, lines = recipe.train.global_batch, []
        steps = recipe.train.budget // batch
        every = steps // NUM_EVALUATIONS
        after = recipe.execution.stop_after
        stop = steps if after is None else build_plan(recipe, CPUS).stop_step or 0
        begun = len([line for line in read_lines(path / "metrics.jsonl") if "train/loss" in line])
        self.trained += stop - begun
        for step in range(begun + 1, stop + 1):
            common = {"step": step, "attempt": 1, "tokens_seen": step * batch}
            perf = {"perf/cpu_sec": 0.5, "perf/tokens_per_sec": speed, "data/batch_tokens": batch, "perf/mfu": 0.25}
            lines.append({**common, **perf, "train/loss": 5.0, "memory/peak_bytes": 2**30 + step})
            if step % every == 0:
                lines.append({**common, "eval/loss": 6 + (end - 6) * step / steps})
        with (path / "metrics.jsonl").open("a") as metrics:
            metrics.writelines(json.dumps(line) + "\n" for line in lines)
        if stop == steps:
            write_json(path / "results.json", {"budget_tokens": recipe.train.budget, "eval_loss": end})
        return 0


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    train = {"budget": 1024 * 50, "global_batch": 1024}
    path.write_text(yaml.safe_dump({**RECIPE, "train": train, "data": {"seq_len": 128}, **AWAY}))
    return str(path)


def prepare(recipe_file: str, *tricks: str, overrides: tuple[str, ...] = (), **options: Any) -> Ablation:
    return Ablation.prepare(recipe_file, overrides, tricks, CPUS, Options(**options))


def arms_of(ablation: Ablation) -> dict[str, list[str]]:
    return {arm.name: [trick.name for trick in arm.tricks] for arm in ablation.arms}


# ----------------------------------------------------------------------------------------------------------------- arms


def test_the_arms_are_each_set_of_tricks_once(recipe_file: str) -> None:
    assert arms_of(prepare(recipe_file, "muon")) == {"baseline": [], "+muon": ["muon"]}
    assert list(arms_of(prepare(recipe_file, "muon,z_loss"))) == ["baseline", "+muon", "+z_loss", "all"]
    three = arms_of(prepare(recipe_file, "muon,z_loss", "wsd"))
    assert list(three) == ["baseline", "+muon", "+z_loss", "+wsd", "all", "all -muon", "all -z_loss", "all -wsd"]
    assert three["all -z_loss"] == ["muon", "wsd"]
    assert list(arms_of(prepare(recipe_file, "muon,z_loss,lion", alone=True)))[-1] == "+lion"


def test_an_arm_is_the_recipe_with_the_trick_over_it(recipe_file: str) -> None:
    ablation = prepare(recipe_file, "lion", overrides=("optimizer.lr=2e-3", "optimizer.eps=1e-6"))
    optimizer = ablation.arms[1].recipe.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.betas) == ("lion", 2e-3, (0.9, 0.99))
    assert ablation.arms[0].recipe.optimizer.eps == 1e-6
    assert prepare(recipe_file, "lion").arms[1].recipe.optimizer.lr == 3e-4  # AdamW's default, not Lion's


def test_a_sweep_moves_every_rate_of_an_arm(recipe_file: str) -> None:
    """Muon's own rates are not the recipe's: were they left alone, all runs of its sweep would be the same."""
    ablation = prepare(recipe_file, "rates:optimizer.name=muon+optimizer.peak_lrs={matrices: 1e-2, vectors: 4e-2}")
    muon = ablation.recipe(ablation.arms[1], 0, 6e-4).optimizer  # twice AdamW's default
    assert (muon.lr, muon.lr_scales.matrices * muon.lr, muon.lr_scales.vectors * muon.lr) == (6e-4, 2e-2, 8e-2)
    assert muon.lr_scales.embeddings * muon.lr == 6e-4
    assert ablation.recipe(ablation.arms[1], 0, 3e-4).optimizer == ablation.arms[1].recipe.optimizer


def test_tricks_may_be_files_and_settings(recipe_file: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("schedule: {warmup: 10%}\n")
    ablation = prepare(recipe_file, f"{tmp_path}/mine.yaml,beta:optimizer.betas=[0.8, 0.9]+train.z_loss=1e-5")
    assert list(arms_of(ablation)) == ["baseline", "+mine", "+beta", "all"]
    both = ablation.arms[3].recipe
    assert (str(both.schedule.warmup), both.optimizer.betas, both.train.z_loss) == ("10%", (0.8, 0.9), 1e-5)
    staged = "stages:data.length_schedule={name: stages, at: {0%: 32, 50%: 64}}+train.z_loss=1e-5,beta:train.seed=1"
    assert [trick.name for trick in parse_tricks([staged])] == ["stages", "beta"]
    assert parse_tricks([staged])[0].keys == ("data.length_schedule", "train.z_loss")


@pytest.mark.parametrize(
    ("tricks", "overrides", "messages"),
    [
        ("mun,what", (), ["unknown trick 'mun'; did you mean muon?", "unknown trick 'what'"]),
        ("muon,muon", (), ["muon is listed twice"]),
        ("muon,lion", (), ["muon and lion both set optimizer.name"]),
        ("more:train.budget=1M", (), ["more: sets train.budget, but train.budget is what each arm is given"]),
        ("other:data.sources=[{type: text, path: a}]", (), ["other: sets data.sources"]),
        ("vocab:tokenizer.train.vocab_size=512", (), ["vocab: sets tokenizer.train.vocab_size"]),
        ("longer:data.seq_len=256", (), ["longer: sets data.seq_len"]),
        ("often:evaluation.every=1%", (), ["often: sets evaluation.every"]),
        ("zero0", (), ["zero0: would also change train.precision from bf16 to fp32", "such as train.precision=fp32"]),
        ("best_fit", (), ["best_fit: changes nothing"]),
        ("muon", ("data.validation=0",), ["data.validation: 0 leaves no held-out loss to compare the arms by"]),
        ("fp16,zeropp", (), ["fp16: train.precision=fp16 needs a GPU", "zeropp: execution.quantized_weights"]),
        ("typo:optimizer.lrr=1", (), ["typo: command line: optimizer.lrr=1: optimizer.lrr: unknown key; did you mean"]),
        ("compile_model,zero3", (), ["all: ", "model does not work with execution.zero_stage 3", "or with --alone"]),
        ("a-b:train.z_loss=1,a:schedule.warmup=1%,b:model.dropout=0.1", (), ["give two arms the same name"]),
        ("", (), ["name the tricks to measure with --tricks"]),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    recipe_file: str, tricks: str, overrides: tuple[str, ...], messages: list[str]
) -> None:
    with pytest.raises(UserError) as refused:
        prepare(recipe_file, tricks, overrides=overrides)
    for message in messages:
        assert message in str(refused.value)


def test_what_all_arms_share_may_be_given_to_all(recipe_file: str) -> None:
    ablation = prepare(recipe_file, "soap", overrides=("train.precision=fp32", "train.budget=2048"))
    assert ablation.arms[1].recipe.optimizer.name == "soap"


# ----------------------------------------------------------------------------------------------------------- measuring


def measures(*points: tuple[float, float, float]) -> RunMeasures:
    evaluations = tuple(Evaluation(tokens, tokens / 10, sec, loss) for tokens, sec, loss in points)
    return RunMeasures(0, 1e-3, "", points[-1][2], 0, 0, 0, 0, 0, None, None, None, None, 0.0, evaluations)


def test_the_target_is_reached_between_two_evaluations() -> None:
    run = measures((100, 10, 6.0), (200, 30, 5.0), (300, 40, 4.0), (400, 50, 4.5))
    reached = run.to_target(4.25)
    assert reached is not None
    assert (reached.tokens, reached.steps, reached.sec) == (275, 27.5, 37.5)
    assert run.to_target(6.5) == run.evaluations[0]
    assert run.to_target(3.9) is None
    after_infinity = measures((100, 10, float("inf")), (200, 30, 5.0)).to_target(5.5)
    assert after_infinity is not None and after_infinity.tokens == 200


def test_a_run_is_measured_over_its_attempts(tmp_path: Path) -> None:
    """The second attempt does steps 3 and 4 again, faster; compilation is not the model's speed."""
    lines: list[dict[str, Any]] = []
    for attempt, steps, rate in ((1, (1, 2, 3), 100.0), (2, (3, 4), 200.0)):
        for step in steps:
            line = {"step": step, "attempt": attempt, "tokens_seen": step * 100, "train/loss": 5.0}
            lines.append({**line, "data/batch_tokens": 100, "perf/tokens_per_sec": rate, "perf/mfu": rate / 1000})
    lines[0]["perf/compile_sec"] = 0.5
    lines[1]["memory/peak_bytes"] = 77
    lines.append({"step": 2, "attempt": 1, "tokens_seen": 200, "eval/loss": 5.0})
    lines.append({"step": 4, "attempt": 2, "tokens_seen": 400, "eval/loss": "nan"})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = measure_run(tmp_path, seed=1, lr=0.1)
    assert run.training_sec == 1 + 1 + 0.5 + 0.5
    assert run.tokens_per_sec == 300 / 2
    assert run.mfu == pytest.approx((0.1 * 2 + 0.2 * 1) / 3)
    assert (run.tokens, run.steps, run.peak_bytes, run.whole_sec) == (400, 4, 77, None)
    assert run.evaluations[0] == Evaluation(200, 2, 2.0, 5.0)
    assert run.final_loss == float("inf")
    with pytest.raises(UserError, match="before processor time was recorded"):
        measure_run(tmp_path, seed=1, lr=0.1, clock="cpu")


# ------------------------------------------------------------------------------------------------------------- running


def test_runs_go_seed_by_seed_and_their_results_are_compared(recipe_file: str) -> None:
    ablation = prepare(recipe_file, "muon,zero1", num_seeds=3)
    runner = FakeRunner({"with-muon": 3.0, "with-muon-zero1": 3.0}, {"with-zero1": 500.0, "with-muon-zero1": 500.0})
    lines: list[str] = []
    assert run_ablation(ablation, runner, lines.append) == 0
    arms = ["baseline", "with-muon", "with-zero1", "with-muon-zero1"]
    assert runner.names == [f"{arm}-seed{seed}" for seed in range(3) for arm in arms]
    assert lines[0].startswith("[1/12] baseline-seed0") and "left" in lines[-1]
    results = json.loads((ablation.folder / "ablation.json").read_text())
    assert results == json.loads(json.dumps(collect_results(ablation)))
    assert results["complete"] and results["seeds"] == [0, 1, 2]
    assert results["target_loss"] == pytest.approx(4.002 * 1.005)
    muon, zero1, both = results["arms"][1:]
    assert [arm["verdict"] for arm in (muon, zero1, both)] == ["gain", "loss", "loss"]
    # From 6 to 3 it reaches 4.022 after 0.659 of the way, from 6 to 4 after 0.989.
    assert muon["versus_baseline"]["target_tokens"]["ratio"] == pytest.approx(0.666, abs=0.002)
    assert zero1["versus_baseline"]["target_sec"]["ratio"] == pytest.approx(2, abs=0.01)
    assert zero1["versus_baseline"]["target_tokens"]["verdict"] == "cannot be resolved"
    assert zero1["versus_baseline"]["tokens_per_sec"]["verdict"] == "loss"
    assert muon["mean"]["peak_bytes"] == 2**30 + 50
    rows = list(csv.DictReader((ablation.folder / "ablation.csv").open()))
    assert len(rows) == 12 and rows[3]["tricks"] == "muon" and float(rows[3]["final_loss"]) == 3.0
    assert not any(value.startswith(("+", "=", "-", "@")) for row in rows for value in row.values())  # as a formula
    table = render_table(results)
    assert "gain: 1.50x as fast (p < 0.001)" in table and "not complete" not in table


def test_a_finished_run_is_not_done_again_and_an_interrupted_ablation_goes_on(recipe_file: str) -> None:
    runner = FakeRunner()
    runner.codes["with-z_loss-seed0"] = 75
    ablation = prepare(recipe_file, "z_loss,wsd")
    assert run_ablation(ablation, runner, lambda _: None) == 75
    assert runner.names == ["baseline-seed0", "with-z_loss-seed0"]
    assert not collect_results(ablation)["complete"]
    assert not any("failed" in note for note in collect_results(ablation)["notes"])
    assert "not complete" in render_table(collect_results(ablation))
    again = FakeRunner()
    ablation = prepare(recipe_file, "z_loss,wsd")
    assert run_ablation(ablation, again, lambda _: None) == 0
    assert again.names == ["with-z_loss-seed0", "with-wsd-seed0", "with-wsd-z_loss-seed0"]
    timing = json.loads((ablation.folder / "with-z_loss-seed0" / "timing.json").read_text())
    assert [one["exit_code"] for one in timing] == [75, 0]
    more = FakeRunner()
    assert run_ablation(prepare(recipe_file, "wsd,bigger:train.z_loss=1e-3"), more, lambda _: None) == 0
    assert more.names == ["with-bigger-seed0", "with-bigger-wsd-seed0"]


def test_the_same_runs_are_read_by_another_clock(recipe_file: str) -> None:
    """Each step takes half a second of the processor, however busy the machine was."""
    runner = FakeRunner(speeds={"with-zero1": 500.0})
    assert run_ablation(prepare(recipe_file, "zero1"), runner, lambda _: None) == 0
    results = collect_results(prepare(recipe_file, "zero1", clock="cpu"))
    assert [arm["mean"]["training_sec"] for arm in results["arms"]] == [25, 25]
    assert results["arms"][1]["verdict_text"] == (
        "cannot be resolved: 1.00x as fast; the smallest effect that these runs resolve is 5.0% of the time (one seed)"
    )
    assert results["arms"][1]["smallest_effect"] == 0.05
    assert "processor time" in render_table(results)


def test_a_run_that_fails_leaves_the_others(recipe_file: str) -> None:
    runner = FakeRunner()
    runner.codes["with-z_loss-seed0"] = 1
    ablation = prepare(recipe_file, "z_loss,wsd")
    assert run_ablation(ablation, runner, lambda _: None) == 1
    results = collect_results(ablation)
    assert [len(arm["runs"]) for arm in results["arms"]] == [1, 0, 1, 1]
    assert any("with-z_loss-seed0 failed with exit code 1" in note for note in results["notes"])
    assert "no run is finished" in render_table(results)
    killed = FakeRunner()
    killed.codes["with-z_loss-seed0"] = 137
    assert run_ablation(prepare(recipe_file, "z_loss,wsd"), killed, lambda _: None) == 137
    assert killed.names == ["with-z_loss-seed0"]


def test_runs_of_another_recipe_are_not_mixed_in(recipe_file: str) -> None:
    assert run_ablation(prepare(recipe_file, "wsd"), FakeRunner(), lambda _: None) == 0
    runner = FakeRunner()
    with pytest.raises(UserError, match=r"train.budget: 51200 -> 102400"):
        run_ablation(prepare(recipe_file, "wsd", overrides=("train.budget=102400",)), runner, lambda _: None)
    with pytest.raises(UserError, match=r"execution.micro_batch: \"auto\" -> 512"):
        run_ablation(prepare(recipe_file, "wsd", overrides=("execution.micro_batch=512",)), runner, lambda _: None)
    assert runner.names == []
    file = prepare(recipe_file, "wsd").folder / "recipes" / "with-wsd-seed0.yaml"
    file.write_text(file.read_text().replace("  z_loss: 0.0\n", ""))  # as an older version would have written it
    assert run_ablation(prepare(recipe_file, "wsd"), runner, lambda _: None) == 0
    assert runner.names == []
    other = prepare(recipe_file, "wsd", overrides=("train.budget=102400",), name="longer")
    assert run_ablation(other, runner, lambda _: None) == 0


def test_one_seed_says_so(recipe_file: str) -> None:
    ablation = prepare(recipe_file, "wsd,zero1")
    run_ablation(ablation, FakeRunner(speeds={"with-wsd": 1020.0, "with-zero1": 2000.0}), lambda _: None)
    texts = [arm["verdict_text"] for arm in collect_results(ablation)["arms"]]
    assert texts[1].startswith("cannot be resolved: 1.02x as fast")
    assert texts[2].startswith("gain: 2.00x as fast (one seed")


# --------------------------------------------------------------------------------------------------------------- sweeps


def test_a_sweep_is_even_in_logarithms_and_checked() -> None:
    assert Sweep.parse("1e-3,1e-1,5").lrs == [0.001, 0.00316, 0.01, 0.0316, 0.1]
    for text in ("1,2", "a,b,c", "2e-3,1e-3,3", "0,1,3", "1e-3,1e-2,1", "1e-3,inf,3"):
        with pytest.raises(UserError, match="--sweep-lr"):
            Sweep.parse(text)


def test_a_sweep_finds_the_rate_of_each_arm_that_may_want_its_own(recipe_file: str) -> None:
    """The baseline's best is in the middle, muon's at the upper edge; zero1 takes the baseline's."""
    ablation = prepare(recipe_file, "muon,zero1", num_seeds=2, sweep=Sweep(1e-3, 4e-3, 3), alone=True)
    losses = {"baseline-lr0.001": 4.5, "baseline-lr0.002": 4.0, "baseline-lr0.004": 5.0, "with-zero1-lr0.002": 4.0}
    losses |= {"with-muon-lr0.001": 4.5, "with-muon-lr0.002": 4.0, "with-muon-lr0.004": 3.0}
    runner = FakeRunner(losses)
    runner.codes["baseline-lr0.004-seed0"] = 1  # too high a rate may end a run
    lines: list[str] = []
    assert run_ablation(ablation, runner, lines.append) == 0
    assert len(runner.names) == len(set(runner.names)) == 6 + 4
    assert runner.names[:2] == ["baseline-lr0.001-seed0", "with-muon-lr0.001-seed0"]
    assert runner.names[6:] == [
        *("with-zero1-lr0.002-seed0", "baseline-lr0.002-seed1"),
        *("with-muon-lr0.004-seed1", "with-zero1-lr0.002-seed1"),
    ]
    results = collect_results(ablation)
    assert [arm["lr"] for arm in results["arms"]] == [0.002, 0.004, 0.002]
    assert results["arms"][0]["sweep"] == [[0.001, 4.5], [0.002, 4.0], [0.004, None]]
    edges = [note for note in results["notes"] if "edge of the sweep" in note]
    assert len(edges) == 1 and edges[0].startswith("+muon: the best learning rate, 0.004")
    assert any(line.startswith("[10/10] with-zero1-lr0.002-seed1") for line in lines)
    assert "chosen" in (ablation.folder / "report.html").read_text()


def test_a_trick_with_its_own_rate_is_swept_around_it(recipe_file: str) -> None:
    sweep = Sweep(1e-3, 4e-3, 2)
    ablation = prepare(recipe_file, "high:optimizer.lr=2e-2", overrides=("optimizer.lr=2e-3",), sweep=sweep)
    runner = FakeRunner()
    run_ablation(ablation, runner, lambda _: None)
    high = [name for name in runner.names if "high" in name]
    assert high == ["with-high-lr0.01-seed0", "with-high-lr0.04-seed0"]


def test_halving_trains_no_token_twice_and_gives_every_arm_the_same_trials(recipe_file: str) -> None:
    """Four rates until step 15 of 50 (the first evaluation past a quarter), two until 25, one to the end."""
    losses = {f"{arm}-lr{lr}": end for arm in ("baseline", "with-muon") for lr, end in CURVES.items()}
    losses["with-muon-lr0.008"] = 2.0
    options: dict[str, Any] = {"sweep": Sweep(1e-3, 8e-3, 4), "halving": True}
    ablation, runner, lines = prepare(recipe_file, "muon,zero1", alone=True, **options), FakeRunner(losses), []
    assert run_ablation(ablation, runner, lines.append) == 0
    swept = [name for name in runner.names if "zero1" not in name]
    for arm, kept in (("baseline", ["0.004", "0.002"]), ("with-muon", ["0.008", "0.004"])):
        names = [f"{arm}-lr{lr}-seed0" for lr in ("0.001", "0.002", "0.004", "0.008", *kept, kept[0])]
        assert [name for name in swept if name.startswith(arm)] == names
    assert runner.trained == 2 * (4 * 15 + 2 * 10 + 25) + 50  # zero1 takes the baseline's rate
    assert any("halving trained 215k of the 410k tokens of the whole sweep (52%)" in line for line in lines)
    assert "[1/15] baseline-lr0.001-seed0 until 15.4k tokens" in lines
    assert any(line.startswith("[15/15] with-zero1-lr0.004-seed0") for line in lines)
    results = json.loads((ablation.folder / "ablation.json").read_text())
    assert [arm["lr"] for arm in results["arms"]] == [0.004, 0.008, 0.004] and results["sweep"]["halving"]
    assert [note for note in results["notes"] if "edge" in note][0].startswith("+muon: the best learning rate, 0.008")
    baseline = results["arms"][0]
    at_15 = [[lr, pytest.approx(6 + (end - 6) * 0.3)] for lr, end in CURVES.items()]
    assert baseline["rungs"][0] == {"tokens": 15 * 1024, "losses": at_15}
    assert baseline["rungs"][1]["losses"] == [[0.004, pytest.approx(4.5)], [0.002, pytest.approx(5.0)]]
    assert dict(baseline["sweep"]) == {0.001: at_15[0][1], 0.002: pytest.approx(5.0), 0.004: 3.0, 0.008: at_15[3][1]}
    page = (ablation.folder / "report.html").read_text()
    assert "5.4000 after 15.4k tokens" in page and "5.0000 after 25.6k tokens" in page
    assert baseline["runs"][0]["tokens"] == 50 * 1024  # of all its starts


CURVES = {0.001: 4.5, 0.002: 4.0, 0.004: 3.0, 0.008: 4.0 + 1e-3}  # final losses by rate


def test_halving_that_is_interrupted_goes_on_where_it_was(recipe_file: str) -> None:
    class Interrupted(FakeRunner):
        def train(self, task: Task) -> int:
            return 75 if len(self.names) == 5 else super().train(task)

    losses = {f"baseline-lr{lr}": end for lr, end in CURVES.items()}
    options: dict[str, Any] = {"sweep": Sweep(1e-3, 8e-3, 4), "halving": True}
    first, again = Interrupted(losses), FakeRunner(losses)
    assert run_ablation(prepare(recipe_file, "zero1", **options), first, lambda _: None) == 75
    ablation = prepare(recipe_file, "zero1", **options)
    assert run_ablation(ablation, again, lambda _: None) == 0
    assert again.names == ["baseline-lr0.002-seed0", "baseline-lr0.004-seed0", "with-zero1-lr0.004-seed0"]
    assert first.trained + again.trained == (4 * 15 + 2 * 10 + 25) + 50
    assert ablation.lr(ablation.arms[1]) == 0.004


def test_a_rate_that_diverges_at_the_end_of_halving_gives_way_to_the_next(recipe_file: str) -> None:
    class Diverging(FakeRunner):
        def train(self, task: Task) -> int:
            ends = task.recipe.name == "baseline-lr0.004-seed0" and task.recipe.execution.stop_after is None
            return 1 if ends else super().train(task)

    runner = Diverging({f"baseline-lr{lr}": end for lr, end in CURVES.items()})
    ablation = prepare(recipe_file, "zero1", sweep=Sweep(1e-3, 8e-3, 4), halving=True)
    assert run_ablation(ablation, runner, lambda _: None) == 0
    assert ablation.lr(ablation.arms[0]) == 0.002
    assert ["baseline-lr0.004-seed0 failed" in note for note in collect_results(ablation)["notes"]].count(True) == 1


@pytest.mark.parametrize(
    ("overrides", "count", "message"),
    [
        (("evaluation.every=60%",), 4, "halved after 25%, 50% of the budget, and evaluation.every=60% does not"),
        (("schedule.warmup=30%",), 4, "first after 15.4k tokens, within the warmup"),
        ((), 32, "halved after 3.125%, 6.25%, 12.5%, 25%, 50% of the budget, and evaluation.every=10% does not"),
    ],
)
def test_halving_needs_an_evaluation_for_each_round(
    recipe_file: str, overrides: tuple[str, ...], count: int, message: str
) -> None:
    sweep = Sweep(1e-3, 8e-3, count)
    ablation = prepare(recipe_file, "zero1", overrides=overrides, sweep=sweep, halving=True)
    with pytest.raises(UserError, match="--halving: baseline: ") as refused:
        run_ablation(ablation, FakeRunner(), lambda _: None)
    assert message in str(refused.value)
    with pytest.raises(UserError, match="--halving: needs the learning rates"):
        prepare(recipe_file, "zero1", halving=True)


# ------------------------------------------------------------------------------------------------------------ rendering


def test_the_page_stands_alone_and_escapes(recipe_file: str) -> None:
    ablation = prepare(recipe_file, "wsd,zero1", num_seeds=2, command="turbolm <script>")
    run_ablation(ablation, FakeRunner({"with-wsd": 3.5}), lambda _: None)
    page = (ablation.folder / "report.html").read_text()
    for text in ("Held-out loss", "Time to the target loss", "+zero1", "gain: ", "with-wsd-seed1"):
        assert text in page
    assert_loads_nothing(page)
    assert "turbolm &lt;script&gt;" in page
    losses = chart_data(page)["Held-out loss"]["curves"]
    assert [curve["name"] for curve in losses] == ["baseline", "+wsd", "+zero1", "all", "target"]
    assert losses[1]["x"][-1] == 51200 and losses[1]["y"][-1] == pytest.approx(3.5005)  # the mean of two seeds
    assert losses[1]["others"]["steps"] == [5 * number for number in range(1, 11)]
    assert page.count('title="+wsd: ') == 2 * 4  # a dot for each seed in each dot chart


def test_a_target_met_at_the_first_evaluation_is_inconclusive(recipe_file: str) -> None:
    """The first evaluation of the baseline is at 5.8: what happened before it is unknown."""
    ablation = prepare(recipe_file, "wsd,zero1", target_loss=5.75)
    run_ablation(ablation, FakeRunner({"with-wsd": 1.0}), lambda _: None)
    results = collect_results(ablation)
    baseline, wsd, zero1, _ = results["arms"]
    assert baseline["runs"][0]["target_tokens"] == pytest.approx(51200 / 8)
    assert wsd["runs"][0]["target_at_first_evaluation"] and wsd["runs"][0]["target_tokens"] is None
    assert (wsd["verdict"], zero1["verdict"]) == ("inconclusive", "cannot be resolved")
    assert "target_sec" not in wsd["versus_baseline"]
    row = next(line for line in render_table(results).splitlines() if line.startswith("+wsd"))
    assert row.count("inconclusive") == 3 and "evaluate more often" in row  # tokens, time, verdict
    sooner = prepare(recipe_file, "wsd,zero1", target_loss=5.9)
    assert {arm["verdict"] for arm in collect_results(sooner)["arms"]} == {None, "inconclusive"}


def test_the_statistical_test_is_named(recipe_file: str) -> None:
    ablation = prepare(recipe_file, "wsd", num_seeds=2)
    run_ablation(ablation, FakeRunner(), lambda _: None)
    assert collect_results(ablation)["test"] == "two-sided paired t-test over the seeds"
    assert "two-sided paired t-test over the seeds at 0.05" in render_table(collect_results(ablation))
    assert "two-sided paired t-test over the seeds at 0.05" in (ablation.folder / "report.html").read_text()
    assert "paired t-test" in (Path(verdict.__file__).parent / "README.md").read_text()
    one = render_table(collect_results(prepare(recipe_file, "wsd")))
    assert "no test" in one and "t-test" not in one
