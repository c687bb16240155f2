"""What one part of a recipe demands of another, as far as it can be known without a machine.

Each rule sees the values that are valid by themselves, so that these findings come together with all the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from turbolm.recipe.messages import Finding, describe
from turbolm.recipe.schema import Recipe, Section

Values = Mapping[str, Any]  # by dotted key; a value that is missing or not valid is None

_GPT2_POSITIONS = 1024  # its default; the one model type here with a table of positions
_KEYS = (
    "model.config",
    "tokenizer.train",
    "data.seq_len",
    "train.budget",
    "train.global_batch",
    "train.precision",
    "execution.zero_stage",
    "execution.offload_optimizer",
    "execution.micro_batch",
)


def check_recipe(recipe: Recipe) -> list[Finding]:
    """The findings of every rule on a valid recipe."""
    values = {}
    for key in _KEYS:
        section, _, name = key.partition(".")
        values[key] = getattr(getattr(recipe, section), name)
    return _findings(values)


def check_values(data: Mapping[str, Any]) -> list[Finding]:
    """The findings of every rule on what is valid of `data`, a recipe as plain values."""
    return _findings({key: _valid_value(data, key) for key in _KEYS})


def not_whole_bins(tokens: int, seq_len: int) -> str:
    """What to say of a number of tokens that is not a multiple of `seq_len`."""
    below = tokens // seq_len * seq_len
    nearest = f"{below} and {below + seq_len}" if below else f"{seq_len}"
    return f"must be a multiple of data.seq_len ({seq_len}), got {tokens}; nearest: {nearest}"


def _findings(values: Values) -> list[Finding]:
    return [Finding(tuple(key.split(".")), message) for rule in _RULES for key, message in rule(values)]


def _valid_value(data: Mapping[str, Any], key: str) -> Any:
    section_name, _, name = key.partition(".")
    section = Recipe.model_fields[section_name].annotation
    assert isinstance(section, type)
    assert issubclass(section, Section)
    field = section.model_fields[name]
    given = data.get(section_name, {})
    if not isinstance(given, Mapping) or name not in given:
        return None if field.is_required() else field.get_default()
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]
        return adapter.validate_python(given[name], strict=True)
    except ValidationError:
        return None


def _whole_bins(values: Values) -> Iterator[tuple[str, str]]:
    """A batch and a micro-batch are made of whole bins."""
    seq_len = values["data.seq_len"]
    for key in ("train.global_batch", "execution.micro_batch"):
        tokens = values[key]
        if seq_len and isinstance(tokens, int) and tokens % seq_len:
            yield key, not_whole_bins(tokens, seq_len)


def _sizes(values: Values) -> Iterator[tuple[str, str]]:
    batch, budget, micro_batch = (values[k] for k in ("train.global_batch", "train.budget", "execution.micro_batch"))
    if batch and budget and budget < batch:
        yield "train.budget", f"must be at least one step, train.global_batch ({batch}), got {budget}"
    if batch and isinstance(micro_batch, int) and micro_batch > batch:
        yield "execution.micro_batch", f"must be at most train.global_batch ({batch}), got {micro_batch}"


def _zero_stage(values: Values) -> Iterator[tuple[str, str]]:
    stage, precision = values["execution.zero_stage"], values["train.precision"]
    if stage == 0 and precision in ("bf16", "fp16"):
        yield (
            "execution.zero_stage",
            f"must be 1, 2 or 3 with train.precision {precision}, got 0: DeepSpeed's ZeRO stage 0 keeps no fp32 "
            "weights that a checkpoint could read; set zero_stage: 1, or train.precision: fp32",
        )
    if stage == 0 and values["execution.offload_optimizer"]:
        yield "execution.zero_stage", "must be 1, 2 or 3 with execution.offload_optimizer, got 0"


def _positions(values: Values) -> Iterator[tuple[str, str]]:
    """A model sees no position beyond its table or its rotary range."""
    config, seq_len = values["model.config"], values["data.seq_len"]
    names = ("max_position_embeddings", "n_positions")
    if config and config.get("model_type") == "gpt2" and not any(name in config for name in names):
        config = config | {"n_positions": _GPT2_POSITIONS}
    for name in names:
        if not config or name not in config:
            continue
        positions = config[name]
        if not _is_count(positions):
            yield f"model.config.{name}", f"expected a whole number, got {describe(positions)}"
        elif seq_len and seq_len > positions:
            yield "data.seq_len", f"must be at most model.config.{name} ({positions}), got {seq_len}"


def _vocabulary(values: Values) -> Iterator[tuple[str, str]]:
    config, tokenizer = values["model.config"], values["tokenizer.train"]
    if not config or "vocab_size" not in config:
        return
    vocab_size = config["vocab_size"]
    if not _is_count(vocab_size):
        yield "model.config.vocab_size", f"expected a whole number, got {describe(vocab_size)}"
    elif tokenizer and vocab_size < tokenizer.vocab_size:
        wanted = f"must be at least tokenizer.train.vocab_size ({tokenizer.vocab_size})"
        yield "model.config.vocab_size", f"{wanted}, got {vocab_size}"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


_RULES: tuple[Callable[[Values], Iterator[tuple[str, str]]], ...] = (
    _whole_bins,
    _sizes,
    _zero_stage,
    _positions,
    _vocabulary,
)
