"""What the planner counts for gradients and updates is what the operators of a real step read and write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests.world import run_world
from turbolm.plan.batch import plan_batch
from turbolm.plan.deepspeed import ELEMENT_BYTES, resolve_ds_config
from turbolm.plan.weight_bytes import gradient_bytes, update_bytes
from turbolm.recipe.schema import Recipe

TENSORS, ROWS, COLUMNS = 4, 256, 512
WEIGHTS = TENSORS * ROWS * COLUMNS
Layout = tuple[int, str, int]  # ZeRO stage, precision, micro-batches of a step
ALL: list[Layout] = [(0, "fp32", times) for times in (1, 2)]
ALL += [(stage, precision, times) for stage in (1, 2, 3) for precision in ("fp32", "bf16") for times in (1, 2)]


def ds_config(stage: int, precision: str, times: int, world_size: int) -> dict[str, Any]:
    batch = {"global_batch": 64 * times * world_size, "max_grad_norm": 1.0}
    values: dict[str, Any] = {
        "name": "bytes",
        "model": {"config": {"model_type": "llama"}},
        "tokenizer": {"train": {}},
        "data": {"seq_len": 64},
        "train": {"budget": 4096, "precision": precision, **batch},
        "execution": {"zero_stage": stage, "micro_batch": 64},
    }
    recipe = Recipe.model_validate(values)
    return resolve_ds_config(recipe, plan_batch(recipe, world_size), "cpu", precision)


def _counted(layouts: Sequence[Layout], world_size: int) -> Mapping[Layout, tuple[float, float]]:
    """Return bytes for each weight of the model, of all backward passes of a second step and of its update."""
    import torch
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from turbolm.engine.start import build_accelerator, wrap

    class Counter(TorchDispatchMode):
        total = 0.0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
            if func.namespace == "c10d" or func.is_view or name.startswith(("empty", "detach")):
                return output
            read = args[1:] if name == "copy_" else args
            tensors = [one for one in tree_leaves((read, kwargs, output)) if isinstance(one, torch.Tensor)]
            moved = sum(min(one.numel() * one.element_size(), one.untyped_storage().nbytes()) for one in tensors)
            # It returns nothing: of its four tensors all but the gradient are written too.
            self.total += moved * 7 / 4 if name == "_fused_adamw_" else moved
            return output

    class Products(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList(torch.ones(ROWS, COLUMNS) for _ in range(TENSORS))

        def forward(self, factors: torch.Tensor) -> torch.Tensor:
            return sum(((weight * factors).sum(dtype=torch.float32) for weight in self.weights), torch.zeros(()))

    def backward_alone(dtype: torch.dtype, factors: torch.Tensor) -> float:
        model = Products().to(dtype)
        loss = model(factors)
        with Counter() as counter:
            torch.autograd.grad(loss, list(model.parameters()))
        return counter.total

    found = {}
    for stage, precision, times in layouts:
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        config = ds_config(stage, precision, times, world_size)
        accelerator = build_accelerator(config, device="cpu", precision=precision, timeout_sec=120)
        model = Products()
        engine = wrap(accelerator, model, torch.optim.AdamW(model.parameters(), fused=True)).deepspeed_engine  # type: ignore[arg-type]
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        factors = torch.ones(ROWS, COLUMNS, dtype=dtype)
        for _ in range(2):
            backward = Counter()
            for index in range(times):
                loss = engine(factors)
                engine.set_gradient_accumulation_boundary(is_boundary=index == times - 1)
                with backward:
                    engine.backward(loss, scale_wrt_gas=False)
            with Counter() as update:
                engine.step()
        alone = backward_alone(dtype, factors) * times
        found[stage, precision, times] = ((backward.total - alone) / WEIGHTS, update.total / WEIGHTS)
        engine.destroy()
    return found


def _check(world_size: int, layouts: Sequence[Layout]) -> None:
    for layout, counted in run_world(world_size, _counted, layouts, world_size)[0].items():
        stage, precision, times = layout
        size = ELEMENT_BYTES[precision]
        planned = (gradient_bytes(stage, size, times, world_size), update_bytes(stage, size, world_size))
        assert counted == pytest.approx(planned, abs=0.1), layout


def test_the_bytes_of_gradients_and_update_are_those_of_one_process() -> None:
    _check(1, [(1, "bf16", 2), (2, "bf16", 2), (3, "fp32", 2)])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_bytes_of_gradients_and_update_are_those_of_every_stage(world_size: int) -> None:
    _check(world_size, ALL)
