"""Products in 8 bits, emulated in fp32: scaled as written out here, close to the plain model, and only where wanted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.models.test_isolation import CONFIGS, VOCAB, make_model
from tests.train.harness import make_recipe
from turbolm.errors import UserError
from turbolm.models.fp8 import apply_fp8
from turbolm.plan.machine import Machine, check_fp8
from turbolm.recipe.checks import check_recipe

MOST = 448.0  # the largest float8_e4m3fn
H100 = Machine(1, "NVIDIA H100", (9, 0), 8, True, 2**34)


def rounded(values: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    scale = MOST / largest
    return (values * scale).to(torch.float8_e4m3fn).float() / scale


def test_one_layer_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48, bias=False))
    inputs, weight = torch.randn(16, 32), model[0].weight.detach().clone()
    assert apply_fp8(model, "tensorwise", emulate=True) == ["0"]
    expected = rounded(inputs, inputs.abs().max()) @ rounded(weight, weight.abs().max()).t()
    torch.testing.assert_close(model(inputs), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(expected, inputs @ weight.t(), atol=1e-2)


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_a_model_stays_close_and_learns_the_same_parameters(scaling: str) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCAB, (2, 32))
    plain, model = make_model(CONFIGS["llama"], "sdpa"), make_model(CONFIGS["llama"], "sdpa")
    parameters = dict(model.named_parameters())
    converted = apply_fp8(model, scaling, emulate=True)
    assert len(converted) == 2 * 7
    assert not any("lm_head" in name for name in converted)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    losses = [each(input_ids=tokens, labels=tokens, use_cache=False).loss for each in (plain, model)]
    for loss in losses:
        loss.backward()
    assert losses[0] != losses[1]
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)
    for (name, one), two in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.cosine_similarity(one.grad.flatten(), two.grad.flatten(), dim=0) > 0.97, name


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(UserError, match=r"train.fp8: this model has no linear layer .* set train.fp8: off"):
        apply_fp8(make_model(CONFIGS["gpt2"], "sdpa"), "tensorwise", emulate=True)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"precision": "fp16"}}, "set precision: bf16"),
        ({"execution": {"zero_stage": 3}}, "works with execution.zero_stage 1 and 2, got 3"),
        ({"cluster": {"device": "cpu"}}, "needs a GPU, but cluster.device is cpu"),
        ({"cluster": {"gpu": "A100-80GB", "gpus_per_node": 8}}, "but cluster.gpu is A100-80GB; set fp8: off"),
        ({"cluster": {"gpu": "H100-80GB", "gpus_per_node": 1}}, None),
    ],
)
def test_where_it_is_refused(sections: dict[str, dict], message: str | None, tmp_path: Path) -> None:
    works = {
        "train": {"fp8": "rowwise", "precision": "bf16"},
        "execution": {"zero_stage": 2},
        "cluster": {"device": "auto"},
    }
    recipe = make_recipe(tmp_path, **{name: works[name] | sections.get(name, {}) for name in works})
    found = [finding.message for finding in check_recipe(recipe) if finding.path[-1] == "fp8"]
    assert (not found) if message is None else (len(found) == 1 and message in found[0])


def test_a_machine_that_cannot(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, train={"fp8": "tensorwise"}, execution={"zero_stage": 2})
    check_fp8(recipe, H100, "cuda", "bf16")
    with pytest.raises(UserError, match="needs a GPU, and this run is on the CPU"):
        check_fp8(recipe, H100, "cpu", "bf16")
    with pytest.raises(UserError, match="in fp32"):
        check_fp8(recipe, H100, "cuda", "fp32")
    with pytest.raises(UserError, match=r"9.0 \(Hopper\) or later, but NVIDIA A100 has 8.0"):
        check_fp8(recipe, replace(H100, gpu_name="NVIDIA A100", gpu_compute_capability=(8, 0)), "cuda", "bf16")
