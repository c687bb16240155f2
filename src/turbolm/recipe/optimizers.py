"""The `optimizer` section: one class for each optimizer, with its settings, its traits and how it is built. Torch-free.

To add one, write its class here and a line in OPTIMIZERS: recipes, checks, the memory estimate, the JSON schema and the
table of src/turbolm/optim/README.md use it from there. `build` imports what it needs when it is called.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from turbolm.recipe.fields import (
    Before,
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
CautiousDecay = Annotated[bool, Before(False)]

_NAME = "which optimizer"
_LR = "peak learning rate"
_BETAS = "decay of the running mean of the gradient and of its square"
_EPS = "added to the root of the mean square"
_CAUTIOUS_DECAY = "weight decay only where it points the same way as the update (arXiv 2510.12402), element by element"
_COUPLED_DECAY = "added to the gradient; not on norms, biases and embeddings"
_DECOUPLED_DECAY = "decoupled, scaled by the learning rate; not on norms, biases and embeddings"


_OF_MATRICES = ("momentum", "nesterov", "ns_steps", "adjust_lr", "orthogonalization", "row_beta2", "hyperball")


class LrMultipliers(Section):
    """Learning-rate factors by kind of parameter."""

    embeddings: PositiveNumber = Field(1.0, description="token and position embeddings, and a head tied to them")
    head: PositiveNumber = Field(1.0, description="the output head, if it is not tied to the embedding")
    matrices: PositiveNumber = Field(1.0, description="every other weight with two or more dimensions")
    vectors: PositiveNumber = Field(1.0, description="norms, biases, and the dynamics of state-space models")


class PeakLrs(Section):
    """Peak learning rates by kind of parameter."""

    embeddings: PositiveNumber | None = Field(None, description="of AdamW, instead of lr")
    head: PositiveNumber | None = Field(None, description="of AdamW, instead of lr")
    matrices: PositiveNumber | None = Field(None, description="of Muon (and of AdamW for convolutions), instead of lr")
    vectors: PositiveNumber | None = Field(None, description="of AdamW, instead of lr")


class EmaNesterov(Section):
    """Gradients are taken ahead of the weights, along the mean of their movement (arXiv 2605.25395)."""

    lookahead: NotNegative = Field(
        0.6, description="how far ahead, in means, at the peak learning rate; it follows the schedule"
    )
    mean_decay: Beta = Field(0.99, description="decay of the running mean of the weights' movement in a step")
    start: TrainingSpan = Field(Span(0.16, "share"), description="from here on; the mean is kept from the first step")
    end: TrainingSpan = Field(Span(0.76, "share"), description="until here")

    @model_validator(mode="after")
    def _in_order(self) -> EmaNesterov:
        if self.start.unit == self.end.unit and self.start.amount >= self.end.amount:
            raise ValueError(f"expected start before end, got {self.start} and {self.end}")
        return self


class Optimizer(Section):
    """Base of every optimizer. ZeRO 0 is fp32 only, and offloading needs stage 1 to 3 (`turbolm.recipe.checks`)."""

    zero_stages: ClassVar[tuple[int, ...]] = (0, 1, 2, 3)
    package: ClassVar[str | None] = None  # package it needs besides torch, from `pip install 'turbolm[optimizers]'`
    state_bytes: ClassVar[float] = 8  # per parameter, approximately
    steps_together: ClassVar[bool] = False  # all tensors of a group at once (foreach), not one by one
    has_momentum: ClassVar[bool] = True
    assembled: ClassVar[tuple[str, ...]] = ()  # kinds of parameters of which it needs whole matrices (`optim.exchange`)

    name: str
    lr: PositiveNumber = Field(3e-4, description=_LR)
    weight_decay: NotNegative = Field(0.1, description=_DECOUPLED_DECAY)
    lr_multipliers: LrMultipliers = Field(LrMultipliers(), description="factors on lr by kind of parameter")
    ema_nesterov: Annotated[EmaNesterov | None, Before(None)] = Field(
        None, description="take gradients ahead of the weights (arXiv 2605.25395); none: at the weights"
    )

    @property
    def kept_bytes(self) -> float:
        """Return the bytes of state per parameter with the options that are set, approximately."""
        return self.state_bytes + (0 if self.ema_nesterov is None else 4)

    @property
    def lr_scales(self) -> LrMultipliers:
        """Return the factors on lr by kind of parameter, all settings together."""
        return self.lr_multipliers

    @property
    def num_exchanged(self) -> int:
        """Return how many tensors of each assembled matrix go to its owner at ZeRO 1 to 3; one comes back."""
        return int(bool(self.assembled))

    @property
    def exchanges_fp32(self) -> bool:
        """Return whether they are sent in fp32 in half precision, too."""
        return True

    @property
    def owner_bytes(self) -> float:
        """Return those of `kept_bytes` that the owner of an assembled matrix keeps, on its GPU with offloading, too."""
        return self.state_bytes if self.assembled else 0

    def at_lr(self, lr: float) -> Self:
        """Return this optimizer with another peak learning rate; all other rates keep their ratios to it."""
        return self.model_copy(update={"lr": lr})

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
    cautious_weight_decay: CautiousDecay = Field(False, description=_CAUTIOUS_DECAY)

    def build(self, groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
        """`adam_kernel` auto uses DeepSpeed's vectorized CPUAdam when the optimizer state is offloaded to the host, and
        torch's fused kernel (one pass over parameters and both moments, on CPU as on GPU) otherwise; `torch` and
        `deepspeed` force one. DeepSpeed compiles its kernels on first use, which needs a C++ compiler (on a GPU also
        nvcc).
        """
        import torch

        if self.cautious_weight_decay:  # the kernels decay every element
            from turbolm.optim.decay import AdamW as Cautious

            return Cautious(groups, fused=True, **self._adam)
        offload, kernel = recipe.execution.offload_optimizer, recipe.execution.adam_kernel
        if kernel == "torch" or (kernel == "auto" and not offload):
            return torch.optim.AdamW(groups, fused=True, **self._adam)
        if offload or not torch.cuda.is_available():
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, adamw_mode=True, fp32_optimizer_states=True, **self._adam)
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam(groups, adam_w_mode=True, **self._adam)


class SoapBeforeMuon(Section):
    """SOAP's preconditioner before Muon (nikhilvyas.github.io/SOAP_Muon.pdf)."""

    beta2: Beta = Field(0.9, description="decay of the covariances and of the mean square in their eigenbasis")
    every: Steps = Field(10, description="steps between computations of the eigenbasis")
    max_dim: Steps = Field(10_000, description="matrix sides longer than this are not preconditioned")


class Muon(Optimizer):
    """Momentum made orthogonal for matrices (arXiv 2502.16982), AdamW for embeddings, head, norms and biases."""

    state_bytes = 4
    assembled = ("matrices",)

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
    peak_lrs: Annotated[PeakLrs, Before(PeakLrs())] = Field(
        PeakLrs(), description="peak learning rates of kinds of parameters, which lr_multipliers scale as they do lr"
    )

    cautious_weight_decay: CautiousDecay = Field(False, description=_CAUTIOUS_DECAY)
    orthogonalization: Annotated[Literal["newton_schulz", "polar_express"], Before("newton_schulz")] = Field(
        "newton_schulz",
        description="polynomials of the iterations: one for all; or the best for each of up to 5 (arXiv 2505.16932)",
    )
    row_beta2: Annotated[Beta | None, Before(None)] = Field(
        None,
        description="NorMuon (arXiv 2510.05491), such as 0.95: divide the rows of an update by the root of their mean "
        "square, which decays by this; none: do not",
    )
    soap: Annotated[SoapBeforeMuon | None, Before(None)] = Field(
        None, description="scale the momentum in the eigenbasis of SOAP before it is made orthogonal; none: do not"
    )

    hyperball: Annotated[bool, Before(False)] = Field(
        False,
        description="for matrices: keep the norm of each one and move it by lr times that norm, without weight decay "
        "(arXiv 2606.16899)",
    )

    @model_validator(mode="after")
    def _polynomials(self) -> Muon:
        if self.orthogonalization == "polar_express" and self.ns_steps > 5:
            raise ValueError(
                "expected ns_steps of at most 5 with orthogonalization polar_express, which has 5 polynomials"
            )
        return self

    @property
    def kept_bytes(self) -> float:
        return super().kept_bytes + self._soap_bytes

    @property
    def _soap_bytes(self) -> float:
        return 0 if self.soap is None else 20  # as SOAP, without its mean

    @property
    def num_exchanged(self) -> int:
        return 1 + (self.soap is not None) + self.hyperball  # the update, and for these the gradient and the weight

    @property
    def exchanges_fp32(self) -> bool:
        return self.num_exchanged > 1

    @property
    def owner_bytes(self) -> float:
        return self._soap_bytes  # the momentum is in the partitions

    @property
    def lr_scales(self) -> LrMultipliers:
        own = {kind: peak / self.lr for kind, peak in self.peak_lrs if peak is not None}
        factors = {kind: factor * own.get(kind, 1.0) for kind, factor in self.lr_multipliers}
        return self.lr_multipliers.model_copy(update=factors)

    def at_lr(self, lr: float) -> Self:
        peaks = {kind: peak * (lr / self.lr) for kind, peak in self.peak_lrs if peak is not None}
        return self.model_copy(update={"lr": lr, "peak_lrs": self.peak_lrs.model_copy(update=peaks)})

    def build(self, groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
        import torch

        from turbolm.optim.muon import Muon as Implementation

        for group in groups:
            if group["assembled"]:
                group |= {name: getattr(self, name) for name in _OF_MATRICES}
                group |= {} if self.soap is None else {f"soap_{name}": value for name, value in self.soap}
        ns_dtype = torch.float32 if recipe.train.precision == "fp32" else torch.bfloat16
        return Implementation(groups, ns_dtype=ns_dtype, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


class CautiousAdamW(_Adam):
    """AdamW that masks the elements of its update whose sign is not the gradient's (arXiv 2411.16085)."""

    name: Literal["cautious_adamw"] = Field(description=_NAME)
    cautious_weight_decay: CautiousDecay = Field(False, description=_CAUTIOUS_DECAY)

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
    assembled = ("matrices", "convolutions", "head", "embeddings", "vectors")
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
        from turbolm.optim.soap import Soap as Implementation

        return Implementation(
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
