"""Checkpoints whose manifest is right and whose content is not, on two ranks: all pass over them to the one before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from tests.chaos.test_damage import edit_json, recompute_manifest
from tests.train.harness import Cell, cell_recipe
from tests.world import run_world
from turbolm.data.prepare.build import prepare

pytestmark = pytest.mark.chaos


def edit_tensors(checkpoint: Path, rank: int, edit: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> None:
    path = checkpoint / f"fragments-{rank:05d}.safetensors"
    with safe_open(path, "pt") as file:
        tensors, labels = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    edit(tensors, labels)
    save_file(tensors, path, labels)


def swap(checkpoint: Path, suffix: str) -> None:
    first, second = (checkpoint / f"fragments-0000{rank}.{suffix}" for rank in (0, 1))
    first.rename(checkpoint / "between")
    second.rename(first)
    (checkpoint / "between").rename(second)


def swap_the_tensors_of_two_ranks(checkpoint: Path) -> None:
    swap(checkpoint, "safetensors")


def swap_the_files_of_two_ranks(checkpoint: Path) -> None:
    swap(checkpoint, "safetensors")
    swap(checkpoint, "json")


def take_the_tensors_of_another_step(checkpoint: Path) -> None:
    name = "fragments-00001.safetensors"
    shutil.copy(checkpoint.with_name("step-00000001") / name, checkpoint / name)


def take_a_world_of_another_size(checkpoint: Path) -> None:
    edit_tensors(checkpoint, 0, lambda tensors, labels: labels.update(world_size="4"))


def truncate_the_random_state(checkpoint: Path) -> None:
    edit_tensors(checkpoint, 1, lambda tensors, labels: tensors.update({"rng/cpu": tensors["rng/cpu"][:100].clone()}))


def garble_the_random_state(checkpoint: Path) -> None:
    edit_tensors(checkpoint, 1, lambda tensors, labels: tensors.update({"rng/cpu": tensors["rng/cpu"] * 0 + 255}))


def truncate_the_random_state_of_the_host(checkpoint: Path) -> None:
    index = json.loads((checkpoint / "fragments-00001.json").read_text())
    del index["rng"]["python"][1][100:]
    (checkpoint / "fragments-00001.json").write_text(json.dumps(index))


def point_beyond_the_random_state_of_numpy(checkpoint: Path) -> None:
    index = json.loads((checkpoint / "fragments-00000.json").read_text())
    index["rng"]["numpy"][2] = 10**6
    (checkpoint / "fragments-00000.json").write_text(json.dumps(index))


def moment(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in sorted(tensors) if name.startswith("exp_avg/"))


def narrow_a_moment(checkpoint: Path) -> None:
    edit_tensors(
        checkpoint, 1, lambda tensors, labels: tensors.update({moment(tensors): tensors[moment(tensors)].bfloat16()})
    )


def narrow_a_weight(checkpoint: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor], labels: dict[str, str]) -> None:
        name = next(name for name in sorted(tensors) if name.startswith("weight/"))
        tensors[name] = tensors[name].half()

    edit_tensors(checkpoint, 0, edit)


def reshape_a_moment(checkpoint: Path) -> None:
    edit_tensors(
        checkpoint, 0, lambda tensors, labels: tensors.update({moment(tensors): tensors[moment(tensors)][None].clone()})
    )


def forget_a_moment(checkpoint: Path) -> None:
    path = checkpoint / "fragments-00001.json"
    index = json.loads(path.read_text())
    for group in index["fragments"]:
        group["states"] = ["exp_avg_sq"]
    path.write_text(json.dumps(index))

    def edit(tensors: dict[str, torch.Tensor], labels: dict[str, str]) -> None:
        for name in [name for name in tensors if name.startswith("exp_avg/")]:
            del tensors[name]

    edit_tensors(checkpoint, 1, edit)


def change_the_order_of_the_data(checkpoint: Path) -> None:
    edit_json(checkpoint / "trainer.json", order_digest="0" * 16)


def forge_the_loss_scaler(checkpoint: Path) -> None:
    edit_json(checkpoint / "trainer.json", scaler={"cur_scale": "large"})


@dataclass(frozen=True)
class Fails:
    """Rank 1 alone meets an error while it loads the newest checkpoint, in a function of `turbolm.checkpoint.load`."""

    where: str

    @property
    def __name__(self) -> str:
        return f"rank 1 fails in {self.where}"

    def __call__(self, checkpoint: Path) -> None:
        pass


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (swap_the_tensors_of_two_ranks, "fragments-00000.safetensors: not of rank 0, but of '1'"),
    (swap_the_files_of_two_ranks, "fragments-00000.json: not of rank 0, but of 1"),
    (take_the_tensors_of_another_step, "fragments-00001.safetensors: not of step 2, but of '1'"),
    (take_a_world_of_another_size, "fragments-00000.safetensors: not of world_size 2, but of '4'"),
    (truncate_the_random_state, "rank 1: {checkpoint}: the random state of rank 1 is not one: "),
    (garble_the_random_state, "rank 1: {checkpoint}: the random state of rank 1 is not one: "),
    (truncate_the_random_state_of_the_host, "fragments-00001.json: the random state of rank 1 is not one: ValueError"),
    (point_beyond_the_random_state_of_numpy, "fragments-00000.json: the random state of rank 0 is not one: ValueError"),
    (narrow_a_moment, "is bfloat16 of shape"),
    (narrow_a_weight, "is not in fp32"),
    (reshape_a_moment, "is missing or of another size"),
    (forget_a_moment, "exp_avg"),
    (change_the_order_of_the_data, "the order of the data is not the one"),
    (forge_the_loss_scaler, "the loss scaler's state is not numbers"),
    (Fails("_check_fits"), "rank 1: OSError: cannot read"),
    (Fails("_load_fragment"), "rank 1: OSError: cannot read"),
    (Fails("_set_rng_state"), "rank 1: OSError: cannot read"),
]


def pass_over(folder: Path, cell: Cell) -> list[dict[str, Any]]:
    """What each rank finds: for each damage the checkpoint it restored, the reasons, and whether all is as saved."""
    from tests.train.cells import build_cell
    from turbolm.checkpoint import load
    from turbolm.checkpoint.agreement import gather_over
    from turbolm.checkpoint.optimizer_state import parameter_state
    from turbolm.checkpoint.retention import Retention
    from turbolm.checkpoint.save import write_checkpoint
    from turbolm.checkpoint.snapshot import take_snapshot
    from turbolm.data.batch.loader import BatchLoader
    from turbolm.data.order.batch_order import recipe_order
    from turbolm.plan.rates import step_rates
    from turbolm.reliability.anomalies import AnomalyWatch
    from turbolm.train.recover import restore_newest
    from turbolm.train.step import train_step

    plan, store, engine, attention = build_cell(folder, cell)
    order = recipe_order(plan.recipe, store, plan.curriculum, save=False)
    loader = BatchLoader(order, store, "train", 2, dist.get_rank(), plan.recipe.execution.micro_batch)
    saved = folder / cell.name

    def state() -> dict[str, torch.Tensor]:
        tensors = {"rng": torch.get_rng_state()}
        for fragment in engine.fragments():
            held = parameter_state(engine.optimizer, fragment)
            tensors[f"weight/{fragment.name}"] = fragment.view(fragment.flat).clone()
            tensors |= {f"{name}/{fragment.name}": one.clone() for name, one in held.sharded.items()}
            tensors |= {f"{name}/{fragment.name}": torch.tensor(one) for name, one in held.scalars.items()}
        tensors |= {f"model/{name}": p.detach().clone() for name, p in engine.replicated_parameters().items()}
        return tensors

    first: dict[str, torch.Tensor] = {}
    for step in (1, 2):
        batch = loader.global_batch(step - 1)
        engine.set_rates(step_rates(plan, step - 1))
        train_step(engine, batch.micro_batches, batch.num_targets, attention)
        noted = {"step": step, "order_digest": order.digest(step), "anomalies": {}}
        snapshot = take_snapshot(engine, step, noted)
        write_checkpoint(saved, snapshot, {"contract": "test"}, Retention(9), agree=gather_over(None))
        first = first or state()

    found = []
    for number, (damage, _) in enumerate(DAMAGE):
        checkpoints = folder / f"{cell.name}-{number}"
        if dist.get_rank() == 0:
            shutil.copytree(saved, checkpoints)
            damage(checkpoints / "step-00000002")
            recompute_manifest(checkpoints / "step-00000002")
        dist.barrier()
        run, said = SimpleNamespace(checkpoints=checkpoints), []
        session: Any = SimpleNamespace(
            context=SimpleNamespace(run=run, group=None, contracts={"test"}), engine=engine, loader=loader, step=9,
            average=None,
            gate=SimpleNamespace(watch=AnomalyWatch(plan.recipe.anomalies)), log=SimpleNamespace(say=said.append),
        )  # fmt: skip
        with failing_once(load, damage if dist.get_rank() == 1 else None):
            checkpoint, reasons = restore_newest(session)
        now = state()
        changed = [name for name in now.keys() | first.keys() if not torch.equal(now[name], first[name])]
        name = checkpoint.name if checkpoint else None
        found.append({"name": name, "reasons": reasons, "step": session.step, "changed": changed, "said": said})
    return found


def failing_once(load: Any, damage: object) -> Any:
    if not isinstance(damage, Fails):
        return patch.object(load, "__name__", load.__name__)
    works, failed = getattr(load, damage.where), []

    def fails_once(*arguments: Any) -> Any:
        if not failed:
            failed.append(True)
            raise OSError("cannot read")
        return works(*arguments)

    return patch.object(load, damage.where, fails_once)


@pytest.mark.parametrize("zero_stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_all_ranks_go_back_to_the_checkpoint_before(zero_stage: int, tmp_path: Path) -> None:
    cell = Cell(name="cell", zero_stage=zero_stage, micro_batch_bins=1)
    prepare(cell_recipe(tmp_path, cell))
    by_rank = run_world(2, pass_over, tmp_path, cell)
    for number, (damage, reason) in enumerate(DAMAGE):
        for found in (by_rank[0][number], by_rank[1][number]):
            newest = tmp_path / f"cell-{number}" / "step-00000002"
            assert (found["name"], found["step"]) == ("step-00000001", 1), (damage.__name__, found)
            assert len(found["reasons"]) == 1 and found["reasons"][0].startswith(f"{newest}: "), found
            assert reason.format(checkpoint=newest) in found["reasons"][0], found
            assert found["changed"] == [], (damage.__name__, found)
            assert any(str(newest) in line for line in found["said"])
