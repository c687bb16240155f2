"""Count the parameters of a recipe's model: by formula, or once in a separate process. Torch-free."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from turbolm.errors import UserError, did_you_mean
from turbolm.files import load_json, write_atomic
from turbolm.hub import cached_config, check_revisions, config_command
from turbolm.plan.parameters import ModelSize, estimate_size, has_no_experts
from turbolm.plan.plain_config import is_plain
from turbolm.recipe.contract import canonical_json
from turbolm.recipe.model_config import is_dropout, text_part
from turbolm.recipe.paths import use_path
from turbolm.recipe.rope import too_few_positions
from turbolm.recipe.schema import Model, Recipe

MODEL_CONFIG_FILE = "model_config.json"  # beside a recipe: the config.json of a checkpoint on another machine
_COUNT_TIMEOUT_SEC = 300
_EXAMINERS = (
    *(f"models/{name}.py" for name in ("config", "config_errors", "config_names", "config_source", "count", "size")),
    "recipe/model_config.py",
)


@dataclass(frozen=True)
class Answer:
    """The result of building a configuration with Transformers."""

    problems: tuple[str, ...]  # one line each; if there are any, size is None
    notes: tuple[str, ...]
    size: ModelSize | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Answer:
        """Parse the output of `to_json`. Raises ValueError or TypeError for anything else."""
        answer = json.loads(text)
        size = answer["size"] and ModelSize(**answer["size"])
        return cls(tuple(answer["problems"]), tuple(answer["notes"]), size)


Examiner = Callable[[Mapping[str, Any] | None, Mapping[str, Any] | None], Answer]


@dataclass(frozen=True)
class ModelFacts:
    """What is known about the model of a recipe; nothing if its folder is not on this machine."""

    config: dict[str, Any] | None
    size: ModelSize | None
    assumed: tuple[str, ...] = ()  # assumptions for planning; training knows the real values
    notes: tuple[str, ...] = ()


def examine_model(recipe: Recipe, recipe_file: str | Path, examine: Examiner | None = None) -> ModelFacts:
    """Check the model's configuration and count its parameters, for `plan`, `submit` and `train`.

    Transformers does the check in a separate process, unless `examine` does it here; the result is cached in the
    recipe's cache. A plain configuration is recognized without it. Raises UserError with all problems.
    """
    model = recipe.model
    config, assumed = read_model_config(recipe, recipe_file)
    facts = ModelFacts(config, None, tuple(assumed))
    if config is None:
        return facts
    _check_routers(recipe, config)
    if model.pretrained is not None:
        size = _shipped_size(config, model.dropout) or size_model(config, recipe.execution.cache_dir)
        return replace(facts, size=size, notes=_position_notes(recipe, config))
    if model.config_file is None and is_plain(config):
        return replace(facts, size=_formula(config))
    if model.config_file is None and (shipped := _shipped_size(config, model.dropout)):
        return replace(facts, size=shipped)
    _check_model_type(model.config_file, config)
    rows = {"vocab_size": config["vocab_size"]} if "vocab_size" in config else {}
    answer = _ask(model.config_file, {**(model.config or {}), **rows}, recipe.execution.cache_dir, examine)
    if answer.problems:
        raise UserError("\n".join(answer.problems))
    return replace(facts, size=answer.size, notes=(*_differences(recipe), *answer.notes))


def _check_routers(recipe: Recipe, config: Mapping[str, Any]) -> None:
    """Raise UserError for settings of routers where the type certainly has no experts; of others the ranks ask."""
    if not has_no_experts(config):
        return
    for key, off in (("router_aux_loss", "config or off"), ("router_bias_update", "0")):
        value = getattr(recipe.train, key)
        if isinstance(value, int | float) and value:
            raise UserError(f"train.{key}: {value:g} cannot act: {config['model_type']} has no experts; set {off}")


def check_model(recipe: Recipe, recipe_file: str | Path, examine: Examiner | None = None) -> tuple[str, ...]:
    """Refuse at a start what `plan` refuses about a model with new weights; return notes for the log.

    Raises UserError with all problems, one per line.
    """
    if recipe.model.pretrained is not None:
        return ()
    try:
        return examine_model(recipe, recipe_file, examine).notes
    except UserError as error:
        raise UserError("\n".join(f"{recipe_file}: {line}" for line in str(error).splitlines())) from None


def read_model_config(
    recipe: Recipe, recipe_file: str | Path, vocab_size: int | None = None
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the Hugging Face configuration that will be trained, and the assumptions made.

    `vocab_size` is that of the prepared data, where they are there; else a tokenizer to train has as many as it may.
    None when the recipe starts from a folder that is not on this machine. Raises UserError.
    """
    check_revisions(recipe)
    model, train = recipe.model, recipe.tokenizer.train
    config = model.full_config
    if config is not None:
        asked = vocab_size or (train.vocab_size if train is not None else None)
        rows = config.get("vocab_size", asked)
        if isinstance(rows, int):
            return {**config, "vocab_size": padded_vocab_size(model, rows)}, []
        return config, ["model.config names no vocab_size: the model type's default is assumed"]
    folder = use_path(str(model.pretrained), "model.pretrained")
    cached = cached_config(model)
    beside = Path(recipe_file).parent / MODEL_CONFIG_FILE
    if folder.is_dir() or cached is not None:
        added = ["rows that model.resize_embeddings adds are not counted"] if model.resize_embeddings else []
        return _read_json(folder / "config.json" if cached is None else cached), added
    if beside.is_file():
        return _read_json(beside), [f"{folder} is not on this machine: its size is read from {beside}"]
    command = config_command(model)
    hint = f" (as a hub name, its config.json is enough: {command})" if command else ""
    return None, [f"{folder} is not on this machine: the size of the model is unknown{hint}"]


def _position_notes(recipe: Recipe, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what becomes of a checkpoint's positions. Raises UserError if they are fewer than the recipe needs."""
    rope, seq_len = recipe.model.rope_parameters, recipe.data.seq_len
    own = config.get("max_position_embeddings", config.get("n_positions"))
    if type(own) is not int or own <= 0:
        return ()
    if rope is not None:
        there = f"positions for {rope.positions(own, seq_len)} tokens (the checkpoint has {own})"
        base = f" with rope_theta {rope.rope_theta:g}" if rope.rope_theta else ""
        return (f"model.rope_parameters: {rope.rope_type}{base}, {there}",)
    if own < seq_len:
        raise too_few_positions(own, seq_len, pretrained=True)
    return ()


def padded_vocab_size(model: Model, vocab_size: int) -> int:
    """Return the rows of the embedding and the head: the vocabulary, rounded up to `model.pad_vocab_to_multiple`."""
    multiple = model.pad_vocab_to_multiple
    return -(-vocab_size // multiple) * multiple


def size_model(config: Mapping[str, Any], cache_dir: str | Path) -> ModelSize:
    """Return the size of the model that a published `config` describes. Raises UserError if there is no such model.

    Without a formula for its type, the model is built on the meta device, which takes seconds; `cache_dir` caches the
    result.
    """
    size = _formula(config)
    if size is None:
        _check_model_type(config, config)
        answer = _ask(config, None, cache_dir, None)
        if answer.problems or answer.size is None:
            raise UserError("\n".join(answer.problems).replace("model.config_file:", "model.pretrained: config.json:"))
        size = answer.size
    return size


def _shipped_size(config: Mapping[str, Any], dropout: float) -> ModelSize | None:
    """Return the size of a shipped recipe's model, which Transformers built when its profile was recorded."""
    from turbolm.plan.profiles import shipped_profile  # which imports this module

    found = shipped_profile(config, dropout)
    if found is None:
        return None
    by_kind = found.parameters_by_kind()
    return ModelSize(
        total=found.num_parameters,
        embedding=by_kind["embedding"],
        head=by_kind["head"],
        source="counted",
        idle=found.idle_parameters,
        attention_width=int(sum(kind.count * kind.attention_flops_per_pair for kind in found.layers)) // 4,
        matmul=found.num_parameters - found.idle_parameters - (0 if found.is_tied else by_kind["embedding"]),
    )


def _formula(config: Mapping[str, Any]) -> ModelSize | None:
    try:
        return estimate_size(config)
    except ValueError as error:
        raise UserError(str(error)) from None


def _differences(recipe: Recipe) -> list[str]:
    """Yield notes: settings of the file that the recipe replaces, and dropouts that come from the file."""
    file, config = recipe.model.config_file, recipe.model.config or {}
    if file is None:
        return []
    part = text_part(file, config.get("model_type"))
    shown = [f"{name} ({part[name]})" for name in config if name in part and not isinstance(part[name], (dict, list))]
    lines = [f"model.config overrides the file's {', '.join(shown)}"] if shown else []
    dropouts = [name for name in recipe.model.full_config or {} if is_dropout(name) and name not in config]
    if dropouts:
        named = ", ".join(f"{name} {part[name]}" for name in dropouts)
        lines.append(f"model.config_file: {named} instead of model.dropout {recipe.model.dropout:g}")
    return lines


def _ask(
    file: Mapping[str, Any] | None, config: Mapping[str, Any] | None, cache_dir: str | Path, examine: Examiner | None
) -> Answer:
    """Return Transformers' result, from the cache if these versions computed it before."""
    text = canonical_json({"file": file, "config": config})
    cache = answer_file(cache_dir, text, ("transformers",), _EXAMINERS, ".json")
    try:
        return Answer.from_json(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        answer = examine(file, config) if examine is not None else _run_examiner(text)
        _keep(cache, answer)
        return answer


def answer_file(
    cache_dir: str | Path, request: str, packages: Iterable[str], modules: Iterable[str], suffix: str
) -> Path:
    """Return where the answer to a request is cached: by these packages' versions and the modules that answer it."""
    digest = hashlib.sha256(f"{' '.join(map(importlib.metadata.version, packages))} {request}".encode())
    for module in modules:
        digest.update((Path(__file__).parent.parent / module).read_bytes())
    return use_path(str(cache_dir), "execution.cache_dir") / "models" / f"{digest.hexdigest()[:32]}{suffix}"


def _check_model_type(file: Mapping[str, Any] | None, config: Mapping[str, Any]) -> None:
    """Refuse model types unknown to transformers at once: importing it to check takes seconds."""
    known = _model_types("auto_mappings.py", "CONFIG_MAPPING_NAMES")
    model_type = str(config.get("model_type"))
    if known and model_type not in known:
        hint = did_you_mean(model_type, known)
        key = "model.config.model_type" if file is None else "model.config_file: model_type"
        raise UserError(f"{key}: transformers knows no causal language model {model_type[:100]!r}{hint}")


def causal_model_types() -> list[str]:
    """Return every model type for which transformers has a causal language model."""
    return _model_types("modeling_auto.py", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")


def _model_types(source: str, table: str) -> list[str]:
    """Return the keys of a table in transformers' source, read without importing it; empty if it looks unexpected."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return []
    path = Path(spec.submodule_search_locations[0]) / "models/auto" / source
    try:
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Assign) and table in map(ast.unparse, statement.targets):
                assert isinstance(statement.value, ast.Call)
                return [str(name) for name, _ in ast.literal_eval(statement.value.args[0])]
    except (OSError, ValueError, SyntaxError, TypeError, IndexError, AssertionError):
        pass
    return []


def _run_examiner(request: str) -> Answer:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "turbolm.models.count"],
            input=request,
            capture_output=True,
            text=True,
            timeout=_COUNT_TIMEOUT_SEC,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"model.config: building it takes more than {_COUNT_TIMEOUT_SEC} s even without weights; make it smaller"
        ) from None
    try:
        return Answer.from_json(done.stdout.splitlines()[-1])
    except (ValueError, TypeError, KeyError, IndexError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"model.config: its parameters cannot be counted: {last[:300]}") from None


def _keep(cache: Path, answer: Answer) -> None:
    try:
        write_atomic(cache, answer.to_json())
    except OSError:
        pass  # computed again next time


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = load_json(path)
    except OSError:
        raise UserError(f"model.pretrained: {path} is missing; expected a local Hugging Face model folder") from None
    except ValueError as error:
        raise UserError(f"model.pretrained: {path} is not JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise UserError(f"model.pretrained: {path} names no model_type")
    return content
