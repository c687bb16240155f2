"""What a rank of `harness.run_cells` does: trains a cell with the project's own engine, step and checkpoints."""

from __future__ import annotations

import functools
import json
import os
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_grad

from tests.train.harness import MIXTURES, Cell, cell_recipe
from turbolm.checkpoint.agreement import gather_over
from turbolm.checkpoint.load import load_checkpoint
from turbolm.checkpoint.retention import Retention
from turbolm.checkpoint.save import write_checkpoint
from turbolm.checkpoint.saver import CheckpointSaver
from turbolm.checkpoint.snapshot import Snapshot, take_snapshot
from turbolm.data.batch.loader import BatchLoader
from turbolm.data.order.batch_order import recipe_order
from turbolm.data.prepare.build import find_store
from turbolm.data.store.token_store import TokenStore, open_store
from turbolm.engine.start import build_accelerator
from turbolm.models.compile import apply_compile
from turbolm.plan.machine import detect_machine
from turbolm.plan.plan import Plan, build_plan
from turbolm.plan.rates import step_rates
from turbolm.train.build import build_engine
from turbolm.train.run_directory import RunDirectory
from turbolm.train.step import micro_batch_loss, train_step


def build_cell(folder: Path, cell: Cell) -> tuple[Plan, TokenStore, Any, str]:
    """The plan, the data, the engine and its attention kernel."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    recipe = cell_recipe(folder, cell)
    plan = build_plan_of_large_matrices(recipe, detect_machine(), int(os.environ["WORLD_SIZE"]))
    store = open_store(find_store(recipe) or "missing")
    accelerator = build_accelerator(plan.ds_config, device=plan.device, precision=plan.precision, timeout_sec=120)
    with compiled_by(cell.compiler):
        return plan, store, *build_engine(accelerator, plan, store, RunDirectory(folder / "runs" / cell.name))


def compiled_by(backend: str) -> Any:
    """`execution.compile` with another backend of torch.compile than inductor."""
    return patch("turbolm.train.tricks.apply_compile", functools.partial(apply_compile, backend=backend))


def build_plan_of_large_matrices(*arguments: Any) -> Plan:
    """The plan with which ZeRO-3 cuts the matrices of a tiny model too, as it does large ones; norms stay whole."""
    plan = build_plan(*arguments)
    if plan.recipe.execution.zero_stage == 3:
        plan.ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    return plan


def train_cell(folder: Path, cell: Cell) -> list[list[float]]:
    """(loss, gradient norm) of every step; of a mixture of experts also (router loss, gradient norm of the routers)."""
    with torch.compiler.set_stance("force_eager" if cell.compiler == "eager" else "default"):
        return _train_cell(folder, cell)


def _train_cell(folder: Path, cell: Cell) -> list[list[float]]:
    plan, store, engine, attention = build_cell(folder, cell)
    recipe = plan.recipe
    order = recipe_order(recipe, store, plan.curriculum, save=False)
    ranks, execution = (dist.get_world_size(), dist.get_rank()), recipe.execution
    loader = BatchLoader(order, store, "train", *ranks, execution.micro_batch, shared_by=execution.sequence_parallel)
    if cell.load:  # after a forward pass, as in the trainer, which checks first that packed documents are isolated
        engine.eval()
        with torch.no_grad():
            micro_batch_loss(engine, loader.global_batch(0).micro_batches[0], attention)
        engine.train()
    step = load_checkpoint(Path(cell.load), engine)["step"] if cell.load else 0
    if cell.save_loaded_in:
        save(cell.save_loaded_in, engine, step)
    trained, ledger = [], []
    router_norms = watch_routers(engine) if cell.model in MIXTURES else []
    while step < cell.steps:
        batch = loader.global_batch(step)
        ledger.append(batch.samples_digest)
        engine.set_rates(step_rates(plan, step))
        with no_device_synchronization():
            result = train_step(engine, batch.micro_batches, batch.num_targets, attention)
        loss = result.loss_sum.double()
        dist.all_reduce(loss)
        step += 1
        norm = float("nan") if result.grad_norm is None else float(result.grad_norm)  # fp16 skips updates at first
        trained.append([float(loss) / batch.num_targets, norm])
        if result.router_loss_sum is not None and router_norms:
            router_loss = result.router_loss_sum.double()
            dist.all_reduce(router_loss)
            trained[-1] += [float(router_loss) / batch.num_targets, router_norms[-1]]
        if step in cell.save_at:
            save(cell.save_in or "missing", engine, step)
            if cell.save_late_in:
                late = late_saver(cell.save_late_in, engine)
                late.save(step, {"step": step, "order_digest": ""})
    if cell.save_late_in:
        late.finish()
    engine.deepspeed_engine.destroy()
    (folder / f"{cell.name}.ledger.json").write_text(json.dumps(ledger), encoding="utf-8")
    return trained


@contextmanager
def no_device_synchronization() -> Iterator[None]:
    """Fail when DeepSpeed waits for the whole device: on a GPU the host could then no longer run ahead of it.

    The engine of an earlier cell does so when it is collected, which may happen here.
    """
    stacks: list[str] = []

    def synchronize(*_: Any) -> None:
        stack = traceback.extract_stack(limit=6)
        if not any(frame.name == "destroy" for frame in stack):
            stacks.append("".join(traceback.format_list(stack)))

    with patch.object(type(get_accelerator()), "synchronize", synchronize):
        yield
    assert not stacks, f"{len(stacks)} device synchronizations in a step, first:\n{stacks[0]}"


def watch_routers(engine: Any) -> list[float]:
    """The norm of the gradient of all routers, which every update from now on adds to."""
    norms: list[float] = []
    gates = [p for name, p in engine.module.named_parameters() if name.endswith(".gate.weight")]
    step = engine.deepspeed_engine.step

    def step_noting() -> None:
        if engine.deepspeed_engine.is_gradient_accumulation_boundary():
            gradients = [safe_get_full_grad(gate) for gate in gates]
            norms.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))
        step()

    engine.deepspeed_engine.step = step_noting
    return norms


def save(folder: str, engine: Any, step: int) -> None:
    """Save a checkpoint of an engine after `step` steps."""
    state = {"step": step, "order_digest": ""}
    snapshot = take_snapshot(engine, step, state)
    write_checkpoint(Path(folder), snapshot, {"contract": "test"}, Retention(9), agree=gather_over(None))


def late_saver(folder: str, engine: Any) -> CheckpointSaver:
    """A saver that copies as late as it may: when the next update waits for it."""
    saver = CheckpointSaver(
        folder=Path(folder),
        engine=engine,
        retention=Retention(9),
        contract_fingerprint="test",
        asynchronous=True,
        group=dist.new_group(backend="gloo"),
        report=print,
    )
    update_waits, wait, fill = threading.Event(), saver.wait_for_copy, saver._copy.fill

    def noted_wait() -> None:
        update_waits.set()
        wait()

    def late_fill(snapshot: Snapshot) -> Snapshot:
        if not update_waits.wait(60):
            raise TimeoutError("no update has waited for the copy")
        return fill(snapshot)

    saver.wait_for_copy, saver._copy.fill = noted_wait, late_fill  # type: ignore[method-assign]
    return saver
