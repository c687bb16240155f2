"""A configuration file in a recipe: what it says is what counts, not where it lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from turbolm.recipe.contract import contract_of, fingerprint
from turbolm.recipe.load import RecipeError, dump_recipe, load_recipe
from turbolm.recipe.schema import Recipe

FILE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "rope_theta": 500000.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    "attention_dropout": 0.0,
    "resid_pdrop": 0.1,
    "time_step_limit": [0.0, float("inf")],
    "bos_token_id": 128000,
    "torch_dtype": "bfloat16",
    "prefix": "</s> ",
}
RECIPE = {
    "name": "tiny",
    "tokenizer": {"train": {"vocab_size": 300}},
    "data": {"seq_len": 32, "sources": [{"type": "stdlib"}]},
    "train": {"budget": 6400, "global_batch": 320},
}


def load(folder: Path, **model: Any) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "model": model}), encoding="utf-8")
    return load_recipe(path)


def test_the_contract_holds_what_is_trained_whether_a_file_or_the_recipe_says_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FILE), encoding="utf-8")
    recipe = load(tmp_path, config_file=str(tmp_path), config={"hidden_size": 32, "rope_scaling": {"factor": 4}})
    contract = contract_of(recipe)
    assert contract["model"]["config_file"] is None
    assert contract["model"]["config"] == {
        "model_type": "llama",
        "hidden_size": 32,
        "rope_theta": 500000,
        "rope_scaling": {"rope_type": "llama3", "factor": 4},
        "resid_pdrop": 0.1,
        "time_step_limit": [0, {"__float__": "Infinity"}],
        "prefix": "</s> ",
    }
    assert contract_of(load(tmp_path, config=contract["model"]["config"])) == contract


def test_a_moved_file_is_the_same_contract_and_an_edited_one_another(tmp_path: Path) -> None:
    prints = {}
    for name, changes in (
        ("here", {}),
        ("moved", {}),
        ("saved again", {"transformers_version": "9", "torch_dtype": "float32", "use_cache": False}),
        ("edited", {"hidden_size": 128}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**FILE, **changes}), encoding="utf-8")
        prints[name] = fingerprint(contract_of(load(tmp_path, config_file=str(folder / "config.json"))))
    assert prints["here"] == prints["moved"] == prints["saved again"] != prints["edited"]


def test_what_is_written_down_does_not_need_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FILE), encoding="utf-8")
    recipe = load(tmp_path, config_file=str(tmp_path), config={"hidden_size": 32})
    (tmp_path / "written.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    (tmp_path / "config.json").unlink()
    again = load_recipe(tmp_path / "written.yaml")
    assert again == recipe
    assert again.model.config == {"hidden_size": 32}, "what the file says is not held against the recipe's own names"
    assert contract_of(again) == contract_of(recipe)
    assert dump_recipe(again) == dump_recipe(recipe)


def test_rotary_positions_of_another_type_do_not_keep_the_settings_of_the_file(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    file = {"model_type": "llama", "rope_parameters": rope}
    recipe = load(tmp_path, config_file=file, config={"rope_parameters": {"rope_type": "linear", "factor": 2.0}})
    assert recipe.model.full_config is not None
    assert recipe.model.full_config["rope_parameters"] == {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; expected a published config.json, or its folder"),
        ("{", "not JSON: "),
        ("[1]", "expected a JSON object with a model_type, got list"),
        ("{}", "names no model_type"),
        ('{"model_type": "llama", "hidden_size": ' + "9" * 30 + "}", "a whole number of more than 64 bits"),
        ('{"model_type": "llama", "x": ' + "[" * 50 + "]" * 50 + "}", "more than 12 levels"),
        ('{"model_type": "llama", "x": [' + "1, " * 3000 + "1]}", "which no configuration of a model has"),
        ('{"model_type": "llama", "x": "https://me:hunter22@host/"}', "contains a password, token or key"),
        ('{"model_type": "llama", "x": "\\ud800"}', "surrogates not allowed"),
    ],
)
def test_a_file_that_is_none_is_refused_with_its_place(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, config_file=str(tmp_path / "config.json"))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'recipe.yaml'}:")
    assert f"model.config_file: {tmp_path / 'config.json'}: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_positions_and_rows_of_the_file_are_checked_with_the_rest(tmp_path: Path) -> None:
    file = {"model_type": "llama", "max_position_embeddings": 16, "vocab_size": 100}
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, config_file=file)
    text = str(caught.value)
    assert "data.seq_len: must be at most max_position_embeddings of model.config_file (16), got 32" in text
    assert "model.config_file: vocab_size: must be at least tokenizer.train.vocab_size (300), got 100" in text
    load(tmp_path, config_file=file, config={"max_position_embeddings": 32, "vocab_size": 512})
