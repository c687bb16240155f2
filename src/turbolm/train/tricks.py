"""Every trick that a recipe can enable, in the order of application.

A trick changes the model, the optimizer, the engine or the beginning of a run, and is applied where its `point` is
reached. To add one, write its function (here, or in a new file if it takes more than a few lines) and add a line to
`TRICKS`. State per parameter belongs in the optimizer's state of that parameter, which checkpoints store by name. The
z-loss is part of the loss (`models.loss`); growing batches and lengths are part of the curriculum (`plan.curriculum`);
what an optimizer does belongs to its class (`recipe.optimizers`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from turbolm.engine.averaged_weights import AveragedWeights
from turbolm.engine.engine import Engine
from turbolm.models.compile import apply_compile, keep_layers_whole
from turbolm.models.fp8 import apply_fp8
from turbolm.models.recompute import apply_activation_checkpointing
from turbolm.models.router import attach_router_loss, find_routers, keep_experts_whole
from turbolm.recipe.schema import Recipe
from turbolm.train.random_restarts import choose_start

Point = Literal["model", "optimizer", "engine", "start"]
"""When a trick is applied, and to what: the model before it is in an engine, the optimizer, the engine after its checks
and with its loss, or the session (`train.session.Session`) before its first step."""


@dataclass(frozen=True)
class Trick:
    """`apply` changes its first argument, which `point` names, in place."""

    name: str
    point: Point
    applies: Callable[[Recipe], bool]
    apply: Callable[[Any, Recipe], None]


def apply_tricks(point: Point, subject: Any, recipe: Recipe) -> None:
    """Apply the recipe's tricks of one point to `subject`, in order. Raises UserError if one cannot work."""
    for trick in TRICKS:
        if trick.point == point and trick.applies(recipe):
            trick.apply(subject, recipe)


def _recompute(model: PreTrainedModel, recipe: Recipe) -> None:
    apply_activation_checkpointing(model, recipe.execution.activation_checkpointing)


def _needs_layers_whole(recipe: Recipe) -> bool:
    execution = recipe.execution
    is_by_layer = execution.compile == "layers" or execution.activation_checkpointing == "selective"
    return execution.zero_stage == 3 and is_by_layer


def _clip_by_value(optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
    """Clamp every gradient element to ±`train.max_grad_value` just before the update.

    DeepSpeed clips by norm only. When its inner optimizer steps, gradients are averaged, unscaled and laid out as the
    partitions this rank owns, at every ZeRO stage; clamping is element-wise, so clamping the partitions is the same.
    """
    limit = recipe.train.max_grad_value
    assert limit is not None

    def clamp(stepped: torch.optim.Optimizer, *_: object) -> None:
        for group in stepped.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.clamp_(-limit, limit)

    optimizer.register_step_pre_hook(clamp)


def _balance_experts(engine: Engine, recipe: Recipe) -> None:
    routers = find_routers(engine.module, recipe.train.router_aux_loss, recipe.train.router_bias_update)
    if routers is not None:
        attach_router_loss(engine.module, routers)
        engine.balance = routers.balance


def _compile(engine: Engine, recipe: Recipe) -> None:
    apply_compile(engine.module, recipe.execution.compile)


def _multiply_in_8_bits(engine: Engine, recipe: Recipe) -> None:
    """Apply it after the isolation check: all sequences share the rounding of a tensor's scale."""
    print(f"products in 8 bits: {len(apply_fp8(engine.module, recipe.train.fp8))} linear layers")


def _look_ahead(engine: Engine, recipe: Recipe) -> None:
    assert recipe.optimizer.ema_nesterov is not None
    engine.look_ahead(recipe.optimizer.ema_nesterov.mean_decay)


def _average_weights(engine: Engine, recipe: Recipe) -> None:
    engine.averaged = AveragedWeights()


TRICKS = (
    Trick("recompute activations", "model", lambda r: r.execution.activation_checkpointing != "none", _recompute),
    Trick("gather layers whole", "model", _needs_layers_whole, lambda model, _: keep_layers_whole(model)),
    Trick("gather experts whole", "model", lambda r: r.execution.zero_stage == 3, lambda m, _: keep_experts_whole(m)),
    Trick("clip by value", "optimizer", lambda r: r.train.max_grad_value is not None, _clip_by_value),
    Trick("EMA-Nesterov", "engine", lambda r: r.optimizer.ema_nesterov is not None, _look_ahead),
    Trick("weight average", "engine", lambda r: r.evaluation.weight_average is not None, _average_weights),
    Trick("balance experts", "engine", lambda r: True, _balance_experts),
    Trick("compile", "engine", lambda r: r.execution.compile != "none", _compile),
    Trick("fp8", "engine", lambda r: r.train.fp8 != "off", _multiply_in_8_bits),
    Trick(
        "random restarts",
        "start",
        lambda r: r.train.random_restarts is not None,
        lambda session, _: choose_start(session),
    ),
)
