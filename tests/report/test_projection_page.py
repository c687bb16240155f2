"""The page of projections: its points are those of the JSON, as the command prints and writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.report.page import _Page, assert_loads_nothing, chart_data
from turbolm.cli import app

RECIPE = str(Path(__file__).parents[2] / "recipes/llama3.1-8b/pretrain/config.yaml")


def project(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["plan", RECIPE, "--project", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(project("--json"))
    return parsed


def test_the_points_drawn_are_those_of_the_json(found: dict[str, Any], tmp_path: Path) -> None:
    text = project("--html", str(tmp_path / "p.html"))
    assert text.endswith(f"plots: {tmp_path / 'p.html'}\n") and "strong scaling" in text
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    charts = chart_data(page)
    per_gpu = charts["Tokens per second of each GPU"]
    assert per_gpu["logarithmic"] == "x" and per_gpu["x_label"] == "GPUs"
    for number, kind in enumerate(("strong", "weak")):
        runs = [one for one in found[kind] if one["step_sec"] is not None]
        for chart, values in (
            (per_gpu, [one["tokens_per_sec"] / one["num_gpus"] for one in runs]),
            (charts["Model FLOPs utilization (MFU)"], [one["mfu"] for one in runs]),
            (charts["Exposed communication, share of a step"], [one["exposed_share"] for one in runs]),
            (charts["Days of training"], [one["run_sec"] / 86400 for one in runs]),
        ):
            curve = chart["curves"][number]
            assert curve["name"] == f"{kind} scaling"
            assert curve["x"] == [one["num_gpus"] for one in runs]
            assert curve["y"] == pytest.approx(values, rel=1e-4)
    assert per_gpu["curves"][0]["x"][-1] == 512, "4M tokens are 512 sequences of 8,192"
    assert per_gpu["curves"][1]["x"] == [8 * 2**power for power in range(12)], "8 to 16,384"


def test_the_page_says_that_it_is_a_model_and_what_it_assumes(found: dict[str, Any], tmp_path: Path) -> None:
    project("--html", str(tmp_path / "p.html"))
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    parsed = _Page(page)
    texts = [text for tag, text in parsed.texts]
    assert "A model, not a measurement." in texts
    assert [text for tag, text in parsed.texts if tag == "li" and text.strip()] == found["assumptions"]
    assert len(found["assumptions"]) == 5 and "not calibrated" in found["rates"] and found["rates"] in "".join(texts)
    assert_loads_nothing(page)


def test_a_run_that_does_not_fit_is_in_the_tables_alone(tmp_path: Path) -> None:
    overrides = ("execution.zero_stage=3", "execution.activation_checkpointing=none", "cluster.gpu=A100-40GB")
    arguments = (*overrides, "execution.micro_batch=16384", "--html", str(tmp_path / "p.html"))
    text = project(*arguments)
    assert "DOES NOT FIT" in text
    charts = chart_data((tmp_path / "p.html").read_text(encoding="utf-8"))
    assert charts["Days of training"]["curves"] == []
