"""Estimate what one process takes of its GPU at the worst moment of a step, activations included. Torch-free.

Model state is `plan/zero_memory.py`'s, activations and loss are the profile's. They are not largest at the same moment:
when the backward pass begins all activations are there and no gradients of this pass; when it ends it is the other way
around; and the update has no activations, but copies. Activations are those of eager code, so for compiled models they
are an upper bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from turbolm.plan.deepspeed import ELEMENT_BYTES
from turbolm.plan.exchange import kept_elements
from turbolm.plan.plan import Plan
from turbolm.plan.profile import Kernel, Loss, ModelProfile, Recomputation, chunk_rows
from turbolm.plan.zero_memory import Held, ZeroMemory, estimate_zero_memory

CONTEXT_BYTES = 2**30
"""The CUDA context, kernels and cuBLAS workspaces of a process: about 1.3 GB with all kernels loaded (Hugging Face,
"Model training anatomy"), less since CUDA 11.7 loads kernels lazily. Assumed, not measured."""
NCCL_BYTES = 2**29
"""NCCL's channels: 4 MiB per buffer (NCCL_BUFFSIZE) x 3 protocols x channels x peers. Assumed, not measured."""
FRAGMENTATION = 0.05
"""Of what is allocated and freed in each step; the allocator runs with expandable segments. Assumed, not measured."""
FITS, TIGHT = 0.85, 0.95  # shares of the GPU's memory
_FEW_LOGITS = 2**26  # below, a run in fp32 makes all logits at once (models/loss.py)

Verdict = Literal["FITS", "TIGHT", "DOES NOT FIT"]
PARTS = {  # of a footprint, by the name that is shown
    "weights": "weights",
    "gradients": "gradients",
    "master": "fp32 master weights",
    "optimizer": "optimizer moments",
    "gathered": "gathered weights, at most",
    "buckets": "communication buckets",
    "copies": "copies for the update",
    "saved": "saved activations",
    "working": "work of one layer",
    "loss": "logits and loss",
    "context": "CUDA and NCCL (assumed)",
    "margin": "fragmentation (assumed)",
}


@dataclass(frozen=True)
class Footprint:
    """Bytes of one process on its GPU at the worst moment of a step."""

    moment: str  # when it is
    weights: int
    gradients: int
    master: int
    optimizer: int
    gathered: int
    buckets: int
    copies: int  # of gradients for the update, and the optimizer's temporaries
    saved: int  # activations kept for the backward pass
    working: int  # tensors of the layer that is at work, those it recomputes included
    loss: int  # logits and loss, those of routers included
    context: int  # CUDA context and NCCL
    margin: int  # fragmentation
    offloaded: int  # activations in host memory instead
    host_bytes: int  # model state in host memory instead
    is_upper_bound: bool  # compiled code keeps fewer activations

    @property
    def state_bytes(self) -> int:
        """Return the bytes of tensors that are as many whatever the micro-batch is."""
        state = self.weights + self.gradients + self.master + self.optimizer + self.gathered
        return state + self.buckets + self.copies

    @property
    def counted_bytes(self) -> int:
        """Return the bytes of tensors alone."""
        return self.state_bytes + self.saved + self.working + self.loss

    @property
    def total_bytes(self) -> int:
        """Return all bytes."""
        return self.counted_bytes + self.context + self.margin

    def verdict(self, gpu_bytes: int) -> Verdict:
        """Return whether it fits a GPU of `gpu_bytes`."""
        share = self.total_bytes / gpu_bytes
        return "FITS" if share < FITS else "TIGHT" if share <= TIGHT else "DOES NOT FIT"


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch: what is saved, and what stands on top at several moments."""

    saved: float  # by all layers and around them
    offloaded: float
    first: float  # saved by one layer and around the layers: when the backward pass arrives at the first layer
    working: float  # the worst layer's backward pass
    around: float  # that of the embedding, and what is saved around
    loss: float  # head and loss at their worst


def estimate_footprint(plan: Plan, profile: ModelProfile) -> Footprint:
    """Estimate the worst moment of a step of `plan`. Raises KeyError for a way to run that was not traced."""
    state = estimate_zero_memory(profile.tensors, plan)
    found = estimate_activations(plan, profile)
    router = router_loss(plan, profile)
    saved, gathered = found.saved + router.saved, max(state.gathered, state.small_weights)
    begins, ends, late = "start of the backward pass", "end of the backward pass", found.first + found.working
    moments = (
        _Moment(f"{begins} (loss)", state.resting, gathered, saved, loss=found.loss + router.working),
        _Moment(f"{begins} (last layer)", state.started, gathered, saved, found.working),
        _Moment(ends, state.passed, gathered, working=max(late, found.around)),
        _Moment("reduction of the gradients", state.reduced, gathered),
        _Moment("update of the optimizer", state.updating, 0),
    )
    return max((_footprint(plan, state, found, moment) for moment in moments), key=lambda one: one.total_bytes)


@dataclass(frozen=True)
class _Moment:
    name: str
    held: Held
    gathered: int
    saved: float = 0.0
    working: float = 0.0
    loss: float = 0.0


def _footprint(plan: Plan, state: ZeroMemory, found: Activations, moment: _Moment) -> Footprint:
    held, on_gpu = moment.held, plan.device == "cuda"
    moving = held.gradients + held.buckets + held.copies + moment.gathered + moment.saved + moment.working + moment.loss
    return Footprint(
        moment=moment.name,
        weights=state.weights,
        gradients=held.gradients,
        master=state.master,
        optimizer=state.optimizer,
        gathered=moment.gathered,
        buckets=held.buckets,
        copies=held.copies,
        saved=round(moment.saved),
        working=round(moment.working),
        loss=round(moment.loss),
        context=(CONTEXT_BYTES + NCCL_BYTES * (plan.world_size > 1)) if on_gpu else 0,
        margin=round(FRAGMENTATION * moving) if on_gpu else 0,
        offloaded=round(found.offloaded),
        host_bytes=state.host_bytes,
        is_upper_bound=plan.recipe.execution.compile != "none",
    )


@dataclass(frozen=True)
class RouterLoss:
    """Bytes that `models/router.py` takes of a micro-batch."""

    saved: float = 0.0  # from the loss on: the softmax of all layers' router logits, later their gradients
    working: float = 0.0  # while the loss is made: the logits themselves, and one layer's sums


def router_loss(plan: Plan, profile: ModelProfile) -> RouterLoss:
    """Return what the router loss of a mixture of experts takes at most; nothing without experts.

    Logits and choices are recorded in every layer, with recomputation, too. The loss adds up one layer at a time in
    fp32. Where the model's own coefficient is 0, nothing is saved; the profile does not know it.
    """
    experts = [tensor for tensor in profile.tensors if tensor.kind == "expert" and len(tensor.shape) == 3]
    if not experts:
        return RouterLoss()
    layers, num_experts = len({tensor.name.rpartition(".")[0] for tensor in experts}), experts[0].shape[0]
    active = 1 - profile.idle_parameters / sum(tensor.num_parameters for tensor in experts)
    logits, chosen = num_experts * ELEMENT_BYTES[plan.precision], 8 * round(active * num_experts)  # int64
    tokens, is_saved = plan.batch.process_tokens, plan.recipe.train.router_aux_loss != "off"
    return RouterLoss(
        saved=tokens * layers * logits * is_saved,
        working=tokens * (layers * (logits + chosen) + 2 * 4 * num_experts + chosen),
    )


def estimate_activations(plan: Plan, profile: ModelProfile) -> Activations:
    """Return the activations of a micro-batch of the longest sequences. Raises KeyError for a way not traced."""
    batch, execution = plan.batch, plan.recipe.execution
    shared_by = batch.sequence_parallel
    tokens, seq_len = batch.process_tokens, batch.seq_len * shared_by  # dense masks are of whole sequences
    kernel, element_bytes = used_kernel(plan, profile), ELEMENT_BYTES[plan.precision]
    mix = list(_recomputations(execution.activation_checkpointing, profile.num_layers))
    around = profile.around(mix[0][0], kernel, element_bytes)
    saved = around.saved.at(tokens, seq_len)
    layers = first = working = 0.0
    for kind in profile.layers:
        for mode, share in mix:
            one = kind.at(mode, kernel, element_bytes)
            kept, again = one.saved.at(tokens, seq_len), one.backward_peak.at(tokens, seq_len)
            if shared_by > 1 and profile.heads is not None:
                extra = tokens * element_bytes * kept_elements(profile.heads, shared_by, kernel, mode)
                kept, again = (kept + extra, again) if mode == "none" else (kept, again + extra)
            layers += kind.count * share * kept
            first, working = max(first, kept), max(working, again)
    offloads = execution.activation_checkpointing == "offloaded"
    loss = used_loss(plan, profile)
    table = next(tensor.shape for tensor in profile.tensors if tensor.kind == "embedding")
    rows = chunk_rows(loss, tokens, table[0], table[1], plan.device)
    return Activations(
        saved=saved + (0.0 if offloads else layers),
        offloaded=layers if offloads else 0.0,
        first=saved + first,
        working=working,
        around=saved + around.backward_peak.at(tokens, seq_len),
        loss=profile.loss(loss, element_bytes).peak(tokens, seq_len, rows),
    )


def _recomputations(asked: str | int, num_layers: int) -> Iterator[tuple[Recomputation, float]]:
    """Yield what is recomputed and in what share of the layers."""
    if isinstance(asked, int):
        share = -(-num_layers // asked) / num_layers
        yield "full", share
        if share < 1:
            yield "none", 1 - share
    elif asked == "offloaded":
        yield "full", 1.0
    else:
        yield asked, 1.0  # type: ignore[misc]


def used_kernel(plan: Plan, profile: ModelProfile) -> Kernel:
    """Return the kernel that `execution.attention` comes to (models/attention.py)."""
    asked = plan.recipe.execution.attention
    if asked in ("flash", "varlen", "flex"):
        return "flash"
    if asked != "auto":
        return asked  # type: ignore[return-value]
    traced = {one.kernel for one in profile.outer}
    plain = next(iter(traced - {"flash"}))
    is_half_on_gpu = plan.device == "cuda" and plan.precision in ("bf16", "fp16")
    return "flash" if is_half_on_gpu and "flash" in traced and plain == "sdpa" else plain


def used_loss(plan: Plan, profile: ModelProfile) -> Loss:
    """Return what `execution.loss` comes to (models/loss.py), taking a model's head for a plain one."""
    asked = plan.recipe.execution.loss
    if asked != "auto":
        return asked
    vocabulary = next(tensor.shape[0] for tensor in profile.tensors if tensor.kind == "embedding")
    is_small = plan.precision == "fp32" and plan.batch.process_tokens * vocabulary <= _FEW_LOGITS
    return "full" if plan.precision == "fp16" or is_small else "chunked"
