"""A small configuration of any causal language model type of Transformers."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TYPES = sorted(AutoModelForCausalLM._model_mapping._model_mapping)
# What Transformers itself cannot build from a small configuration, or without another package.
NOT_BUILT = {
    "cohere_compass_text", "dots3_note", "gemma3n", "gemma4_assistant", "gemma4_unified_assistant", "musicgen",
    "musicgen_melody",
}  # fmt: skip

_SIZES = {
    128: "vocab_size vocab_size_per_layer_input",
    64: """intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_inner n_inner d_ff max_position_embeddings
        n_positions encoder_hash_byte_group_vocab""",
    32: """hidden_size n_embd d_model emb_dim emb_size embedding_size word_embed_proj_dim attention_hidden_size
        moe_intermediate_size shared_expert_intermediate_size image_size pronunciation_vocab_size shape_vocab_size""",
    16: "head_dim global_head_dim v_head_dim q_lora_rank kv_lora_rank patch_size",
    8: """rotary_dim qk_rope_head_dim qk_nope_head_dim mamba_d_state state_size hidden_size_per_layer_input
        num_mel_bins""",
    4: "num_local_experts num_experts n_routed_experts moe_num_experts mamba_n_heads",
    2: """num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_attention_heads n_head
        n_heads num_heads decoder_attention_heads encoder_attention_heads num_key_value_heads num_experts_per_tok""",
    1: "encoder_layers n_group topk_group first_k_dense_replace depth",
    0: "num_kv_shared_layers",
}
_SMALL = {name: size for size, names in _SIZES.items() for name in names.split()} | {"mamba_d_head": 16}
_SPECIAL: dict[str, dict[str, Any]] = {
    "codegen": {"n_head": 4},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2}},
    "dots1": {"n_shared_experts": 1},
    "emu3_text_model": {"pad_token_id": 0},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4},
    "modernbert-decoder": {"pad_token_id": 0},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2},
    "zamba2": {"layer_types": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1, "layer_types": None},
}


def small_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """Two layers of width 32, over 128 tokens."""
    kind = CONFIG_MAPPING[model_type]
    config: PreTrainedConfig = kind(**{**_small_values(kind), **changes})
    return config


def _small_values(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map or {})
    values: dict[str, Any] = {name: size for name, size in _SMALL.items() if name in names}
    for name, part in (kind.sub_configs or {}).items():
        inner = type(getattr(kind(), name, None)) if part is AutoConfig else part
        if inner is not type(None):
            values[name] = {"model_type": inner.model_type, **_small_values(inner)}
    if "pad_token_id" in names:
        values["pad_token_id"] = None
    return {**values, **_SPECIAL.get(kind.model_type, {})}
