"""Start a small model on the CPU as a run starts it, probes included, to try a model type or a configuration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from turbolm.errors import UserError
from turbolm.models.attention import check_long_sequences, choose_attention, model_inputs
from turbolm.models.build import (
    build_config,
    build_model,
    carries_state_across_documents,
    check_all_trained,
    model_class,
)
from turbolm.models.isolation import check_isolation, outputs_that_count
from turbolm.models.loss import choose_loss
from turbolm.models.positions import check_positions
from turbolm.models.router import freeze_balancing_biases
from turbolm.recipe.schema import Model

VOCAB = 96
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Started:
    """A model that passed the probes of a run."""

    model: PreTrainedModel
    attention: str
    loss: str
    moved: float  # how far a changed document moved the logits of its neighbor


def start_small(section: Model, *, packed: bool, num_sequences: int, seq_len: int) -> Started:
    """Build and probe a model as `turbolm.train.build` does. Raises UserError where a run would."""
    config = build_config(section, seq_len=seq_len, vocab_size=VOCAB, bos_token_id=1, eos_token_id=2)
    kind = model_class(config)
    reason = carries_state_across_documents(config, kind)
    if reason and packed:
        raise UserError(f"data.packing: {reason}, so packed documents cannot be kept apart")
    attention = choose_attention("auto", "cpu", "fp32", kind, carries_state=reason is not None)
    check_long_sequences(config, attention, seq_len=seq_len, joined_tokens=num_sequences * seq_len, packed=packed)
    model = build_model(section, config, seed=0, attention=attention)
    freeze_balancing_biases(model)
    check_all_trained(model)
    check_positions(model, seq_len)
    model.train()
    with outputs_that_count(model, section.init):
        moved = check_isolation(
            model,
            vocab_size=VOCAB,
            seq_len=seq_len,
            attention=attention,
            precision="fp32",
            packed=packed,
            num_sequences=num_sequences,
            config=model.config,
        )
    tokens = np.arange(8)[None]
    probe = model_inputs({"input_ids": tokens, "position_ids": tokens}, attention, CPU)
    return Started(model, attention, choose_loss("auto", model, model, probe, "fp32"), moved)
