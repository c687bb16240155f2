"""What the pages and the notebook show runs: in a folder of its own, in order, on a small copy of the quickstart.

The recipe there has the same keys with smaller values, and a budget in a block is divided by `CUT`. Blocks of one page
follow each other, and all pages share the run that the quickstart trains.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from tests.docs.blocks import Block, all_blocks, running_text
from tests.test_pages import ROOT
from turbolm.report.metrics import read_lines

pytestmark = pytest.mark.slow
CUT = 40
QUICKSTART = "recipes/quickstart/README.md"
NOTEBOOK = ROOT / "recipes/quickstart/quickstart.ipynb"
_BUDGET = re.compile(r"(budget[=: ]\s*)([\d.]+)([kMB])")
_SMALLER = {
    "hidden_size: 128": "hidden_size: 32",
    "intermediate_size: 384": "intermediate_size: 64",
    "num_hidden_layers: 4": "num_hidden_layers: 2",
    "vocab_size: 4096": "vocab_size: 512",
    "- type: stdlib": "- {type: text, path: src/turbolm/data/**/*.py}",
    "validation: 2%": "validation: 20%",
    "tokens: 100k": "tokens: 8k",
}
_ONE_PROCESS = "cluster: {processes_per_node: 1}\nlogging: {sample_tokens: 8}\n"


def run_blocks() -> list[Block]:
    """The blocks that run, those of the quickstart first."""
    blocks = [block for block in all_blocks("sh", "python") if block.why_not is None]
    return sorted(blocks, key=lambda block: block.page != QUICKSTART)


def cut(text: str) -> str:
    """The text with smaller budgets."""
    return _BUDGET.sub(lambda found: f"{found[1]}{float(found[2]) / CUT:g}{found[3]}", text)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a checkout, with a small quickstart."""
    home = tmp_path_factory.mktemp("pages")
    shutil.copytree(ROOT / "recipes", home / "recipes")
    for name in ("src", "launch", "ds_configs"):
        (home / name).symlink_to(ROOT / name)
    recipe = home / "recipes/quickstart/config.yaml"
    text = cut(recipe.read_text(encoding="utf-8"))
    for before, after in _SMALLER.items():
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    recipe.write_text(text + _ONE_PROCESS, encoding="utf-8")
    (home / "bin").mkdir()
    command = home / "bin/turbolm"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m turbolm.cli "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    return home


def run(home: Path, *command: str) -> str:
    """Run a command in the folder; returns what it printed."""
    path = f"{home / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "TURBOLM_HOME": str(home), "PYTHONPATH": str(ROOT / "src"), "PATH": path}
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.mark.parametrize("block", run_blocks(), ids=str)
def test_a_block_runs(block: Block, home: Path) -> None:
    if block.language == "python":
        assert run(home, sys.executable, "-c", block.text).strip()
    else:
        run(home, "bash", "-euo", "pipefail", "-c", cut(block.text))


def test_the_notebook_trains_and_plots(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells run as a script: Jupyter and matplotlib need not be there, and what would be plotted is looked at."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    script = cut("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"))
    axes = (MagicMock(), MagicMock())
    plots = MagicMock()
    plots.subplots.return_value = MagicMock(), axes
    for name, module in {"matplotlib": MagicMock(pyplot=plots), "matplotlib.pyplot": plots}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("TURBOLM_HOME", str(home))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.chdir(home)
    exec(compile(script, NOTEBOOK.name, "exec"), {})
    lines = read_lines(home / "runs/notebook/metrics.jsonl")
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    drawn = [call.args[:2] for call in axes[0].plot.call_args_list]
    assert len(losses) > 1 and list(drawn[0][1]) == losses
    assert len(drawn[1][1]) == sum("eval/loss" in line for line in lines) > 0
    assert len(axes[1].plot.call_args.args[0]) == len(losses)


def test_the_formats_that_are_documented_are_those_that_are_written(home: Path) -> None:
    """Every key of the metrics and results of a run stands in the page of formats, and every file of an attempt."""
    told = set(re.findall(r"`([^`\n]+)`", running_text(ROOT / "src/turbolm/checkpoint/README.md")))
    lines = read_lines(home / "runs/quickstart/metrics.jsonl")
    assert {key for line in lines for key in line} <= told
    assert set(json.loads((home / "runs/quickstart/results.json").read_text())) <= told
    files = {path.name for path in (home / "runs/quickstart/attempts/1").iterdir()}
    patterns = [re.escape(name).replace("<k>", r"\d+") for name in (word.rstrip("/") for word in told)]
    patterns += ["ranks", "nodes"]
    assert not [name for name in files if not any(re.fullmatch(pattern, name) for pattern in patterns)]
    newest = sorted((home / "runs/quickstart/checkpoints").iterdir())[-1]
    assert set(json.loads((newest / "manifest.json").read_text())) <= told
