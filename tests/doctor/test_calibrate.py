"""What `turbolm calibrate` measures, and how rates are fitted to it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from turbolm.doctor.calibrate import CLOCKS, Order, Sample, fit_rates, measure, take_turns
from turbolm.doctor.pieces import (
    Case,
    Subject,
    _MemoryBytes,
    count_memory_bytes,
    gradient_case,
    model_cases,
    small_config,
    update_case,
)
from turbolm.launch.calibrate import _step_config
from turbolm.models.profile import profile_model
from turbolm.plan.machine import detect_machine
from turbolm.plan.work import Shape, micro_batch_amounts
from turbolm.shipped import shipped

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
SUBJECT = {"config": LLAMA, "num_layers": 2, "sequences": 2, "seq_len": 16, "attention": "sdpa", "loss": "full"}
CPU = torch.device("cpu")
ORDER = {
    "device": "cpu",
    "precision": "fp32",
    "num_ranks": 1,
    "threads": 1,
    "port": 0,
    "subjects": [SUBJECT],
    "steps": (),
    "ds_config": {},
    "budget_sec": 0.05,
    "clock": "cpu",
}


def test_the_fit_finds_the_rates_that_made_the_times() -> None:
    true = {"matrix_flops": 1e-12, "memory_bytes": 2e-9, "products": 1e-4}
    amounts = [
        {"matrix_flops": flops, "memory_bytes": moved, "products": number, "layers": 1.0}
        for flops, moved, number in ((1e9, 1e6, 3), (1e10, 1e6, 3), (1e9, 1e8, 3), (1e8, 1e7, 30), (5e10, 5e7, 1))
    ]
    samples = [Sample("", one, sum(true[u] * one[u] for u in true), 0.0) for one in amounts]  # type: ignore[literal-required, arg-type]
    found = fit_rates(samples)
    for unit, value in true.items():
        assert found[unit] == pytest.approx(value, rel=0.01)  # type: ignore[literal-required, index]
    assert found["layers"] == pytest.approx(0, abs=1e-6)
    assert min(found.values()) >= 0


def test_a_weight_of_three_counts_nine_times_in_the_squares() -> None:
    samples = [Sample("piece", {"products": 1.0}, 1.0, 0.0), Sample("step", {"products": 1.0}, 2.0, 0.0, weight=3.0)]
    # Least squares of w (x / sec - 1): x = sum(w^2 / sec) / sum(w^2 / sec^2).
    assert fit_rates(samples)["products"] == pytest.approx((1 + 9 / 2) / (1 + 9 / 4), rel=1e-6)


def test_cases_take_turns_and_the_median_counts() -> None:
    now, calls = [0.0], []

    def case(name: str, durations: list[float]) -> Case:
        def run() -> None:
            calls.append(name)
            now[0] += durations[min(calls.count(name), len(durations)) - 1]

        return Case(name, {}, run)

    cases = [case("a", [9.0, 1.0, 5.0, 1.1]), case("b", [9.0, 2.0])]
    found = take_turns(cases, 0.0, torch.device("cpu"), lambda: now[0])
    assert calls == ["a", "b"] * 4, "one turn that does not count, and three"
    assert [one.sec for one in found] == pytest.approx([1.1, 2.0])
    assert found[0].spread == pytest.approx(0.1 / 1.1)


def test_memory_bytes_are_those_of_the_operators_that_move_them() -> None:
    model = _Doubling()
    object.__setattr__(model, "base_model", model)  # a child of itself would be traversed without end
    # Forward 2 x 16 elements; backward 2 x 16 for the gradient's ones and 2 x 16 for the product with 2. The matrix
    # products and the view count nothing.
    assert count_memory_bytes(model, {"rows": torch.ones(2, 4)}) == 4 * 3 * 2 * 16


class _Doubling(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4, 8))

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor]:
        return ((rows @ self.weight).view(-1) * 2,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_cases_move_the_bytes_that_they_count(dtype: torch.dtype) -> None:
    for case in (gradient_case(3, 1024, CPU, dtype), update_case(4, 1024, CPU, dtype)):
        case.run()  # an optimizer makes its state
        with _MemoryBytes() as counted:
            case.run()
        (expected,) = (value for unit, value in case.amounts.items() if unit.endswith("_bytes"))
        moved = counted.num_bytes
        if "AdamW" in case.name:  # it returns nothing: three of its four tensors are written too
            moved += 3 * 4 * 4096
        copies = {torch.float32: 2, torch.bfloat16: 3}[dtype] if "AdamW" not in case.name else 1
        moved -= copies * dtype.itemsize * (3072 if copies > 1 else 4096)  # what `copy_` writes is not read before
        assert moved == pytest.approx(expected, rel=0.01), case.name


def test_a_rank_measures_products_attention_models_and_the_update() -> None:
    found = measure(Order(**{**ORDER, "subjects": (SUBJECT,)}), 0)  # type: ignore[arg-type]
    names = [one["name"] for one in found["samples"]]
    assert {"32 x 32 x 48", "32 x 48 x 32", "32 x 32 x 64", "attention 2 x 2 x 16 x 16"} <= set(names)
    assert {"4 gradients of 1048576", "64 gradients of 4096", "AdamW, 64 x 4096"} <= set(names)
    model = next(one for one in found["samples"] if one["name"].startswith("llama of 2 layers"))
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 48) + 32 * 64
    assert model["amounts"]["matrix_flops"] == 6 * 32 * weights
    assert model["amounts"]["attention_pairs"] == 3 * 2 * 2 * 32 * 16
    assert all(one["sec"] > 0 for one in found["samples"])
    assert set(CLOCKS) == {"wall", "cpu"}


def test_steps_do_not_depend_on_a_recipe_that_anyone_may_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ds_configs").symlink_to(shipped("ds_configs"))
    monkeypatch.setenv("TURBOLM_HOME", str(tmp_path))  # which has no recipes
    config = _step_config(detect_machine(), "cpu", "fp32")
    sizes = [config[f"train_{name}"] for name in ("batch_size", "micro_batch_size_per_gpu")]
    assert [*sizes, config["gradient_accumulation_steps"], config["gradient_clipping"]] == [1, 1, 1, 1.0]
    assert config["zero_optimization"]["stage"] == 2 and not config["bf16"]["enabled"]


@pytest.mark.slow
def test_the_profile_that_plan_reads_counts_what_calibrate_counts() -> None:
    """Rates are seconds per counted unit, so that both must count alike."""
    values = {**SUBJECT, "sequences": 2, "seq_len": 128, "config": {**LLAMA, "max_position_embeddings": 128}}
    *_, piece = model_cases(values, torch.device("cpu"), "bf16")
    profile = profile_model(small_config(Subject(**values)))
    found = micro_batch_amounts(profile, Shape(256, 128, "sdpa", 2, 16, (64, 64)))
    for unit in ("matrix_flops", "matrix_bytes", "products", "attention_flops", "attention_rows", "layers", "logits"):
        assert found[unit] == pytest.approx(piece.amounts[unit]), unit  # type: ignore[index]
    assert found["memory_bytes"] == pytest.approx(piece.amounts["memory_bytes"], rel=0.05)


@pytest.mark.slow
def test_two_ranks_measure_together_and_plan_reads_what_they_kept(tmp_path: Path) -> None:
    code = (
        "import turbolm.launch.calibrate as c;"
        f"c._default_subjects = c._step_subjects = lambda *_: [{SUBJECT!r}];"
        "print(c.calibrate(None, (), 0.05))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    kept = json.loads(next((tmp_path / ".cache/turbolm/rates").glob("*.json")).read_text())
    assert kept["version"] == 2 and kept["sec_per"]["matrix_flops"] >= 0
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 2 * 64 * 32 + 32
    (step,) = (one for one in kept["measured"]["samples"] if one["name"].startswith("step of 2 layers, width 32"))
    per_weight = 70 if ", bf16" in kept["kind"] else 72  # as tests/engine/test_weight_bytes.py counts them
    assert step["amounts"]["optimizer_bytes"] == per_weight * weights and step["amounts"]["gradients"] == 2 * 21
    assert step["sec"] > 0 and step["weight"] > 1
    assert kept["node"]["bytes_per_sec"] > 0 and kept["measured"]["messages"]
