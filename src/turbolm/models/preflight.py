"""`python -m turbolm.models.preflight`: try a small copy of a model for `turbolm adapt`, which imports no torch.

Reads {"model": a recipe's section, "seq_len": the longest sequence} as JSON on stdin and writes what it found as JSON
on stdout. Exits with 2 and one line on stderr for a model that cannot be trained.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from turbolm.errors import EXIT_BAD_INPUT, UserError
from turbolm.models import count
from turbolm.models.build import build_config
from turbolm.models.positions import num_positions
from turbolm.models.router import find_routers
from turbolm.models.settings import ropes_by_length
from turbolm.models.shrink import shrink
from turbolm.models.start import VOCAB, Started, start_small
from turbolm.models.trial import answer_on_stdout, compare_losses
from turbolm.recipe.model_config import is_dropout
from turbolm.recipe.schema import Model

# Settings that `shrink` makes small for a test, and that a model that is to learn something keeps: windows and blocks
# only where they fit its other sizes.
_POSITIONS = ("position",)
_SPREADS = ("initializer_range", "init_std")
_WINDOWS = ("window", "chunk", "block", "topk")
_LOSSES = {"full": "all logits at once", "chunked": "never all logits at once"}


@dataclass(frozen=True)
class Way:
    """How documents are put into sequences and micro-batches."""

    packing: str
    rope_factors: str = "by_length"
    one_sequence: bool = False  # one sequence per micro-batch

    def __str__(self) -> str:
        single, packed = "one document per sequence", "documents share sequences and are kept apart"
        sequences = ", one sequence per micro-batch" if self.one_sequence else ""
        ropes = f" with model.rope_factors: {self.rope_factors}" if self.rope_factors != "by_length" else ""
        return (single if self.packing == "single" else packed) + sequences + ropes


def examine(section: Model, seq_len: int) -> dict[str, Any]:
    """Build a small copy of what `section` describes, as a run would, and probe sequences of up to `seq_len` tokens.

    Returns, as plain values: `class_name` and `model_type`; `num_positions` (None: no limit), `vocab_size` and the
    type's default `pad_token_id`; `sizes`, the settings that make the model as large as it is, and `small`, those of a
    model of the same structure that a CPU can train; `packing`, `rope_factors` and `one_sequence`, the most efficient
    way to batch that works; and `said`, the findings in words by subject.

    Raises UserError for a model that cannot be trained, or whose loss differs from that of Transformers.
    """
    answer = count.examine(section.config_file, section.config)
    problems = UserError("; ".join(answer.problems)) if answer.problems else None
    if problems and section.config_file is not None:
        raise problems
    try:
        found = _examine(section, seq_len, is_sound=problems is None)
    except UserError as error:
        raise problems or error from None  # some types have no sound defaults, but work when small
    if answer.notes:
        found["said"]["notes"] = "; ".join(answer.notes)
    return found


def _examine(section: Model, seq_len: int, *, is_sound: bool) -> dict[str, Any]:
    try:
        default = AutoConfig.for_model((section.full_config or {})["model_type"])
    except Exception as error:  # of many kinds: a part of another model has no defaults
        raise UserError(f"model.config: {str(error).splitlines()[0]}") from error
    config = _full_size(section, default) if is_sound else default
    own, changed = vars(config), shrink(config)
    switched = {name: value for name, value in changed.items() if name != "model_type" and not _is_size(own.get(name))}
    copied = changed | {name: own[name] for name in changed if name in own and _is_kept(name, _POSITIONS)}
    if section.config_file is not None:  # as in the file, or the copy would pass where a run is refused
        copied |= {name: own.get(name) for name in switched}
    elif switched and is_sound:
        config = _full_size(section.model_copy(update={"config": {**(section.config or {}), **switched}}), default)
    positions = num_positions(count.build_on_meta(config)) if is_sound else own.get("max_position_embeddings")
    way, refused, started = _first_that_works(section, copied, config, min(seq_len, positions or seq_len))
    sizes = {name: own[name] for name in changed if _is_size(own.get(name)) and not _is_kept(name, _SPREADS)}
    sizes = {
        name: size for name, size in sizes.items() if size != changed[name] and not isinstance(size, PreTrainedConfig)
    }
    model = started.model
    return {
        "class_name": type(model).__name__,
        "model_type": config.model_type,
        "num_positions": positions,
        "vocab_size": config.get_text_config().vocab_size,
        "pad_token_id": vars(default).get("pad_token_id"),
        "sizes": {"model_type": config.model_type, **sizes, **switched},
        "small": {"model_type": config.model_type, **_small(default, changed), **switched},
        **vars(way),
        "said": _describe(started, f"{way}; else {refused}" if refused else str(way)),
    }


def _describe(started: Started, packing: str) -> dict[str, str]:
    model = started.model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    routers = find_routers(model, "config")
    limit = f" by more than {started.moved:.0e}" if started.moved else ""
    has_tied_head = head is not None and getattr(head, "weight", None) is embedding.weight
    return {
        "packing": packing,
        "causality": f"no later token and no other document moves a logit{limit}",
        "attention": f"{started.attention} on a CPU" + ", varlen on a GPU in half precision" * model._supports_sdpa,
        "loss": f"{started.loss}: {_LOSSES[started.loss]}",
        "router": "the model has no experts" if routers is None else routers.message.removeprefix("experts: "),
        "head": "tied to the embedding" if has_tied_head else "weights of its own",
    }


def _full_size(section: Model, default: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration with all its sizes and its own vocabulary."""
    vocab_size = (section.full_config or {}).get("vocab_size")
    vocab_size = vocab_size if isinstance(vocab_size, int) else default.get_text_config().vocab_size
    return build_config(section, seq_len=1, vocab_size=vocab_size, bos_token_id=0, eos_token_id=0)


def _ways(config: PreTrainedConfig, seq_len: int) -> Iterator[Way]:
    """Yield ways to batch, the most efficient first."""
    yield Way("best_fit")
    ropes = ropes_by_length(config.get_text_config())
    if ropes:
        known = ropes[0].get("original_max_position_embeddings") or vars(config).get("max_position_embeddings")
        yield Way("best_fit", "long" if known and seq_len > known else "short")
    yield Way("single")
    yield Way("single", one_sequence=True)


def _first_that_works(
    section: Model, copied: Mapping[str, Any], config: PreTrainedConfig, seq_len: int
) -> tuple[Way, str | None, Started]:
    """Return the first way that trains, and why the way before all others does not."""
    refused: list[UserError] = []
    for way in _ways(config, seq_len):
        small = section.model_copy(update={"config": copied, "config_file": None, "rope_factors": way.rope_factors})
        packed, num_sequences = way.packing != "single", 1 if way.one_sequence else 2
        try:
            started = start_small(small, packed=packed, num_sequences=num_sequences, seq_len=seq_len)
        except UserError as error:
            if not str(error).startswith(("data.packing", "execution.micro_batch")):
                raise
            refused.append(error)
            continue
        if not way.one_sequence:  # the comparison takes several sequences at once
            _compare(small, way)
        return way, str(refused[0]).partition(": ")[2] if refused else None, started
    raise refused[-1]


def _compare(small: Model, way: Way) -> None:
    """Raise UserError where loss and gradient are not those of Transformers' own model, given each document alone."""
    config = small.config or {}
    still = {name: 0.0 for name in config if is_dropout(name)}  # random numbers cannot be compared
    try:
        compare_losses(small.model_copy(update={"config": config | still, "dropout": 0.0}), way.packing)
    except AssertionError as error:
        raise UserError(f"model: a small copy of it does not compute what Transformers does: {error}") from None


def _is_kept(name: str, parts: tuple[str, ...]) -> bool:
    return name.startswith("rope_") or any(part in name for part in parts)


def _is_size(value: object) -> bool:
    """Whether `shrink` makes a setting smaller; others, such as `is_decoder`, it sets so that the type trains."""
    return isinstance(value, (int, float, list, tuple, dict, PreTrainedConfig)) and not isinstance(value, bool)


def _small(default: PreTrainedConfig, changed: Mapping[str, Any]) -> dict[str, Any]:
    """`changed` without the type's defaults; windows, positions and spreads stay what they are where that fits."""
    small: dict[str, Any] = {}
    for kept in ((*_POSITIONS, *_SPREADS, *_WINDOWS), (*_POSITIONS, *_SPREADS)):
        small = {
            name: value
            for name, value in changed.items()
            if name != "model_type" and not _is_kept(name, kept) and value != vars(default).get(name)
        }
        tried = {"model_type": default.model_type, "vocab_size": VOCAB, "pad_token_id": None, **small}
        if not count.examine(None, tried).problems:
            break
    return small


def main() -> int:
    """Examine the section on stdin."""
    answers = answer_on_stdout()
    request = json.load(sys.stdin)
    try:
        found = examine(Model.model_validate(request["model"]), int(request["seq_len"]))
    except UserError as error:
        print(f"turbolm: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(json.dumps(found), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
