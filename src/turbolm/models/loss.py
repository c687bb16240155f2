"""Token-exact language-model loss: sums over targets, so that any split of a batch adds up to the same number.

The loss stands inside the model's forward pass (`attach_loss`), where ZeRO-3 has the output head's weights at hand and
where a compiler sees it. `chunked` never holds the logits of more than a few rows: at a vocabulary of 128k those of a
16k-token micro-batch would take 8 GB, and as much again for their gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from turbolm.errors import UserError
from turbolm.plan.batch import IGNORED_TARGET
from turbolm.plan.profile import CHUNK_LOGITS, chunk_rows

Loss = tuple[torch.Tensor, torch.Tensor]
"""What is minimised, and the negative log likelihood alone, without its gradient: both summed over targets, in fp32."""
TokenLosses = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Without gradients: twice the summed negative log likelihood, in the place of `Loss`, and that of each target, fp32
[rows]; 0 for those that are ignored."""

_FEW_LOGITS = 2**26  # 256 MB in fp32; a tenth of a step's time faster at once, on a CPU core (in bf16 it is not)


def summed_loss(logits: torch.Tensor, targets: torch.Tensor, z_loss: float = 0.0) -> Loss:
    """The negative log likelihood in nats, plus `z_loss` times the squared log of the softmax's denominator.

    `logits` is [..., vocabulary], `targets` has as many entries as there are rows of logits and is already shifted:
    each entry is the token that follows, or `IGNORED_TARGET`. The z-loss keeps logits from drifting (PaLM, arXiv
    2204.02311, section 5, with 1e-4).
    """
    logits, targets = logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1)
    nll = F.cross_entropy(logits, targets, ignore_index=IGNORED_TARGET, reduction="sum")
    if not z_loss:
        return nll, nll.detach()
    squares = logits.logsumexp(-1).square().masked_fill(targets == IGNORED_TARGET, 0.0)
    return nll + z_loss * squares.sum(), nll.detach()


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> TokenLosses:
    """`summed_loss` bit by bit, in which the loss of each target is kept. Without gradients."""
    logits, targets = logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1)
    log_probabilities = F.log_softmax(logits, -1)  # the steps of F.cross_entropy
    nll = F.nll_loss(log_probabilities, targets, ignore_index=IGNORED_TARGET, reduction="sum")
    return nll, nll, F.nll_loss(log_probabilities, targets, ignore_index=IGNORED_TARGET, reduction="none")


@torch.no_grad()
def chunked_token_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> TokenLosses:
    """`chunked_linear_loss` bit by bit, in which the loss of each target is kept. Without gradients."""
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    chunk_tokens = chunk_tokens or _chunk_tokens(len(rows), weight)
    nll, each = torch.zeros((), dtype=torch.float32, device=rows.device), []
    for part, its_targets in zip(rows.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        logits = F.linear(part, weight, bias).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        losses = logits.logsumexp(-1) - logits.gather(1, its_targets.clamp(min=0)[:, None])[:, 0]
        each.append(losses.masked_fill(its_targets == IGNORED_TARGET, 0.0))
        nll = nll + each[-1].sum()
    return nll, nll, torch.cat(each)


def chunked_linear_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> Loss:
    """`summed_loss` of `hidden` [..., width] times `weight` [vocabulary, width], without holding all logits.

    Chunk by chunk the logits are made, and from them the gradients at once, so that nothing is computed twice and
    nothing of them is kept but the gradients of `hidden` and `weight` (the latter summed in fp32). The idea is that of
    Liger Kernel (arXiv 2410.10989); this needs PyTorch alone. `softcap` c replaces logits x by c tanh(x / c).
    """
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    with_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if chunk_tokens is None:
        chunk_tokens = _chunk_tokens(len(rows), weight)
    objective, squares = _ChunkedLinearLoss.apply(
        rows, weight, bias, targets, z_loss, softcap, chunk_tokens, with_gradients
    )
    nll = objective.detach()
    return objective, nll - z_loss * squares if z_loss else nll


def _chunk_tokens(num_rows: int, weight: torch.Tensor) -> int:
    """Rows of a chunk, which the planner knows too."""
    device = weight.device.type
    vocab_size, width = weight.shape
    return chunk_rows("chunked", num_rows, vocab_size, width, device if device in CHUNK_LOGITS else "cuda")


class _ChunkedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        z_loss: float,
        softcap: float | None,
        chunk_tokens: int,
        with_gradients: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        nll = torch.zeros((), dtype=torch.float32, device=rows.device)
        squares = torch.zeros_like(nll)
        grad_rows = []
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if with_gradients else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if with_gradients and bias is not None else None
        for part, its_targets in zip(rows.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
            logits = F.linear(part, weight, bias).float()
            slope = None
            if softcap is not None:
                capped = torch.tanh(logits / softcap)
                slope, logits = 1 - capped.square(), softcap * capped
            is_valid = its_targets != IGNORED_TARGET
            column = its_targets.clamp(min=0)[:, None]
            log_sum = logits.logsumexp(-1)
            nll = nll + (log_sum - logits.gather(1, column)[:, 0]).masked_fill(~is_valid, 0.0).sum()
            if z_loss:
                squares = squares + log_sum.square().masked_fill(~is_valid, 0.0).sum()
            if grad_weight is None:
                continue
            factor = (1 + 2 * z_loss * log_sum).masked_fill(~is_valid, 0.0)
            gradient = logits.sub_(log_sum[:, None]).exp_().mul_(factor[:, None])
            gradient.scatter_add_(1, column, -is_valid[:, None].float())
            if slope is not None:
                gradient.mul_(slope)
            if grad_bias is not None:
                grad_bias.add_(gradient.sum(0))
            gradient = gradient.to(weight.dtype)
            grad_rows.append(gradient @ weight)
            if weight.dtype == torch.float32:
                grad_weight.addmm_(gradient.t(), part)
            else:
                grad_weight.add_(gradient.t() @ part)
        if with_gradients:
            ctx.save_for_backward(torch.cat(grad_rows), grad_weight, grad_bias)
        ctx.mark_non_differentiable(squares)
        ctx.dtype = weight.dtype
        return nll + z_loss * squares, squares

    @staticmethod
    def backward(ctx: Any, grad_objective: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
        grad_rows, grad_weight, grad_bias = ctx.saved_tensors
        scaled = (grad_rows * grad_objective.to(grad_rows.dtype), grad_weight.mul_(grad_objective).to(ctx.dtype))
        bias = None if grad_bias is None else (grad_bias * grad_objective).to(ctx.dtype)
        return *scaled, bias, None, None, None, None, None


def attach_loss(model: PreTrainedModel, kind: str, *, z_loss: float = 0.0) -> None:
    """Have the model's forward pass take `targets` and return their `Loss` instead of logits; without, it is as before.

    With `per_token` as well, which has no gradients, it returns their `TokenLosses`.
    `kind` is full, chunked or liger; for the latter two the output head is called with the targets, so that the hooks
    of ZeRO-3 gather its weights for as long as it needs them and take their gradient.
    """
    plain, head = model.forward, model.get_output_embeddings()
    if kind == "full":

        def full(*arguments: Any, targets: torch.Tensor | None = None, per_token: bool = False, **kwargs: Any) -> Any:
            output = plain(*arguments, **kwargs)
            if targets is None:
                return output
            if per_token:
                return token_losses(output.logits, targets)
            return summed_loss(output.logits, targets, z_loss)

        model.forward = full
        return
    linear = head.forward
    fused = _liger_loss(z_loss, _softcap(model)) if kind == "liger" else None

    def head_or_loss(hidden: torch.Tensor, targets: torch.Tensor | None = None, per_token: bool = False) -> Any:
        if targets is None:
            return linear(hidden)
        if per_token:
            return chunked_token_losses(hidden, head.weight, head.bias, targets, softcap=_softcap(model))
        if fused is not None and torch.is_grad_enabled():
            return fused(hidden, head.weight, head.bias, targets)
        return chunked_linear_loss(hidden, head.weight, head.bias, targets, z_loss=z_loss, softcap=_softcap(model))

    def without_logits(
        *arguments: Any, targets: torch.Tensor | None = None, per_token: bool = False, **kwargs: Any
    ) -> Any:
        if targets is None:
            return plain(*arguments, **kwargs)
        hidden = model.base_model(*arguments, **kwargs).last_hidden_state
        return head(hidden, targets, per_token=True) if per_token else head(hidden, targets)

    head.forward, model.forward = head_or_loss, without_logits


def choose_loss(
    requested: str,
    forward: Callable[..., Any],
    model: PreTrainedModel,
    inputs: dict[str, Any],
    precision: str,
    micro_batch_tokens: int | None = None,
) -> str:
    """full, chunked or liger. `auto` is chunked wherever the model's logits are a linear head's, and not in fp16.

    In fp32, logits of `micro_batch_tokens` that take little memory are all made at once, which is faster there.

    Runs `forward` (the engine) once on `inputs` to see whether they are; every rank must call it. Raises UserError if
    the requested kind cannot work.
    """
    is_small = micro_batch_tokens is not None and micro_batch_tokens * model.config.vocab_size <= _FEW_LOGITS
    if requested == "full" or (requested == "auto" and is_small and precision == "fp32"):
        return "full"
    if precision == "fp16":  # gradients are made before DeepSpeed's loss scale is known, and would vanish in fp16
        problem: str | None = "not with train.precision fp16; set bf16"
    else:
        problem = _why_not_linear(forward, model, inputs)
    if problem and requested != "auto":
        raise UserError(f"execution.loss: {requested} does not work here: {problem}, or execution.loss: full")
    if problem:
        print(f"execution.loss: full, because {problem}")
        return "full"
    return "chunked" if requested == "auto" else requested


@torch.no_grad()
def _why_not_linear(forward: Callable[..., Any], model: PreTrainedModel, inputs: dict[str, Any]) -> str | None:
    """Why the logits are not the (soft-capped) output head of the base model's last hidden state; None if they are."""
    head, base = model.get_output_embeddings(), model.base_model
    seen: dict[str, Any] = {}
    if not isinstance(head, nn.Linear):
        return f"{model.config.model_type} has no linear output head"

    def note_hidden(_: nn.Module, __: Any, output: Any) -> None:
        seen["hidden"] = getattr(output, "last_hidden_state", None)

    hooks = [
        head.register_forward_hook(lambda _, arguments, output: seen.update(input=arguments[0], output=output)),
        base.register_forward_hook(note_hidden),
    ]
    try:
        logits = forward(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()
    if base is model or seen.get("hidden") is None:  # OPT calls its decoder, past its base model
        return f"{model.config.model_type} does not make its logits from its base model's last hidden state"
    if "input" not in seen or not torch.equal(seen["input"], seen["hidden"]):
        return f"{model.config.model_type} changes the last hidden state before its output head"
    softcap, expected = _softcap(model), seen["output"]
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    if not torch.equal(logits, expected):
        return f"{model.config.model_type} changes the logits after its output head"
    return None


def _softcap(model: PreTrainedModel) -> float | None:
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def _liger_loss(z_loss: float, softcap: float | None) -> Callable[..., Loss]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORED_TARGET,
        reduction="sum",
        lse_square_scale=z_loss,
        softcap=softcap,
        return_z_loss=True,
        accum_dtype=torch.float32,
    )

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor) -> Loss:
        result = fused(weight, hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), bias)
        return result.loss, result.loss.detach() - result.z_loss.detach()

    return loss
