"""How often a step makes the host wait for the device, with the plan of a GPU and a stand-in for CUDA."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.train.harness import Cell, cell_recipe
from tests.world import run_world
from turbolm.data.prepare.build import prepare

MICRO_BATCHES = 3  # of 2 ranks: 2 inside the accumulation, then that of the update

# DeepSpeed 0.19.8, by ZeRO stage, (inside the accumulation, at the update): at most so many waits of the host. Stage 3
# waits for an event only where the device is behind, which the stand-in always is.
ZERO, PARAMETERS = "deepspeed/runtime/zero/stage", "deepspeed/runtime/zero/partition_parameters.py"
FETCH = "deepspeed/runtime/zero/partitioned_param_coordinator.py:_fetch_sub_module_impl event.synchronize"
UTILS = "deepspeed/runtime/utils.py"
OWN: dict[int, tuple[dict[str, int], dict[str, int]]] = {
    0: ({}, {}),
    1: ({}, {f"{UTILS}:is_invalid_grad_norm _local_scalar_dense": 1,
             f"{UTILS}:clip_tensors_by_global_norm _local_scalar_dense": 1}),
    2: ({f"{ZERO}_1_and_2.py:independent_gradient_partition_epilogue synchronize": 2},
        {f"{ZERO}_1_and_2.py:independent_gradient_partition_epilogue synchronize": 1,
         f"{ZERO}_1_and_2.py:has_overflow _local_scalar_dense": 1,
         f"{UTILS}:is_invalid_grad_norm _local_scalar_dense": 3}),
    3: ({FETCH: 80, f"{ZERO}3.py:__reduce_and_partition_ipg_grads event.synchronize": 8,
         f"{ZERO}3.py:independent_gradient_partition_epilogue stream.synchronize": 2},
        {FETCH: 16, f"{ZERO}3.py:__reduce_and_partition_ipg_grads event.synchronize": 4,
         f"{ZERO}3.py:independent_gradient_partition_epilogue stream.synchronize": 1,
         f"{UTILS}:is_invalid_grad_norm _local_scalar_dense": 1,
         f"{PARAMETERS}:_allgather_params_coalesced synchronize": 1}),
}  # fmt: skip


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=pytest.mark.slow if stage in (0, 3) else ()) for stage in OWN]
)
def test_the_host_waits_for_the_device_nowhere_inside_an_accumulation_but_in_deepspeed(
    stage: int, tmp_path: Path
) -> None:
    gpu_plan = {"overlap_communication": True, "communication_bucket": 20_000} if stage else {}
    attention, precision = ("varlen", "bf16") if stage else ("sdpa", "fp32")  # as `auto` chooses on a GPU
    cell = Cell(name="c", zero_stage=stage, micro_batch_bins=1, precision=precision, attention=attention)
    cell.execution = gpu_plan
    prepare(cell_recipe(tmp_path, cell))
    for found in run_world(2, count_waits, tmp_path, cell):
        assert found["accumulation turbolm"] == {}
        # The watch for anomalies reads loss and norm once, in DeepSpeed's own call at stages 1 to 3.
        assert set(found["update turbolm"]) <= {"turbolm/train/gate.py:_sums tolist"}
        assert found["update turbolm"].total() == (1 if stage == 0 else 0)
        for phase, most in zip(("accumulation", "update"), OWN[stage], strict=True):
            assert found[f"{phase} deepspeed"] <= Counter(most), f"{phase}: {dict(found[f'{phase} deepspeed'])}"
            assert found[f"{phase} torch"] == {}
        # sdpa's mask: Transformers asks whether any sequence is packed.
        assert found["accumulation transformers"].total() == (MICRO_BATCHES if stage == 0 else 0)
    assert set(found["accumulation deepspeed"]) == set(OWN[stage][0])


def count_waits(folder: Path, cell: Cell) -> dict[str, Counter[str]]:
    import torch.distributed as dist

    from tests.cuda_standin import installed, reads_noted
    from tests.train.cells import build_cell
    from turbolm.data.batch.loader import BatchLoader
    from turbolm.data.order.batch_order import recipe_order
    from turbolm.recipe.schema import Anomalies
    from turbolm.reliability.anomalies import AnomalyWatch
    from turbolm.train.gate import UpdateGate
    from turbolm.train.step import train_step

    # Which FlashAttention a real GPU would run is asked of its driver.
    with installed() as waits, patch("turbolm.train.build.start_kernels", lambda *_: ""):
        plan, store, engine, attention = build_cell(folder, cell)
        order = recipe_order(plan.recipe, store, plan.curriculum, save=False)
        loader = BatchLoader(order, store, "train", 2, dist.get_rank(), plan.recipe.execution.micro_batch)
        gate = UpdateGate(engine, AnomalyWatch(Anomalies()))
        plain = engine.backward_and_step

        def by_phase(loss: Any, *, is_boundary: bool) -> Any:
            if is_boundary:
                waits.phase = "update"
            return plain(loss, is_boundary=is_boundary)

        engine.backward_and_step = by_phase  # type: ignore[method-assign]
        for step in range(3):  # the first ones prepare buffers and ZeRO-3's order of parameters
            batch, waits.phase = loader.global_batch(step), "accumulation"
            assert len(batch.micro_batches) == MICRO_BATCHES
            waits.counted.clear()
            with reads_noted(waits):
                train_step(engine, batch.micro_batches, batch.num_targets, attention, gate)
        packages = ("turbolm", "deepspeed", "torch", "transformers")
        phases = ("accumulation", "update")
        return {f"{phase} {package}": waits.of(phase, package) for phase in phases for package in packages}
