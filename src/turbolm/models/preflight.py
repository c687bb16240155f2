"""`python -m turbolm.models.preflight`: try a small copy of a model, for `turbolm adapt`, which imports no torch.

Reads {"model": the recipe's section, "seq_len": its row length} as JSON on stdin; writes what was found as JSON on
stdout. Exit code 2 and one line for a model that cannot be trained.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from turbolm.errors import EXIT_BAD_INPUT, UserError
from turbolm.models import count
from turbolm.models.attention import model_inputs
from turbolm.models.build import build_config
from turbolm.models.loss import choose_loss
from turbolm.models.positions import num_positions
from turbolm.models.router import find_routers
from turbolm.models.settings import ropes_by_length
from turbolm.models.shrink import shrink
from turbolm.models.start import CPU, VOCAB, start_small
from turbolm.models.trial import compare_losses
from turbolm.recipe.model_config import is_dropout
from turbolm.recipe.schema import Model

# What `shrink` changes for a test, and a model that is to learn something has as it is: the first where that fits.
_KEPT = ("position", "initializer_range", "init_std")
_KEPT_IF_IT_FITS = (*_KEPT, "window", "chunk", "block", "topk")


@dataclass(frozen=True)
class Way:
    """How documents are put into rows and micro-batches."""

    packing: str
    rope_factors: str = "by_length"
    one_row: bool = False  # a micro-batch of one row


@dataclass(frozen=True)
class Findings:
    """What a small copy of a model showed."""

    model_type: str
    class_name: str
    num_positions: int | None
    vocab_size: int  # of the configuration, or the type's own
    pad_token_id: int | None  # the type's default, which a smaller vocabulary may not hold
    sizes: dict[str, Any]  # the settings that make the model as large as it is
    small: dict[str, Any]  # the same for a model of the same structure that a CPU can train
    way: Way
    refused: str | None  # why not the way that wastes nothing
    moved: float  # how far a changed document moved its neighbour's logits
    attention: str  # the kernel on this CPU
    has_sdpa: bool
    loss: str
    router: str
    has_tied_head: bool
    notes: list[str]


def examine(section: Model, seq_len: int) -> Findings:
    """Build a small copy of what `section` describes, as a run would, and probe it; rows have `seq_len` tokens at most.

    Raises UserError for a model that cannot be trained, or whose loss is not that of Transformers.
    """
    answer = count.examine(section.config_file, section.config)
    if answer.problems and section.config_file is not None:
        raise UserError("; ".join(answer.problems))
    try:
        return _examine(section, seq_len, list(answer.notes), is_sound=not answer.problems)
    except UserError:
        if answer.problems:  # not every type can be built with its own defaults; some can when they are small
            raise UserError("; ".join(answer.problems)) from None
        raise


def _examine(section: Model, seq_len: int, notes: list[str], *, is_sound: bool) -> Findings:
    try:
        default = AutoConfig.for_model((section.full_config or {})["model_type"])
    except Exception as error:  # of many kinds: a part of another model has no defaults of its own
        raise UserError(f"model.config: {str(error).splitlines()[0]}") from error
    config = _whole(section, default) if is_sound else default
    own, changed = vars(config), shrink(config)
    switched = _switched(own, changed)
    copied = changed | {name: own[name] for name in changed if name in own and _is_kept(name, ("position",))}
    if section.config_file is not None:  # as it is there, or the refusal of a run would not show
        copied |= {name: own.get(name) for name in switched}
    elif switched and is_sound:
        config = _whole(section.model_copy(update={"config": {**(section.config or {}), **switched}}), default)
    positions = num_positions(count.build_on_meta(config)) if is_sound else own.get("max_position_embeddings")
    seq_len = min(seq_len, positions or seq_len)
    model, attention, way, refused, moved = _first_that_works(section, copied, config, seq_len)
    tokens = np.arange(8)[None]
    probe = model_inputs({"input_ids": tokens, "position_ids": tokens}, attention, CPU)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    routers = find_routers(model, "config")
    return Findings(
        model_type=config.model_type,
        class_name=type(model).__name__,
        num_positions=positions,
        vocab_size=config.get_text_config().vocab_size,
        pad_token_id=vars(default).get("pad_token_id"),
        sizes={"model_type": config.model_type, **_sizes(own, changed), **switched},
        small={"model_type": config.model_type, **_small(default, changed), **switched},
        way=way,
        refused=refused,
        moved=moved,
        attention=attention,
        has_sdpa=bool(type(model)._supports_sdpa),
        loss=choose_loss("auto", model, model, probe, "bf16"),
        router="the model has no experts" if routers is None else routers.message.removeprefix("experts: "),
        has_tied_head=head is not None and getattr(head, "weight", None) is embedding.weight,
        notes=notes,
    )


def _whole(section: Model, default: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration with all its sizes, and its own vocabulary."""
    rows = (section.full_config or {}).get("vocab_size")
    rows = rows if isinstance(rows, int) else default.get_text_config().vocab_size
    return build_config(section, seq_len=1, vocab_size=rows, bos_token_id=0, eos_token_id=0)


def _ways(config: PreTrainedConfig, seq_len: int) -> Iterator[Way]:
    """Those that waste least come first."""
    yield Way("best_fit")
    ropes = ropes_by_length(config.get_text_config())
    if ropes:
        known = ropes[0].get("original_max_position_embeddings") or vars(config).get("max_position_embeddings")
        yield Way("best_fit", "long" if known and seq_len > known else "short")
    yield Way("single")
    yield Way("single", one_row=True)


def _first_that_works(
    section: Model, copied: dict[str, Any], config: PreTrainedConfig, seq_len: int
) -> tuple[PreTrainedModel, str, Way, str | None, float]:
    refused: list[UserError] = []
    for way in _ways(config, seq_len):
        small = section.model_copy(update={"config": copied, "config_file": None, "rope_factors": way.rope_factors})
        try:
            packed, num_rows = way.packing != "single", 1 if way.one_row else 2
            model, attention, moved = start_small(small, packed=packed, num_rows=num_rows, seq_len=seq_len)
        except UserError as error:
            if not str(error).startswith(("data.packing", "execution.micro_batch")):
                raise
            refused.append(error)
            continue
        _compare(small, way)
        return model, attention, way, str(refused[0]).partition(": ")[2] if refused else None, moved
    raise refused[-1]


def _compare(small: Model, way: Way) -> None:
    """Raise UserError where loss and gradient are not those of Transformers' own model, given each document alone."""
    if way.one_row:  # several rows are compared at once
        return
    config = small.config or {}
    still = {name: 0.0 for name in config if is_dropout(name)}  # what is random cannot be compared
    try:
        compare_losses(small.model_copy(update={"config": config | still, "dropout": 0.0}), way.packing)
    except AssertionError as error:
        raise UserError(f"model: a small copy of it does not compute what Transformers does: {error}") from None


def _is_kept(name: str, parts: tuple[str, ...]) -> bool:
    return name.startswith("rope_") or any(part in name for part in parts)


def _switched(own: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """What `shrink` has switched on, such as `is_decoder`, without which the type is not trained."""
    sized = (int, float, list, tuple, dict, PreTrainedConfig)
    return {
        name: value
        for name, value in changed.items()
        if name != "model_type" and (isinstance(own.get(name), bool) or not isinstance(own.get(name), sized))
    }


def _sizes(own: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """The values of what `changed` has made smaller; nested configurations are left to the type."""
    known = {name: own.get(name) for name in changed if not isinstance(own.get(name), PreTrainedConfig)}
    return {
        name: value
        for name, value in known.items()
        if value is not None and value != changed[name] and not _is_kept(name, ("initializer_range", "init_std"))
    }


def _small(default: PreTrainedConfig, changed: dict[str, Any]) -> dict[str, Any]:
    """`changed` without what is the type's default, and with windows, positions and spreads as they are."""
    small: dict[str, Any] = {}
    for kept in (_KEPT_IF_IT_FITS, _KEPT):
        sizes = {name: value for name, value in changed.items() if name != "model_type" and not _is_kept(name, kept)}
        small = {name: value for name, value in sizes.items() if value != vars(default).get(name)}
        tried = {"model_type": default.model_type, "vocab_size": VOCAB, "pad_token_id": None, **small}
        if not count.examine(None, tried).problems:
            break
    return small


def main() -> int:
    """Examine the section on stdin; what models print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    request = json.load(sys.stdin)
    try:
        found = examine(Model.model_validate(request["model"]), int(request["seq_len"]))
    except UserError as error:
        print(f"turbolm: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(json.dumps(asdict(found)), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
