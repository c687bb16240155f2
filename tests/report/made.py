"""Run directories made by hand, whose curves are known."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml


def made_loss(step: int) -> float:
    return 3 + 6 / math.sqrt(step) + 0.2 * math.sin(7 * step)


def step_line(step: int, attempt: int = 1, **changes: Any) -> dict[str, Any]:
    """Steps of 1000 tokens at 500 tokens a second: 2 seconds each."""
    line = {
        "step": step, "attempt": attempt, "tokens_seen": 1000 * step, "train/lr": 1e-3, "train/loss": made_loss(step),
        "train/grad_norm": 0.5 + step % 3, "perf/tokens_per_sec": 500.0, "perf/cpu_sec": 1.5, "perf/mfu": 0.3,
        "data/batch_tokens": 1000, "data/seq_len": 100, "data/padding_fraction": 0.01, "memory/peak_bytes": 3 * 2**30,
    }  # fmt: skip
    return line | changes


def write_lines(run: Path, lines: Iterable[dict[str, Any]], how: str = "a") -> None:
    run.mkdir(parents=True, exist_ok=True)
    with (run / "metrics.jsonl").open(how) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make_run(run: Path, num_steps: int = 100, lr: float = 1e-3, zero_stage: int = 2, **changes: Any) -> Path:
    """A finished run with two validation sets, an anomaly, and a plan; `changes` are those of each step's line."""
    lines = [step_line(step, **changes) for step in range(1, num_steps + 1)]
    for step in range(20, num_steps + 1, 20):
        evaluation = {"step": step, "attempt": 1, "tokens_seen": 1000 * step, "eval/loss": made_loss(step) + 0.1}
        lines.append(evaluation | {"eval/loss/web": made_loss(step) + 0.2, "eval/loss/code": made_loss(step)})
    event = {"anomaly": "loss_spike", "anomaly/loss": 40.0, "anomaly/decision": "skip", "data/batch": 49}
    lines.append({"step": 50, "attempt": 1, "tokens_seen": 50_000, **event})
    write_lines(run, lines, "w")
    contract = {"train": {"budget": 1000 * num_steps, "seed": 0}, "optimizer": {"name": "adamw", "lr": lr}}
    record = {"fingerprint": f"of lr {lr}", "contract": contract, "store_fingerprint": "s"}
    write(run / "contract.json", {**record, "budgets_tokens": [1000 * num_steps]})
    execution = {"zero_stage": zero_stage, "micro_batch": 100}
    recipe = {"name": run.name, **contract, "execution": execution, "evaluation": {"tokens": 1000}}
    recipe["train"] = {**contract["train"], "max_grad_norm": 1.0}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    planned = {"device": "cuda", "seq_len": 100, "batch_tokens": 1000, "step_sec": 1.6, "tokens_per_sec": 625.0}
    planned |= {"peak_bytes": 2 * 2**30, "peak_parts": {"master": 1.5 * 2**30, "gradients": 0.5 * 2**30}}
    planned |= {"notes": ["planned by hand"], "step_parts": {"matrix": 1.2, "host": 0.4}}
    attempt = run / "attempts/1"
    write(attempt / "plan.json", {"num_steps": num_steps, "planned": planned, "device": "cuda", "world_size": 1})
    write(attempt / "start.json", {"unix_time": 1_760_000_000.0})
    write(attempt / "outcome.json", {"status": "finished", "exit_code": 0, "message": "", "unix_time": 1_760_000_754.0})
    environment = {"host": "node1", "turbolm": "0.5.0", "git_commit": "0123456789abcdef", "torch": "2.13.0"}
    write(attempt / "environment.json", environment)
    write(run / "results.json", {"unigram_entropy": 5.5, "steps": num_steps})
    return run
