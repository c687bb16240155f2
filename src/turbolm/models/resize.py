"""Add embedding rows for a tokenizer that has more tokens than a pretrained model (`model.resize_embeddings`)."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from turbolm.errors import UserError
from turbolm.recipe.schema import Model


def fit_vocabulary(model: Model, config: PreTrainedConfig, vocab_size: int) -> None:
    """Set the rows that the tokenizer needs in a pretrained model's configuration. Raises UserError."""
    if config.vocab_size >= vocab_size:
        return
    if not model.resize_embeddings:
        raise UserError(
            f"model.pretrained: {model.pretrained} has rows for {config.vocab_size} tokens, and the tokenizer has "
            f"{vocab_size}; set model.resize_embeddings: true to add rows, each the mean of the others"
        )
    others = [name for name in vars(config) if name.startswith("vocab_size_")]
    if others:
        raise UserError(f"model.resize_embeddings: {config.model_type} has a second table of tokens ({others[0]})")
    config.vocab_size = vocab_size


@torch.no_grad()
def add_rows(model: PreTrainedModel, num_rows: int) -> None:
    """Grow embedding and output head to `num_rows` rows; each new row is the mean of the old ones.

    Near the mean, a new token starts with less than an average token's probability and moves no other far
    (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").
    """
    old = model.get_input_embeddings().weight.shape[0]
    if num_rows <= old:
        return
    with torch.random.fork_rng([]):  # Hugging Face draws the rows, which are replaced here
        model.resize_token_embeddings(num_rows, mean_resizing=False)
    head = model.get_output_embeddings()
    for table in (model.get_input_embeddings().weight, head.weight, getattr(head, "bias", None)):
        if table is not None:
            table[old:] = table[:old].double().mean(0).to(table.dtype)
