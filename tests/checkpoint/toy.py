"""A model and optimizer that look like an engine at ZeRO stage 0: most of checkpointing is tested in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from turbolm.checkpoint.retention import Retention
from turbolm.checkpoint.saver import CheckpointSaver
from turbolm.engine import engine

CONTRACT = "c" * 64
BuildOptimizer = Callable[[Any], torch.optim.Optimizer]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


class Toy(nn.Module):
    """Sizes that no power of two divides, a scalar parameter, and a buffer that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(7, 5), nn.Linear(5, 3, bias=False)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return self.gain * self.outer(torch.tanh(self.inner(x)))


class Engine(engine.Engine):
    """An engine around what a checkpoint needs of DeepSpeed's."""

    def __init__(self, build_optimizer: BuildOptimizer = adamw, seed: int = 0):
        torch.manual_seed(seed)
        module, stage = Toy(), 0
        optimizer = build_optimizer(module.parameters())
        device = torch.device("cpu")
        super().__init__(
            SimpleNamespace(module=module, device=device, optimizer=optimizer, zero_optimization_stage=lambda: stage)
        )

    def train(self, steps: int, first: int = 0) -> list[float]:
        """Train on data that is a function of the step; returns the losses."""
        losses = []
        for step in range(first, first + steps):
            data = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
            loss = (self.module(data) - 1).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses


@contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def build_saver(folder: Path, engine: Engine, **settings: Any) -> CheckpointSaver:
    values: dict[str, Any] = {
        "retention": Retention(keep_last=2),
        "contract_fingerprint": CONTRACT,
        "asynchronous": True,
        "group": None,
        "report": lambda text: None,
    }
    return CheckpointSaver(folder=folder, engine=engine, **{**values, **settings})


def write_checkpoint(folder: Path, step: int, **state: Any) -> Path:
    """A checkpoint of a toy trained for `step` steps; needs a process group."""
    engine = Engine()
    engine.train(step)
    saver = build_saver(folder, engine, retention=Retention(keep_last=99), asynchronous=False)
    saver.save(step, {"step": step, "tokens_seen": 100 * step, "order_digest": "", **state})
    saver.finish()
    return folder / f"step-{step:08d}"
