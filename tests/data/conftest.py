"""A small corpus, its recipe and its token store, built once for each test process."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from turbolm.data.prepare.build import prepare
from turbolm.data.store.token_store import TokenStore, open_store
from turbolm.recipe.schema import Recipe

WORDS = ["the", "cat", "sat", "on", "mat", "looked", "moon", "über", "Straße", "猫", "🙂", "1234", "= x + y", "\n\t"]


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of long-tailed lengths, all different."""
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(WORDS, k=1 + int(rng.paretovariate(0.8)) % 400)) for i in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def make_recipe(cache: Path, sources: list[dict[str, Any]], *, validation: float = 0.1, **tokenizer: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "model": {"config": {"model_type": "llama"}},
            "tokenizer": tokenizer or {"train": {"vocab_size": 300}},
            "data": {"seq_len": 64, "sources": tuple(sources), "validation": validation},
            "train": {"budget": 64000, "global_batch": 640},
            "execution": {"cache_dir": str(cache)},
        }
    )


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(300)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "texts.jsonl", texts)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> TokenStore:
    """Read only: tests that change files build their own."""
    recipe = make_recipe(tmp_path_factory.mktemp("cache"), [{"type": "jsonl", "path": str(corpus)}])
    return open_store(prepare(recipe, num_workers=1), verify="full")
