"""Build a Hugging Face causal language model from a recipe, with weights that depend on nothing but the seed."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations import unset_hf_deepspeed_config

from turbolm.errors import UserError
from turbolm.models.attention import ATTENTION_NAMES
from turbolm.models.config import make_config
from turbolm.models.initialise import initialise_weights
from turbolm.plan.count import padded_vocab_size
from turbolm.recipe.model_config import is_dropout
from turbolm.recipe.schema import Model

# Layers that carry a state from token to token, or mix positions by convolution, reach over document boundaries.
_ISOLATING_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


def build_config(
    model: Model, *, seq_len: int, vocab_size: int, bos_token_id: int, eos_token_id: int
) -> PreTrainedConfig:
    """The model's configuration, completed from the tokenizer and checked against the recipe.

    Every dropout probability becomes `model.dropout` unless `model.config` names it, or the file one that is not 0.
    Raises UserError with every name that nothing reads and every value that Transformers refuses.
    """
    named = model.full_config
    if named is not None:
        config = _config_of_recipe(model, named, vocab_size)
        for key, value in (("bos_token_id", bos_token_id), ("eos_token_id", eos_token_id), ("pad_token_id", None)):
            if key not in named:
                with suppress(StrictDataclassFieldValidationError):  # a type that cannot do without the token
                    setattr(config, key, value)
    else:
        config = _config_from_folder(Path(str(model.pretrained)))
    kept = {config.attribute_map.get(key, key) for key in named or ()}
    for key in vars(config):
        if is_dropout(key) and key not in kept:
            setattr(config, key, model.dropout)
    if config.vocab_size < vocab_size:
        raise UserError(
            f"model.config.vocab_size: {config.vocab_size} rows cannot hold the tokenizer's {vocab_size} tokens; "
            f"set it to at least {vocab_size} or leave it out"
        )
    max_positions = getattr(config, "max_position_embeddings", None)
    if max_positions is not None and seq_len > max_positions:
        raise UserError(f"data.seq_len: the model has positions for {max_positions} tokens, fewer than {seq_len}")
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
    Transformers must not see DeepSpeed: its own hooks would draw the weights in another order.
    """
    unset_hf_deepspeed_config()
    implementation = ATTENTION_NAMES[attention]
    try:
        if model.pretrained is not None:
            _check_weights(Path(model.pretrained))
            return AutoModelForCausalLM.from_pretrained(
                model.pretrained,
                config=config,
                dtype=torch.float32,
                attn_implementation=implementation,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
        with no_init_weights(), _sharding(sharded_by):
            built: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=implementation, trust_remote_code=False
            )
    except (ValueError, ImportError, OSError, TypeError) as error:
        raise UserError(f"model: cannot build {config.model_type} with {attention} attention: {error}") from error
    built.tie_weights()
    initialise_weights(built, seed, depth_scaled=model.init == "depth_scaled")
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


def _config_of_recipe(model: Model, named: dict[str, Any], vocab_size: int) -> PreTrainedConfig:
    rows = named.get("vocab_size", vocab_size)
    padded = {"vocab_size": padded_vocab_size(model, rows)} if isinstance(rows, int) else {}
    return make_config(model.config_file, {**(model.config or {}), **padded})


def _check_weights(folder: Path) -> None:
    """Only safetensors are read, and only those of the folder. Raises UserError."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"model.pretrained: {folder} has no *.safetensors, the only weights that are read: other formats can run "
            "code; convert them where you trust them"
        )
    for file in files:
        try:
            with safe_open(file, framework="pt"):  # reads the header
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"model.pretrained: {file} cannot be read: {error}") from None
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"model.pretrained: {index} is no index of weights: {error!r}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"model.pretrained: {index} names {name!r}, which is no safetensors file of its folder")


def _config_from_folder(folder: Path) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise UserError(f"model.pretrained: {folder} has no config.json; expected a local Hugging Face model folder")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # Transformers' validators raise their own kinds
        text = " ".join(str(error).split())
        raise UserError(f"model.pretrained: {folder / 'config.json'} is no configuration: {text}") from None
