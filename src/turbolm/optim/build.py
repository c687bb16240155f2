"""From a recipe's `optimizer` section to a torch optimizer that DeepSpeed accepts."""

from __future__ import annotations

import torch
from torch import nn

from turbolm.optim.groups import build_param_groups
from turbolm.recipe.schema import Optimizer


def build_optimizer(model: nn.Module, optimizer: Optimizer, *, kernel: str, offload: bool) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) over the model's parameter groups.

    `kernel` auto takes DeepSpeed's vectorised CPUAdam when the optimizer state is offloaded to the host and torch's
    fused kernel (one pass over parameters and both moments, on CPU as on GPU) otherwise; `torch` and `deepspeed`
    force one. DeepSpeed's kernels are compiled on first use and need a C++ compiler (on a GPU also nvcc).
    """
    groups = build_param_groups(model, optimizer.weight_decay)
    settings = {"lr": optimizer.lr, "betas": optimizer.betas, "eps": optimizer.eps}
    if kernel == "torch" or (kernel == "auto" and not offload):
        return torch.optim.AdamW(groups, fused=True, **settings)
    if offload or not torch.cuda.is_available():
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, fp32_optimizer_states=True, **settings)
    from deepspeed.ops.adam import FusedAdam

    return FusedAdam(groups, adam_w_mode=True, **settings)
