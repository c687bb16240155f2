"""Build a Hugging Face causal language model from a recipe, with weights that depend on nothing but the seed."""

from __future__ import annotations

import dataclasses
import difflib
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations import unset_hf_deepspeed_config

from turbolm.errors import UserError
from turbolm.models.attention import ATTENTION_NAMES
from turbolm.models.initialise import initialise_weights
from turbolm.models.pretrained import load_pretrained, refuse_adapter, settle_tying
from turbolm.models.settings import apply_router_noise, fix_rope_factors, stop_sampling_routers
from turbolm.plan.count import padded_vocab_size
from turbolm.recipe.schema import Model

# Layers that carry a state from token to token, or mix positions by convolution, reach over document boundaries.
_ISOLATING_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


def build_config(
    model: Model, *, seq_len: int, vocab_size: int, bos_token_id: int, eos_token_id: int
) -> PreTrainedConfig:
    """The model's configuration, completed from the tokenizer and checked against the recipe.

    Every dropout probability becomes `model.dropout` unless `model.config` names it; so does noise on routers, and
    `model.rope_factors` replaces factors that follow the length. A key that the model type does
    not know is refused: Hugging Face would keep it silently and train something else than what was asked for.
    Raises UserError.
    """
    if model.config is not None:
        config = _config_from_mapping(model.config)
        for key, value in (("vocab_size", vocab_size), ("bos_token_id", bos_token_id), ("eos_token_id", eos_token_id)):
            if key not in model.config:
                setattr(config, key, value)
        config.vocab_size = padded_vocab_size(model, config.vocab_size)
        if "pad_token_id" not in model.config:
            config.pad_token_id = None
    else:
        config = _config_from_folder(Path(str(model.pretrained)))
    for key in vars(config):
        if _is_dropout(key) and key not in (model.config or {}):
            setattr(config, key, model.dropout)
    if config.vocab_size < vocab_size:
        raise UserError(
            f"model.config.vocab_size: {config.vocab_size} rows cannot hold the tokenizer's {vocab_size} tokens; "
            f"set it to at least {vocab_size} or leave it out"
        )
    max_positions = getattr(config, "max_position_embeddings", None)
    if max_positions is not None and seq_len > max_positions:
        raise UserError(f"data.seq_len: the model has positions for {max_positions} tokens, fewer than {seq_len}")
    apply_router_noise(config, model)
    fix_rope_factors(config, model, seq_len)
    return config


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The causal language model class of a configuration."""
    try:
        found: type[PreTrainedModel] = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise UserError(f"model.config.model_type: {config.model_type} has no causal language model") from None
    return found


def build_model(
    model: Model, config: PreTrainedConfig, *, seed: int, attention: str, sharded_by: dict[str, Any] | None = None
) -> PreTrainedModel:
    """The model with fp32 initial weights on the CPU, the same for every ZeRO stage and world size.

    `attention` is one of `turbolm.models.attention.ATTENTION_NAMES`. `sharded_by`, a DeepSpeed configuration of stage
    3, makes each process hold only its part from the start (weights that are read from a folder are still read whole).
    The model's own configuration says whether its embeddings are tied. Raises UserError.
    Transformers must not see DeepSpeed: its own hooks would draw the weights in another order.
    """
    unset_hf_deepspeed_config()
    implementation = ATTENTION_NAMES[attention]
    try:
        if model.pretrained is not None:
            built = load_pretrained(Path(model.pretrained), config, model_class(config), implementation)
        else:
            with no_init_weights(), _sharding(sharded_by):
                built = AutoModelForCausalLM.from_config(
                    config, dtype=torch.float32, attn_implementation=implementation, trust_remote_code=False
                )
    except (ValueError, ImportError, OSError, TypeError) as error:
        raise UserError(f"model: cannot build {config.model_type} with {attention} attention: {error}") from error
    if model.pretrained is None:
        built.tie_weights()
        initialise_weights(built, seed, depth_scaled=model.init == "depth_scaled")
    settle_tying(built)
    stop_sampling_routers(built, model)
    return built


def check_all_trained(model: PreTrainedModel) -> None:
    """Raise UserError for a parameter that is not trained: no optimizer holds it, so no checkpoint would."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if frozen:
        raise UserError(
            f"model: {frozen[0]}{f' and {len(frozen) - 1} others' if frozen[1:] else ''} are parameters that are not "
            "trained (requires_grad is False), which checkpoints cannot hold; choose a model type without such"
        )


def _sharding(ds_config: dict[str, Any] | None) -> AbstractContextManager[Any]:
    if ds_config is None:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.Init(config_dict_or_path=ds_config)


def carries_state_across_documents(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> str | None:
    """Why documents packed in one row cannot be kept apart in this kind of model, or None when attention does it."""
    if getattr(model_class, "_is_stateful", False):
        return f"{config.model_type} carries a recurrent state from token to token"
    foreign = sorted(set(getattr(config, "layer_types", None) or ()) - _ISOLATING_LAYER_TYPES)
    if foreign:
        return f"{config.model_type} has layers of type {', '.join(foreign)}"
    return None


def _config_from_mapping(mapping: dict[str, Any]) -> PreTrainedConfig:
    values = dict(mapping)
    model_type = values.pop("model_type")
    try:
        blank = AutoConfig.for_model(model_type)
    except ValueError:
        known = sorted(AutoConfig._model_mapping) if hasattr(AutoConfig, "_model_mapping") else []
        near = difflib.get_close_matches(model_type, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"model.config.model_type: transformers knows no model type {model_type!r}{hint}") from None
    allowed = {field.name for field in dataclasses.fields(blank)} | set(type(blank).attribute_map)
    unknown = sorted(set(values) - allowed)
    if unknown:
        near = difflib.get_close_matches(unknown[0], sorted(allowed), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"model.config.{unknown[0]}: {model_type} has no such setting{hint}")
    try:
        return type(blank)(**values)
    except Exception as error:  # transformers' validators raise their own kinds
        raise UserError(f"model.config: {model_type} refuses these settings: {error}") from error


def _config_from_folder(folder: Path) -> PreTrainedConfig:
    refuse_adapter(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"model.pretrained: {folder} has no config.json; expected a local Hugging Face model folder")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"model.pretrained: {folder / 'config.json'} is no configuration: {error}") from None


def _is_dropout(key: str) -> bool:
    return "dropout" in key or key.endswith(("pdrop", "_drop"))
