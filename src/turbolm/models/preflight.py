"""`python -m turbolm.models.preflight`: try a small copy of a model, for `turbolm adapt`, which imports no torch.

Reads the recipe's `model` section as JSON on stdin; writes what was found as JSON on stdout. Exit code 2 and one line
for a model that cannot be trained.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from turbolm.errors import EXIT_BAD_INPUT, UserError
from turbolm.models.attention import choose_attention, model_inputs
from turbolm.models.build import (
    build_config,
    build_model,
    carries_state_across_documents,
    check_all_trained,
    model_class,
)
from turbolm.models.isolation import check_isolation
from turbolm.models.loss import choose_loss
from turbolm.models.shrink import shrink
from turbolm.recipe.schema import Model

_VOCAB, _SEQ_LEN = 96, 64
_CPU = torch.device("cpu")
# Sizes that `shrink` makes small for a test, and a small model that is to learn something has as they are.
_NOT_SIZES = ("initializer_range", "init_std", "max_position_embeddings", "window", "chunk", "block", "topk")


@dataclass(frozen=True)
class Findings:
    """What a small copy of a model showed."""

    model_type: str
    class_name: str
    num_positions: int | None
    vocab_size: int  # of the configuration, or the type's own
    sizes: dict[str, Any]  # the settings that make the model as large as it is
    small: dict[str, Any]  # the same for a model of the same structure that a CPU can train
    refuses_packing: str | None  # why documents cannot share a row
    leak: float | None  # how far a changed document moved its neighbour's logits
    attention: str  # the kernel on this CPU
    has_sdpa: bool
    loss: str
    router: str
    has_tied_head: bool


def examine(section: Model) -> Findings:
    """Build a small copy of what `section` describes, as a run would, and probe it. Raises UserError."""
    config = _configuration(section)
    small = section.model_copy(update={"config": shrink(config), "config_file": None})
    refuses, leak = None, None
    try:
        model, attention, leak = _start(small, packed=True)
    except UserError as error:
        if not str(error).startswith("data.packing"):
            raise
        refuses = str(error).removeprefix("data.packing: ")
        model, attention, _ = _start(small, packed=False)
    tokens = np.arange(8)[None]
    probe = model_inputs({"input_ids": tokens, "position_ids": tokens}, attention, _CPU)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return Findings(
        model_type=config.model_type,
        class_name=type(model).__name__,
        num_positions=getattr(config.get_text_config(), "max_position_embeddings", None),
        vocab_size=_vocabulary(section, config),
        sizes=_sizes(config, shrink(config)),
        small=_small(config),
        refuses_packing=refuses,
        leak=leak,
        attention=attention,
        has_sdpa=bool(type(model)._supports_sdpa),
        loss=choose_loss("auto", model, model, probe, "bf16"),
        router=_router(model),
        has_tied_head=head is not None and head.weight is embedding.weight,
    )


def _configuration(section: Model) -> PreTrainedConfig:
    return build_config(section, seq_len=1, vocab_size=1, bos_token_id=0, eos_token_id=0)


def _vocabulary(section: Model, config: PreTrainedConfig) -> int:
    given = (section.config or {}).get("vocab_size")
    return int(given or AutoConfig.for_model(config.model_type).get_text_config().vocab_size)


def _router(model: PreTrainedModel) -> str:
    """How tokens are spread over experts, in words."""
    text = model.config.get_text_config()
    counts = [getattr(text, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")]
    if not any(counts):
        return "none: the model has no experts"
    if any("e_score_correction_bias" in name for name, _ in model.state_dict().items()):
        return "balanced by a bias, which training leaves as it is: this type is not balanced"
    coefficient = getattr(text, "router_aux_loss_coef", None)
    return f"a loss of weight {coefficient} spreads tokens over the experts" if coefficient else "no loss of its own"


def _start(section: Model, packed: bool) -> tuple[PreTrainedModel, str, float | None]:
    """The model as a run starts it, and the attention kernel. Raises UserError where a run would."""
    config = build_config(section, seq_len=_SEQ_LEN, vocab_size=_VOCAB, bos_token_id=1, eos_token_id=2)
    kind = model_class(config)
    reason = carries_state_across_documents(config, kind)
    if reason and packed:
        raise UserError(f"data.packing: {reason}, so packed documents cannot be kept apart")
    attention = choose_attention("auto", "cpu", "fp32", kind)
    model = build_model(section, config, seed=0, attention=attention)
    check_all_trained(model)
    model.eval()
    leak = None
    if packed:
        sizes = {"vocab_size": _VOCAB, "seq_len": _SEQ_LEN}
        leak = check_isolation(model, attention=attention, device=_CPU, precision="fp32", **sizes)
    return model, attention, leak


def _sizes(config: PreTrainedConfig, changed: dict[str, Any]) -> dict[str, Any]:
    """The values in `config` of what `changed` has made smaller."""
    found = {name: getattr(config, name, None) for name in changed}
    return {name: value for name, value in found.items() if value != changed[name] or name == "model_type"}


def _small(config: PreTrainedConfig) -> dict[str, Any]:
    """A configuration for a CPU: `shrink`'s sizes, but windows and the spread of initial weights as they are."""
    default = vars(AutoConfig.for_model(config.model_type))
    sizes = {name: value for name, value in shrink(config).items() if not any(part in name for part in _NOT_SIZES)}
    return {name: value for name, value in sizes.items() if name == "model_type" or value != default.get(name)}


def main() -> int:
    """Examine the section on stdin; what models print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    try:
        found = examine(Model.model_validate(json.load(sys.stdin)))
    except UserError as error:
        print(f"turbolm: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(json.dumps(asdict(found)), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
