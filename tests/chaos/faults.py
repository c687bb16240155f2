"""What the ranks of test_anomalies do: train with faults put in, and the reference that is given no faulty batch."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState

from turbolm.data.batch.loader import BatchLoader
from turbolm.data.order.batch_order import recipe_order
from turbolm.data.prepare.build import find_store
from turbolm.data.store.token_store import open_store
from turbolm.engine.start import build_accelerator
from turbolm.errors import RunError
from turbolm.plan.machine import detect_machine
from turbolm.plan.plan import build_plan
from turbolm.plan.rates import step_rates
from turbolm.recipe.schema import Recipe
from turbolm.train import loop, session, step
from turbolm.train.build import build_engine
from turbolm.train.run_directory import RunDirectory
from turbolm.train.step import train_step
from turbolm.train.worker import run_worker

Fault = tuple[str, float, Sequence[int]]  # where (loss or gradient), what it is multiplied by, on which ranks
CRASH = "crash"


class Crash(Exception):
    """The run dies here."""


def train_with_faults(recipe: Recipe, faults: Mapping[int, Fault | str]) -> int | str:
    """Train as the worker does, with the faults of some global batches; its exit code, or what it stopped with."""
    _fresh_process()
    clean_batches = loop.batches_to_train

    with faulty_losses(faults) as before_batch:

        def batches(trained: session.Session) -> Any:
            for batch in clean_batches(trained):
                if faults.get(batch.index) == CRASH:
                    trained.saver.wait()
                    raise Crash(f"before batch {batch.index}")
                before_batch(batch.index)
                yield batch

        try:
            with patch.object(loop, "batches_to_train", batches):
                return run_worker(recipe)
        except (Crash, RunError) as error:
            return str(error)


@contextmanager
def faulty_losses(faults: Mapping[int, Fault | str]) -> Iterator[Callable[[int], None]]:
    """Put the faults into the losses; yields what is to be told the index of each batch before it is trained on."""
    current: list[Fault | None] = [None]
    clean_loss = step.micro_batch_loss

    def before_batch(index: int) -> None:
        fault = faults.get(index)
        current[0] = fault if isinstance(fault, tuple) and dist.get_rank() in fault[2] else None

    def loss(*arguments: Any) -> Any:
        objective, nll, *routed = clean_loss(*arguments)
        if current[0] is None:
            return objective, nll, *routed
        where, factor, _ = current[0]
        if where == "loss":
            return objective * factor, nll * factor, *routed
        if where == "reported loss":  # whose gradient is as ever
            return objective, nll * factor, *routed
        objective.register_hook(lambda gradient: gradient * factor)
        return objective, nll, *routed

    with patch.object(step, "micro_batch_loss", loss):
        yield before_batch


def train_on(
    recipe: Recipe,
    steps: Sequence[tuple[int, int | None]],
    save_at: Sequence[int],
    folder: Path,
    faults: Mapping[int, Fault] | None = None,
) -> None:
    """The reference: for each (step, batch) one plain training step, none where the batch is None."""
    from tests.train.cells import save

    _fresh_process()
    plan = build_plan(recipe, detect_machine(), int(os.environ["WORLD_SIZE"]))
    store = open_store(find_store(recipe) or "missing")
    accelerator = build_accelerator(plan.ds_config, device=plan.device, precision=plan.precision, timeout_sec=120)
    engine, attention = build_engine(accelerator, plan, store, RunDirectory(folder / "run"))
    order = recipe_order(recipe, store, plan.curriculum, save=False)
    loader = BatchLoader(order, store, "train", dist.get_world_size(), dist.get_rank(), recipe.execution.micro_batch)
    with faulty_losses(faults or {}) as before_batch:
        for index, batch_index in steps:
            if batch_index is not None:
                batch = loader.global_batch(batch_index)
                before_batch(batch_index)
                engine.set_rates(step_rates(plan, index))
                train_step(engine, batch.micro_batches, batch.num_targets, attention)
            if index + 1 in save_at:
                save(str(folder), engine, index + 1)


def flip_a_bit(recipe: Recipe, at_batch: int, name: str, on_rank: int) -> int | str:
    """Train, and let one bit of a weight flip on one rank before a batch."""
    _fresh_process()
    clean_check = session.check_replicas

    def check(engine: Any, finished: int, group: Any) -> None:
        if finished == at_batch and dist.get_rank() == on_rank:
            weight = dict(engine.module.named_parameters())[name].data.view(-1)
            weight[-1:].view(torch.int32)[0] ^= 1
        clean_check(engine, finished, group)

    try:
        with patch.object(session, "check_replicas", check):
            return run_worker(recipe)
    except RunError as error:
        return str(error)


def _fresh_process() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    gc.collect()
