"""Documents in one sequence do not see each other, on the models people train; and the check that proves it works."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from turbolm.errors import UserError
from turbolm.models.attention import model_inputs
from turbolm.models.build import (
    build_config,
    build_model,
    carries_state_across_documents,
)
from turbolm.models.isolation import Probe, check_isolation, outputs_that_count
from turbolm.models.recompute import apply_activation_checkpointing
from turbolm.recipe.schema import Model

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2, **SHAPE},
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16, **SHAPE},
    "mistral-sliding": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 6, **SHAPE},
}
LEAKING = {
    "bloom": {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4},  # ALiBi from the attention mask
    "opt": {"model_type": "opt", "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "word_embed_proj_dim": 64},
}  # fmt: skip
VOCAB, SEQ_LEN, SPLIT = 128, 32, 14
CPU = torch.device("cpu")


def make_model(config: dict[str, Any], attention: str, checkpointing: str = "none") -> PreTrainedModel:
    section = Model(config=config)
    completed = build_config(section, seq_len=SEQ_LEN, vocab_size=VOCAB, bos_token_id=0, eos_token_id=0)
    model = build_model(section, completed, seed=0, attention=attention)
    apply_activation_checkpointing(model, checkpointing)
    return model.train()


def packed_sequence(seed: int) -> dict[str, np.ndarray]:
    """Two documents in a sequence; the second is always the same."""
    first = np.random.default_rng(seed).integers(0, VOCAB, SPLIT)
    second = np.random.default_rng(99).integers(0, VOCAB, SEQ_LEN - SPLIT)
    positions = np.concatenate([np.arange(SPLIT), np.arange(SEQ_LEN - SPLIT)])
    return {"input_ids": np.concatenate([first, second])[None], "position_ids": positions[None]}


# Flex attention cannot train on a CPU, and takes 10 s to compile for each model.
KERNELS = [
    *((name, "sdpa") for name in CONFIGS),
    *(pytest.param(name, "flex", marks=pytest.mark.slow) for name in CONFIGS),
]


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize(("name", "attention"), KERNELS)
def test_the_second_document_does_not_see_the_first(name: str, attention: str, checkpointing: str) -> None:
    model = make_model(CONFIGS[name], attention, checkpointing)
    with torch.set_grad_enabled(attention != "flex"):  # torch has no backward pass of flex attention on a CPU
        found = [model(**model_inputs(packed_sequence(seed), attention, CPU)).logits[0, SPLIT:] for seed in (1, 2)]
        assert (found[0] - found[1]).abs().max() <= 1e-6
        alone = {key: value[:, SPLIT:] for key, value in packed_sequence(1).items()}
        separate = model(**model_inputs(alone, attention, CPU)).logits[0]
    assert (found[0] - separate).abs().max() <= 1e-5, "nor does it lose sight of its own past"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cache_would_leak(name: str) -> None:
    """Transformers' default `use_cache` drops the document mask, in training mode too: why we always turn it off."""
    model = make_model(CONFIGS[name], "sdpa")
    inputs = [{**model_inputs(packed_sequence(seed), "sdpa", CPU), "use_cache": True} for seed in (1, 2)]
    found = [model(**values).logits[0, SPLIT:] for values in inputs]
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", LEAKING)
def test_the_check_refuses_models_that_leak(name: str) -> None:
    model = make_model(LEAKING[name], "eager")
    settings = {"vocab_size": VOCAB, "seq_len": SEQ_LEN, "attention": "eager"}
    assert Probe(model, **settings).move_by_neighbors() > 1e-3
    with pytest.raises(UserError, match="data.packing: with eager attention this model lets packed documents see"):
        check_isolation(model, precision="fp32", **settings)
    with pytest.raises(UserError):
        check_isolation(model.to(torch.bfloat16), precision="bf16", **settings)


@pytest.mark.parametrize("config", [LEAKING["bloom"], LEAKING["opt"], CONFIGS["gpt2"]], ids=lambda c: c["model_type"])
def test_outputs_that_start_at_zero_hide_no_leak(config: dict[str, Any]) -> None:
    """Before the first step such a layer adds nothing, so the check looks through random outputs instead."""
    section = Model(config=config, init="zero_outputs")
    completed = build_config(section, seq_len=SEQ_LEN, vocab_size=VOCAB, bos_token_id=0, eos_token_id=0)
    model = build_model(section, completed, seed=0, attention="eager").train()
    settings = {"vocab_size": VOCAB, "seq_len": SEQ_LEN, "attention": "eager", "precision": "fp32"}
    before = Probe(model, vocab_size=VOCAB, seq_len=SEQ_LEN, attention="eager").logits
    with pytest.raises(UserError, match="no token of this model moves the logits after it"):
        check_isolation(model, **settings)
    with outputs_that_count(model, "zero_outputs"), patch.object(torch, "randn", wraps=torch.randn) as randn:
        if config in LEAKING.values():
            with pytest.raises(UserError, match="lets packed documents see"):
                check_isolation(model, **settings)
        else:
            assert check_isolation(model, **settings) <= 1e-6
            assert Probe(model, vocab_size=VOCAB, seq_len=SEQ_LEN, attention="eager").move_by_tokens()[1] > 1e-2
    drawn = [call.args[0] for call in randn.call_args_list]
    assert len(drawn) == len(set(drawn)) == 2, "one for attention and one for the other layers, in all passes"
    assert torch.equal(Probe(model, vocab_size=VOCAB, seq_len=SEQ_LEN, attention="eager").logits, before)


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 8, "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
}  # fmt: skip
PHI3 = {"model_type": "phi3", "max_position_embeddings": 256, "original_max_position_embeddings": 64, "pad_token_id": 0,
        "rope_parameters": LONGROPE, **SHAPE}  # fmt: skip


def check(config: dict[str, Any], seq_len: int = SEQ_LEN, **settings: Any) -> float:
    section = Model(config=config, **settings.pop("model", {}))
    completed = build_config(section, seq_len=seq_len, vocab_size=VOCAB, bos_token_id=0, eos_token_id=0)
    model = settings.pop("change", lambda model: model)(build_model(section, completed, seed=0, attention="eager"))
    settings = {"attention": "eager", "precision": "fp32", "config": model.config, **settings}
    return check_isolation(model.train(), vocab_size=VOCAB, seq_len=seq_len, **settings)


def test_a_neighbours_length_must_not_matter() -> None:
    """In the same sequence, and in another one of the micro-batch."""
    check(PHI3, seq_len=64)  # all its documents get the short factors
    with pytest.raises(UserError, match=r"in phi3 a document's logits follow the length .*set model\.rope_factors"):
        check(PHI3, seq_len=65)
    with pytest.raises(UserError, match=r"set model\.rope_factors: .*, or execution\.micro_batch to data\.seq_len"):
        check(PHI3, seq_len=256, packed=False)
    check(PHI3, seq_len=256, packed=False, num_sequences=1)
    for factors in ("short", "long"):
        assert check(PHI3, seq_len=256, model={"rope_factors": factors}) == 0
    sliding = {"rope_type": "default", "rope_theta": 1e4}
    gemma3 = {"model_type": "gemma3_text", "head_dim": 16, "max_position_embeddings": 256, **SHAPE}
    ropes = {"rope_parameters": {"full_attention": LONGROPE, "sliding_attention": sliding}}
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    with pytest.raises(UserError, match=r"model\.rope_factors"):
        check({**gemma3, **ropes, **layers}, seq_len=256)
    assert check({**gemma3, **ropes, **layers}, seq_len=256, model={"rope_factors": "long"}) == 0


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("config", "cure"),
    [
        ({"model_type": "bert", **SHAPE}, {"is_decoder": True}),
        ({"model_type": "electra", "embedding_size": 32, **SHAPE}, {"is_decoder": True}),
        ({"model_type": "gemma3_text", "head_dim": 16, "use_bidirectional_attention": True, **SHAPE},
         {"use_bidirectional_attention": False}),
    ],
    ids=lambda value: value.get("model_type", ""),
)  # fmt: skip
def test_a_model_that_sees_later_tokens_is_refused(config: dict[str, Any], cure: dict[str, Any], packed: bool) -> None:
    ((key, value),) = cure.items()
    with pytest.raises(UserError, match=rf"sees later tokens .*set `model\.config\.{key}: {str(value).lower()}`"):
        check(config, packed=packed)
    check({**config, **cure}, packed=False)


def with_nan(model: PreTrainedModel) -> PreTrainedModel:
    """NaN in one row of the embedding, for a token of the probe."""
    with torch.no_grad():
        model.get_input_embeddings().weight[:] = torch.nan
    return model


def without_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Weights with which nothing passes from one token to another."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    return model


def with_dropout_that_fails(model: PreTrainedModel) -> PreTrainedModel:
    model.forward = lambda **_: {}["no such thing"]  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_nan, r"the logits of llama are not finite \(NaN or infinite\) before the first step, in fp32"),
        (without_attention, "no token of llama moves the logits after it"),
        (with_dropout_that_fails, "llama cannot be trained with eager attention: KeyError: 'no such thing'"),
    ],
)
def test_what_cannot_be_measured_is_refused(change: Any, message: str) -> None:
    """A NaN passes every comparison, and a model in which nothing moves any other."""
    with pytest.raises(UserError, match=message):
        check(CONFIGS["llama"], change=change)


def test_the_check_leaves_no_trace() -> None:
    """The caller's random numbers go on, and a model with dropout, run as it trains, is measured without its noise."""
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    model = make_model({**CONFIGS["gpt2"], "attn_pdrop": 0.3, "resid_pdrop": 0.3}, "sdpa")
    torch.manual_seed(3)
    settings = {"vocab_size": VOCAB, "seq_len": SEQ_LEN, "attention": "sdpa", "precision": "fp32"}
    assert check_isolation(model, **settings) == 0
    assert torch.equal(torch.rand(3), expected)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_check_passes_models_that_isolate(precision: str) -> None:
    model = make_model(CONFIGS["llama"], "sdpa").to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    settings = {"vocab_size": VOCAB, "seq_len": SEQ_LEN, "attention": "sdpa"}
    assert check_isolation(model, precision=precision, **settings) <= 1e-6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_neither_dropout_nor_experts_look_like_a_leak(precision: str) -> None:
    """Random numbers follow the shape of a pass, and what rounds otherwise may go to another expert."""
    config = {
        "model_type": "mixtral",
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "attention_dropout": 0.5,
        **SHAPE,
    }
    model = make_model(config, "sdpa").to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    check_isolation(model, vocab_size=VOCAB, seq_len=SEQ_LEN, attention="sdpa", precision=precision)
    assert model.training


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 1}, "mamba carries a recurrent state"),
        ({"model_type": "llama", **SHAPE}, None),
    ],
)
def test_recurrent_models_are_known_before_they_run(config: dict[str, Any], reason: str | None) -> None:
    model = make_model(config, "eager")
    found = carries_state_across_documents(model.config, type(model))
    assert found is None if reason is None else reason in str(found)
