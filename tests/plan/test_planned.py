"""What a run keeps of its plan is what `turbolm plan` says, and what is not known is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from turbolm.plan.machine import described_machine, detect_machine
from turbolm.plan.machine_rates import Link, Rates, keep_rates, kind_of
from turbolm.plan.plan import build_plan
from turbolm.plan.planned import planned_figures
from turbolm.plan.summary import collect_summary
from turbolm.plan.work import Unit
from turbolm.recipe.load import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
UNITS: tuple[Unit, ...] = (
    *("matrix_flops", "matrix_bytes", "products", "attention_flops", "attention_pairs", "attention_rows"),
    *("memory_bytes", "logits", "layers", "optimizer_bytes"),
)


def test_figures_are_those_of_the_plan() -> None:
    path = str(RECIPES / "llama3.1-8b/pretrain/config.yaml")
    recipe = load_recipe(path)
    machine = described_machine(recipe)
    assert machine is not None
    found = planned_figures(build_plan(recipe, machine), machine)
    shown = collect_summary(recipe, path, (), lambda *_: {}).as_dict()
    assert found["step_sec"] == shown["estimate"]["step"]["total"]
    assert (found["tokens_per_sec"], found["mfu"]) == (shown["estimate"]["tokens_per_sec"], shown["estimate"]["mfu"])
    assert found["peak_bytes"] == shown["footprint"]["counted_bytes"] < shown["footprint"]["total_bytes"]
    assert sum(found["peak_parts"].values()) == found["peak_bytes"]
    assert sum(found["step_parts"].values()) == pytest.approx(found["step_sec"])
    # ZeRO-2: 8 micro-batches reduce 8.03B gradients in fp32, and the weights are gathered once in bf16.
    assert found["collective_bytes"] == pytest.approx((8 * 4 + 2) * 8_030_261_248, rel=1e-3)
    assert (found["device"], found["seq_len"], found["batch_tokens"]) == ("cuda", 8192, 4194304)
    bound, source = found["notes"]
    assert "an upper bound" in bound and source.startswith("planned times: not calibrated: assumed for H100-80GB")


def test_the_exchange_of_shared_sequences_counts() -> None:
    """8B at ZeRO-2, pairs that share: 16 micro-batches of 4096 tokens a process, forward, again and backward."""
    recipe = load_recipe(RECIPES / "llama3.1-8b/pretrain/config.yaml", ["execution.sequence_parallel=2"])
    machine = described_machine(recipe)
    assert machine is not None
    found = planned_figures(build_plan(recipe, machine), machine)
    weights = (16 * 4 + 2) * 8_030_261_248
    token = 32 * 3 * 2 * (4096 + 1024) * 2  # of layers and passes; queries and outputs, keys and values, in bf16
    assert found["collective_bytes"] == pytest.approx(weights + 16 * 4096 * token, rel=1e-3)


def test_a_cpu_has_times_once_it_is_calibrated(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "quickstart/config.yaml", [f"execution.cache_dir={tmp_path}", "cluster.device=cpu"])
    machine = detect_machine()
    plan = build_plan(recipe, machine)
    before = planned_figures(plan, machine)
    assert before["step_sec"] is None and before["peak_bytes"] > 0
    assert before["notes"] == ["no time is planned: not calibrated; `turbolm calibrate RECIPE` measures this machine"]
    kind = kind_of("cpu", None, plan.precision, plan.threads_per_process)
    link = Link(1e9, 1e-4)
    rates = Rates(kind, True, dict.fromkeys(UNITS, 1e-10), link, link, (0.01, 0.02), "2026-01-02")
    keep_rates(str(tmp_path), rates, {})
    after = planned_figures(plan, machine)
    assert after["step_sec"] > 0 and after["tokens_per_sec"] == pytest.approx(8192 / after["step_sec"])
    assert after["mfu"] is None and after["notes"] == [f"planned times: calibrated on {kind}, 2026-01-02"]


def test_what_is_not_known_is_said_and_ends_no_run(tmp_path: Path) -> None:
    overrides = [f"execution.cache_dir={tmp_path}", "cluster.device=cpu", "model.config.num_hidden_layers=3"]
    recipe = load_recipe(RECIPES / "quickstart/config.yaml", overrides)
    machine = detect_machine()
    plan = build_plan(recipe, machine)
    found = planned_figures(plan, machine)
    assert found["notes"][0].startswith("nothing is planned: not traced yet; `turbolm calibrate RECIPE`")
    assert found["peak_bytes"] is None and found["collective_bytes"] is None
    eager = replace(plan, recipe=load_recipe(RECIPES / "quickstart/config.yaml", ["cluster.device=cpu"]))
    with patch("turbolm.plan.planned.estimate_footprint", side_effect=ZeroDivisionError("of the\ntest")):
        assert planned_figures(eager, machine)["notes"] == ["nothing is planned: ZeroDivisionError: of the test"]
