"""Try a model type: build it small as a run would, and compare its loss and gradient with those of Hugging Face.

`python -m turbolm.models.trial` reads model types on stdin, one per line, and answers each with a line of JSON on
stdout. `turbolm.models.table` runs it in child processes, so a type that crashes costs nothing but itself.
"""

from __future__ import annotations

import copy
import json
import math
import os
import resource
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoConfig, PreTrainedModel

from turbolm.errors import UserError
from turbolm.models.attention import model_inputs
from turbolm.models.loss import attach_loss
from turbolm.models.router import attach_router_loss, find_routers
from turbolm.models.shrink import shrink
from turbolm.models.start import CPU, VOCAB, start_small
from turbolm.plan.batch import IGNORED_TARGET
from turbolm.recipe.schema import Model

SEQ_LEN = 48
DOCUMENT_LENGTHS = ((19, 12, 9), (3, 30), (26,))  # lengths of the documents of each packed sequence; padding follows
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-6, 1e-5  # relative, fp32
MAX_MEMORY_BYTES = 4 * 2**30  # a model that needs more is not small: its trial fails at once
# Types whose own loss is not that of the next token: decoders take labels that are already shifted, and git counts the
# tokens of an image. Their loss is computed here from their own logits.
OTHER_LABELS = (
    "bart bigbird_pegasus blenderbot blenderbot-small git mbart mvp pegasus plbart trocr whisper xlnet".split()
)


@dataclass(frozen=True)
class Trial:
    """The outcome for a model type: packed, single (one document per sequence), refused or failed; and why."""

    model_type: str
    outcome: str
    reason: str = ""
    loss_error: float = 0.0
    norm_error: float = 0.0


def try_type(model_type: str) -> Trial:
    """Train a small model of the type, packed where that is allowed, else with one document per sequence."""
    try:
        section = Model(config=small_mapping(model_type))
        try:
            return Trial(model_type, "packed", "", *compare_losses(section, "packed"))
        except UserError as error:
            if not str(error).startswith("data.packing"):
                raise
            return Trial(model_type, "single", str(error), *compare_losses(section, "single"))
    except UserError as error:
        return Trial(model_type, "refused", str(error))
    except Exception:
        return Trial(model_type, "failed", traceback.format_exc())


def small_mapping(model_type: str) -> dict[str, Any]:
    """Return `model.config` of a small model of the type; the type alone where it has no default configuration."""
    try:
        return shrink(AutoConfig.for_model(model_type))
    except Exception:  # of any kind; the trial shows what turbolm says to the type alone
        return {"model_type": model_type}


def compare_losses(section: Model, packing: str) -> tuple[float, float]:
    """Return the relative errors of loss and gradient norm of a small model that is trained as `section` says.

    `packing` is packed or single. Raises UserError where a run would, and AssertionError for errors that are too large.
    """
    with _nan_in_new_memory():
        started = start_small(section, packed=packing != "single", num_sequences=2, seq_len=SEQ_LEN)
    model = started.model
    attach_loss(model, started.loss)
    documents = _documents()
    sequences = documents if packing != "single" else [[document] for sequence in documents for document in sequence]
    micro_batch = _micro_batch(sequences)
    inputs = {**model_inputs(micro_batch, started.attention, CPU), "targets": torch.from_numpy(micro_batch["targets"])}
    _try_router_loss(model, inputs)
    _perturb(model)
    objective, nll = model(**inputs)
    (objective / int((inputs["targets"] != IGNORED_TARGET).sum())).backward()
    loss, norm = nll.item(), _norm(model)
    expected_loss, expected_norm = _hugging_face(model, [document for sequence in documents for document in sequence])
    errors = abs(loss / expected_loss - 1), abs(norm / expected_norm - 1)
    assert errors[0] <= LOSS_TOLERANCE and errors[1] <= NORM_TOLERANCE, (
        f"{packing}: loss {loss} and gradient norm {norm}, Transformers' own {expected_loss} and {expected_norm}"
    )
    return errors


@contextmanager
def _nan_in_new_memory() -> Iterator[None]:
    """Fill uninitialized memory with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # `fill_uninitialized_memory` is on by default
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@torch.no_grad()
def _perturb(model: PreTrainedModel) -> None:
    """Perturb parameters that start as constants: a bias or gate of 0 hides what it does, and equal scores tie."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() < 2 or parameter.min() == parameter.max():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)


def _documents() -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randint(3, VOCAB, (size + 1,), generator=generator) for size in sizes] for sizes in DOCUMENT_LENGTHS]


def _try_router_loss(model: PreTrainedModel, inputs: dict[str, Any]) -> None:
    """Run a step with the router loss that a recipe adds by default; the comparison afterwards is without it."""
    routers = find_routers(model, "config")
    if routers is None:
        return
    plain = model.forward
    attach_router_loss(model, routers)
    objective, *_ = model(**inputs)
    objective.backward()
    assert math.isfinite(_norm(model)), "the gradient with the router loss is not finite"
    model.zero_grad()
    model.forward = plain


def _micro_batch(sequences: list[list[torch.Tensor]]) -> dict[str, np.ndarray]:
    """Fill a micro-batch as turbolm.data.batch does: shifted targets, padding at the end as its own document."""
    batch = {name: np.zeros((len(sequences), SEQ_LEN), np.int64) for name in ("input_ids", "position_ids", "targets")}
    batch["targets"][:] = IGNORED_TARGET
    for number, sequence in enumerate(sequences):
        start = 0
        for document in sequence:
            end = start + len(document) - 1
            batch["input_ids"][number, start:end] = document[:-1]
            batch["targets"][number, start:end] = document[1:]
            batch["position_ids"][number, start:end] = np.arange(end - start)
            start = end
        batch["position_ids"][number, start:] = np.arange(SEQ_LEN - start)
    return batch


def _hugging_face(model: PreTrainedModel, documents: list[torch.Tensor]) -> tuple[float, float]:
    """Return summed loss and gradient norm from Transformers' own model and loss, given each document alone."""
    config = copy.deepcopy(model.config)
    reference = type(model)._from_config(config, dtype=torch.float32, attn_implementation="eager")
    reference.load_state_dict(model.state_dict())
    reference.eval()  # no noise; the other model stays in training mode
    num_targets = sum(len(document) - 1 for document in documents)
    total = 0.0
    for document in documents:
        tokens = document[None]
        if config.model_type in OTHER_LABELS:
            loss = F.cross_entropy(reference(input_ids=tokens[:, :-1], use_cache=False).logits[0], document[1:])
        else:
            loss = reference(input_ids=tokens, labels=tokens, use_cache=False).loss
        nll = loss * (len(document) - 1)
        (nll / num_targets).backward()
        total += nll.item()
    return total, _norm(reference)


def _norm(model: PreTrainedModel) -> float:
    """Return the norm of all gradients together."""
    return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())


def answer_on_stdout() -> TextIO:
    """Return this process's stdout for its answers, and send what models print to stderr; use one thread."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    return answers


def main() -> None:
    """Answer each line of stdin with a trial."""
    answers = answer_on_stdout()
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    for line in sys.stdin:
        print(json.dumps(asdict(try_type(line.strip()))), file=answers, flush=True)


if __name__ == "__main__":
    main()
