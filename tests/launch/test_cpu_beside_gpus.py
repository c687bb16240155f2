"""A CPU run on a machine with GPUs: nothing of it may see them."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from turbolm.launch.local import precision_override, process_environment
from turbolm.plan.machine import Machine, detect_machine
from turbolm.plan.plan import build_plan
from turbolm.recipe.load import load_recipe

RECIPE = {
    "name": "r",
    "model": {"config": {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}},
    "tokenizer": {"train": {"vocab_size": 300}},
    "data": {"sources": [{"type": "jsonl", "path": "x.jsonl"}], "seq_len": 8},
    "train": {"budget": 640, "global_batch": 64},
    "optimizer": {"lr": 1e-3},
    "cluster": {"device": "cpu"},
}
EIGHT_H100 = Machine(8, "NVIDIA H100 80GB HBM3", (9, 0), 64, False, 2**40)

# What a rank does once torch is there; CUDA would see GPUs here unless they are hidden from it.
RANK = """
import os, sys
import turbolm.train.worker as worker
import torch
from deepspeed.accelerator import get_accelerator
from turbolm.plan.machine import detect_machine

def run(*_):
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    torch.cuda.is_available = lambda: not hidden
    from turbolm.engine.start import build_accelerator
    accelerator = build_accelerator(DS, device="cpu", precision="fp32", timeout_sec=30)
    print("seen:", detect_machine().num_gpus, hidden, get_accelerator().device_name(), accelerator.device)
    return 0

DS = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "zero_optimization": {"stage": 1}}
"""


@pytest.fixture
def machine_with_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two GPUs, as nvidia-smi tells of them."""
    stub = tmp_path / "bin" / "nvidia-smi"
    stub.parent.mkdir()
    stub.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 9.0'\necho 'NVIDIA H100 80GB HBM3, 9.0'\n")
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{stub.parent}{os.pathsep}{os.environ['PATH']}")
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "ACCELERATE_TORCH_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


@pytest.mark.slow  # 13 s: torch and DeepSpeed in a fresh process
def test_a_rank_started_by_hand_sees_no_gpu(machine_with_gpus: Path) -> None:
    """`python -m turbolm.train`: its own recipe says cpu, and torch is imported after that."""
    assert detect_machine().num_gpus == 2
    (machine_with_gpus / "rank.py").write_text(
        "import sys, turbolm.train.__main__ as main\nassert 'torch' not in sys.modules\n"
        "from types import ModuleType\nfake = ModuleType('turbolm.train.worker')\n"
        f"code = {RANK!r}\n"
        "def run_worker(*a):\n"
        "    del sys.modules['turbolm.train.worker']\n    space = {}\n"
        "    exec(code, space)\n    return space['run']()\n"
        "fake.run_worker = run_worker\nsys.modules['turbolm.train.worker'] = fake\n"
        "main.watch_over = lambda *a: None\n"
        "sys.argv = ['train', '--recipe', 'recipe.yaml']\nsys.exit(main.main())\n"
    )
    done = subprocess.run(
        [sys.executable, "rank.py"], cwd=machine_with_gpus, capture_output=True, text=True, check=False
    )
    assert "seen: 0 True cpu cpu" in done.stdout, done.stdout[-2000:] + done.stderr[-3000:]


def test_the_launchers_children_see_no_gpu(machine_with_gpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    plan = build_plan(load_recipe(machine_with_gpus / "recipe.yaml", []), EIGHT_H100)
    environment = process_environment(plan)
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
    assert {name: environment[name] for name in hidden} == hidden
    on_gpus = build_plan(load_recipe(machine_with_gpus / "recipe.yaml", ["cluster.device=auto"]), EIGHT_H100)
    environment = process_environment(on_gpus)
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["DS_ACCELERATOR"]) == ("0,1", "cuda")


def test_ranks_get_the_launchers_precision(machine_with_gpus: Path) -> None:
    """A rank whose nvidia-smi fails does not know that its GPU computes in bf16."""
    path, auto = machine_with_gpus / "recipe.yaml", ["cluster.device=auto"]
    plan = build_plan(load_recipe(path, auto), EIGHT_H100)
    silent = Machine(8, None, None, 64, False, 2**40)
    assert (plan.precision, build_plan(load_recipe(path, auto), silent).precision) == ("bf16", "fp32")
    told = build_plan(load_recipe(path, [*auto, precision_override(plan)]), silent)
    assert told.precision == "bf16" and told.recipe == plan.recipe
