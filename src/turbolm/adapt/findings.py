"""What a small copy of a model shows, found in a process of its own, because trying it takes torch."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from turbolm.adapt.subject import Subject
from turbolm.data.tokenizer import load_tokenizer, special_ids, vocabulary_size
from turbolm.errors import EXIT_BAD_INPUT, UserError

_TIMEOUT_SEC = 900
_LOSSES = {"full": "all logits at once", "chunked": "never all logits at once"}


def examine(subject: Subject) -> dict[str, Any]:
    """The findings of `turbolm.models.preflight`. Raises UserError for a model that cannot be trained."""
    section: dict[str, Any] = {"config": {"model_type": subject.model_type}}
    if subject.config_file is not None:
        section = {"config_file": str(subject.config_file)}
    command = [sys.executable, "-m", "turbolm.models.preflight"]
    done = subprocess.run(
        command, input=json.dumps(section), capture_output=True, text=True, timeout=_TIMEOUT_SEC, check=False
    )
    if done.returncode == EXIT_BAD_INPUT:
        reason = done.stderr[done.stderr.rfind("turbolm: ") :].removeprefix("turbolm: ").strip()
        raise UserError(f"{subject.given} cannot be trained: {reason}")
    if done.returncode:
        raise UserError(f"{subject.given}: a small copy of it fails:\n{done.stderr[-2000:].strip()}")
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
    apart = f"documents share rows and are kept apart: changing one moved its neighbour's logits by {found['leak']}"
    alone = f"one document a row, because {found['refuses_packing']}"
    return {
        "packing": alone if found["refuses_packing"] else apart,
        "attention": f"{found['attention']} on a CPU" + (", varlen on a GPU in half precision" * found["has_sdpa"]),
        "loss": f"{found['loss']}: {_LOSSES[found['loss']]}",
        "router": found["router"],
        "head": "tied to the embedding" if found["has_tied_head"] else "weights of its own",
        "tokenizer": f"its own, {tokenizer} tokens" if isinstance(tokenizer, int) else f"{tokenizer}: one is trained",
    }
