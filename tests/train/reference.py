"""An independent trainer: plain PyTorch, one process, one document at a time, none of the project's packing or step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.optim.formulas import Formula
from turbolm.data.order import recipe_order
from turbolm.data.store import TokenStore
from turbolm.models.build import build_model
from turbolm.plan.curriculum import build_curriculum
from turbolm.recipe.schema import Recipe


def train_reference(
    recipe: Recipe,
    store: TokenStore,
    lrs: list[float],
    *,
    batches: Sequence[int] | None = None,
    initial_seed: int | None = None,
) -> list[list[float]]:
    """(loss, gradient norm before clipping) of a step for each learning rate in `lrs`.

    `batches` are the indices of their global batches where some are left out, `initial_seed` that of the initial
    weights where it is not the recipe's.
    """
    mapping: dict[str, Any] = dict(recipe.model.config or {})
    mapping |= {"vocab_size": store.vocab_size, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    if mapping["model_type"] == "gpt2":
        mapping |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = AutoConfig.for_model(mapping.pop("model_type"), **mapping)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    seed = recipe.train.seed if initial_seed is None else initial_seed
    initial = build_model(recipe.model, config, seed=seed, attention="eager")  # all that is shared
    model.load_state_dict(initial.state_dict())
    model.train()
    optimizer = reference_optimizer(recipe, model)
    order = recipe_order(recipe, store, build_curriculum(recipe), save=False)
    trained = []
    for step, lr in enumerate(lrs):
        batch = order.batch(step if batches is None else batches[step])
        pieces = zip(batch.document, batch.start, batch.length, strict=True)
        loss, num_targets = torch.zeros(()), 0
        for document, start, length in pieces:
            tokens = torch.from_numpy(store.read("train", int(document), int(start), int(length)).astype("int64"))
            logits = model(tokens[None, :-1]).logits[0]
            loss = loss - logits.log_softmax(-1).gather(1, tokens[1:, None]).sum()
            num_targets += len(tokens) - 1
        loss = loss / num_targets
        model.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.train.max_grad_norm or float("inf"))
        if recipe.train.max_grad_value is not None:
            torch.nn.utils.clip_grad_value_(model.parameters(), recipe.train.max_grad_value)
        optimizer.step(lr, **scheduled(recipe, step))
        trained.append([loss.item(), norm.item()])
    return trained


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
    return Formula(
        recipe.optimizer, model.named_parameters(), decayed=decayed, matrices=matrices, slow_warmup_steps=steps
    )
