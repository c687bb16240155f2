"""Weight decay acts on matrices and on nothing else."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from turbolm.optim.groups import build_param_groups


@pytest.mark.parametrize(
    ("settings", "decayed"),
    [
        (
            {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "vocab_size": 32},
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"},
        ),
        (
            {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 32},
            {"c_attn", "c_proj", "c_fc"},
        ),
    ],
)  # fmt: skip
def test_matrices_are_decayed_and_norms_biases_and_embeddings_are_not(
    settings: dict[str, object], decayed: set[str]
) -> None:
    values = dict(settings)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(str(values.pop("model_type")), **values))
    matrices, rest = build_param_groups(model, weight_decay=0.3)
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in matrices["params"]} == decayed
    assert all(names[id(p)].endswith("weight") for p in matrices["params"])
    ids = [id(parameter) for group in (matrices, rest) for parameter in group["params"]]
    assert sorted(ids) == sorted(names), "each parameter exactly once"


def test_a_model_of_vectors_has_one_group() -> None:
    groups = build_param_groups(torch.nn.LayerNorm(4), weight_decay=0.1)
    assert [len(group["params"]) for group in groups] == [2]
    assert groups[0]["weight_decay"] == 0.0
