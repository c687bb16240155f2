"""Which parameters are decayed."""

from __future__ import annotations

from typing import Any

from torch import nn


def build_param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weight decay on matrices, none on norms, biases and embeddings (a tied head is an embedding).

    Returns the non-empty ones, each a dict with `params`, `weight_decay`, `lr_scale` and `name`.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_matrix = _num_dims(parameter) >= 2 and id(parameter) not in embeddings
            exempt = getattr(parameter, "_no_weight_decay", False)  # how state-space models mark their dynamics
            (decayed if is_matrix and not exempt else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "lr_scale": 1.0, "name": "matrices"},
        {"params": plain, "weight_decay": 0.0, "lr_scale": 1.0, "name": "norms, biases and embeddings"},
    ]
    return [group for group in groups if group["params"]]


def _num_dims(parameter: nn.Parameter) -> int:
    shape = getattr(parameter, "ds_shape", None)  # the whole shape of a parameter that ZeRO-3 already partitioned
    return len(shape) if shape is not None else parameter.dim()
