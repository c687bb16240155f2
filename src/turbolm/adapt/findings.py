"""What a small copy of a model shows, found in a process of its own, because trying it takes torch."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from turbolm.adapt.subject import Subject
from turbolm.data.prepare.tokenizer import load_tokenizer, special_ids, vocabulary_size
from turbolm.errors import EXIT_BAD_INPUT, UserError

_TIMEOUT_SEC = 900
_LOSSES = {"full": "all logits at once", "chunked": "never all logits at once"}


def model_section(subject: Subject) -> dict[str, Any]:
    """The recipe's `model` section for new weights of this model."""
    if subject.config_file is not None:
        return {"config_file": str(subject.config_file)}
    return {"config": {"model_type": subject.model_type}}


def examine(subject: Subject, seq_len: int) -> dict[str, Any]:
    """The findings of `turbolm.models.preflight`. Raises UserError for a model that cannot be trained."""
    command = [sys.executable, "-m", "turbolm.models.preflight"]
    request = json.dumps({"model": model_section(subject), "seq_len": seq_len})
    done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=_TIMEOUT_SEC, check=False)
    if done.returncode == EXIT_BAD_INPUT:
        reason = done.stderr[done.stderr.rfind("turbolm: ") :].removeprefix("turbolm: ").strip()
        raise UserError(f"{subject.given} cannot be trained: {reason}")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"{subject.given} cannot be trained: a small copy of it fails: {last[:300]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def tokenizer_size(subject: Subject) -> int | str:
    """How many tokens the model's own tokenizer has, or why it cannot be used."""
    if subject.tokenizer is None:
        return "none comes with it"
    try:
        tokenizer = load_tokenizer(subject.tokenizer)
        special_ids(subject.tokenizer, tokenizer)
    except UserError as error:
        return str(error)
    return vocabulary_size(tokenizer)


def describe(found: dict[str, Any], tokenizer: int | str) -> dict[str, str]:
    """The findings in words, by subject."""
    way = found["way"]
    rows = "one document a row" if way["packing"] == "single" else "documents share rows and are kept apart"
    rows += ", one row a micro-batch" if way["one_row"] else ""
    rows += f" with model.rope_factors: {way['rope_factors']}" if way["rope_factors"] != "by_length" else ""
    rows += f"; else {found['refused']}" if found["refused"] else ""
    said = {
        "packing": rows,
        "causality": "no later token and no other document moves a logit"
        + (f" by more than {found['moved']:.0e}" if found["moved"] else ""),
        "attention": f"{found['attention']} on a CPU" + (", varlen on a GPU in half precision" * found["has_sdpa"]),
        "loss": f"{found['loss']}: {_LOSSES[found['loss']]}",
        "router": found["router"],
        "head": "tied to the embedding" if found["has_tied_head"] else "weights of its own",
        "tokenizer": f"its own, {tokenizer} tokens" if isinstance(tokenizer, int) else f"{tokenizer}: one is trained",
    }
    return said | ({"notes": "; ".join(found["notes"])} if found["notes"] else {})
