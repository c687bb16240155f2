"""Add embedding rows for a tokenizer that has more tokens than a pretrained model (`model.resize_embeddings`)."""

from __future__ import annotations

from transformers import PreTrainedConfig

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
