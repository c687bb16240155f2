"""Apply keys of a recipe's `model` section to a configuration: noise on routers, rotary positions.

Both are written into the configuration, so the exported model computes what was trained and evaluated.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from turbolm.errors import UserError
from turbolm.models.config import rope_warnings
from turbolm.recipe.model_config import heads_of
from turbolm.recipe.schema import Model

# Named like noise, but none on a router: phimoe's threshold for masking an expert's logits (it counts in evaluation
# too), and the augmentation of a vision tower's positions.
_NOT_NOISE = {"phimoe.router_jitter_noise", "pos_embed_jitter"}
# Routers that sample the expert while they train; in evaluation mode they take the likeliest.
_SAMPLING_ROUTERS = ("PhimoeTopKRouter",)


def apply_router_noise(config: PreTrainedConfig, model: Model) -> None:
    """Set every noise amplitude of a router to `model.router_noise`, unless `model.config` names it.

    Raises UserError if a number is requested and the type has no such amplitude.
    """
    if model.router_noise == "config":
        return
    keys = [
        (owner, key, key in named)
        for owner, named in _configs(config, model.config or {})
        for key in vars(owner)
        if ("jitter" in key or "noise" in key) and not {key, f"{owner.model_type}.{key}"} & _NOT_NOISE
    ]
    if model.router_noise and not keys:
        raise UserError(
            f"model.router_noise: {config.model_type} has no noise on its routers to set; leave it out, or set it to 0"
        )
    for owner, key, is_named in keys:
        if not is_named and (model.router_noise or getattr(owner, key)):  # an absent one stays absent
            setattr(owner, key, model.router_noise)


def stop_sampling_routers(built: PreTrainedModel, model: Model) -> None:
    """With `model.router_noise: 0`, keep routers that sample experts in evaluation mode, whatever the model's mode."""
    if model.router_noise != 0:
        return
    for module in built.modules():
        if type(module).__name__ in _SAMPLING_ROUTERS:
            module.eval()
            module.train = _stay(module)


def _stay(module: nn.Module) -> Any:
    return lambda mode=True: module


def extend_rope(config: PreTrainedConfig, model: Model, seq_len: int) -> None:
    """Put `model.rope_parameters` into a checkpoint's configuration, and make room for `seq_len` positions.

    Where kinds of layers have positions of their own (Gemma 3), those of full attention change: windows see no farther
    than before. Raises UserError for a model without rotary positions, and for what Transformers warns of.
    """
    new, own = model.rope_parameters, copy.deepcopy(getattr(config, "rope_parameters", None))
    if new is None:
        return
    kinds = config.nested_rope_parameter_keys(own) if own else []
    before = getattr(config, "max_position_embeddings", None)
    if not own or before is None or (kinds and not isinstance(own.get("full_attention"), dict)):
        raise UserError(f"model.rope_parameters: {config.model_type} has no rotary positions that it could set")
    config.max_position_embeddings = new.positions(before, seq_len)
    if new.original_max_position_embeddings and hasattr(config, "original_max_position_embeddings"):  # Phi-3 reads it
        config.original_max_position_embeddings = new.original_max_position_embeddings
    config.rope_parameters = own | {"full_attention": new.over(own["full_attention"])} if kinds else new.over(own)
    with rope_warnings() as texts:
        try:
            config.validate_rope()
        except Exception as error:  # KeyError and ValueError, and TypeError for what it cannot compare
            texts.append(str(error))
    if texts:
        raise UserError(f"model.rope_parameters: {' '.join(texts[0].split())}")
    print(f"rotary positions: {new.rope_type}, for {config.max_position_embeddings} tokens instead of {before}")


def fix_rope_factors(config: PreTrainedConfig, model: Model, seq_len: int) -> None:
    """Make rotary factors that follow the longest sequence of a batch those of `model.rope_factors` for any length.

    longrope (arXiv 2402.13753) has two lists: `short` or `long` replaces the other. dynamic (NTK) scaling has a base
    that grows with the length: `short` is the base without scaling, `long` that of `seq_len` tokens. What results is in
    the configuration's own terms, so plain Transformers computes the same. Raises UserError where the model has no such
    factors.
    """
    if model.rope_factors == "by_length":
        return
    configs = [part for part, _ in _configs(config, {}) if ropes_by_length(part)]
    for part in configs:
        part.rope_parameters = copy.deepcopy(part.rope_parameters)  # the recipe's own mapping stays as it is
    found = [(part, rope) for part in configs for rope in ropes_by_length(part)]
    if not found:
        raise UserError(
            f"model.rope_factors: {config.model_type} has no rotary factors that follow the length (longrope, dynamic);"
            " leave it out"
        )
    for part, rope in found:
        if "longrope" in rope["rope_type"]:
            other = {"short": "long", "long": "short"}[model.rope_factors]
            # phimoe's code has the short factors at any length; what follows it there is the scale of attention.
            name = "mscale" if "short_mscale" in rope else "factor"
            rope[f"{other}_{name}"] = rope[f"{model.rope_factors}_{name}"]
        else:
            _fix_dynamic(part, rope, seq_len if model.rope_factors == "long" else 0)
    print(f"rotary factors: {model.rope_factors}, whatever the length of a sequence; the configuration says so")


def _fix_dynamic(config: PreTrainedConfig, rope: dict[str, Any], seq_len: int) -> None:
    """The formula of Transformers' `dynamic`, once for `seq_len`: a plain base."""
    heads = heads_of(lambda name: getattr(config, name, None))
    assert heads is not None, "rotary embeddings are those of heads"
    dim = int(heads[1] * rope.get("partial_rotary_factor", 1.0))
    positions, factor = config.max_position_embeddings, rope["factor"]
    stretch = factor * max(seq_len, positions) / positions - (factor - 1)
    rope["rope_theta"] *= stretch ** (dim / (dim - 2))
    rope["rope_type"] = "default"
    for name in ("factor", "type", "original_max_position_embeddings"):
        rope.pop(name, None)


def ropes_by_length(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The rotary parameters of a configuration whose factors follow the longest sequence of a batch."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return []
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]  # one, or by layer type
    return [rope for rope in each if _follows_length(rope)]


def _follows_length(rope: dict[str, Any]) -> bool:
    kind = rope.get("rope_type")
    if not isinstance(kind, str):
        return False
    if kind == "longrope":
        name = "mscale" if "short_mscale" in rope else "factor"
        return rope.get(f"short_{name}") != rope.get(f"long_{name}")
    return "dynamic" in kind and not rope.get("alpha")  # with an alpha (Hunyuan) it is fixed


def _configs(
    config: PreTrainedConfig, named: Mapping[str, Any]
) -> Iterator[tuple[PreTrainedConfig, Mapping[str, Any]]]:
    """Yield the configuration and those nested in it, each with what `named`, the recipe's own mapping, says of it."""
    yield config, named
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            inner = named.get(key)
            yield from _configs(value, inner if isinstance(inner, dict) else {})
