"""Try a small copy of a model in a child process, because that takes torch, and look at its tokenizer."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from turbolm.adapt.subject import Subject
from turbolm.data.prepare.tokenizer import load_tokenizer, special_ids, vocabulary_size
from turbolm.errors import EXIT_BAD_INPUT, UserError

_TIMEOUT_SEC = 900


def model_section(subject: Subject) -> dict[str, Any]:
    """Return the recipe's `model` section for new weights of this model."""
    if subject.config_file is not None:
        return {"config_file": str(subject.config_file)}
    return {"config": {"model_type": subject.model_type}}


def examine(subject: Subject, seq_len: int) -> dict[str, Any]:
    """Return what `turbolm.models.preflight.examine` finds. Raises UserError for a model that cannot be trained."""
    command = [sys.executable, "-m", "turbolm.models.preflight"]
    request = json.dumps({"model": model_section(subject), "seq_len": seq_len})
    done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=_TIMEOUT_SEC, check=False)
    if done.returncode == EXIT_BAD_INPUT:
        raise UserError(f"{subject.given} cannot be trained: {done.stderr.rpartition('turbolm: ')[2].strip()}")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"{subject.given} cannot be trained: a small copy of it fails: {last[:300]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def tokenizer_size(subject: Subject) -> int | str:
    """Return how many tokens the model's own tokenizer has, or why it cannot be used."""
    if subject.tokenizer is None:
        return "none comes with it"
    try:
        tokenizer = load_tokenizer(subject.tokenizer)
        special_ids(subject.tokenizer, tokenizer)
    except UserError as error:
        return str(error)
    return vocabulary_size(tokenizer)


def describe(found: dict[str, Any], tokenizer: int | str) -> dict[str, str]:
    """Return the findings in words, by subject."""
    own = f"its own, {tokenizer} tokens" if isinstance(tokenizer, int) else f"{tokenizer}: one is trained"
    return {**found["said"], "tokenizer": own}
