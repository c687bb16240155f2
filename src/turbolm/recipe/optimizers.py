"""The `optimizer` section: one class for each optimizer, with its settings, its traits and how it is built. Torch-free.

To add one, write its class here and a line in OPTIMIZERS: recipes, checks, the memory estimate, the JSON schema and the
table of src/turbolm/optim/README.md use it from there. `build` imports what it needs when it is called.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from turbolm.recipe.fields import (
    Beta,
    Number,
    PositiveNumber,
    Section,
    TrainingSpan,
    by_tag,
    list_is_tuple,
    positive_span,
    tagged_union,
)
from turbolm.units import Span

if TYPE_CHECKING:
    import torch

    from turbolm.recipe.schema import Recipe

Groups = list[dict[str, Any]]  # made by `turbolm.optim.groups`
NotNegative = Annotated[Number, Field(ge=0)]
Betas = Annotated[tuple[Beta, Beta], BeforeValidator(list_is_tuple)]
ThreeBetas = Annotated[tuple[Beta, Beta, Beta], BeforeValidator(list_is_tuple)]
Steps = Annotated[int, Field(ge=1)]

_NAME = "which optimizer"
_LR = "peak learning rate"
_BETAS = "decay of the running mean of the gradient and of its square"
_EPS = "added to the root of the mean square"
_COUPLED_DECAY = "added to the gradient; not on norms, biases and embeddings"
_DECOUPLED_DECAY = "decoupled, scaled by the learning rate; not on norms, biases and embeddings"


class LrMultipliers(Section):
    """Learning-rate factors by kind of parameter."""

    embeddings: PositiveNumber = Field(1.0, description="token and position embeddings, and a head tied to them")
    head: PositiveNumber = Field(1.0, description="the output head, if it is not tied to the embedding")
    matrices: PositiveNumber = Field(1.0, description="every other weight with two or more dimensions")
    vectors: PositiveNumber = Field(1.0, description="norms, biases, and the dynamics of state-space models")


class Optimizer(Section):
    """Base of every optimizer. ZeRO 0 is fp32 only, and offloading needs stage 1 to 3 (`turbolm.recipe.checks`)."""

    zero_stages: ClassVar[tuple[int, ...]] = (0, 1, 2, 3)
    package: ClassVar[str | None] = None  # package it needs besides torch, from `pip install 'turbolm[optimizers]'`
    state_bytes: ClassVar[float] = 8  # per parameter, approximately
    steps_together: ClassVar[bool] = False  # all tensors of a group at once (foreach), not one by one
    has_momentum: ClassVar[bool] = True
    is_orthogonal: ClassVar[bool] = False  # orthogonalizes updates of hidden matrices: they are a separate group

    name: str
    lr: PositiveNumber = Field(3e-4, description=_LR)
    weight_decay: NotNegative = Field(0.1, description=_DECOUPLED_DECAY)
    lr_multipliers: LrMultipliers = Field(LrMultipliers(), description="factors on lr by kind of parameter")

    def temporary_bytes(self, shape: Sequence[int]) -> float:
        """Return what the update of one tensor allocates and frees again, as tests/optim/test_temporaries.py counts it.

        Under ZeRO a tensor is a flat part of a group. Muon's, which depend on the ranks, are in plan/zero_memory.py.
        """
        return 0

    def build(self, groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
        """Return the torch optimizer over these parameter groups, which include their weight decay."""
        raise NotImplementedError


class _Adam(Optimizer):
    betas: Betas = Field((0.9, 0.95), description=_BETAS)
    eps: PositiveNumber = Field(1e-8, description=_EPS)

    @property
    def _adam(self) -> dict[str, Any]:
        return {"lr": self.lr, "betas": self.betas, "eps": self.eps}


class AdamW(_Adam):
    """AdamW (arXiv 1711.05101). Weight decay acts on matrices only: not on norms, biases and embeddings."""

    name: Literal["adamw"] = Field("adamw", description=_NAME)

    def build(self, groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
        """`adam_kernel` auto uses DeepSpeed's vectorized CPUAdam when the optimizer state is offloaded to the host, and
        torch's fused kernel (one pass over parameters and both moments, on CPU as on GPU) otherwise; `torch` and
        `deepspeed` force one. DeepSpeed compiles its kernels on first use, which needs a C++ compiler (on a GPU also
        nvcc).
        """
        import torch

        offload, kernel = recipe.execution.offload_optimizer, recipe.execution.adam_kernel
        if kernel == "torch" or (kernel == "auto" and not offload):
            return torch.optim.AdamW(groups, fused=True, **self._adam)
        if offload or not torch.cuda.is_available():
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, adamw_mode=True, fp32_optimizer_states=True, **self._adam)
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam(groups, adam_w_mode=True, **self._adam)


class Muon(Optimizer):
    """Momentum made orthogonal for matrices (arXiv 2502.16982), AdamW for embeddings, head, norms and biases."""

    state_bytes = 4
    is_orthogonal = True

    name: Literal["muon"] = Field(description=_NAME)
    momentum: Beta = Field(0.95, description="for matrices: decay of the running mean of the gradient")
    nesterov: bool = Field(True, description="for matrices: Nesterov momentum, which looks one step ahead")
    ns_steps: Annotated[int, Field(ge=1, le=20)] = Field(
        5, description="Newton-Schulz iterations that orthogonalize an update"
    )
    adjust_lr: Literal["match_rms_adamw", "original"] = Field(
        "match_rms_adamw",
        description="match_rms_adamw: 0.2 sqrt(larger side), for AdamW's lr; original: sqrt(rows / columns) or 1, for "
        "an lr of about 0.02",
    )
    betas: Betas = Field((0.9, 0.95), description="of AdamW for the rest")
    eps: PositiveNumber = Field(1e-8, description="of AdamW for the rest")

    def build(self, groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
        import torch

        from turbolm.optim.muon import Muon as Implementation

        for group in groups:
            if group["orthogonal"]:
                group |= {name: getattr(self, name) for name in ("momentum", "nesterov", "ns_steps", "adjust_lr")}
        ns_dtype = torch.float32 if recipe.train.precision == "fp32" else torch.bfloat16
        return Implementation(groups, ns_dtype=ns_dtype, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


class CautiousAdamW(_Adam):
    """AdamW that masks the elements of its update whose sign is not the gradient's (arXiv 2411.16085)."""

    name: Literal["cautious_adamw"] = Field(description=_NAME)

    def temporary_bytes(self, shape: Sequence[int]) -> float:
        return 12 * math.prod(shape)

    def build(self, groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
        from turbolm.optim.cautious import CautiousAdamW as Implementation

        return Implementation(groups, **self._adam)


class AdEMAMix(Optimizer):
    """AdamW with a second, slow mean of the gradient (arXiv 2409.03137)."""

    package = "pytorch_optimizer"
    state_bytes = 12
    steps_together = True

    name: Literal["ademamix"] = Field(description=_NAME)
    betas: ThreeBetas = Field(
        (0.9, 0.999, 0.9999), description="decay of the fast mean, of the mean square, and of the slow mean"
    )
    alpha: NotNegative = Field(5.0, description="weight of the slow mean")
    slow_warmup: Annotated[TrainingSpan, AfterValidator(positive_span)] = Field(
        Span(1.0, "share"), description="how long alpha and the slow mean's decay take to grow to their values"
    )
    eps: PositiveNumber = Field(1e-8, description=_EPS)

    def temporary_bytes(self, shape: Sequence[int]) -> float:
        return 8 * math.prod(shape)

    def build(self, groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
        from pytorch_optimizer import AdEMAMix as Implementation

        train = recipe.train
        warmup_steps = self.slow_warmup.tokens(train.budget, train.global_batch) / train.global_batch
        return Implementation(
            groups,
            lr=self.lr,
            betas=self.betas,
            alpha=self.alpha,
            t_alpha_beta3=max(warmup_steps, 1.0),
            eps=self.eps,
            weight_decouple=True,
        )


class Lion(Optimizer):
    """The sign of a mean of the gradient (arXiv 2302.06675); wants about a third to a tenth of AdamW's lr."""

    package = "pytorch_optimizer"
    state_bytes = 4
    steps_together = True

    name: Literal["lion"] = Field(description=_NAME)
    lr: PositiveNumber = Field(1e-4, description=_LR)
    betas: Betas = Field((0.9, 0.99), description="decay of the mean in the update, and of the mean that is kept")

    def temporary_bytes(self, shape: Sequence[int]) -> float:
        return 4 * math.prod(shape)

    def build(self, groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
        from pytorch_optimizer import Lion as Implementation

        return Implementation(groups, lr=self.lr, betas=self.betas)


class Sgd(Optimizer):
    """Gradient descent with momentum, a baseline."""

    state_bytes = 4
    steps_together = True

    name: Literal["sgd"] = Field(description=_NAME)
    lr: PositiveNumber = Field(0.1, description=_LR)
    momentum: Beta = Field(0.9, description="decay of the running sum of gradients; 0: none")
    nesterov: bool = Field(False, description="look ahead by one step of the momentum")
    weight_decay: NotNegative = Field(0.0, description=_COUPLED_DECAY)

    def temporary_bytes(self, shape: Sequence[int]) -> float:
        return (4 * (self.weight_decay > 0) + 4 * self.nesterov) * math.prod(shape)

    def build(self, groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
        from torch.optim import SGD

        momentum = _largest_momentum(self.momentum, recipe)
        return SGD(groups, lr=self.lr, momentum=momentum, nesterov=self.nesterov)


class RMSprop(Optimizer):
    """The gradient divided by its running root mean square, a baseline (Tieleman and Hinton 2012)."""

    state_bytes = 4
    steps_together = True

    name: Literal["rmsprop"] = Field(description=_NAME)
    alpha: Beta = Field(0.95, description="decay of the running mean square")
    eps: PositiveNumber = Field(1e-8, description=_EPS)
    momentum: Beta = Field(0.0, description="decay of the running sum of updates; 0: none")
    weight_decay: NotNegative = Field(0.0, description=_COUPLED_DECAY)

    def temporary_bytes(self, shape: Sequence[int]) -> float:
        return (4 + 4 * (self.weight_decay > 0)) * math.prod(shape)

    def build(self, groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
        from torch.optim import RMSprop as Implementation

        momentum = _largest_momentum(self.momentum, recipe)
        return Implementation(groups, lr=self.lr, alpha=self.alpha, eps=self.eps, momentum=momentum)


class Soap(Optimizer):
    """AdamW in the eigenbasis of Shampoo's preconditioner (arXiv 2409.11321)."""

    package = "pytorch_optimizer"
    zero_stages = (0,)
    state_bytes = 24

    name: Literal["soap"] = Field(description=_NAME)
    betas: Betas = Field((0.95, 0.95), description=_BETAS)
    eps: PositiveNumber = Field(1e-8, description=_EPS)
    precondition_every: Steps = Field(10, description="steps between computations of the eigenbasis")
    max_precondition_dim: Steps = Field(
        10_000, description="matrix sides longer than this (such as the vocabulary) are not preconditioned"
    )

    def temporary_bytes(self, shape: Sequence[int]) -> float:
        numel, sides = math.prod(shape), [side for side in shape if side <= self.max_precondition_dim]
        most = 4 * numel + sum(side**2 for side in sides)
        for place, side in enumerate(sides):  # a new eigenbasis, one side after another
            most = max(most, (4 + place) * numel + 5 * side**2 + 2 * sum(other**2 for other in sides[:place]))
        return 4 * most

    def build(self, groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
        from pytorch_optimizer import SOAP

        return SOAP(
            groups,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            precondition_frequency=self.precondition_every,
            max_precondition_dim=self.max_precondition_dim,
        )


class Adafactor(Optimizer):
    """The mean square of a matrix kept as that of its rows and its columns (arXiv 1804.04235); no momentum."""

    steps_together = True
    zero_stages = (0,)
    state_bytes = 0
    has_momentum = False

    name: Literal["adafactor"] = Field(description=_NAME)
    lr: PositiveNumber = Field(1e-2, description="peak relative rate: an update is this share of its parameter's size")
    beta2_decay: Annotated[Number, Field(lt=0)] = Field(
        -0.8, description="the mean square decays by 1 - step ** beta2_decay"
    )
    clip_rms: PositiveNumber = Field(1.0, description="updates with a larger root mean square are scaled down to it")
    weight_decay: NotNegative = Field(0.0, description=_DECOUPLED_DECAY)

    def temporary_bytes(self, shape: Sequence[int]) -> float:
        return 4 * math.prod(shape)

    def build(self, groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
        from torch.optim import Adafactor as Implementation

        eps = (1e-15, 1e-3)  # torch squares the first: the paper's 1e-30; torch's default damps small gradients
        return Implementation(groups, lr=self.lr, beta2_decay=self.beta2_decay, d=self.clip_rms, eps=eps)


class AdamW8bit(_Adam):
    """AdamW with both moments in 8 bits, quantized in blocks of 256 (arXiv 2110.02861); from torchao."""

    package = "torchao"
    state_bytes = 2

    name: Literal["adamw_8bit"] = Field(description=_NAME)

    def build(self, groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
        from torchao.optim import AdamW8bit as Implementation

        return Implementation(groups, **self._adam)


def _largest_momentum(momentum: float, recipe: Recipe) -> float:
    """Return the initial momentum: the largest of a schedule, which sets it every step. torch keeps a momentum buffer
    only if the initial one is not 0."""
    ramp = recipe.schedule.momentum
    return momentum if ramp is None else max(ramp.start, ramp.end)


OPTIMIZERS = by_tag(AdamW, AdamW8bit, CautiousAdamW, AdEMAMix, Lion, Sgd, RMSprop, Muon, Soap, Adafactor)
if TYPE_CHECKING:
    AnyOptimizer = Optimizer
else:
    AnyOptimizer = tagged_union(OPTIMIZERS, default="adamw")
