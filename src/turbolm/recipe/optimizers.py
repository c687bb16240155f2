"""The `optimizer` section: one class for each optimizer with the settings it takes, and where each one works.

Torch-free; `turbolm.optim.build` makes the optimizers, and src/turbolm/optim/README.md shows this as a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from turbolm.recipe.fields import Beta, Number, PositiveNumber, Section, TrainingSpan, list_is_tuple, positive_span
from turbolm.units import Span

NotNegative = Annotated[Number, Field(ge=0)]
Betas = Annotated[tuple[Beta, Beta], BeforeValidator(list_is_tuple)]
ThreeBetas = Annotated[tuple[Beta, Beta, Beta], BeforeValidator(list_is_tuple)]
Steps = Annotated[int, Field(ge=1)]

_NAME = "which optimizer"
_LR = "peak learning rate"
_BETAS = "decay of the running mean of the gradient and of its square"
_EPS = "added to the root of the mean square"


class LrMultipliers(Section):
    """Factors on the learning rate of each kind of parameter."""

    embeddings: PositiveNumber = Field(1.0, description="token and position embeddings, and a head tied to them")
    head: PositiveNumber = Field(1.0, description="the output head, where it is not tied to the embedding")
    matrices: PositiveNumber = Field(1.0, description="every other weight with two or more dimensions")
    vectors: PositiveNumber = Field(1.0, description="norms, biases, and the dynamics of state-space models")


class _Optimizer(Section):
    name: str
    lr: PositiveNumber = Field(3e-4, description=_LR)
    weight_decay: NotNegative = Field(
        0.1, description="decoupled, times the learning rate; not on norms, biases and embeddings"
    )
    lr_multipliers: LrMultipliers = Field(LrMultipliers(), description="factors on lr by kind of parameter")


class AdamW(_Optimizer):
    """AdamW (arXiv 1711.05101). Weight decay acts on matrices only: not on norms, biases and embeddings."""

    name: Literal["adamw"] = Field("adamw", description=_NAME)
    betas: Betas = Field((0.9, 0.95), description=_BETAS)
    eps: PositiveNumber = Field(1e-8, description=_EPS)


class AdamW8bit(_Optimizer):
    """AdamW with both moments in 8 bits, quantized in blocks of 256 (arXiv 2110.02861); from torchao."""

    name: Literal["adamw_8bit"] = Field(description=_NAME)
    betas: Betas = Field((0.9, 0.95), description=_BETAS)
    eps: PositiveNumber = Field(1e-8, description=_EPS)


class CautiousAdamW(_Optimizer):
    """AdamW that leaves out the elements of its update whose sign is not the gradient's (arXiv 2411.16085)."""

    name: Literal["cautious_adamw"] = Field(description=_NAME)
    betas: Betas = Field((0.9, 0.95), description=_BETAS)
    eps: PositiveNumber = Field(1e-8, description=_EPS)


class AdEMAMix(_Optimizer):
    """AdamW with a second, slow mean of the gradient (arXiv 2409.03137)."""

    name: Literal["ademamix"] = Field(description=_NAME)
    betas: ThreeBetas = Field(
        (0.9, 0.999, 0.9999), description="decay of the fast mean, of the mean square, and of the slow mean"
    )
    alpha: NotNegative = Field(5.0, description="weight of the slow mean")
    slow_warmup: Annotated[TrainingSpan, AfterValidator(positive_span)] = Field(
        Span(1.0, "share"), description="how long alpha and the slow mean's decay take to grow to their values"
    )
    eps: PositiveNumber = Field(1e-8, description=_EPS)


class Lion(_Optimizer):
    """The sign of a mean of the gradient (arXiv 2302.06675); wants about a third to a tenth of AdamW's rate."""

    name: Literal["lion"] = Field(description=_NAME)
    lr: PositiveNumber = Field(1e-4, description=_LR)
    betas: Betas = Field((0.9, 0.99), description="decay of the mean in the update, and of the mean that is kept")


class Sgd(_Optimizer):
    """Gradient descent with momentum, a baseline."""

    name: Literal["sgd"] = Field(description=_NAME)
    lr: PositiveNumber = Field(0.1, description=_LR)
    momentum: Beta = Field(0.9, description="decay of the running sum of gradients; 0: none")
    nesterov: bool = Field(False, description="look ahead by one step of the momentum")
    weight_decay: NotNegative = Field(0.0, description="added to the gradient; not on norms, biases and embeddings")


class RMSprop(_Optimizer):
    """The gradient divided by its running root mean square, a baseline (Tieleman and Hinton 2012)."""

    name: Literal["rmsprop"] = Field(description=_NAME)
    alpha: Beta = Field(0.95, description="decay of the running mean square")
    eps: PositiveNumber = Field(1e-8, description=_EPS)
    momentum: Beta = Field(0.0, description="decay of the running sum of updates; 0: none")
    weight_decay: NotNegative = Field(0.0, description="added to the gradient; not on norms, biases and embeddings")


class Muon(_Optimizer):
    """Momentum made orthogonal for matrices (arXiv 2502.16982), AdamW for embeddings, head, norms and biases."""

    name: Literal["muon"] = Field(description=_NAME)
    momentum: Beta = Field(0.95, description="of the matrices: decay of the running mean of the gradient")
    nesterov: bool = Field(True, description="of the matrices: look ahead by one step of the momentum")
    ns_steps: Annotated[int, Field(ge=1, le=20)] = Field(
        5, description="iterations of Newton and Schulz that make an update orthogonal"
    )
    adjust_lr: Literal["match_rms_adamw", "original"] = Field(
        "match_rms_adamw",
        description="match_rms_adamw: 0.2 sqrt(larger side), for AdamW's lr; original: sqrt(rows / columns) or 1, for "
        "an lr of about 0.02",
    )
    betas: Betas = Field((0.9, 0.95), description="of AdamW for the rest")
    eps: PositiveNumber = Field(1e-8, description="of AdamW for the rest")


class Soap(_Optimizer):
    """AdamW in the eigenbasis of Shampoo's preconditioner (arXiv 2409.11321)."""

    name: Literal["soap"] = Field(description=_NAME)
    betas: Betas = Field((0.95, 0.95), description=_BETAS)
    eps: PositiveNumber = Field(1e-8, description=_EPS)
    precondition_every: Steps = Field(10, description="steps between two computations of the eigenbasis")
    max_precondition_dim: Steps = Field(
        10_000, description="a side of a matrix longer than this (such as the vocabulary) is left as it is"
    )


class Adafactor(_Optimizer):
    """The mean square of a matrix kept as that of its rows and its columns (arXiv 1804.04235); no momentum."""

    name: Literal["adafactor"] = Field(description=_NAME)
    lr: PositiveNumber = Field(1e-2, description="peak relative rate: an update is this share of its parameter's size")
    beta2_decay: Annotated[Number, Field(lt=0)] = Field(
        -0.8, description="the mean square decays by 1 - step ** beta2_decay"
    )
    clip_rms: PositiveNumber = Field(1.0, description="an update whose root mean square is larger is scaled down to it")
    weight_decay: NotNegative = Field(
        0.0, description="decoupled, times the learning rate; not on norms, biases and embeddings"
    )


def _name_of(value: object) -> str:
    """The optimizer that a section asks for: AdamW when it does not say."""
    name = value.get("name", "adamw") if isinstance(value, Mapping) else getattr(value, "name", "adamw")
    return str(name)


Optimizer = Annotated[
    Annotated[AdamW, Tag("adamw")]
    | Annotated[AdamW8bit, Tag("adamw_8bit")]
    | Annotated[CautiousAdamW, Tag("cautious_adamw")]
    | Annotated[AdEMAMix, Tag("ademamix")]
    | Annotated[Lion, Tag("lion")]
    | Annotated[Sgd, Tag("sgd")]
    | Annotated[RMSprop, Tag("rmsprop")]
    | Annotated[Muon, Tag("muon")]
    | Annotated[Soap, Tag("soap")]
    | Annotated[Adafactor, Tag("adafactor")],
    Discriminator(_name_of),
]


@dataclass(frozen=True)
class Traits:
    """Where an optimizer works and what it costs.

    `reason` says why the ZeRO stages that are missing from `zero_stages` cannot work. ZeRO 0 is fp32 only for every
    optimizer (`turbolm.recipe.checks`), and offloading needs a stage from 1 to 3.
    """

    zero_stages: tuple[int, ...] = (0, 1, 2, 3)
    reason: str = ""
    offload: bool = True
    offload_reason: str = ""
    package: str | None = None  # what it needs besides torch; `pip install 'turbolm[optimizers]'` brings it
    state_bytes: float = 8  # for each parameter

    @property
    def works_sharded(self) -> bool:
        """Whether it works where ZeRO cuts parameters into flat parts."""
        return 1 in self.zero_stages


_WHOLE_MATRICES = "it works on whole matrices, and ZeRO 1 to 3 leave each process a flat part of the parameters"
OPTIMIZERS: dict[str, Traits] = {
    "adamw": Traits(),
    "cautious_adamw": Traits(),
    "sgd": Traits(state_bytes=4),
    "rmsprop": Traits(state_bytes=4),
    "muon": Traits(state_bytes=4),
    "lion": Traits(state_bytes=4, package="pytorch_optimizer"),
    "ademamix": Traits(state_bytes=12, package="pytorch_optimizer"),
    "soap": Traits(zero_stages=(0,), reason=_WHOLE_MATRICES, state_bytes=24, package="pytorch_optimizer"),
    "adafactor": Traits(zero_stages=(0,), reason=_WHOLE_MATRICES, state_bytes=0),
    "adamw_8bit": Traits(state_bytes=2, package="torchao"),
}
