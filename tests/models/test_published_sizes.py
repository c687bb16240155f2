"""Parameters of published models: those of the real model on meta, of the profile, of the plan, and as published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from turbolm.models.count import examine
from turbolm.models.profile import _build, _tensors
from turbolm.plan.parameters import estimate_size

PUBLISHED = json.loads((Path(__file__).parent.parent / "fixtures/published_configs.json").read_text())


def _of(model_type: str, hidden: int, inner: int, layers: int, heads: int, vocabulary: int, **others: Any) -> Any:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    sizes = dict(zip(names, (hidden, inner, layers, heads, vocabulary), strict=True))
    return {"model_type": model_type, **sizes, **others}


# Beside those of the fixture: settings as published, and the parameters that their model cards or weights have.
MORE: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-2-7b": (_of("llama", 4096, 11008, 32, 32, 32000), 6_738_415_616),
    "Llama-2-13b": (_of("llama", 5120, 13824, 40, 40, 32000), 13_015_864_320),
    "TinyLlama-1.1B": (_of("llama", 2048, 5632, 22, 32, 32000, num_key_value_heads=4), 1_100_048_384),
    "Mistral-7B-v0.1": (_of("mistral", 4096, 14336, 32, 32, 32000, num_key_value_heads=8), 7_241_732_096),
    "Mixtral-8x7B": (
        _of("mixtral", 4096, 14336, 32, 32, 32000, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2),
        46_702_792_704,
    ),
    "Qwen3-8B": (_of("qwen3", 4096, 12288, 36, 32, 151936, num_key_value_heads=8, head_dim=128), 8_190_735_360),
    "gemma-2-2b": (_of("gemma2", 2304, 9216, 26, 8, 256000, num_key_value_heads=4, head_dim=256), 2_614_341_888),
    "gpt2-xl": ({"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25}, 1_557_611_200),
    "pythia-1b": (_of("gpt_neox", 2048, 8192, 16, 8, 50304, tie_word_embeddings=False), 1_011_781_632),
    "OLMo-2-7B": (_of("olmo2", 4096, 11008, 32, 32, 100352), 7_298_617_344),
    "OLMoE-1B-7B": (
        _of("olmoe", 2048, 1024, 16, 16, 50304, num_experts=64, num_experts_per_tok=8),
        6_919_161_856,
    ),
    "starcoder2-3b": (_of("starcoder2", 3072, 12288, 30, 24, 49152, num_key_value_heads=2), 3_030_371_328),
}


def check(values: dict[str, Any], expected: int | None) -> None:
    config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(config)
    numel = sum(parameter.numel() for parameter in real.parameters())
    assert expected is None or numel == expected
    tensors = list(_tensors(_build(config, "eager", torch.bfloat16)))
    assert sum(tensor.num_parameters for tensor in tensors) == numel
    assert [(one.name, one.shape) for one in tensors] == [(n, tuple(p.shape)) for n, p in real.named_parameters()]
    size = estimate_size(values) or examine(values, None).size  # as a file, which may hold what others need
    assert size is not None and size.total == numel


@pytest.mark.parametrize(
    "name", ["gpt2-xl", *(pytest.param(n, marks=pytest.mark.slow) for n in MORE if n != "gpt2-xl")]
)
def test_a_published_model_has_its_published_parameters(name: str) -> None:
    values, expected = MORE[name]
    check(values, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PUBLISHED))
def test_the_profile_has_the_parameters_of_a_published_configuration(name: str) -> None:
    check(PUBLISHED[name], None)
