"""Every optimizer against its paper's formula, on small tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.optim.formulas import Formula, orthogonal
from tests.train.harness import make_recipe
from turbolm.optim.build import build_optimizer, eight_bit_share
from turbolm.optim.muon import POLAR_EXPRESS, Muon, orthogonalise
from turbolm.recipe.optimizers import OPTIMIZERS

SETTINGS: list[dict[str, Any]] = [
    {"name": "adamw", "weight_decay": 0.3},
    {"name": "cautious_adamw", "weight_decay": 0.3},
    {"name": "sgd", "weight_decay": 0.3},
    {"name": "sgd", "momentum": 0.5, "nesterov": True},
    {"name": "rmsprop", "momentum": 0.5, "weight_decay": 0.3},
    {"name": "lion", "weight_decay": 0.3},
    {"name": "ademamix", "weight_decay": 0.3, "slow_warmup": "8 steps"},
    {"name": "muon", "weight_decay": 0.3},
    {"name": "muon", "adjust_lr": "original", "nesterov": False, "ns_steps": 3, "momentum": 0.8},
    {"name": "adamw", "weight_decay": 0.3, "cautious_weight_decay": True},
    {"name": "cautious_adamw", "weight_decay": 0.3, "cautious_weight_decay": True},
    {"name": "muon", "weight_decay": 0.3, "cautious_weight_decay": True, "orthogonalization": "polar_express"},
    {"name": "muon", "row_beta2": 0.9, "weight_decay": 0.3},
    {"name": "muon", "row_beta2": 0.9, "adjust_lr": "original", "ns_steps": 4, "orthogonalization": "polar_express"},
    {"name": "muon", "soap": {"every": 3, "max_dim": 9}, "row_beta2": 0.9},
    {"name": "muon", "hyperball": True, "weight_decay": 0.3},
    {"name": "muon", "hyperball": True, "soap": {"every": 3, "max_dim": 9}},
    {"name": "soap", "weight_decay": 0.3, "precondition_every": 3, "max_precondition_dim": 9},
    {"name": "soap", "max_precondition_dim": 9},
    {"name": "adafactor", "weight_decay": 0.3},
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.wide = nn.Linear(6, 10)
        self.narrow = nn.Linear(10, 4)
        self.norm = nn.LayerNorm(10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.norm(torch.tanh(self.wide(self.tokens(ids)))))


def test_every_optimizer_has_a_row() -> None:
    assert {settings["name"] for settings in SETTINGS} | {"adamw_8bit"} == set(OPTIMIZERS)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(str(s) for s in settings.values()))
def test_updates_follow_the_formula(settings: dict[str, Any], tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, optimizer=settings, execution={"zero_stage": 0})
    torch.manual_seed(0)
    ours, theirs = Net().double(), Net().double()
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, recipe)
    matrices = {"wide.weight", "narrow.weight"}
    formula = Formula(
        recipe.optimizer, theirs.named_parameters(), decayed=matrices, matrices=matrices, slow_warmup_steps=8
    )
    before = {name: parameter.clone() for name, parameter in theirs.named_parameters()}
    for step in range(12):
        ids, wanted = torch.randint(11, (60,)), torch.randn(60, 4, dtype=torch.float64)
        for model in (ours, theirs):
            model.zero_grad()
            ((model(ids) - wanted) ** 2).mean().backward()
        lr = 0.01 * (step + 1) / 12
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        formula.step(lr)
    for name, parameter in theirs.named_parameters():
        # Newton-Schulz runs in fp32, whatever the parameters are; eigenvectors amplify rounding.
        rtol, atol = (1e-5, 1e-6) if settings["name"] in ("muon", "soap") else (1e-7, 1e-9)
        torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=rtol, atol=atol)
        assert (parameter - before[name]).abs().max() > 1e-5, "it must have moved"


@pytest.mark.parametrize("shape", [(8, 8), (5, 16), (16, 5), (3, 7, 4)])
def test_newton_schulz_is_the_polynomial_on_singular_values(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    expected = torch.stack([orthogonal(one, 5) for one in matrix]) if len(shape) > 2 else orthogonal(matrix, 5)
    torch.testing.assert_close(orthogonalise(matrix, 5), expected, rtol=1e-4, atol=1e-5)
    singular = torch.linalg.svdvals(expected)
    assert singular.min() > 0.3 and singular.max() < 1.3


def test_polar_express_makes_small_singular_values_closer_to_one_than_newton_schulz() -> None:
    """Each ends within 0.142 of 1 from 0.01 on, where one polynomial for all iterations is twice as far away."""
    values = torch.logspace(-2, 0, 200, dtype=torch.float64)
    errors = {}
    for polar in (False, True):
        s = values / (1.02 if polar else 1)
        for number in range(5):
            a, b, c = POLAR_EXPRESS[number] if polar else (3.4445, -4.7750, 2.0315)
            s = a * s + b * s**3 + c * s**5
        errors[polar] = float((s - 1).abs().max())
    assert errors[True] < 0.142 < errors[False]


def test_muon_equals_torch_muon_in_bf16() -> None:
    """torch's own runs Newton-Schulz in bf16, as ours does when training in bf16."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(12, 20, bias=False), nn.Linear(12, 20, bias=False)
    theirs.load_state_dict(ours.state_dict())
    group = {"params": [ours.weight], "assembled": True, "momentum": 0.9, "nesterov": True, "ns_steps": 5}
    group |= {"adjust_lr": "match_rms_adamw", "weight_decay": 0.1}
    optimizer = Muon([group], ns_dtype=torch.bfloat16, lr=0.02)
    reference = torch.optim.Muon(
        [theirs.weight], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    before = theirs.weight.detach().clone()
    for _ in range(5):
        gradient = torch.randn(20, 12)
        ours.weight.grad, theirs.weight.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    moved = (theirs.weight - before).abs().mean()
    assert (ours.weight - theirs.weight).abs().mean() < 0.05 * moved


def test_the_share_of_moments_in_8_bits() -> None:
    """As torchao chooses: tensors of at least 4096 elements in whole blocks of 256."""
    assert eight_bit_share([torch.empty(8192), torch.empty(4096 + 128), torch.empty(256)]) == 8192 / (8192 + 4224 + 256)
    from torchao.optim import AdamW8bit
    from torchao.optim.subclass_8bit import OptimState8bit

    optimizer = AdamW8bit([torch.nn.Parameter(torch.zeros(1))])
    kinds = [type(optimizer._new_buffer(torch.empty(size), True)) for size in (4096, 4096 + 128, 256)]
    assert kinds == [OptimState8bit, torch.Tensor, torch.Tensor]
