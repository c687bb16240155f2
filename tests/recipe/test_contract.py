"""The contract's fingerprint changes with everything that is learned, and with nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from turbolm.recipe.contract import canonical_json, changed_keys, contract_of, fingerprint
from turbolm.recipe.load import load_recipe
from turbolm.recipe.optimizers import AdamW
from turbolm.recipe.schedules import Cosine
from turbolm.recipe.schema import CONTRACT_SECTIONS, Recipe

BASE = {
    "name": "tiny",
    "model": {"config": {"model_type": "llama", "rope_theta": 500000.0}},
    "tokenizer": {"train": {"vocab_size": 512}},
    "data": {"seq_len": 128, "sources": [{"type": "jsonl", "path": "a"}]},
    "train": {"budget": "2M", "global_batch": 4096},
}
# Tried in order, until one is valid and differs from what the field holds.
CANDIDATES: list[Any] = [
    7, 300, 0.5, 0.25, 200, "3%", "fp32", "single", "sqrt", "refuse", "other", 1, "cpu", "eager", "torch",
    [0.5, 0.6], ["x"], True, 256, False, "off", "continue", "layers", "full", "depth_scaled", "cautious_adamw",
    {"head": 2.0}, {"step": 7, "tokens": 300},
    {"start": 0.5, "end": 0.6},
    {"model_type": "gpt2"}, {"vocab_size": 999}, {}, [{"type": "stdlib"}],
    "exact", "gigatoken", "rowwise", "short", "keep", "wandb",
    "window", {"name": "growth"}, {"start": 128}, "rollback", "skip", {"seeds": 3}, "s3://bucket/runs",
    [{"name": "questions", "path": "a"}], [{"type": "jsonl", "path": "a", "label": "own"}],
]  # fmt: skip
# Fields that exclude one another, so that one alone cannot change.
TOGETHER: dict[str, dict[str, Any]] = {
    "model.config_file": {"config_file": {"model_type": "gpt2", "hidden_size": 8}},  # `config` replaces its type
    "model.pretrained": {"config": None, "pretrained": "x"},
    "model.revision": {"config": None, "pretrained": "x", "revision": "v1"},
    "model.rope_parameters": {
        "config": None,
        "pretrained": "x",
        "rope_parameters": {"rope_type": "linear", "factor": 2},
    },
    "tokenizer.path": {"train": None, "path": "x"},
    "tokenizer.revision": {"train": None, "path": "x", "revision": "v1"},
    "train.max_grad_value": {"max_grad_norm": None, "max_grad_value": 1.0},
    "cluster.slurm": {"slurm": {}},
    "cluster.gpu": {"gpu": "H100-80GB", "gpus_per_node": 8},
    "cluster.gpus_per_node": {"gpu": "H100-80GB", "gpus_per_node": 8},
}


def variants(section: str, name: str) -> Iterator[dict[str, Any]]:
    given: Any = BASE.get(section, {})
    if f"{section}.{name}" in TOGETHER:
        yield BASE | {section: given | TOGETHER[f"{section}.{name}"]}
    for candidate in CANDIDATES:
        yield BASE | {section: given | {name: candidate}}


def changed_recipe(section: str, name: str) -> Recipe:
    """A valid recipe with another value in this one field."""
    old = Recipe.model_validate(BASE)
    for data in variants(section, name):
        try:
            recipe = Recipe.model_validate(data)
        except ValidationError:
            continue
        if getattr(getattr(recipe, section), name) != getattr(getattr(old, section), name):
            return recipe
    raise AssertionError(f"add a value to CANDIDATES that {section}.{name} accepts")


def all_fields() -> list[tuple[str, str]]:
    fields = []
    for section, info in Recipe.model_fields.items():
        if section != "name":
            kind = {"optimizer": AdamW, "schedule": Cosine}.get(section, info.annotation)
            assert isinstance(kind, type)
            fields += [(section, name) for name in kind.model_fields]
    return fields


@pytest.mark.parametrize(("section", "name"), all_fields())
def test_the_fingerprint_follows_the_contract_and_only_that(section: str, name: str) -> None:
    old, new = contract_of(Recipe.model_validate(BASE)), contract_of(changed_recipe(section, name))
    assert (fingerprint(old) != fingerprint(new)) == (section in CONTRACT_SECTIONS)
    changes = [key for key, _, _ in changed_keys(old, new)]
    assert bool(changes) == (section in CONTRACT_SECTIONS)
    assert all(key.startswith(section) for key in changes)


def test_the_name_is_not_part_of_it() -> None:
    renamed = Recipe.model_validate(BASE | {"name": "other"})
    assert contract_of(renamed) == contract_of(Recipe.model_validate(BASE))


def test_spelling_and_order_do_not_change_it(tmp_path: Path) -> None:
    first = """\
name: a
model: {config: {model_type: llama, rope_theta: 500000.0, rms_norm_eps: 1e-5}}
tokenizer: {train: {vocab_size: 512}}
data: {seq_len: 2048, sources: [{type: text, path: a}]}
train: {budget: 2M, global_batch: 4096}
optimizer: {lr: 1e-3, weight_decay: 0}
schedule: {name: wsd, warmup: 2.0%, decay: 1M}
"""
    second = """\
schedule: {decay: 1000000, name: wsd, warmup: 2%}
optimizer: {weight_decay: 0.0, lr: 0.001}
train: {global_batch: 4_096, budget: 2000000}
data: {sources: [{path: [a], type: text}], seq_len: 2Ki}
tokenizer: {train: {vocab_size: 512}}
model: {config: {rms_norm_eps: 0.00001, rope_theta: 5e5, model_type: llama}}
name: b
"""
    contracts = []
    for name, text in (("a", first), ("b", second)):
        (tmp_path / f"{name}.yaml").write_text(text)
        contracts.append(contract_of(load_recipe(tmp_path / f"{name}.yaml")))
    assert fingerprint(contracts[0]) == fingerprint(contracts[1])
    assert changed_keys(*contracts) == []


def test_small_differences_change_it() -> None:
    def of(**schedule: Any) -> str:
        return fingerprint(contract_of(Recipe.model_validate(BASE | {"schedule": schedule})))

    assert of(warmup="12.34567%") != of(warmup="12.34568%")
    assert of(min_lr_ratio=0.1) != of(min_lr_ratio=math.nextafter(0.1, 1))


def test_canonical_json() -> None:
    assert canonical_json({"b": [1, 2.5, None, True], "a": "é"}) == '{"a":"\\u00e9","b":[1,2.5,null,true]}'
    assert canonical_json(1e-8) == "1e-08"
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError):
            canonical_json([value])


def test_fingerprint_is_the_sha256_of_the_canonical_form() -> None:
    # printf '{"a":1}' | sha256sum
    assert fingerprint({"a": 1.0}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"


def test_changed_keys() -> None:
    old = {"a": {"b": 1, "c": [1, 2], "same": 1}, "d": {"e": 1}, "f": True, "gone": 1}
    new = {"a": {"b": 2, "c": [1, 3], "same": 1.0}, "d": None, "f": 1, "new": "x"}
    assert changed_keys(old, new) == [
        ("a.b", 1, 2),
        ("a.c", [1, 2], [1, 3]),
        ("d", {"e": 1}, None),
        ("f", True, 1),
        ("gone", 1, None),
        ("new", None, "x"),
    ]
