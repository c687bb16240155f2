"""The FLOPs that MFU counts while training: of the profile, and by formula where there is none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from turbolm.launch.store import prepare_profile
from turbolm.plan.profile import LayerKind, ModelProfile, Tensor
from turbolm.plan.profiles import profile_of_run
from turbolm.recipe.load import load_recipe
from turbolm.shipped import find_recipe
from turbolm.train import model_flops
from turbolm.train.model_flops import count_batch_flops

LENGTHS = [200, 56, 256]
BATCH: Any = SimpleNamespace(sequences=SimpleNamespace(length=np.array(LENGTHS)), num_targets=sum(LENGTHS))
PAIRS = sum(length * (length + 1) // 2 for length in LENGTHS)
WEIGHTS = 4 * (4 * 128 * 128 + 3 * 128 * 384) + 4096 * 128  # of the quickstart: matrices and the tied head


def context(tmp_path: Path, vocab_size: int = 4096) -> Any:
    overrides = [f"execution.cache_dir={tmp_path}", "cluster.gpus_per_node=8", "cluster.gpu=H100-80GB"]
    recipe = load_recipe(find_recipe("quickstart"), overrides)
    return SimpleNamespace(recipe=recipe, store=SimpleNamespace(vocab_size=vocab_size))


def model(**changes: Any) -> PreTrainedModel:
    recipe = load_recipe(find_recipe("quickstart"))
    values = {**(recipe.model.config or {}), "vocab_size": 4096, "pad_token_id": None, **changes}
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    return made


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)


def test_a_shipped_profile_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = count_batch_flops(context(tmp_path), model())(BATCH)
    assert found == 6 * WEIGHTS * sum(LENGTHS) + 12 * 4 * 128 * PAIRS
    assert capsys.readouterr().out == ""


def test_without_a_profile_the_formula_counts_and_the_log_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = count_batch_flops(context(tmp_path, 4095), model(vocab_size=4095))(BATCH)
    norms = 9 * 128  # a size counts them with the matrices
    assert found == 6 * (WEIGHTS - 128 + norms) * sum(LENGTHS) + 12 * 4 * 128 * PAIRS
    assert "6 N + 12 L H S" in (said := capsys.readouterr().out) and "not traced yet" in said


def test_the_profile_of_another_model_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count_batch_flops(context(tmp_path), model(num_hidden_layers=3))
    assert "parameters, and the model" in capsys.readouterr().out


def test_windows_count_as_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = model()
    num = sum(parameter.numel() for parameter in built.parameters())
    layer = LayerKind("sliding_attention", 4, 0, "window", 100, 0.0, 4 * 128.0, ())
    profile = ModelProfile("llama", (Tensor("all", (num,), "matrix"),), 0, True, 0.0, (layer,), (), (), {})
    monkeypatch.setattr(model_flops, "profile_of_run", lambda *_: (profile, ""))
    pairs = (5050 + 100 * 100) + 56 * 57 // 2 + (5050 + 156 * 100)
    assert count_batch_flops(context(tmp_path), built)(BATCH) == pytest.approx(12 * 4 * 128 * pairs)


def test_other_ranks_trace_and_count_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr(model_flops, "profile_of_run", pytest.fail)
    assert count_batch_flops(context(tmp_path), model())(BATCH) == 0


def test_a_model_that_cannot_be_traced_fails_no_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = context(tmp_path, 4095)
    monkeypatch.setattr("turbolm.plan.profiles._run_tracer", lambda _: (None, "the tracer failed: no memory"))
    prepare_profile(asked.recipe, "recipe", asked.store)
    assert "the model is not traced: the tracer failed: no memory" in capsys.readouterr().err
    monkeypatch.setattr("turbolm.plan.profiles.read_model_config", _refuse)
    prepare_profile(asked.recipe, "recipe", asked.store)
    assert "model.pretrained: no folder" in capsys.readouterr().err


def test_a_run_on_a_cpu_is_not_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(find_recipe("quickstart"), [f"execution.cache_dir={tmp_path}", "cluster.device=cpu"])
    monkeypatch.setattr("turbolm.plan.profiles._run_tracer", pytest.fail)
    prepare_profile(recipe, "recipe", context(tmp_path, 4095).store)


def _refuse(*_: object) -> None:
    from turbolm.errors import UserError

    raise UserError("model.pretrained: no folder")


def test_a_traced_profile_is_found_again_by_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = context(tmp_path, 4095)
    traced, _ = profile_of_run(asked.recipe, "recipe", 4096)
    assert traced is not None
    monkeypatch.setattr("turbolm.plan.profiles._run_tracer", lambda _: (traced.to_json(), ""))
    assert profile_of_run(asked.recipe, "recipe", 4095)[0] is None
    prepare_profile(asked.recipe, "/elsewhere/recipe.yaml", asked.store)
    assert profile_of_run(asked.recipe, "recipe", 4095)[0] == traced
