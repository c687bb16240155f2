"""Count the positions that a model can tell apart."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from turbolm.errors import UserError

# Names of the limit in Transformers' configurations; others (n_positions, n_ctx) are mapped to the first.
_NAMES = ("max_position_embeddings", "max_target_positions", "max_seq_len")
_TABLES = ("embed_positions", "position_embeddings", "positions_embed", "wpe")


def num_positions(model: PreTrainedModel) -> int | None:
    """Return how many tokens fit the model's positions, by its configuration and learned tables; None: no limit.

    A table with a padding row (RoBERTa's) counts positions from the row after it.
    """
    config = model.config.get_text_config(decoder=True)
    limits = [value for name in _NAMES if isinstance(value := getattr(config, name, None), int) and value > 0]
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _TABLES:
            padding = module.padding_idx
            limits.append(module.num_embeddings - (0 if padding is None else padding + 1))
    return min(limits, default=None)


def check_positions(model: PreTrainedModel, seq_len: int) -> None:
    """Raise UserError where a sequence is longer than the model's positions."""
    positions = num_positions(model)
    if positions is not None and seq_len > positions:
        raise UserError(f"data.seq_len: the model has positions for {positions} tokens, fewer than {seq_len}")
