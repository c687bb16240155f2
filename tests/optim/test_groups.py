"""Weight decay acts on matrices and on nothing else; Muon gets every hidden matrix and no embedding."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from turbolm.optim.groups import build_param_groups, group_table
from turbolm.recipe.optimizers import LrMultipliers, Muon


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


LLAMA = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
         "num_attention_heads": 2, "vocab_size": 32}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 32}
EXPERTS = {**LLAMA, "model_type": "mixtral", "num_local_experts": 3, "num_key_value_heads": 2}
MAMBA = {"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 32}


@pytest.mark.parametrize(
    ("settings", "others"),
    [
        (LLAMA, {"model.embed_tokens.weight", "lm_head.weight"}),
        ({**LLAMA, "tie_word_embeddings": True}, {"model.embed_tokens.weight"}),
        (GPT2, {"transformer.wte.weight", "transformer.wpe.weight"}),
        (EXPERTS, {"model.embed_tokens.weight", "lm_head.weight"}),
        (MAMBA, {"backbone.embeddings.weight", "backbone.layers.0.mixer.conv1d.weight",
                 "backbone.layers.0.mixer.A_log"}),
    ],
    ids=["llama", "tied", "gpt2", "mixtral", "mamba"],
)  # fmt: skip
def test_muon_gets_every_matrix_but_embeddings_and_head(settings: dict[str, object], others: set[str]) -> None:
    values = dict(settings)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(str(values.pop("model_type")), **values))
    groups = build_param_groups(model, 0.1, LrMultipliers(embeddings=0.5, head=2.0), assembled=("matrices",))
    orthogonal = [group for group in groups if group["assembled"]]
    assert len(orthogonal) == 1
    shapes = {name: parameter.dim() for name, parameter in model.named_parameters()}
    assert set(orthogonal[0]["tensor_names"]) == {name for name, dims in shapes.items() if dims >= 2} - others
    rates = {name: group["lr_scale"] for group in groups for name in group["tensor_names"]}
    decays = {name: group["weight_decay"] for group in groups for name in group["tensor_names"]}
    assert rates.keys() == shapes.keys()
    for name in rates:
        is_embedding = "embed" in name or "wte" in name or "wpe" in name
        assert rates[name] == (0.5 if is_embedding else 2.0 if name.startswith("lm_head") else 1.0)
        is_vector = shapes[name] < 2 or name.endswith("A_log")
        assert decays[name] == (0.0 if is_embedding or is_vector else 0.1)


def test_the_table_shows_who_updates_what() -> None:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**{**LLAMA, "tie_word_embeddings": False})  # type: ignore[arg-type]
    )
    table = group_table("muon", build_param_groups(model, 0.1, LrMultipliers(head=0.5), assembled=("matrices",)))
    assert [line.split() for line in table.splitlines()] == [
        "group updated by lr x decay tensors names".split(),
        "matrices muon 1 0.1 14 model.layers.0.self_attn.q_proj.weight ... model.layers.1.mlp.down_proj.weight".split(),
        "head adamw 0.5 0.1 1 lm_head.weight".split(),
        "embeddings, vectors adamw 1 0 6 model.embed_tokens.weight ... model.norm.weight".split(),
    ]


def test_peak_rates_of_muon_are_those_of_the_recipe_whatever_its_lr() -> None:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**{**LLAMA, "tie_word_embeddings": False})  # type: ignore[arg-type]
    )
    peaks = {"matrices": 1e-2, "vectors": 4e-3}
    muon = Muon.model_validate({"name": "muon", "lr": 2e-3, "peak_lrs": peaks, "lr_multipliers": {"vectors": 2}})
    groups = build_param_groups(model, 0.1, muon.lr_scales, assembled=("matrices",))
    rates = {name: 2e-3 * group["lr_scale"] for group in groups for name in group["tensor_names"]}
    assert rates["model.layers.0.mlp.up_proj.weight"] == pytest.approx(1e-2)
    assert rates["model.norm.weight"] == pytest.approx(2 * 4e-3)
    assert rates["model.embed_tokens.weight"] == rates["lm_head.weight"] == 2e-3
