"""Estimate what one process takes of its GPU at the worst moment of a step, activations included. Torch-free.

Model state is `plan/memory.py`'s, activations and loss are the profile's. They are not largest at the same moment: when
the backward pass begins all activations are there and no gradients of this pass; when it ends it is the other way
around. Activations are those of eager code, so for compiled models they are an upper bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from turbolm.plan.exchange import kept_elements
from turbolm.plan.memory import ModelState, estimate_model_state
from turbolm.plan.plan import Plan
from turbolm.plan.profile import Kernel, Loss, ModelProfile, Recomputation, chunk_rows

CONTEXT_BYTES = 2**30
"""The CUDA context, kernels and cuBLAS workspaces of a process: about 1.3 GB with all kernels loaded (Hugging Face,
"Model training anatomy"), less since CUDA 11.7 loads kernels lazily. Assumed, not measured."""
NCCL_BYTES = 2**29
"""NCCL's channels: 4 MiB per buffer (NCCL_BUFFSIZE) x 3 protocols x channels x peers. Assumed, not measured."""
FRAGMENTATION = 0.05
"""Of what is allocated and freed in each step; the allocator runs with expandable segments. Assumed, not measured."""
FITS, TIGHT = 0.85, 0.95  # shares of the GPU's memory
_FP32_BYTES = 4
_FEW_LOGITS = 2**26  # below, a run in fp32 makes all logits at once (models/loss.py)

Verdict = Literal["FITS", "TIGHT", "DOES NOT FIT"]


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
    saved: int  # activations kept for the backward pass
    working: int  # tensors of the layer that is at work, those it recomputes included
    loss: int  # logits and loss
    context: int  # CUDA context and NCCL
    margin: int  # fragmentation
    offloaded: int  # activations in host memory instead
    is_upper_bound: bool  # compiled code keeps fewer activations

    @property
    def counted_bytes(self) -> int:
        """Return the bytes of tensors alone."""
        state = self.weights + self.gradients + self.master + self.optimizer + self.gathered + self.buckets
        return state + self.saved + self.working + self.loss

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
    recipe, num_parameters = plan.recipe, profile.num_parameters
    state = estimate_model_state(
        recipe.execution, plan.ds_config, num_parameters, plan.world_size, plan.precision, recipe.optimizer.name
    )
    found = estimate_activations(plan, profile)
    moments = (
        _moment(plan, state, found, f"start of the backward pass ({name})", gradients, working, loss)
        for name, gradients, working, loss in (
            ("loss", _kept_gradients(plan, state, num_parameters), 0.0, found.loss),
            ("last layer", _kept_gradients(plan, state, num_parameters), found.working, 0.0),
        )
    )
    late = (
        _moment(plan, state, replace(found, saved=0.0), "end of the backward pass", state.gradients, working, 0.0)
        for working in (found.first + found.working, found.around)
    )
    return max((*moments, *late), key=lambda one: one.total_bytes)


def _moment(
    plan: Plan, state: ModelState, found: Activations, name: str, gradients: int, working: float, loss: float
) -> Footprint:
    moving = gradients + state.gathered + state.buckets + found.saved + working + loss
    on_gpu = plan.device == "cuda"
    return Footprint(
        moment=name,
        weights=state.weights,
        gradients=gradients,
        master=state.master,
        optimizer=state.optimizer,
        gathered=state.gathered,
        buckets=state.buckets,
        saved=round(found.saved),
        working=round(working),
        loss=round(loss),
        context=(CONTEXT_BYTES + NCCL_BYTES * (plan.world_size > 1)) if on_gpu else 0,
        margin=round(FRAGMENTATION * moving) if on_gpu else 0,
        offloaded=round(found.offloaded),
        is_upper_bound=plan.recipe.execution.compile != "none",
    )


def _kept_gradients(plan: Plan, state: ModelState, num_parameters: int) -> int:
    """Return the bytes of gradients that wait for the other micro-batches of a step while a pass begins."""
    stage = plan.recipe.execution.zero_stage
    if plan.batch.gradient_accumulation_steps == 1 or state.gradients == 0:
        return 0
    return _FP32_BYTES * (num_parameters if stage < 2 else -(-num_parameters // plan.world_size))


def estimate_activations(plan: Plan, profile: ModelProfile) -> Activations:
    """Return the activations of a micro-batch of the longest sequences. Raises KeyError for a way not traced."""
    batch, execution = plan.batch, plan.recipe.execution
    shared_by = batch.sequence_parallel
    tokens, seq_len = batch.process_tokens, batch.seq_len * shared_by  # dense masks are of whole sequences
    kernel, element_bytes = used_kernel(plan, profile), 4 if plan.precision == "fp32" else 2
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
