"""A small model of the same kind: every width, count and window of a configuration made small, its structure kept."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PreTrainedConfig

from turbolm.recipe.model_config import FEED_FORWARD, KEY_VALUE_HEADS, OTHER_FEED_FORWARD

# The most that a setting of these names may be. They fit together: 4 heads of 16 make a width of 64, and 8 heads of a
# state space its double. Windows and chunks are smaller than the documents of a trial (trial.py), or would do nothing.
_NAMES = {
    512: """vocab_size_per_layer_input ngram_vocab_size_base pronunciation_vocab_size shape_vocab_size
        max_source_positions max_position_embeddings encoder_hash_byte_group_vocab""",
    128: " ".join((*FEED_FORWARD, *OTHER_FEED_FORWARD, "encoder_ffn_dim", "mamba_d_ssm")),
    64: """hidden_size word_embed_proj_dim embedding_size embedding_dim input_embedding_size output_embedding_size
        attention_hidden_size lru_width backbone_hidden_size router_hidden_size""",
    16: """head_dim attention_head_size dim_head d_head v_head_dim qk_nope_head_dim swa_head_dim linear_head_dim
        linear_key_head_dim linear_value_head_dim mamba_d_head mamba_head_dim index_head_dim index_n_heads q_lora_rank
        kv_lora_rank o_lora_rank hidden_size_per_layer_input pronunciation_embed_dim shape_embed_dim ple_embed_dim
        hc_lowrank dim_model_base time_step_rank mamba_dt_rank laurel_rank block_multiple_of adapter_rank
        prompt_mid_dim""",
    8: """qk_rope_head_dim rotary_dim mamba_d_state state_size ssm_state_size mamba_n_heads mamba_num_heads chunk_size
        mamba_chunk_size sliding_window attention_chunk_size window_size local_attention block_size index_topk
        index_block_size rel_extent centroid_intermediate_top_k""",
    4: """num_attention_heads encoder_attention_heads decoder_attention_heads num_decoder_attention_heads num_heads
        swa_num_attention_heads linear_num_heads linear_num_value_heads num_attention_heads_per_layer num_experts
        num_local_experts moe_num_experts zero_expert_num""",
    2: """encoder_layers decoder_layers num_layers num_encoder_layers num_decoder_layers num_blocks num_layers_per_stack
        swa_num_key_value_heads linear_num_key_heads n_groups num_experts_per_tok n_group o_groups index_topk_blocks
        n_layers_per_attn_res_block heads_per_ngram num_buckets ngram_size""",
    1: "topk_group n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers",
    0: "num_kv_shared_layers num_nextn_predict_layers",
}
_SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
_MOST_KINDS = 4  # a list with more different values does not say of what kind each layer is
_SPREADS = "initializer_range", "init_std"
_SPREAD = 0.1  # of initial weights: near 1 / sqrt(width), so that every layer moves the logits

# What the names do not show: sizes that follow from others, patterns over layers, and what a default configuration
# omits although its type cannot be built or run without it.
_LINEAR_THEN_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_CONV_THEN_FULL = {"layer_types": ["conv", "full_attention"]}
_HYBRIDS = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}
_ROBERTAS = "camembert data2vec-text roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl".split()
_SPECIAL: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full"},
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": 16},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 8}},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
    },
    "falcon_h1": {"mamba_d_head": 16},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": [128] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_d_head": 16, **_LINEAR_THEN_FULL},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "lfm2": {"full_attn_idxs": [1], **_CONV_THEN_FULL},
    "lfm2_moe": _CONV_THEN_FULL,
    "inkling_text": {"log_scaling_n_floor": 4},
    "inkling2_text": {"log_scaling_n_floor": 4},
    "llama4_text": {"moe_layers": [1]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "llama_4_scaling_beta": 0.1,
        }
    },
    "modernbert-decoder": {"pad_token_id": 0},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "num_key_value_heads": 1},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"default_language": "en_XX", "pad_token_id": 1},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32, **_HYBRIDS},
    "zamba2": _HYBRIDS,
    **{name: {"pad_token_id": 1} for name in _ROBERTAS},  # none of them runs without one
}


def shrink(config: PreTrainedConfig) -> dict[str, Any]:
    """A mapping for `model.config` that describes a small model of the kind of `config`, without a vocabulary size.

    Two layers, or as many as there are kinds of them; the values that say how they work are kept.
    """
    common = {theirs: ours for ours, theirs in config.attribute_map.items()}  # such as n_embd: hidden_size
    own = {field.name: vars(config).get(field.name) for field in dataclasses.fields(config)}
    values = {common.get(name, name): value for name, value in own.items()}
    layers = _kept_layers(values)
    small: dict[str, Any] = {"model_type": config.model_type}
    for name, value in own.items():
        new = _shrunk(common.get(name, name), value, values, layers)
        if new is not None:
            small[name] = new
    return small | _SPECIAL.get(config.model_type, {})


def _shrunk(name: str, value: Any, values: dict[str, Any], layers: list[int]) -> Any:
    """The small value of one setting, None to leave it out."""
    if isinstance(value, PreTrainedConfig):
        return shrink(value)
    if isinstance(value, list | tuple) and len(value) == values.get("num_hidden_layers"):
        return [min(value[layer], _SIZES[name]) if name in _SIZES else value[layer] for layer in layers]
    if name in _SPREADS and isinstance(value, float):
        return _SPREAD
    if name == "is_decoder":
        return True
    if name == "num_hidden_layers":
        return len(layers)
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    if name in KEY_VALUE_HEADS:
        return 4 if value == values.get("num_attention_heads") else min(value, 2)
    return min(value, _SIZES[name]) if name in _SIZES else None


def _kept_layers(values: dict[str, Any]) -> list[int]:
    """The first layer of each kind, and two at least."""
    num_layers = values.get("num_hidden_layers") or 2
    lists = [list(value) for value in values.values() if isinstance(value, list | tuple) and len(value) == num_layers]
    by_kind = [kinds for kinds in lists if len(set(map(str, kinds))) <= _MOST_KINDS]
    kept = {kinds.index(kind) for kinds in by_kind for kind in kinds}
    others = [layer for layer in range(num_layers) if layer not in kept]
    return sorted([*kept, *others[: max(0, 2 - len(kept))]])
