"""What DeepSpeed holds of a small model's state, worked out by hand. benchmarks/planner.py counts real steps."""

from __future__ import annotations

from typing import Any

import pytest

from turbolm.plan.footprint import router_loss
from turbolm.plan.machine import Machine
from turbolm.plan.plan import Plan, build_plan
from turbolm.plan.profile import ModelProfile, Tensor
from turbolm.plan.summary import _state
from turbolm.plan.zero_memory import Held, ZeroMemory, estimate_zero_memory
from turbolm.recipe.schema import Recipe

# Two groups: 48 elements of matrices, and 44 that do not decay.
TENSORS = (
    Tensor("embedding", (10, 4), "embedding"),
    Tensor("first", (4, 6), "matrix"),
    Tensor("second", (6, 4), "matrix"),
    Tensor("norm", (4,), "vector"),
)
BUCKET = 30


def plan_of(
    stage: int,
    precision: str,
    *,
    micro_batches: int = 1,
    gpu: bool = False,
    optimizer: dict[str, Any] | None = None,
    **execution: Any,
) -> Plan:
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "model": {"config": {"model_type": "llama"}},
            "tokenizer": {"train": {}},
            "data": {"seq_len": 8},
            "train": {"budget": "1M", "global_batch": 128 * micro_batches, "precision": precision},
            "cluster": {"gpu": "A100-40GB", "gpus_per_node": 2} if gpu else {},
            "optimizer": optimizer or {},
            "execution": {
                "zero_stage": stage,
                "micro_batch": 64,
                "communication_bucket": BUCKET,
                "overlap_communication": False,
                **execution,
            },
        }
    )
    machine = Machine(2 if gpu else 0, "A100", (8, 0), 2, cpu_has_bf16=True, memory_bytes=0)
    return build_plan(recipe, machine, world_size=2)


def state_of(*arguments: Any, **keywords: Any) -> ZeroMemory:
    return estimate_zero_memory(TENSORS, plan_of(*arguments, **keywords))


def test_stage_0_keeps_everything() -> None:
    state = state_of(0, "fp32")
    assert (state.weights, state.master, state.optimizer) == (4 * 92, 0, 8 * 92)
    assert state.resting == Held()
    assert state.passed == state.updating == Held(4 * 92)
    assert state.started == Held(4 * 40), "the head is tied to the embedding, whose gradient comes first"
    assert state.reduced == Held(4 * 92, 4 * 92), "all of them flattened at once"
    assert state_of(0, "fp32", micro_batches=2).resting == Held(4 * 92)


def test_stage_1_in_bf16_keeps_all_fp32_gradients_from_step_to_step() -> None:
    state = state_of(1, "bf16")
    assert (state.weights, state.master, state.optimizer) == (2 * 92, 4 * 46, 8 * 46)
    assert state.resting == Held(4 * 92)
    assert state.passed == state.updating == Held(4 * 92 + 2 * 92)
    assert state.reduced == Held(6 * 92, 4 * 92), "both groups in one message"


def test_stage_2_in_fp32_keeps_whole_gradients_and_copies_them() -> None:
    """The second rank has a part of the embedding, the second matrix and the norm: 40 + 24 + 4 elements."""
    state = state_of(2, "fp32")
    assert (state.weights, state.master) == (4 * 92, 4 * 46)
    # A bucket; the embedding is larger than it, and flattened once more.
    assert state.passed == Held(4 * 68, 4 * (BUCKET + 40 + 40))
    assert state.updating == Held(4 * 68, 0, 4 * 24), "the matrices' part is flattened"
    assert state_of(2, "fp32", micro_batches=2).resting == Held(4 * 68)


def test_stage_2_in_bf16_keeps_its_part_flat() -> None:
    state = state_of(2, "bf16")
    assert state.passed == Held(4 * 46, 2 * (BUCKET + 40) + (2 + 4) * 40), "flattened, and converted to be sent in fp32"
    assert state.updating == Held(4 * 46)
    assert state.resting == Held()


def test_stage_3_keeps_gradients_and_a_bucket() -> None:
    state = state_of(3, "bf16")
    assert (state.weights, state.master, state.optimizer) == (2 * 46, 4 * 46, 8 * 46)
    assert state.small_weights == 2 * 92, "all are small"
    assert state.resting == Held(4 * 46, 4 * BUCKET)
    assert state.updating == Held(4 * 46, 4 * BUCKET, 4 * 24), "DeepSpeed flattens each sub-group's once more"
    assert state_of(3, "fp32").master == 4 * 46, "a second copy of the weights"


def test_offloading_leaves_reduced_gradients_of_half_precision_on_the_gpu() -> None:
    state = state_of(2, "bf16", gpu=True, offload_optimizer=True)
    assert (state.master, state.optimizer) == (0, 0)
    largest = 2 * 40
    assert state.resting == Held(0, largest)
    assert state.updating == Held(4 * 46, largest)
    # Master weights, moments, gradients; the new weights and the largest gradient in bf16.
    assert state.host_bytes == 16 * 46 + 2 * (46 + 40)
    assert state_of(3, "bf16", gpu=True, offload_optimizer=True).resting == Held(0, 4 * BUCKET)


@pytest.mark.parametrize(
    ("optimizer", "on_gpu", "on_host", "copies"),
    [
        # In bf16 the matrix of each rank as it arrives, and 4 of its size and a gram matrix to make it orthogonal.
        ({"name": "muon"}, 0, 4 * 24 + 8 * 22, 2 * (24 + 4 * 24 + 16)),
        # In fp32 the update and the gradient, and what turns the basis of the longer side, after that of the shorter.
        ({"name": "muon", "soap": {}}, 20 * 24, 4 * 24 + 8 * 22, 4 * (2 * 24 + 24 + 4 * 24 + 5 * 36)),
        # The norm is not assembled. The largest is the embedding, with the weight that SOAP steps and a basis of 10.
        ({"name": "soap"}, 24 * (24 + 20), 24 * 2, 4 * (40 + 40 + 4 * 40 + 5 * 100)),
    ],
    ids=str,
)
def test_whole_matrices_are_updated_on_the_gpu_with_offloading_too(
    optimizer: dict[str, Any], on_gpu: int, on_host: int, copies: int
) -> None:
    """And what their owners keep stays there; the update in fp32 of the rank's part is on the host."""
    part, momentum = (20, 0) if optimizer["name"] == "soap" else (24, 4)
    for stage in (1, 2, 3):
        plan = plan_of(stage, "bf16", gpu=True, offload_optimizer=True, optimizer=optimizer)
        state = estimate_zero_memory(TENSORS, plan)
        assert (state.master, state.optimizer) == (0, on_gpu)
        gradients = 8 * 46 if stage == 3 else 4 * 46 + 2 * (46 + 40)
        assert state.host_bytes == 4 * 46 + on_host + gradients
        here = state_of(stage, "bf16", gpu=True, optimizer=optimizer)
        assert here.optimizer == on_gpu + on_host
        if stage == 2:
            assert (state.updating.copies, here.updating.copies) == (copies, copies + 4 * part)
        each = _state(plan, plan.recipe.execution, 92)  # without the tensors, as if all were matrices
        assert each.optimizer == plan.recipe.kept_bytes * 46 - momentum * 46
        assert each.host_bytes == (4 + momentum + (8 if stage == 3 else 6)) * 46


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_muon_keeps_one_moment_of_matrices(stage: int) -> None:
    plan = plan_of(stage, "fp32")
    recipe = Recipe.model_validate({**plan.recipe.model_dump(mode="json"), "optimizer": {"name": "muon"}})
    machine = Machine(0, None, None, 2, cpu_has_bf16=True, memory_bytes=0)
    state = estimate_zero_memory(TENSORS, build_plan(recipe, machine, world_size=2))
    assert state.optimizer == (4 * 48 + 8 * 44) // (2 if stage else 1)
    assert state.updating.copies > (4 * 24 if stage > 1 else 0)


def test_router_losses() -> None:
    """Two layers of 4 experts, of which 2 are chosen; 64 tokens in fp32."""
    experts = tuple(Tensor(f"layers.{layer}.experts.up", (4, 8, 8), "expert") for layer in range(2))
    profile = ModelProfile("x", experts, 2 * 2 * 64, False, 0.0, (), (), (), {})
    found = router_loss(plan_of(0, "fp32"), profile)
    logits, choices = 4 * 4, 8 * 2
    assert found.saved == 64 * 2 * logits
    assert found.working == 64 * (2 * (logits + choices) + 2 * logits + choices)
    dense = ModelProfile("x", TENSORS, 0, False, 0.0, (), (), (), {})
    assert router_loss(plan_of(0, "fp32"), dense).saved == 0
