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
from turbolm.models.attention import check_long_rows, choose_attention, model_inputs
from turbolm.models.build import (
    build_config,
    build_model,
    carries_state_across_documents,
    check_all_trained,
    model_class,
)
from turbolm.models.isolation import check_isolation
from turbolm.models.loss import choose_loss
from turbolm.models.positions import check_positions, num_positions
from turbolm.models.router import find_routers, freeze_balancing_biases
from turbolm.models.settings import ropes_by_length
from turbolm.models.shrink import shrink
from turbolm.recipe.schema import Model

VOCAB = 96
_CPU = torch.device("cpu")
# What `shrink` makes small for a test, and a model that is to learn something has as it is.
_KEPT = ("position", "initializer_range", "init_std", "window", "chunk", "block", "topk")


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

    Raises UserError for a model that cannot be trained.
    """
    answer = count.examine(section.config_file, section.config)
    if answer.problems:
        raise UserError("; ".join(answer.problems))
    config = build_config(section, seq_len=1, vocab_size=_own_vocabulary(section), bos_token_id=0, eos_token_id=0)
    positions = num_positions(count.build_on_meta(config))
    seq_len = min(seq_len, positions or seq_len)
    changed = shrink(config)
    if section.config_file is not None and "is_decoder" in changed:
        changed["is_decoder"] = config.is_decoder
    copied = changed | {name: getattr(config, name) for name in changed if "position" in name}
    model, attention, way, refused, moved = _first_that_works(section, copied, config, seq_len)
    tokens = np.arange(8)[None]
    probe = model_inputs({"input_ids": tokens, "position_ids": tokens}, attention, _CPU)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    routers = find_routers(model, "config")
    return Findings(
        model_type=config.model_type,
        class_name=type(model).__name__,
        num_positions=positions,
        vocab_size=config.vocab_size,
        sizes=_sizes(config, changed),
        small=_small(config, changed),
        way=way,
        refused=refused,
        moved=moved,
        attention=attention,
        has_sdpa=bool(type(model)._supports_sdpa),
        loss=choose_loss("auto", model, model, probe, "bf16"),
        router="the model has no experts" if routers is None else routers.message.removeprefix("experts: "),
        has_tied_head=head is not None and getattr(head, "weight", None) is embedding.weight,
        notes=list(answer.notes),
    )


def _own_vocabulary(section: Model) -> int:
    named = section.full_config or {}
    rows = named.get("vocab_size")
    if not isinstance(rows, int):
        rows = AutoConfig.for_model(named["model_type"]).get_text_config().vocab_size
    return int(rows)


def _ways(config: PreTrainedConfig, seq_len: int) -> Iterator[Way]:
    """Those that waste least come first."""
    yield Way("best_fit")
    ropes = ropes_by_length(config.get_text_config())
    if ropes:
        known = ropes[0].get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
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
        return model, attention, way, str(refused[0]).partition(": ")[2] if refused else None, moved
    raise refused[-1]


def start_small(section: Model, *, packed: bool, num_rows: int, seq_len: int) -> tuple[PreTrainedModel, str, float]:
    """The model as `turbolm.train.build` starts it, its attention kernel, and how far neighbours moved its logits.

    Raises UserError where a run would.
    """
    config = build_config(section, seq_len=seq_len, vocab_size=VOCAB, bos_token_id=1, eos_token_id=2)
    kind = model_class(config)
    reason = carries_state_across_documents(config, kind)
    if reason and packed:
        raise UserError(f"data.packing: {reason}, so packed documents cannot be kept apart")
    attention = choose_attention("auto", "cpu", "fp32", kind)
    check_long_rows(config, attention, seq_len=seq_len, row_tokens=num_rows * seq_len, packed=packed)
    model = build_model(section, config, seed=0, attention=attention)
    freeze_balancing_biases(model)
    check_all_trained(model)
    check_positions(model, seq_len)
    model.train()
    moved = check_isolation(
        model,
        vocab_size=VOCAB,
        seq_len=seq_len,
        attention=attention,
        device=_CPU,
        precision="fp32",
        packed=packed,
        num_rows=num_rows,
        config=model.config,
    )
    return model, attention, moved


def _sizes(config: PreTrainedConfig, changed: dict[str, Any]) -> dict[str, Any]:
    """The values in `config` of what `changed` has made smaller; what it has switched on, as it is there."""
    own = {name: getattr(config, name, value) for name, value in changed.items()}
    switched = {"is_decoder": changed["is_decoder"]} if "is_decoder" in changed else {}
    return {name: value for name, value in own.items() if name == "model_type" or value != changed[name]} | switched


def _small(config: PreTrainedConfig, changed: dict[str, Any]) -> dict[str, Any]:
    """`changed` without what is the type's default, and with windows, positions and spreads as they are."""
    default = vars(AutoConfig.for_model(config.model_type))
    sizes = {name: value for name, value in changed.items() if not any(part in name for part in _KEPT)}
    return {name: value for name, value in sizes.items() if name == "model_type" or value != default.get(name)}


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
