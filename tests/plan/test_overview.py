"""The page of `turbolm plan`: short, with every warning, and its proposals hold when they are planned."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from turbolm.plan.overview import render_overview
from turbolm.plan.summary import Summary, collect_summary
from turbolm.recipe.load import load_recipe

REPOSITORY = Path(__file__).parents[2]
LLAMA_8B = str(REPOSITORY / "recipes/llama3.1-8b/pretrain/config.yaml")
QUICKSTART = str(REPOSITORY / "recipes/quickstart/config.yaml")


def summary_of(recipe: str, *overrides: str) -> Summary:
    return collect_summary(load_recipe(recipe, overrides), recipe, overrides, lambda *_: {})


def words(page: str) -> str:
    """The page without its line breaks."""
    return " ".join(page.split())


def proposals(page: str) -> list[list[str]]:
    """The overrides of every line that is proposed under `change`."""
    change = page.partition("\nchange ")[2].partition("\nlaunch ")[0]
    return [shlex.split(line)[3:] for line in change.splitlines() if " turbolm submit " in f" {line.strip()}"]


def test_the_page_of_a_large_run_is_read_in_half_a_minute() -> None:
    summary = summary_of(LLAMA_8B, "cluster.price_per_gpu_hour=2")
    page, made = render_overview(summary), summary.estimate
    assert made is not None and made.bill.gpu_hours is not None
    assert len(page.splitlines()) <= 25
    assert all(len(line) <= 110 for line in page.splitlines() if "turbolm " not in line)
    labels = re.findall(r"^([a-z]+) {2,}", page, re.MULTILINE)
    assert labels == ["model", "training", "machines", "memory", "time", "cost", "change", "launch"]
    for expected in (
        "8,030,261,248 parameters; 5.15e+10 FLOPs a token",
        "1T tokens of parquet[0] in 238,419 steps of 4,194,304 tokens (512 sequences of 8,192)",
        "8 nodes x 8 processes = 64 on NVIDIA H100 (as the recipe describes), bf16, ZeRO-2",
        "FITS: ",
        "most of it: weights 15 GiB, ",
        "tokens/s, MFU ",
        "not calibrated: assumed for H100-80GB",
        f" {2 * made.bill.gpu_hours:,.0f} USD",
        "--verbose",
    ):
        assert expected in words(page), expected
    assert "ds_config" not in page and "optimizer moments" not in page


def test_what_is_proposed_takes_less_time_and_fits() -> None:
    """Each line is planned again; the first says by how much it is faster."""
    summary = summary_of(LLAMA_8B)
    page = render_overview(summary)
    proposed = proposals(page)
    assert proposed == [["execution.activation_checkpointing=selective"]]
    other = summary_of(LLAMA_8B, *proposed[0])
    assert other.footprint is not None and other.footprint.verdict(80 * 2**30) == "FITS"
    assert summary.estimate is not None and other.estimate is not None
    share = other.estimate.bill.run_sec / summary.estimate.bill.run_sec
    assert f"{1 - share:.0%} less time" in page and share < 0.9


def test_a_tight_run_has_lines_that_fit() -> None:
    overrides = ("execution.zero_stage=1", "train.budget=100B")
    page = render_overview(summary_of(LLAMA_8B, *overrides))
    assert "TIGHT: " in page
    proposed = proposals(page)
    assert len(proposed) == 3
    for changes in proposed:
        assert "train.budget=100B" in changes, "the overrides of the command are kept"
        found = summary_of(LLAMA_8B, *changes)
        assert found.footprint is not None and found.footprint.verdict(80 * 2**30) == "FITS"


def test_warnings_are_on_the_page(tmp_path: Path) -> None:
    overrides = ("cluster.processes_per_node=3", "cluster.device=cpu", "execution.hang_timeout=30m")
    overrides += (f"execution.cache_dir={tmp_path}",)  # where this machine is not calibrated
    summary = summary_of(QUICKSTART, *overrides)
    page = words(render_overview(summary))
    assert summary.notes
    for note in summary.notes:
        assert words(note) in page
    assert "fillers count in nothing, but take 33.3% of the time" in page
    assert f"UNKNOWN, not calibrated: `turbolm calibrate {QUICKSTART}`" in page
    assert f"turbolm train {QUICKSTART} {' '.join(overrides)}" in page


def test_a_schedule_that_changes_says_so() -> None:
    changing = render_overview(summary_of(QUICKSTART, "data.length_schedule={name: growth, start: 64}"))
    assert "the largest; batches or lengths change on the way" in words(changing)
    assert "on the way" not in words(render_overview(summary_of(QUICKSTART)))
