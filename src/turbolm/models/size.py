"""Measure how large a built model is, and how much of it a token passes through."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from turbolm.engine.sharding import whole_shape
from turbolm.plan.parameters import ModelSize
from turbolm.recipe.model_config import heads_of

_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "moe_top_k")


def measure_model(model: PreTrainedModel) -> ModelSize:
    """Return the size of a model on any device, sharded or not; each weight counts once."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    has_own_head = output is not None and output.weight is not embedding.weight
    tables = {id(m.weight): _numel(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}  # and positions
    total, idle, embedding_size = sum(map(_numel, model.parameters())), count_idle(model), sum(tables.values())
    return ModelSize(
        total=total,
        embedding=embedding_size,
        head=sum(map(_numel, output.parameters())) if has_own_head else 0,
        source="counted",
        idle=idle,
        attention_width=_attention_width(model.config.get_text_config()),
        matmul=total - idle - (embedding_size if has_own_head else 0),  # norms and biases are a thousandth of it
    )


def expert_parameters(model: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """Yield parameters that hold one slice per expert, and their number of experts."""
    for name, module in model.named_modules():
        number = getattr(module, "num_experts", getattr(module, "moe_num_experts", None))
        if not isinstance(number, int) or number < 1:
            continue
        for parameter in module.parameters(recurse=False):
            shape = whole_shape(parameter)
            is_stacked = len(shape) == 3 and shape[0] == number
            if is_stacked or (len(shape) == 2 and "experts" in name.split(".") and shape[0] % number == 0):
                yield parameter, number


def count_idle(model: PreTrainedModel) -> int:
    """Count the weights of experts that a token does not pass through."""
    parts = (model.config.get_text_config(), getattr(model.config, "ffn_config", None))  # DBRX has the latter
    per_token = next((n for part in parts for name in _EXPERTS_PER_TOKEN if (n := getattr(part, name, None))), None)
    if not isinstance(per_token, int):
        return 0
    sizes = [(_numel(parameter), number) for parameter, number in expert_parameters(model)]
    return sum(size - size * min(per_token, number) // number for size, number in sizes)


def _attention_width(config: Any) -> int:
    """Return heads x head size summed over attention layers, by the usual names of configurations; else 0."""
    num_layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(num_layers, int):
        return 0
    kinds = getattr(config, "layer_types", None) or ["attention"] * num_layers
    layers = getattr(config, "per_layer_config", None) or [config] * num_layers  # some types have layers of other sizes
    pairs = zip(kinds, layers, strict=False)
    return sum(_layer_width(layer) for kind, layer in pairs if "attention" in kind and "linear" not in kind)


def _layer_width(config: Any) -> int:
    found = heads_of(lambda name: getattr(config, name, None))
    return math.prod(found) if found else 0


def _numel(parameter: nn.Parameter) -> int:
    return math.prod(whole_shape(parameter))
