"""How many parameters a recipe's model has: by formula, or counted once in a process of its own. Torch-free."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from turbolm.errors import EXIT_BAD_INPUT, UserError
from turbolm.plan.parameters import estimate_parameters, read_architecture
from turbolm.recipe.contract import canonical_json
from turbolm.recipe.schema import Model, Recipe

MODEL_CONFIG_FILE = "model_config.json"  # beside a recipe: the config.json of a checkpoint that is elsewhere
_COUNT_TIMEOUT_SEC = 300


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model, each weight counted once."""

    total: int
    embedding: int  # the token embedding, and the positions where they are learned
    head: int  # the output projection; 0 when it is the token embedding
    source: str  # "formula" or "counted"
    idle: int  # weights of experts that a token does not pass through
    attention_width: int  # heads x head size, of all layers together

    @property
    def matmul(self) -> int:
        """Weights a token is multiplied with: all but idle experts and the embedding, which is the head when tied."""
        return self.total - self.idle - (self.embedding if self.head else 0)


def read_model_config(recipe: Recipe, recipe_file: str | Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The Hugging Face configuration that will be trained, and what had to be assumed.

    None when the recipe starts from a folder that is not on this machine. Raises UserError.
    """
    model, train = recipe.model, recipe.tokenizer.train
    if model.config is not None:
        vocab_size = model.config.get("vocab_size", train.vocab_size if train is not None else None)
        if isinstance(vocab_size, int):
            return {**model.config, "vocab_size": padded_vocab_size(model, vocab_size)}, []
        return dict(model.config), ["model.config names no vocab_size: the model type's default is assumed"]
    folder = Path(str(model.pretrained))
    beside = Path(recipe_file).parent / MODEL_CONFIG_FILE
    if folder.is_dir():
        return _read_json(folder / "config.json"), []
    if beside.is_file():
        return _read_json(beside), [f"{folder} is not on this machine: its size is taken from {beside}"]
    return None, [f"{folder} is not on this machine: the size of the model is not known"]


def padded_vocab_size(model: Model, vocab_size: int) -> int:
    """Rows of the embedding and the head: the vocabulary, rounded up to `model.pad_vocab_to_multiple`."""
    multiple = model.pad_vocab_to_multiple
    return -(-vocab_size // multiple) * multiple


def size_model(config: Mapping[str, Any], cache_dir: str | Path) -> ModelSize:
    """The size of the model that `config` describes. Raises UserError when there is no such model.

    Without a formula for its type the model is built on the meta device, which takes seconds; `cache_dir` keeps the
    answer.
    """
    try:
        counts = estimate_parameters(config)
    except ValueError as error:
        raise UserError(str(error)) from None
    if counts is not None:
        shape = read_architecture(config)
        width = shape.num_layers * shape.attention_width if shape else 0
        return ModelSize(counts.total, counts.embedding, counts.head, "formula", idle=0, attention_width=width)
    _check_model_type(str(config.get("model_type")))
    text = canonical_json(config)
    version = importlib.metadata.version("transformers")
    key = hashlib.sha256(f"{version} {text}".encode()).hexdigest()
    cache = Path(cache_dir) / "parameters" / f"{key[:32]}.json"
    try:
        return ModelSize(**json.loads(cache.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        size = ModelSize(**_count(text))
        _keep(cache, size)
        return size


def _check_model_type(model_type: str) -> None:
    """Refuse at once what transformers has no causal language model for: importing it to ask takes seconds."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return
    known = _causal_model_types(Path(spec.submodule_search_locations[0]) / "models/auto/modeling_auto.py")
    if known and model_type not in known:
        near = difflib.get_close_matches(model_type[:100], known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"model.config.model_type: transformers knows no causal language model {model_type[:100]!r}{hint}"
        )


def _causal_model_types(source: Path) -> list[str]:
    """The keys of transformers' own table, read without running it; none where it is not as expected."""
    try:
        statements = ast.parse(source.read_text(encoding="utf-8")).body
        for statement in statements:
            if isinstance(statement, ast.Assign) and "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES" in map(
                ast.unparse, statement.targets
            ):
                assert isinstance(statement.value, ast.Call)
                return [str(name) for name, _ in ast.literal_eval(statement.value.args[0])]
    except (OSError, ValueError, SyntaxError, TypeError, IndexError, AssertionError):
        pass
    return []


def _count(config_text: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "turbolm.models.count"],
        input=config_text,
        capture_output=True,
        text=True,
        timeout=_COUNT_TIMEOUT_SEC,
        check=False,
    )
    if done.returncode == EXIT_BAD_INPUT:
        raise UserError(done.stderr[done.stderr.rfind("turbolm: ") :].removeprefix("turbolm: ").strip())
    if done.returncode:
        raise UserError(f"model.config: its parameters cannot be counted:\n{done.stderr[-1000:].strip()}")
    counts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return counts


def _keep(cache: Path, size: ModelSize) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        new = cache.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(asdict(size)), encoding="utf-8")
        new.replace(cache)
    except OSError:
        pass  # counted again next time


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"model.pretrained: {path} is missing; expected a local Hugging Face model folder") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"model.pretrained: {path} is not JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise UserError(f"model.pretrained: {path} names no model_type")
    return content
