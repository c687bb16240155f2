"""`ablate --transfer` with a runner that writes what a training would leave behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ablate.test_ablation import AWAY, CPUS, FakeRunner
from tests.launch.harness import RECIPE
from turbolm.ablate.command import check_transfer
from turbolm.ablate.runner import one_by_one
from turbolm.ablate.settings import Ablation, Options, Sweep
from turbolm.ablate.transfer import Transfer, _wider, judge, render_transfer, run_transfer
from turbolm.errors import UserError
from turbolm.recipe.load import load_recipe
from turbolm.recipe.model_config import heads_of

SWEEP = Sweep(1e-3, 4e-3, 3)


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True}
    own = {"model": {"config": config}, "train": {"budget": 1024 * 50, "global_batch": 1024}, "data": {"seq_len": 128}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, **own, "optimizer": {"lr": 2e-3}}))
    return "recipe.yaml"


def prepare(recipe_file: str, to: str = "128", tricks: tuple[str, ...] = (), **options: Any) -> Transfer:
    return Transfer.prepare(recipe_file, (), tricks, to, CPUS, Options(**{"sweep": SWEEP, **options}))


def train(transfer: Transfer, runner: FakeRunner) -> tuple[int, dict[str, Any]]:
    return run_transfer(transfer, runner, lambda _: None)


def test_the_best_learning_rate_is_moved_by_the_rule_and_compared_at_the_larger_width(recipe_file: str) -> None:
    """Twice the width: AdamW's matrices take half of the rate, the tied embedding 1 / sqrt(2)."""
    losses = {"tuned-lr0.001": 3.9, "tuned-lr0.004": 3.8, "w128-lr0.001": 3.60, "w128-lr0.002": 3.62}
    runner = FakeRunner(losses | {"w128-lr0.004": 3.7, "w128-moved-lr0.004": 3.61})
    transfer = prepare(recipe_file)
    code, results = train(transfer, runner)
    assert code == 0 and results == json.loads((transfer.folder / "transfer.json").read_text())
    assert runner.names[:3] == ["tuned-lr0.001-seed0", "tuned-lr0.002-seed0", "tuned-lr0.004-seed0"]
    assert runner.names[3:] == [f"w128-{name}-seed0" for name in ("lr0.001", "lr0.002", "lr0.004", "moved-lr0.004")]
    moved = load_recipe(transfer.folder / "recipes" / "w128-moved-lr0.004-seed0.yaml")
    config = moved.model.full_config or {}
    assert (config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]) == (128, 384, 4)
    assert (moved.optimizer.lr, moved.optimizer.weight_decay) == (4e-3, 0.2)
    multipliers = moved.optimizer.lr_multipliers
    assert (multipliers.matrices, multipliers.embeddings, multipliers.vectors) == (0.5, 0.7071, 1)
    unmoved = load_recipe(transfer.folder / "recipes" / "w128-lr0.004-seed0.yaml")
    assert unmoved.optimizer.lr_multipliers.matrices == 1 and unmoved.optimizer.weight_decay == 0.1
    (found,) = results["larger"]
    assert found["moved_excess"] == pytest.approx(3.61 / 3.60 - 1) and found["unmoved_excess"] == pytest.approx(1 / 36)
    assert found["verdict"].startswith("transfers: ") and found["is_at_edge"]
    text = render_transfer(results)
    assert "w128: transfers: " in text and "at the edge of the grid" in text and "3.6100" in text
    train(transfer, runner)
    assert len(runner.names) == 7  # finished runs are not repeated


def test_a_run_that_fails_is_the_worst_and_the_mean_of_seeds_decides(recipe_file: str) -> None:
    runner = FakeRunner({"tuned-lr0.001": 3.9})
    runner.codes = {"tuned-lr0.002-seed0": 1, "w128-moved-lr0.001-seed1": 1}
    transfer = prepare(recipe_file, num_seeds=2)
    code, results = train(transfer, runner)
    assert code == 1 and results["tuned"]["best_lr"] == 1e-3
    assert results["tuned"]["grid"][0]["loss"] == pytest.approx(3.9005)
    assert results["tuned"]["grid"][1]["loss"] is None
    (found,) = results["larger"]
    assert found["moved_excess"] is None and found["verdict"].startswith("does not transfer")
    assert "moved diverged, unmoved +0.00% above it" in render_transfer(results)


def test_an_interruption_stops_and_the_same_command_resumes(recipe_file: str) -> None:
    runner = FakeRunner()
    runner.codes = {"w128-lr0.002-seed0": 75}
    code, results = train(prepare(recipe_file), runner)
    assert code == 75 and results["larger"][0]["verdict"] == "not finished"
    assert runner.names[-1] == "w128-lr0.002-seed0"
    code, results = train(prepare(recipe_file), runner)
    assert code == 0 and results["larger"][0]["verdict"].startswith("both end within 1%")


def test_runs_are_trained_and_compared_as_those_of_an_ablation(recipe_file: str) -> None:
    """A recipe that would stop early, keep more checkpoints, copy them and push; the fake runner checks its file."""
    text = yaml.safe_load(Path(recipe_file).read_text())
    text |= AWAY | {"execution": {"stop_after": "50%"}}
    text["checkpoint"] = {**AWAY["checkpoint"], "keep_best": True, "keep_every": "10%"}
    Path(recipe_file).write_text(yaml.safe_dump(text))
    ablation = Ablation.prepare(recipe_file, (), ["zero1"], CPUS, Options(sweep=SWEEP, num_seeds=2))
    transfer = prepare(recipe_file, num_seeds=2)
    where = {"name", "execution"}
    for runs, lr in zip(transfer.grid(transfer.tuned, "tuned"), SWEEP.lrs, strict=True):
        for run, seed in zip(runs, ablation.seeds, strict=True):
            one = ablation.recipe(ablation.arms[0], seed, lr)
            assert run.model_dump(exclude=where) == one.model_dump(exclude=where)
            assert run.execution.stop_after is None and run.execution.runs_dir == str(transfer.folder)
            kept = run.checkpoint
            assert (kept.keep_last, kept.keep_every, kept.keep_best, kept.mirror) == (1, None, False, None)
    lines: list[str] = []
    code, _ = run_transfer(transfer, FakeRunner(), lines.append)
    assert code == 0 and lines[0] == "[1/14] tuned-lr0.001-seed0"
    assert lines[-1].startswith("[14/14] w128-moved-") and "left" in lines[-1]
    (timing,) = json.loads((transfer.folder / "tuned-lr0.001-seed0" / "timing.json").read_text())
    assert timing["exit_code"] == 0
    Path(recipe_file).write_text(yaml.safe_dump(text | {"evaluation": {"tokens": "500k"}}))
    with pytest.raises(UserError, match="another recipe; changed:\n  evaluation.tokens: 1000000 -> 500000\nRestore"):
        train(prepare(recipe_file, num_seeds=2), FakeRunner())


def test_a_run_without_a_loss_and_a_moved_run_of_other_rates_are_told(recipe_file: str) -> None:
    with pytest.raises(UserError, match="the run ended well, but .* do not tell its loss"):
        run_transfer(prepare(recipe_file), one_by_one(lambda _: 0), lambda _: None)
    transfer = prepare(recipe_file, name="moved")
    train(transfer, FakeRunner())
    for path in transfer.folder.glob("tuned-*"):
        shutil.rmtree(path)
    (file,) = transfer.folder.glob("recipes/w128-moved-*.yaml")
    file.write_text(file.read_text().replace("matrices: 0.5", "matrices: 0.25"))
    with pytest.raises(UserError, match="optimizer.lr_multipliers.matrices: 0.25 -> 0.5"):
        train(prepare(recipe_file, name="moved"), FakeRunner())


def test_an_interrupted_command_says_how_to_go_on(
    recipe_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("turbolm.ablate.command.train_here", lambda *_: 75)
    assert check_transfer(recipe_file, (), (), Options(sweep=SWEEP), "128") == 75
    assert capsys.readouterr().err == "stopped; the same command resumes\n"


def test_a_larger_recipe_that_scales_from_the_tuned_one(recipe_file: str, tmp_path: Path) -> None:
    larger = {"extends": recipe_file, "scale": {"from": recipe_file}, "name": "larger"}
    larger["train"] = {"budget": 1024 * 50 * 64}
    (tmp_path / "larger.yaml").write_text(yaml.safe_dump(larger))
    transfer = prepare(recipe_file, "larger.yaml")
    (one,) = transfer.larger
    (moved,) = transfer.moved(one, transfer.tuned)
    assert moved.train.global_batch == 4096 and moved.optimizer == load_recipe("larger.yaml").optimizer
    assert {run.train.global_batch for runs in transfer.grid(one.recipe, "x") for run in runs} == {4096}
    (tmp_path / "larger.yaml").write_text(yaml.safe_dump({key: larger[key] for key in ("extends", "name")}))
    with pytest.raises(UserError, match=r"larger.yaml must say `scale: \{from: recipe.yaml\}`"):
        prepare(recipe_file, "larger.yaml")


def test_tricks_are_in_all_runs_and_every_learning_rate_has_the_same_place_on_the_grid(recipe_file: str) -> None:
    transfer = prepare(recipe_file, tricks=("muon",))
    assert transfer.folder.name == "tiny-muon-transfer" or transfer.folder.name.endswith("-muon-transfer")
    grid = transfer.grid(transfer.larger[0].recipe, "w128")
    assert [runs[0].optimizer.peak_lrs.matrices for runs in grid] == [5e-3, 1e-2, 2e-2]
    settings = ["optimizer.name=muon", "optimizer.lr=0.00123456", "optimizer.peak_lrs.matrices=0.0123456"]
    transfer = Transfer.prepare(recipe_file, settings, (), "128", CPUS, Options())
    grid = transfer.grid(transfer.tuned, "tuned")
    assert [runs[0].optimizer.lr for runs in grid] == [3.086e-4, 6.173e-4, 1.235e-3, 2.469e-3, 4.938e-3]
    peaks = [runs[0].optimizer.peak_lrs.matrices for runs in grid]
    assert peaks == [3.086e-3, 6.173e-3, 1.235e-2, 2.469e-2, 4.938e-2], "to four digits, as runs before have them"


@pytest.mark.parametrize(
    ("grid", "moved", "unmoved", "verdict"),
    [
        ([4.0, 3.0, 3.1], 3.0, 0, "transfers"),
        ([4.0, 3.0, 3.01], 3.02, 2, "both"),
        ([4.0, 3.0, 3.01], 3.2, 2, "does not transfer"),
        ([4.0, 3.0, 3.3], 3.2, 2, "neither"),
        ([4.0, 3.1, 3.0], 2.9, 2, "transfers"),  # the moved rates may be the best
        ([4.0, None, 3.0], 2.9, 2, "not finished"),
    ],
)
def test_verdicts(grid: list[float | None], moved: float, unmoved: int, verdict: str) -> None:
    assert judge(grid, moved, unmoved)["verdict"].startswith(verdict)


@pytest.mark.parametrize(
    ("to", "told"), [("100", "is no width: model.config.num_attention_heads"), ("wide", "expected widths such as")]
)
def test_widths_that_cannot_be(recipe_file: str, to: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        prepare(recipe_file, to)


def test_a_width_that_is_not_named_is_told(recipe_file: str) -> None:
    """Without it Llama's default stays: of 4 x 64^2 + 3 x 64 x 11008 weights a layer the second part only doubles."""
    text = yaml.safe_load(Path(recipe_file).read_text())
    del text["model"]["config"]["intermediate_size"]
    Path(recipe_file).write_text(yaml.safe_dump(text))
    grown = r"at width 128 the weights beside the embeddings are 2.02 times as many, not 4: .* intermediate_size.*"
    grown += "or give a larger recipe: --transfer LARGER.yaml"
    with pytest.raises(UserError, match=grown):
        prepare(recipe_file)


OTHER_NAMES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_inner": 192},
    "gpt_neo": {"hidden_size": 64, "num_heads": 4, "num_layers": 2, "attention_types": [[["global"], 2]]},
    "opt": {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 192}
    | {"word_embed_proj_dim": 64},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},
    "xglm": {"d_model": 64, "attention_heads": 4, "num_layers": 2, "ffn_dim": 192},
    "falcon": {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_hidden_size": 192}
    | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "qwen2_moe": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 96, "intermediate_size": 192},
    "granitemoeshared": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"num_hidden_layers": 2, "intermediate_size": 96, "shared_intermediate_size": 192},
    "llama4_text": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    | {"num_hidden_layers": 2, "moe_layers": [1], "intermediate_size": 96, "intermediate_size_mlp": 192},
    "cohere2_moe": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    | {"num_hidden_layers": 2, "first_k_dense_replace": 1, "intermediate_size": 96}
    | {"prefix_dense_intermediate_size": 192},
}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_types_with_other_names_grow_with_all_their_widths(recipe_file: str, name: str) -> None:
    """As Transformers builds them: four times the weights in matrices at twice the width, of heads of the same size."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    text = yaml.safe_load(Path(recipe_file).read_text())
    text["model"] = {"config": {"model_type": name, **OTHER_NAMES[name]}}
    Path(recipe_file).write_text(yaml.safe_dump(text))
    tuned = load_recipe(recipe_file)
    wider = load_recipe(recipe_file, _wider(tuned, "128"))
    weights, heads = [], []
    for recipe in (tuned, wider):
        config = transformers.AutoConfig.for_model(**(recipe.model.full_config or {}))
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        tables = [one.weight for one in model.modules() if isinstance(one, torch.nn.Embedding)]
        left_out = {id(one) for one in (*tables, model.get_output_embeddings().weight)}
        matrices = [one for one in model.parameters() if one.dim() > 1 and id(one) not in left_out]
        weights.append(sum(one.numel() for one in matrices))
        heads.append(heads_of((recipe.model.full_config or {}).get))
        assert model.config.num_attention_heads == heads[-1][0]
    assert heads == [(4, 16), (8, 16)]
    assert weights[1] == pytest.approx(4 * weights[0], rel=0.03)  # but for routers


def test_runs_of_another_recipe_are_refused(recipe_file: str, tmp_path: Path) -> None:
    train(prepare(recipe_file), FakeRunner())
    text = Path(recipe_file).read_text()
    Path(recipe_file).write_text(text.replace("weight_decay: 0.1", "") + "schedule: {name: linear}\n")
    with pytest.raises(UserError, match="holds runs of another recipe; changed:\n  schedule"):
        train(prepare(recipe_file), FakeRunner())
