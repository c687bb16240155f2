"""Rows for the tokens that a pretrained model does not know yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from turbolm.errors import UserError
from turbolm.models.build import build_config, build_model
from turbolm.recipe.schema import Model

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TYPES: list[tuple[dict[str, Any], list[str]]] = [  # and its tables with a row for each token
    ({"model_type": "llama", "tie_word_embeddings": False, **SMALL}, ["model.embed_tokens.weight", "lm_head.weight"]),
    ({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}, ["transformer.wte.weight"]),
    ({"model_type": "phi", **SMALL}, ["model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"]),
]


def resized(folder: Path, vocab_size: int, resize: bool = True) -> Any:
    model = Model(pretrained=str(folder), resize_embeddings=resize)
    config = build_config(model, seq_len=8, vocab_size=vocab_size, bos_token_id=0, eos_token_id=0)
    assert config.vocab_size == max(40, vocab_size)
    return build_model(model, config, seed=0, attention="eager")


@pytest.mark.parametrize(("config", "tables"), TYPES, ids=[config["model_type"] for config, _ in TYPES])
def test_new_rows_are_the_mean_of_the_others(config: dict[str, Any], tables: list[str], tmp_path: Path) -> None:
    values = {"vocab_size": 40, **config}
    original = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    if "lm_head.bias" in tables:
        torch.nn.init.normal_(original.lm_head.bias)
    original.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    torch.manual_seed(1)
    drawn = torch.get_rng_state()
    model = resized(tmp_path, 45)
    assert torch.equal(torch.get_rng_state(), drawn)  # the same on ranks that draw other numbers, and nothing is drawn
    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    assert set(weights) == set(saved)
    for name, expected in saved.items():
        assert len(weights[name]) == (45 if name in tables else len(expected))
        np.testing.assert_array_equal(weights[name][: len(expected)], expected)
        for row in weights[name][len(expected) :]:
            np.testing.assert_allclose(row, expected.astype(np.float64).mean(0), rtol=1e-6, atol=1e-8)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (len(tables) == 1) and model.config.vocab_size == 45
    assert model(input_ids=torch.tensor([[44, 0]])).logits.shape == (1, 2, 45)
    assert [len(parameter) for parameter in resized(tmp_path, 40).parameters()] == [
        len(p) for p in original.parameters()
    ]


def test_without_the_key_the_message_names_it(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=40, **SMALL)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"rows for 40 tokens, .* has 45; set model.resize_embeddings: true"):
        resized(tmp_path, 45, resize=False)
