"""Gradients of 4 ranks are summed in the precision that the recipe names, whatever ZeRO's layout."""

from __future__ import annotations

from typing import Any

import pytest

from tests.world import run_world
from turbolm.plan.batch import plan_batch
from turbolm.plan.deepspeed import resolve_ds_config
from turbolm.recipe.schema import Recipe

WORLD_SIZE, ROWS, COLUMNS = 4, 256, 512


def ds_config(stage: int, reduced_in: str, offload: bool) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": "reduction",
        "model": {"config": {"model_type": "llama"}},
        "tokenizer": {"train": {}},
        "data": {"seq_len": 64},
        "train": {"budget": 1024, "global_batch": 1024, "max_grad_norm": "off", "precision": "bf16"},
        "execution": {"zero_stage": stage, "reduce_precision": reduced_in, "offload_optimizer": offload},
    }
    recipe = Recipe.model_validate(values)
    config = resolve_ds_config(recipe, plan_batch(recipe, WORLD_SIZE), "cpu", "bf16")
    return config | {"train_batch_size": WORLD_SIZE, "train_micro_batch_size_per_gpu": 1}


def _errors(layouts: list[tuple[int, str, bool]]) -> list[float]:
    """For each layout this rank's relative error of what its optimizer gets, against the mean in fp64."""
    import torch
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from turbolm.engine.start import build_accelerator, wrap

    class Product(torch.nn.Module):
        """Its weight's gradient is its input."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(ROWS, COLUMNS))

        def forward(self, factors: torch.Tensor) -> torch.Tensor:
            return (self.weight * factors).sum(dtype=torch.float32)

    inputs = [
        torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(rank)).bfloat16()
        for rank in range(WORLD_SIZE)
    ]
    expected = torch.stack(inputs).double().mean(0).flatten()
    errors = []
    for stage, reduced_in, offload in layouts:
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        config = ds_config(stage, reduced_in, offload)
        accelerator = build_accelerator(config, device="cpu", precision="bf16", timeout_sec=120)
        model = Product()
        engine = wrap(accelerator, model, torch.optim.SGD(model.parameters(), lr=0.1))  # type: ignore[arg-type]
        seen: list[torch.Tensor] = []

        def note(*_: Any, engine: Any = engine, seen: list[torch.Tensor] = seen) -> None:
            for one in engine.fragments():
                gradient = one.view(one.flat.grad).double()
                mean = expected[one.start : one.start + one.numel]
                seen.append((gradient - mean).norm() / mean.norm())

        engine.optimizer.register_step_pre_hook(note)
        engine.backward_and_step(engine(inputs[dist.get_rank()]), is_boundary=True)
        assert len(seen) == 1
        errors.append(float(seen[0]))
        engine.deepspeed_engine.destroy()
    return errors


def test_bf16_gradients_of_4_ranks_are_summed_as_the_recipe_says() -> None:
    kinds = [(1, False), (2, False), (3, False), (2, True)]
    layouts = [(stage, reduced_in, offload) for stage, offload in kinds for reduced_in in ("auto", "bf16")]
    by_rank = run_world(WORLD_SIZE, _errors, layouts)
    worst = {layout: max(errors) for layout, *errors in zip(layouts, *by_rank, strict=True)}
    print(worst)
    for (stage, reduced_in, offload), error in worst.items():
        where = f"stage {stage}, {reduced_in}, offload {offload}: {error}"
        assert error < 1e-6 if reduced_in == "auto" else error > 1e-3, where


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"precision": "fp32"}}, "would round the fp32 gradients"),
        ({"train": {"precision": "fp16"}, "cluster": {"device": "cuda"}}, "would round the fp16 gradients"),
    ],
)
def test_bf16_refuses_gradients_that_it_would_round(values: dict[str, Any], message: str) -> None:
    from turbolm.recipe.checks import check_recipe

    base: dict[str, Any] = {"name": "r", "model": {"config": {"model_type": "llama"}}, "tokenizer": {"train": {}}}
    base["data"] = {"seq_len": 64}
    base["execution"] = {"reduce_precision": "bf16"}
    recipe = Recipe.model_validate({**base, **values, "train": {"budget": 1024, "global_batch": 64, **values["train"]}})
    assert [f.message for f in check_recipe(recipe) if message in f.message]
