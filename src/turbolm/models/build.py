"""Build a Hugging Face causal language model from a recipe, with weights that depend only on the seed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations import unset_hf_deepspeed_config

from turbolm.engine import sharding
from turbolm.errors import UserError
from turbolm.hub import pretrained_folder
from turbolm.models.attention import ATTENTION_NAMES
from turbolm.models.config import make_config
from turbolm.models.initialise import initialise_weights
from turbolm.models.pretrained import fill_model, open_folder, refuse_adapter, set_tying, settle_tying
from turbolm.models.resize import fit_vocabulary
from turbolm.models.router import BALANCING_BIASES
from turbolm.models.settings import apply_router_noise, extend_rope, fix_rope_factors, stop_sampling_routers
from turbolm.plan.count import padded_vocab_size
from turbolm.recipe.model_config import is_dropout
from turbolm.recipe.rope import too_few_positions
from turbolm.recipe.schema import Model

# Layers that carry a state from token to token, or mix positions by convolution, reach over document boundaries.
_ISOLATING_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


def build_config(
    model: Model, *, seq_len: int, vocab_size: int, bos_token_id: int, eos_token_id: int
) -> PreTrainedConfig:
    """Return the model's configuration, completed from the tokenizer and checked against the recipe.

    Every dropout probability becomes `model.dropout` unless `model.config` names it, or the file one that is not 0.
    Noise on routers is set likewise, and `model.rope_factors` replaces factors that follow the length. Raises UserError
    with every name that nothing reads and every value that Transformers refuses.
    """
    named = model.full_config
    if named is not None:
        rows = named.get("vocab_size", vocab_size)
        padded = {"vocab_size": padded_vocab_size(model, rows)} if isinstance(rows, int) else {}
        config = make_config(model.config_file, {**(model.config or {}), **padded})
        for key, value in (("bos_token_id", bos_token_id), ("eos_token_id", eos_token_id), ("pad_token_id", None)):
            if key not in named:
                with suppress(StrictDataclassFieldValidationError):  # a type that cannot do without the token
                    setattr(config, key, value)
    else:
        config = _config_from_folder(pretrained_folder(model))
        extend_rope(config, model, seq_len)
    kept = {config.attribute_map.get(key, key) for key in named or ()}
    for key in vars(config):
        if is_dropout(key) and key not in kept:
            setattr(config, key, model.dropout)
    if model.pretrained is not None:
        fit_vocabulary(model, config, vocab_size)
    if config.vocab_size < vocab_size:
        raise UserError(
            f"model.config.vocab_size: {config.vocab_size} rows cannot hold the tokenizer's {vocab_size} tokens; "
            f"set it to at least {vocab_size} or leave it out"
        )
    max_positions = getattr(config, "max_position_embeddings", None)
    if max_positions is not None and 0 < max_positions < seq_len:  # xlnet's -1: no limit
        raise too_few_positions(max_positions, seq_len, pretrained=model.pretrained is not None)
    _refuse_other_attention(config)
    apply_router_noise(config, model)
    fix_rope_factors(config, model, seq_len)
    return config


def _refuse_other_attention(config: PreTrainedConfig) -> None:
    """Raise UserError for a type whose attention changes in long sequences, which no short probe sees."""
    if config.model_type == "reformer":
        raise UserError(
            "model: reformer sorts a sequence's tokens, padding too, into chunks that see each other; choose "
            "another type"
        )
    if config.model_type == "big_bird" and config.attention_type != "original_full":
        raise UserError(
            f"model.config.attention_type: big_bird's {config.attention_type} attention reads later tokens; set "
            "original_full"
        )


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the causal language model class of a configuration. Raises UserError."""
    try:
        found: type[PreTrainedModel] = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise UserError(f"model.config.model_type: {config.model_type} has no causal language model") from None
    return found


def build_model(
    model: Model,
    config: PreTrainedConfig,
    *,
    seed: int,
    attention: str,
    sharded_by: dict[str, Any] | None = None,
    saved: Collection[str] | None = None,
    held_as: tuple[torch.dtype, torch.device] | None = None,
) -> PreTrainedModel:
    """Return the model with fp32 initial weights on the CPU, the same for every ZeRO stage and world size.

    `held_as` is another type and device to hold them in, tensor by tensor, which rounds them as DeepSpeed would.
    `attention` is one of `turbolm.models.attention.ATTENTION_NAMES`. `sharded_by`, a DeepSpeed configuration of stage
    3, makes each process hold only its part from the start; then this is collective. `saved` names the parameters of a
    checkpoint that will be loaded: neither weights nor persistent buffers are drawn or read then. The model's own
    configuration says whether its embeddings are tied. Raises UserError.
    """
    unset_hf_deepspeed_config()  # its hooks in Transformers would draw the weights in another order
    construct = functools.partial(
        _construct,
        implementation=ATTENTION_NAMES[attention],
        sharded_by=sharded_by,
        held_as=held_as,
        whole=BALANCING_BIASES if model.pretrained is not None else (),
    )
    try:
        if model.pretrained is None:
            built = construct(config)
        elif saved is None:
            built = _from_folder(model, config, ATTENTION_NAMES[attention], construct)
        else:
            built = _as_from_folder(config, construct, saved)
    except UserError:
        raise
    except Exception as error:  # of many kinds, as many as there are model types
        raise UserError(f"model: cannot build {config.model_type} with {attention} attention: {error}") from error
    if model.pretrained is None and saved is None:
        initialise_weights(built, seed, model.init)
    settle_tying(built)
    stop_sampling_routers(built, model)
    return built


def _from_folder(
    model: Model,
    config: PreTrainedConfig,
    implementation: str,
    construct: Callable[[PreTrainedConfig], PreTrainedModel],
) -> PreTrainedModel:
    """Return the model with the weights of `model.pretrained`, in evaluation mode."""
    folder, config, loading = pretrained_folder(model), copy.deepcopy(config), copy.deepcopy(config)
    loading.vocab_size = _config_from_folder(folder).vocab_size  # the rows of the folder's weights
    with open_folder(folder, loading, model_class(config), implementation) as matched:
        if matched.has_own_head():
            set_tying(config, False)
        built = construct(config).eval()
        fill_model(folder, matched, built)
    return built


def _as_from_folder(
    config: PreTrainedConfig, construct: Callable[[PreTrainedConfig], PreTrainedModel], saved: Collection[str]
) -> PreTrainedModel:
    """Return the model that `_from_folder` returned when the run began, without its weights."""
    built = construct(config)
    if any({one, other} <= set(saved) for one, other in built.all_tied_weights_keys.items()):
        config = copy.deepcopy(config)
        set_tying(config, False)
        built = construct(config)
    return built.requires_grad_(True).eval()


def _construct(
    config: PreTrainedConfig,
    *,
    implementation: str,
    sharded_by: dict[str, Any] | None,
    held_as: tuple[torch.dtype, torch.device] | None,
    whole: Collection[str],
) -> PreTrainedModel:
    """Return the model of a configuration with no values in its weights. Draws nothing from the global random state.

    Parameters of the names in `whole` stay whole, in fp32, on the CPU.
    """
    with torch.random.fork_rng([]), no_init_weights(), sharding.building(sharded_by, whole):
        built: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=implementation, trust_remote_code=False
        )
    built.tie_weights()
    if held_as is not None and sharded_by is None:
        dtype, device = held_as
        for name, parameter in built.named_parameters():
            if name.rpartition(".")[2] not in whole and parameter.is_floating_point():
                parameter.data = torch.empty_like(parameter.data, dtype=dtype, device=device)
    return built


def check_all_trained(model: PreTrainedModel) -> None:
    """Raise UserError for a parameter that is not trained: no optimizer holds it, so no checkpoint would."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if frozen:
        raise UserError(
            f"model: {frozen[0]}{f' and {len(frozen) - 1} others' if frozen[1:] else ''} are parameters that are not "
            "trained (requires_grad is False), which checkpoints cannot hold; choose a model type without such"
        )


def carries_state_across_documents(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> str | None:
    """Return why documents in one sequence cannot be kept apart in this kind of model; None if attention does it."""
    if getattr(model_class, "_is_stateful", False):
        return f"{config.model_type} carries a recurrent state from token to token"
    foreign = sorted(set(getattr(config, "layer_types", None) or ()) - _ISOLATING_LAYER_TYPES)
    if foreign:
        return f"{config.model_type} has layers of type {', '.join(foreign)}"
    return None


def _config_from_folder(folder: Path) -> PreTrainedConfig:
    refuse_adapter(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"model.pretrained: {folder} has no config.json; expected a local Hugging Face model folder")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # Transformers' validators raise their own kinds
        text = " ".join(str(error).split())
        raise UserError(f"model.pretrained: {folder / 'config.json'} is no configuration: {text}") from None
