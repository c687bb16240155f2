"""Rotary positions of a longer context: a checkpoint computes what Transformers does with the same settings by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.models.small import small_config
from turbolm.errors import UserError
from turbolm.models.build import build_config, build_model
from turbolm.models.settings import ropes_by_length
from turbolm.recipe.contract import contract_of, fingerprint
from turbolm.recipe.load import load_recipe
from turbolm.recipe.schema import Model

POSITIONS, LONG = 16, 48
TOKENS = torch.arange(LONG)[None]
FACTORS = [1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0]

# What the recipe says, what a config.json says for it, and its positions.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "theta": ({"rope_type": "default", "rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}, 48),
    "linear": (
        {"rope_type": "linear", "factor": 3},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
        48,
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "beta_fast": 8},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8},
        64,
    ),
    "llama3": (
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 4, "original_max_position_embeddings": 16,
         "low_freq_factor": 1, "high_freq_factor": 4},
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 16,
         "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        64,
    ),
    "longrope": (
        {"rope_type": "longrope", "factor": 3, "long_factor": FACTORS, "original_max_position_embeddings": 16},
        {"rope_type": "longrope", "rope_theta": 1e4, "factor": 3.0, "long_factor": FACTORS, "short_factor": FACTORS,
         "original_max_position_embeddings": 16},
        48,
    ),
}  # fmt: skip


def save_checkpoint(model_type: str, folder: Path) -> Path:
    torch.manual_seed(0)
    config = small_config(model_type, max_position_embeddings=POSITIONS)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def extended(folder: Path, rope: dict[str, Any], seq_len: int = LONG) -> PreTrainedModel:
    section = Model(pretrained=str(folder), rope_parameters=rope)
    config = build_config(section, seq_len=seq_len, vocab_size=128, bos_token_id=0, eos_token_id=0)
    return build_model(section, config, seed=0, attention="eager").eval()


def by_hand(folder: Path, rope: dict[str, Any], positions: int) -> PreTrainedModel:
    """Transformers' own model of the same weights, with these settings in its configuration."""
    values = json.loads((folder / "config.json").read_text())
    values |= {"rope_parameters": rope, "max_position_embeddings": positions}
    config = AutoConfig.for_model(**values)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, config=config, attn_implementation="eager")
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel, length: int = LONG) -> torch.Tensor:
    return model(TOKENS[:, :length], use_cache=False).logits


def differ(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind: str, llama: Path, tmp_path: Path) -> None:
    rope, settings, positions = KINDS[kind]
    model = extended(llama, rope)
    assert model.config.max_position_embeddings == positions
    assert differ(logits(model), logits(by_hand(llama, settings, positions))) < 1e-6
    assert differ(logits(model), logits(AutoModelForCausalLM.from_pretrained(llama).eval())) > 1e-3
    # A document alone is what it is within a longer sequence, which packing needs.
    assert not ropes_by_length(model.config)
    assert differ(logits(model)[:, :10], logits(model, 10)) < 1e-5
    # The configuration that a run saves, and exports, is the extended one.
    model.config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["max_position_embeddings"] == positions
    assert saved["rope_parameters"] == settings


def test_layers_of_full_attention_are_extended_where_others_see_a_window(tmp_path: Path) -> None:
    folder = save_checkpoint("gemma3_text", tmp_path)
    own = json.loads((folder / "config.json").read_text())["rope_parameters"]
    linear = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    model = extended(folder, linear)
    assert differ(logits(model), logits(by_hand(folder, own | {"full_attention": linear}, LONG))) < 1e-6
    assert model.config.rope_parameters["sliding_attention"] == own["sliding_attention"]


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic", "factor": 4}, "no dynamic: its factors follow the longest sequence of a batch"),
        (
            {"rope_type": "longrope", "factor": 3, "original_max_position_embeddings": 16, "long_factor": FACTORS,
             "short_factor": [1.0] * 8},
            "no other short_factor than long_factor: its factors follow the longest sequence",
        ),
        ({"rope_type": "yarn", "factor": 4}, "expected original_max_position_embeddings with rope_type yarn"),
        ({"rope_type": "linear", "factor": 4, "beta_fast": 8}, "expected no beta_fast with rope_type linear"),
        ({"rope_type": "linear", "factor": 0.5}, "greater than or equal to 1"),
        ({"rope_type": "default"}, "expected rope_theta with rope_type default"),
        ({"rope_theta": 1e6}, "rope_type"),  # else another base would drop a checkpoint's stretching unsaid
    ],
)  # fmt: skip
def test_what_packing_cannot_have_is_refused(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Model(pretrained="somewhere", rope_parameters=rope)


def test_a_model_that_cannot_take_them_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.rope_parameters: gpt2 has no rotary positions"):
        extended(save_checkpoint("gpt2", tmp_path), {"rope_type": "default", "rope_theta": 1e6}, seq_len=8)
    short = {"rope_type": "longrope", "factor": 3, "long_factor": [1.0], "original_max_position_embeddings": 16}
    with pytest.raises(UserError, match=r"model\.rope_parameters: .*must have length 8"):
        extended(llama, short)
    with pytest.raises(UserError, match=r"fewer than 48; model\.rope_parameters extends rotary ones"):
        build_config(Model(pretrained=str(llama)), seq_len=48, vocab_size=128, bos_token_id=0, eos_token_id=0)
    with pytest.raises(ValueError, match="of a new model under `config`"):
        Model(config={"model_type": "llama"}, rope_parameters={"rope_type": "default", "rope_theta": 1e6})


def test_the_contract_holds_them_and_older_contracts_stay(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"name: r\nmodel: {{pretrained: {llama}}}\ntokenizer: {{path: {llama}}}\n"
        "data: {seq_len: 16}\ntrain: {budget: 1M, global_batch: 1024}\n"
    )
    before = contract_of(load_recipe(file))
    after = contract_of(load_recipe(file, ["model.rope_parameters={rope_type: default, rope_theta: 2e6}"]))
    assert after["model"]["rope_parameters"]["rope_theta"] == 2e6
    assert fingerprint(before) != fingerprint(after)
    del before["model"]["rope_parameters"]
    assert fingerprint(before) == fingerprint(contract_of(load_recipe(file)))
