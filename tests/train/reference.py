"""An independent trainer: plain PyTorch, one process, one document at a time, none of the project's packing or step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.optim.formulas import Formula
from turbolm.data.order.batch_order import recipe_order
from turbolm.data.order.packing import Sequences
from turbolm.data.store.token_store import TokenStore
from turbolm.models.build import build_model
from turbolm.plan.curriculum import build_curriculum
from turbolm.recipe.schema import Recipe


def train_reference(
    recipe: Recipe,
    store: TokenStore,
    lrs: list[float],
    coefficient: float | None = None,
    *,
    batches: Sequence[int] | None = None,
    initial_seed: int | None = None,
    then: tuple[Recipe, TokenStore, list[float]] | None = None,
    watch: Callable[[torch.nn.Module], Callable[[], None]] = lambda model: lambda: None,
) -> list[list[float]]:
    """(loss, gradient norm before clipping) of a step for each learning rate in `lrs`.

    `batches` are the indices of their global batches where some are left out, `initial_seed` that of the initial
    weights where it is not the recipe's. With a `coefficient` also (router loss, gradient norm of the routers):
    Transformers' own function is called for each packed sequence, with the router logits of its documents. `then` goes
    on with the data of another recipe from their first batch on, and gives the learning rates there. `watch` gets the
    model and returns what is called after each step.
    """
    mapping: dict[str, Any] = dict(recipe.model.config or {})
    mapping |= {"vocab_size": store.vocab_size, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    if mapping["model_type"] == "gpt2":
        mapping |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = AutoConfig.for_model(mapping.pop("model_type"), **mapping)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    seed = recipe.train.seed if initial_seed is None else initial_seed
    initial = build_model(recipe.model, config, seed=seed, attention="eager")  # all that is shared
    model.load_state_dict(initial.state_dict())
    model.train()
    optimizer, after_step = reference_optimizer(recipe, model), watch(model)
    parts = [(recipe, store, lrs), *([then] if then else [])]
    orders = [recipe_order(its_recipe, its, build_curriculum(its_recipe), save=False) for its_recipe, its, _ in parts]
    steps = [(part, step, lr) for part, (_, _, its_lrs) in enumerate(parts) for step, lr in enumerate(its_lrs)]
    trained, ahead, scales = [], EmaNesterov(recipe, model), dict(optimizer.lr_scales)
    for part, step, lr in steps:
        ahead.move(step, lr)
        store, batch = parts[part][1], orders[part].batch(step if batches is None else batches[step])
        loss, router_loss = _losses(model, store, batch, coefficient is not None)
        model.zero_grad()
        (loss + (coefficient or 0.0) * router_loss).backward()
        gates = [parameter.grad for name, parameter in model.named_parameters() if name.endswith(".gate.weight")]
        of_routers = [router_loss.item(), torch.nn.utils.get_total_norm(gates).item()] if gates else []
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.train.max_grad_norm or float("inf"))
        if recipe.train.max_grad_value is not None:
            torch.nn.utils.clip_grad_value_(model.parameters(), recipe.train.max_grad_value)
        kinds = {name: kind_of(name, parameter) for name, parameter in model.named_parameters()}
        optimizer.lr_scales = {n: scales.get(n, 1.0) * own_decay(recipe, kind, step) for n, kind in kinds.items()}
        optimizer.step(lr, **scheduled(recipe, step))
        ahead.follow()
        after_step()
        trained.append([loss.item(), norm.item(), *of_routers])
    return trained


def _losses(model: Any, store: TokenStore, batch: Sequences, has_routers: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a global batch and its router loss, means over its tokens, one document after the other."""
    loss, router_loss = torch.zeros(()), torch.zeros(())
    for first, end in pairwise(batch.offsets.tolist()):  # the documents of a packed sequence
        router_logits = []
        for part in range(first, end):
            place = (int(column[part]) for column in (batch.document, batch.start, batch.length))
            tokens = torch.from_numpy(store.read("train", *place).astype("int64"))
            output = model(tokens[None, :-1], **({"output_router_logits": True} if has_routers else {}))
            loss = loss - output.logits[0].log_softmax(-1).gather(1, tokens[1:, None]).sum()
            router_logits.append(output.router_logits if has_routers else ())
        if has_routers:
            function = sys.modules[type(model).__module__].load_balancing_loss_func
            layers = tuple(torch.cat(layer) for layer in zip(*router_logits, strict=True))
            of_sequence = function(layers, model.num_experts, model.num_experts_per_tok)
            router_loss = router_loss + int(batch.length[first:end].sum()) * of_sequence
    num_targets = int(batch.length.sum())
    return loss / num_targets, router_loss / num_targets


class EmaNesterov:
    """arXiv 2605.25395, algorithm 1: theta' = A(theta + beta m), m' = decay m + (1 - decay) (theta' - theta)."""

    def __init__(self, recipe: Recipe, model: torch.nn.Module):
        self.settings, self.peak = recipe.optimizer.ema_nesterov, recipe.optimizer.lr
        self.weights = list(model.parameters())
        self.means = [torch.zeros_like(weight) for weight in self.weights]

    @torch.no_grad()
    def move(self, step: int, lr: float) -> None:
        self.before = [weight.clone() for weight in self.weights]
        settings = self.settings
        if settings is not None and settings.start.amount <= step + 0.5 < settings.end.amount:  # in steps
            for weight, mean in zip(self.weights, self.means, strict=True):
                weight += settings.lookahead * lr / self.peak * mean

    @torch.no_grad()
    def follow(self) -> None:
        decay = 0 if self.settings is None else self.settings.mean_decay
        for weight, before, mean in zip(self.weights, self.before, self.means, strict=True):
            mean.copy_(decay * mean + (1 - decay) * (weight - before))


def own_decay(recipe: Recipe, kind: str, step: int) -> float:
    """The learning rate of a kind with a linear decay of its own, as a share of the others', which are at the peak."""
    span = getattr(getattr(recipe.schedule, "decays", None), kind, None)
    if span is None:
        return 1.0
    num_steps = recipe.train.budget / recipe.train.global_batch
    left = (num_steps - step - 0.5) / (span.amount * num_steps)  # a share of the budget
    floor = recipe.schedule.min_lr_ratio
    return min(1.0, floor + (1 - floor) * left)


def scheduled(recipe: Recipe, step: int) -> dict[str, float]:
    """Weight decay and momentum of a step where they go linearly over the whole budget, by hand."""
    progress = (step + 0.5) * recipe.train.global_batch / recipe.train.budget
    ramps = {"weight_decay": recipe.schedule.weight_decay, "momentum": recipe.schedule.momentum}
    values = {name: ramp.start + (ramp.end - ramp.start) * progress for name, ramp in ramps.items() if ramp is not None}
    if "weight_decay" in values:
        values["weight_decay"] *= recipe.optimizer.weight_decay
    return values


def reference_optimizer(recipe: Recipe, model: torch.nn.Module) -> Formula:
    """The formula of the recipe's optimizer over plain parameters, sorted by their names."""
    undecayed = ("emb", "wte", "wpe", "A_log")
    decayed = {n for n, p in model.named_parameters() if p.dim() >= 2 and not any(part in n for part in undecayed)}
    matrices = {name for name in decayed if "lm_head" not in name and "conv1d" not in name}
    steps = recipe.train.budget / recipe.train.global_batch
    peaks = getattr(recipe.optimizer, "peak_lrs", None)
    kinds = {name: kind_of(name, parameter) for name, parameter in model.named_parameters()}
    own = {name: peaks and getattr(peaks, kind) for name, kind in kinds.items()}
    return Formula(
        recipe.optimizer,
        model.named_parameters(),
        decayed=decayed,
        matrices=matrices,
        slow_warmup_steps=steps,
        lr_scales={name: peak / recipe.optimizer.lr for name, peak in own.items() if peak},
    )


def kind_of(name: str, parameter: torch.Tensor) -> str:
    """The kind of a parameter of the tested models, by its name."""
    if any(part in name for part in ("emb", "wte", "wpe")):
        return "embeddings"
    if parameter.dim() < 2 or "A_log" in name:
        return "vectors"
    return "head" if "lm_head" in name else "matrices"
