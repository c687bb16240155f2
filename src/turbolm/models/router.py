"""Routers of mixtures of experts: the loss that spreads tokens over the experts, and how many tokens each expert gets.

Transformers adds the loss in the model's own forward pass, over the whole batch and only beside `labels`. It is a
product of two means, so it is not the same for a batch as for its parts. Here the same function is applied to each
packed sequence by itself and weighted by its tokens: a sum over sequences, like the language-model loss. Ranks that
share sequences sum the shares of which the means are made, and each takes the gradient of its own.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from turbolm.engine import sharding
from turbolm.errors import UserError
from turbolm.models.balance import BALANCING_BIASES, BiasBalance, find_balance
from turbolm.models.sequence_parallel import sequence_group
from turbolm.models.size import expert_parameters
from turbolm.plan.batch import IGNORED_TARGET

SequenceLosses = Callable[[tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]
"""Router logits of all layers, each [sequences x seq_len, experts], and the mask of tokens that are not padding, fp32
[sequences, seq_len], to the loss of each sequence, [sequences]."""


@dataclass(frozen=True)
class Routers:
    """The routers of a model, and what is done with them."""

    gates: list[tuple[nn.Module, int]]  # modules that Transformers reads router logits from, and where in their output
    experts: list[nn.Module]  # the modules that are called with the chosen experts
    losses: SequenceLosses | None  # None where Transformers has no such loss for the type
    coefficient: float  # 0: no loss balances the experts
    balance: BiasBalance | None  # what moves the biases of the routers
    message: str


def find_routers(model: PreTrainedModel, setting: float | str, bias_update: float = 0.0) -> Routers | None:
    """The routers of a mixture of experts and their loss as `train.router_aux_loss` wants it; None without experts.

    `bias_update` is `train.router_bias_update`. Raises UserError for a number where there is no such loss or bias.
    """
    model_type = model.config.model_type
    gates = list(_gates(model.base_model))
    experts = [module for module in model.modules() if hasattr(module, "_is_expert_parallel")]  # set by Transformers
    has_experts = bool(gates or experts or any(expert_parameters(model)))
    losses, own = _router_loss(model) if gates else (None, 0.0)
    if isinstance(setting, (int, float)) and setting and losses is None:
        lacks = f"Transformers has no router loss for {model_type}" if has_experts else f"{model_type} has no experts"
        raise UserError(f"train.router_aux_loss: {setting:g} cannot act: {lacks}; set config or off")
    balance = find_balance(model, model_type, experts, bias_update) if bias_update else None
    if not has_experts:
        return None
    coefficient = own if setting == "config" else 0.0 if setting == "off" else float(setting)
    bias = next((name for name, _ in model.named_buffers() if name.endswith(BALANCING_BIASES)), "").rpartition(".")[2]
    if coefficient:
        message = f"experts: the loss is that of the tokens + {coefficient:g} x router loss of each packed sequence"
        message += f"; {bias} stays as it is" if bias and not balance else ""
    elif balance is not None:
        message = "experts: the loss is that of the tokens"
    elif losses is not None:
        message = f"experts: not balanced, their router loss is off ({own:g} in the configuration of {model_type})"
    else:
        reason = f"{bias} stays as it is, and " if bias else ""
        message = f"experts: this type is not balanced: {reason}Transformers has no router loss for {model_type}"
    if balance is not None:
        message += f"; {bias} moves by {bias_update:g} a step towards an even load (arXiv 2408.15664)"
    return Routers(gates, experts, losses, coefficient, balance, message)


def attach_router_loss(model: PreTrainedModel, routers: Routers) -> None:
    """Have the forward pass that `attach_loss` made add the router loss, where it is given targets and has gradients.

    It then returns four things: what is minimised, with `routers.coefficient` times the router loss in it; the negative
    log likelihood; the router loss, summed over tokens (None where the type has none); and how often each expert was
    chosen, fp32 [layers, experts] (None where Transformers does not report it).

    Hooks keep logits and choices on the modules themselves: a compiler can follow that through layers that are compiled
    and recomputed, but not Transformers' own way to collect them.
    """
    model.config.output_router_logits = False  # else Transformers collects them as well
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    recorder = _Recorder()
    for gate, index in routers.gates:
        gate.register_forward_hook(recorder.output_hook(index))
    for module in routers.experts:
        module.register_forward_pre_hook(recorder.choice_hook)
    no_load = _no_load(routers.experts, model.device)
    plain = model.forward

    def with_routers(*arguments: Any, targets: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if targets is None or not torch.is_grad_enabled():
            return plain(*arguments, targets=targets, **kwargs)
        recorder.is_on = True  # and not while layers are recomputed, which would keep what recomputation saves
        objective, nll = plain(*arguments, targets=targets, **kwargs)
        recorder.is_on = False
        mask = (targets != IGNORED_TARGET).float()
        choices = [recorder.take(module) for module in routers.experts]
        load = None if no_load is None else _add_load(no_load.clone(), choices, mask)
        logits = tuple(recorder.take(gate) for gate, _ in routers.gates)
        if routers.losses is None:
            return objective, nll, None, load
        if not routers.coefficient:
            logits = tuple(one.detach() for one in logits)
        router_loss = _summed(routers.losses, logits, mask)
        own_share = router_loss.detach() / _num_sharing()  # what all ranks report is summed
        return objective + routers.coefficient * router_loss, nll, own_share, load

    model.forward = with_routers


def keep_experts_whole(model: PreTrainedModel) -> None:
    """Have ZeRO-3 gather the weights of modules inside the experts before the experts run.

    Such a module runs once for each expert that got a token, which is not as often on every rank, and DBRX reads its
    weights before it runs. Of Transformers 5.23's causal models only DBRX has one; others hold the weights of all
    experts in the experts' own module.
    """
    experts = {
        type(module)
        for module in model.modules()
        if type(module).__name__.endswith("Experts") and any(True for m in module.children() for _ in m.parameters())
    }
    if experts:
        sharding.gather_whole(model, list(experts))


def freeze_balancing_biases(model: PreTrainedModel) -> None:
    """Make buffers of balancing biases that are parameters: fp32 values that checkpoints keep and nothing moves.

    No gradient reaches them, and their types say so, but `from_pretrained` forgets it.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if name not in BALANCING_BIASES:
                continue
            with sharding.gathered([parameter]):
                value = parameter.detach().clone()
            delattr(module, name)
            module.register_buffer(name, value)


def _gates(base: PreTrainedModel) -> Iterator[tuple[nn.Module, int]]:
    """The modules that Transformers' `output_router_logits` reads, by its own rules."""
    recorders = base.can_record_outputs.get("router_logits", [])
    for recorder in recorders if isinstance(recorders, list) else [recorders]:
        if not isinstance(recorder, OutputRecorder):
            recorder = OutputRecorder(recorder, index=1)
        for name, module in base.named_modules():
            in_layer = recorder.layer_name is None or f".{recorder.layer_name.strip('.')}." in f".{name}."
            if isinstance(module, recorder.target_class) and in_layer:
                yield module, recorder.index


def _router_loss(model: PreTrainedModel) -> tuple[SequenceLosses | None, float]:
    """Transformers' router loss of this type, for sequences, and the model's own coefficient."""
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    num_experts, top_k = getattr(model, "num_experts", None), getattr(model, "num_experts_per_tok", None)
    if function is None or num_experts is None or top_k is None:
        return None, 0.0
    settings: tuple[int, ...] = (num_experts, top_k)
    if model.config.model_type == "doge":  # its experts are pairs of keys
        settings = (num_experts, math.floor(math.sqrt(num_experts)), top_k)
    own = getattr(model, "router_aux_loss_coef", None) or getattr(model, "aux_loss_coef", None) or 0.0

    def one_by_one(logits: tuple[torch.Tensor, ...], mask: torch.Tensor) -> torch.Tensor:
        seq_len = mask.shape[1]
        parts = zip(*(layer.split(seq_len, dim=-2) for layer in logits), strict=True)
        return torch.stack([function(part, *settings, its[None]) for part, its in zip(parts, mask, strict=True)])

    def at_once(logits: tuple[torch.Tensor, ...], mask: torch.Tensor) -> torch.Tensor:
        return switch_losses(logits, mask, num_experts, top_k)

    def over_group(logits: tuple[torch.Tensor, ...], mask: torch.Tensor) -> torch.Tensor:
        return switch_losses(logits, mask, num_experts, top_k, total=_over_group)

    if _are_equal(at_once, one_by_one, num_experts):
        return over_group, float(own)
    if _num_sharing() > 1:
        raise UserError(
            f"execution.sequence_parallel: Transformers' router loss of {model.config.model_type} is not made of sums "
            "over tokens, which ranks that share a sequence could add up; set sequence_parallel: 1"
        )
    return one_by_one, float(own)


def switch_losses(
    logits: tuple[torch.Tensor, ...],
    mask: torch.Tensor,
    num_experts: int,
    top_k: int,
    total: Callable[[torch.Tensor], torch.Tensor] = lambda share: share,
) -> torch.Tensor:
    """The loss of Switch Transformers (arXiv 2101.03961, equations 4 to 6) of each sequence, [sequences].

    `logits` are those of each layer, [sequences x seq_len, experts], `mask` is 1 for tokens that count, fp32
    [sequences, seq_len]. It is experts x the sum over experts of (share of the choices, counted `top_k` times) x (mean
    probability), with means over tokens and layers: what nearly all types of Transformers call for a whole batch.
    `total` sums the parts of the means over ranks that each have a slice of the sequences.
    """
    num_sequences, seq_len = mask.shape
    chosen = mask.new_zeros(num_sequences, num_experts)
    probability = torch.zeros_like(chosen)
    each_choice = mask.repeat_interleave(top_k, dim=1)
    for layer in logits:
        weights = layer.softmax(-1)
        experts = weights.topk(top_k, dim=-1).indices.view(num_sequences, seq_len * top_k)
        chosen = chosen.scatter_add(1, experts, each_choice)
        probability = probability + (weights.float().view(num_sequences, seq_len, -1) * mask[..., None]).sum(1)
    num_rows = len(logits) * mask.sum(1, keepdim=True)
    sums = total(torch.cat([chosen, probability, num_rows], 1))
    chosen, probability, num_rows = sums.split((num_experts, num_experts, 1), 1)
    return num_experts * (chosen / num_rows * (probability / num_rows)).sum(1)


def _are_equal(one: SequenceLosses, other: SequenceLosses, num_experts: int) -> bool:
    """Whether two losses are the same function, on the logits of two layers and two sequences with padding."""
    generator = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(14, num_experts, generator=generator) for _ in range(2))
    mask = torch.ones(2, 7)
    mask[1, 4:] = 0.0
    try:
        return torch.allclose(one(logits, mask), other(logits, mask), rtol=1e-5)
    except (RuntimeError, ValueError, IndexError):  # a function of logits of another shape
        return False


def _summed(losses: SequenceLosses, logits: tuple[torch.Tensor, ...], mask: torch.Tensor) -> torch.Tensor:
    """The sum over sequences of their loss times their tokens. A sequence without any, a filler, counts nothing."""
    num_tokens = _over_group(mask.sum(1))
    return (num_tokens * losses(logits, torch.where(num_tokens[:, None] > 0, mask, 1.0))).sum()


def _over_group(share: torch.Tensor) -> torch.Tensor:
    group = sequence_group()
    return share if group is None else group.total(share)


def _num_sharing() -> int:
    group = sequence_group()
    return 1 if group is None else group.size


def _no_load(experts: list[nn.Module], device: torch.device) -> torch.Tensor | None:
    """Zeros, fp32 [layers, experts]; where a layer has fewer experts than another, NaN."""
    if not experts:
        return None
    numbers = torch.tensor([int(module.num_experts) for module in experts])
    is_expert = torch.arange(int(numbers.max())) < numbers[:, None]
    return torch.where(is_expert, 0.0, torch.nan).to(device)


def _add_load(load: torch.Tensor, choices: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """`load` with the choices of each layer, [tokens, experts per token], counted for tokens that are not padding."""
    for counts, chosen in zip(load, choices, strict=True):
        counts.scatter_add_(0, chosen.flatten(), mask.reshape(-1, 1).expand(-1, chosen.shape[-1]).flatten())
    return load


class _Recorder:
    """Keeps what passes through modules on the modules themselves, while it is on."""

    is_on = False

    def output_hook(self, index: int) -> Callable[..., None]:
        def note(module: nn.Module, _: Any, output: Any) -> None:
            if self.is_on:
                logits = output[index] if isinstance(output, tuple) else output
                # A view: what ZeRO-3's own linear returns cannot leave a layer that is compiled and recomputed.
                module._turbolm_recorded = logits.view(logits.shape)

        return note

    def choice_hook(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if self.is_on:
            module._turbolm_recorded = arguments[1]  # hidden states, chosen experts, their weights

    @staticmethod
    def take(module: nn.Module) -> torch.Tensor:
        recorded: torch.Tensor = module._turbolm_recorded
        module._turbolm_recorded = None
        return recorded
