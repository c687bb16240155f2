"""From a recipe's `optimizer` section to a torch optimizer that DeepSpeed accepts."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from turbolm.optim.cautious import CautiousAdamW
from turbolm.optim.groups import build_param_groups
from turbolm.optim.muon import Muon
from turbolm.recipe import optimizers as kinds
from turbolm.recipe.optimizers import OPTIMIZERS
from turbolm.recipe.schema import Recipe

Groups = list[dict[str, Any]]


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over the model's parameter groups (`turbolm.optim.groups`)."""
    settings = recipe.optimizer
    is_muon = isinstance(settings, kinds.Muon)
    groups = build_param_groups(model, settings.weight_decay, settings.lr_multipliers, orthogonal=is_muon)
    optimizer = _BUILDERS[settings.name](groups, recipe)
    if OPTIMIZERS[settings.name].package == "pytorch_optimizer":
        count_steps_in_state(optimizer)
    return optimizer


def count_steps_in_state(optimizer: torch.optim.Optimizer) -> None:
    """Keep the number of steps beside the moments, where pytorch-optimizer keeps it in the parameter group.

    DeepSpeed steps a group's partitions one by one at stage 3, which would count each as a step of all groups; and a
    checkpoint keeps what belongs to a parameter.
    """

    def before(stepped: torch.optim.Optimizer, *_: object) -> None:
        for group in stepped.param_groups:
            counted = [stepped.state[p]["step"] for p in group["params"] if "step" in stepped.state.get(p, {})]
            group["step"] = counted[0] if counted else 0

    def after(stepped: torch.optim.Optimizer, *_: object) -> None:
        for group in stepped.param_groups:
            for parameter in group["params"]:
                if parameter in stepped.state:
                    stepped.state[parameter]["step"] = group["step"]

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def eight_bit_share(tensors: Iterable[torch.Tensor]) -> float:
    """The share of elements whose moments torchao keeps in 8 bits: tensors of whole blocks of 256, at least 16."""
    sizes = [tensor.numel() for tensor in tensors]
    return sum(size for size in sizes if size >= 4096 and size % 256 == 0) / max(sum(sizes), 1)


def _adamw(groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
    """`adam_kernel` auto takes DeepSpeed's vectorised CPUAdam when the optimizer state is offloaded to the host and
    torch's fused kernel (one pass over parameters and both moments, on CPU as on GPU) otherwise; `torch` and
    `deepspeed` force one. DeepSpeed's kernels are compiled on first use and need a C++ compiler (on a GPU also nvcc).
    """
    optimizer, offload, kernel = recipe.optimizer, recipe.execution.offload_optimizer, recipe.execution.adam_kernel
    assert isinstance(optimizer, kinds.AdamW)
    settings: dict[str, Any] = {"lr": optimizer.lr, "betas": optimizer.betas, "eps": optimizer.eps}
    if kernel == "torch" or (kernel == "auto" and not offload):
        return torch.optim.AdamW(groups, fused=True, **settings)
    if offload or not torch.cuda.is_available():
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, fp32_optimizer_states=True, **settings)
    from deepspeed.ops.adam import FusedAdam

    return FusedAdam(groups, adam_w_mode=True, **settings)


def _cautious_adamw(groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
    optimizer = recipe.optimizer
    assert isinstance(optimizer, kinds.CautiousAdamW)
    return CautiousAdamW(groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps)


def _muon(groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
    optimizer = recipe.optimizer
    assert isinstance(optimizer, kinds.Muon)
    for group in groups:
        if group["orthogonal"]:
            group |= {name: getattr(optimizer, name) for name in ("momentum", "nesterov", "ns_steps", "adjust_lr")}
    ns_dtype = torch.float32 if recipe.train.precision == "fp32" else torch.bfloat16
    return Muon(groups, ns_dtype=ns_dtype, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=True)


def _sgd(groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
    optimizer = recipe.optimizer
    assert isinstance(optimizer, kinds.Sgd)
    return torch.optim.SGD(groups, lr=optimizer.lr, momentum=_momentum(recipe), nesterov=optimizer.nesterov)


def _rmsprop(groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
    optimizer = recipe.optimizer
    assert isinstance(optimizer, kinds.RMSprop)
    settings = {"alpha": optimizer.alpha, "eps": optimizer.eps, "momentum": _momentum(recipe)}
    return torch.optim.RMSprop(groups, lr=optimizer.lr, **settings)


def _momentum(recipe: Recipe) -> float:
    """What torch decides by whether there is a momentum at all: the largest of a schedule, which sets it every step."""
    ramp = recipe.schedule.momentum
    optimizer = recipe.optimizer
    assert isinstance(optimizer, (kinds.Sgd, kinds.RMSprop))
    return optimizer.momentum if ramp is None else max(ramp.start, ramp.end)


def _lion(groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
    optimizer = recipe.optimizer
    assert isinstance(optimizer, kinds.Lion)
    return _from_package("pytorch_optimizer", "Lion")(groups, lr=optimizer.lr, betas=optimizer.betas)


def _ademamix(groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
    optimizer, train = recipe.optimizer, recipe.train
    assert isinstance(optimizer, kinds.AdEMAMix)
    warmup_steps = optimizer.slow_warmup.tokens(train.budget, train.global_batch) / train.global_batch
    return _from_package("pytorch_optimizer", "AdEMAMix")(
        groups,
        lr=optimizer.lr,
        betas=optimizer.betas,
        alpha=optimizer.alpha,
        t_alpha_beta3=max(warmup_steps, 1.0),
        eps=optimizer.eps,
        weight_decouple=True,
    )


def _soap(groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
    optimizer = recipe.optimizer
    assert isinstance(optimizer, kinds.Soap)
    return _from_package("pytorch_optimizer", "SOAP")(
        groups,
        lr=optimizer.lr,
        betas=optimizer.betas,
        eps=optimizer.eps,
        precondition_frequency=optimizer.precondition_every,
        max_precondition_dim=optimizer.max_precondition_dim,
    )


def _adafactor(groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
    optimizer = recipe.optimizer
    assert isinstance(optimizer, kinds.Adafactor)
    eps = (1e-15, 1e-3)  # torch squares the first: the paper's 1e-30; its own default would damp small gradients
    settings = {"beta2_decay": optimizer.beta2_decay, "d": optimizer.clip_rms, "eps": eps}
    return torch.optim.Adafactor(groups, lr=optimizer.lr, **settings)


def _adamw_8bit(groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
    optimizer = recipe.optimizer
    assert isinstance(optimizer, kinds.AdamW8bit)
    settings = {"lr": optimizer.lr, "betas": optimizer.betas, "eps": optimizer.eps}
    return _from_package("torchao.optim", "AdamW8bit")(groups, **settings)


def _from_package(module: str, name: str) -> Callable[..., torch.optim.Optimizer]:
    """What `turbolm[optimizers]` installs, imported when it is used; `check_machine` has seen that it is there."""
    found: Callable[..., torch.optim.Optimizer] = getattr(importlib.import_module(module), name)
    return found


_BUILDERS: dict[str, Callable[[Groups, Recipe], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "cautious_adamw": _cautious_adamw,
    "ademamix": _ademamix,
    "lion": _lion,
    "sgd": _sgd,
    "rmsprop": _rmsprop,
    "muon": _muon,
    "soap": _soap,
    "adafactor": _adafactor,
}
