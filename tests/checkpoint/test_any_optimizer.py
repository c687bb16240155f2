"""Whatever an optimizer keeps is saved: a resumed run goes on bit for bit, or it is refused, never wrong."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.checkpoint.toy import BuildOptimizer, Engine, build_saver
from turbolm.checkpoint.load import CheckpointReader, load_checkpoint
from turbolm.checkpoint.verify import verify_checkpoint
from turbolm.errors import RunError, UserError

pytestmark = pytest.mark.usefixtures("process_group")


class Kronecker(torch.optim.Optimizer):
    """State as second-order methods keep it: lists of matrices, None, numbers in the state and in the group."""

    def __init__(self, parameters: Any, lr: float = 1e-2):
        super().__init__(parameters, {"lr": lr, "weight_decay": 0.0, "calls": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["calls"] += 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(factors=[torch.zeros(n, n) for n in p.shape], step=0, scale=torch.ones(3), spare=None)
                    state["turned"] = torch.zeros(p.shape[::-1]).permute(tuple(reversed(range(p.dim()))))
                state["step"] += 1
                state["scale"] *= 1.5
                state["turned"] += p.grad
                update = p.grad.clone()
                for axis, factor in enumerate(state["factors"]):
                    moved = p.grad.movedim(axis, 0).reshape(factor.shape[0], -1)
                    factor += moved @ moved.T
                    update = update / (1 + factor.trace())
                p -= group["lr"] * group["calls"] * state["scale"].sum() * (update + state["turned"])


class Quantised(torch.optim.Optimizer):
    """Moments in 8 bits with a scale for each block of four, as 8-bit optimizers keep them."""

    def __init__(self, parameters: Any, lr: float = 1e-2):
        super().__init__(parameters, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    blocks = -(-p.numel() // 4)
                    state.update(codes=torch.zeros_like(p, dtype=torch.uint8), scales=torch.zeros(blocks))
                scales = state["scales"].repeat_interleave(4)[: p.numel()].view(p.shape)
                momentum = 0.9 * (state["codes"].float() - 128) * scales + p.grad
                padded = torch.nn.functional.pad(momentum.flatten(), (0, -p.numel() % 4)).view(-1, 4)
                state["scales"].copy_(padded.abs().amax(1) / 127)
                codes = (padded / state["scales"].clamp_min(1e-12)[:, None]).round() + 128
                state["codes"].copy_(codes.flatten()[: p.numel()].view(p.shape))
                p -= group["lr"] * momentum


OPTIMIZERS: dict[str, BuildOptimizer] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "adafactor of transformers": lambda p: transformers.Adafactor(
        p, lr=1e-2, relative_step=False, scale_parameter=False
    ),
    "nested": Kronecker,
    "8 bits": Quantised,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    expected = Engine(OPTIMIZERS[name]).train(8)
    assert expected[-1] != expected[-2]
    engine = Engine(OPTIMIZERS[name])
    engine.train(4)
    saver = build_saver(tmp_path, engine)
    saver.save(4, {"step": 4, "order_digest": ""})
    saver.finish()
    assert verify_checkpoint(tmp_path / "step-00000004") == []
    resumed = Engine(OPTIMIZERS[name], seed=5)
    load_checkpoint(tmp_path / "step-00000004", resumed)
    assert resumed.train(4, first=4) == expected[4:]


def cpu_adam(parameters: Any) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(list(parameters), lr=1e-2)  # type: ignore[no-any-return]


def form(optimizer: torch.optim.Optimizer) -> Any:
    """All of the state but its values."""
    return {
        (number, name): (value.shape, value.dtype, value.stride()) if torch.is_tensor(value) else type(value)
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


@pytest.mark.parametrize("name", ["adamw", "fused", pytest.param("cpu_adam", marks=pytest.mark.slow)])  # compiled
def test_state_is_made_in_the_form_that_the_optimizer_gives_it(name: str) -> None:
    build = {**OPTIMIZERS, "cpu_adam": cpu_adam}[name]
    stepped, made = Engine(build), Engine(build)
    stepped.train(1)
    for parameter in made.module.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    before = [parameter.detach().clone() for parameter in made.module.parameters()]
    made.materialise_state()
    assert form(made.optimizer) == form(stepped.optimizer) != {}
    assert list(made.optimizer.state) == list(made.module.parameters())
    for parameter, value in zip(made.module.parameters(), before, strict=True):
        assert torch.equal(parameter, value) and bool((parameter.grad == 2).all())
        assert all(not value.any() for key, value in made.optimizer.state[parameter].items() if key != "step")
    kept = {id(value) for state in made.optimizer.state.values() for value in state.values() if torch.is_tensor(value)}
    made.materialise_state()  # as at a rollback
    again = {id(value) for state in made.optimizer.state.values() for value in state.values() if torch.is_tensor(value)}
    assert again == kept


def test_states_that_are_not_of_the_parameters_shape_are_kept_whole(tmp_path: Path) -> None:
    engine = Engine(OPTIMIZERS["adafactor"])
    engine.train(1)
    saver = build_saver(tmp_path, engine)
    saver.save(1, {"step": 1, "order_digest": ""})
    saver.finish()
    with CheckpointReader(tmp_path / "step-00000001") as reader:
        rank, states = reader.whole["inner.weight", "parameter"]
        assert rank == 0 and {"row_var", "col_var"} <= states
        expected = engine.optimizer.state[engine.module.inner.weight]["row_var"]
        assert torch.equal(reader.read_bound("row_var", "inner.weight", "parameter"), expected)


def test_what_cannot_be_kept_is_refused_by_name(tmp_path: Path) -> None:
    engine = Engine()
    engine.train(1)
    engine.optimizer.state[engine.module.gain]["memo"] = object()
    saver = build_saver(tmp_path, engine)
    saver.save(1, {"step": 1, "order_digest": ""})
    with pytest.raises(RunError, match="'memo' is a object, which cannot be saved"):
        saver.finish()
    assert not list(tmp_path.glob("step-*"))


@pytest.mark.parametrize(("saved", "loaded"), [("adamw", "momentum"), ("adafactor", "adamw"), ("adamw", "adafactor")])
def test_another_optimizer_is_refused(saved: str, loaded: str, tmp_path: Path) -> None:
    engine = Engine(OPTIMIZERS[saved])
    engine.train(1)
    saver = build_saver(tmp_path, engine)
    saver.save(1, {"step": 1, "order_digest": ""})
    saver.finish()
    with pytest.raises(UserError, match="optimizer"):
        load_checkpoint(tmp_path / "step-00000001", Engine(OPTIMIZERS[loaded]))


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    engine = Engine()
    saver = build_saver(tmp_path, engine)
    saver.save(1, {"step": 1, "order_digest": ""})
    saver.finish()
    expected = [torch.rand(3).tolist(), random.random(), np.random.rand(), np.random.randn()]
    engine.train(1)
    load_checkpoint(tmp_path / "step-00000001", Engine())
    assert [torch.rand(3).tolist(), random.random(), np.random.rand(), np.random.randn()] == expected
