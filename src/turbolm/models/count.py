"""`python -m turbolm.models.count`: a configuration as JSON on stdin, its parameter counts as JSON on stdout.

The model is built on the meta device, which takes no memory. `turbolm.plan.count` runs this for model types that it
has no formula for.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from turbolm.errors import EXIT_BAD_INPUT, UserError
from turbolm.models.build import build_config
from turbolm.models.size import measure_model
from turbolm.recipe.schema import Model


def count_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Parameters of the model that `config` describes, each weight counted once. Raises UserError."""
    vocab_size = int(config.get("vocab_size", 1))
    built = build_config(Model(config=config), seq_len=1, vocab_size=vocab_size, bos_token_id=0, eos_token_id=0)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(built, trust_remote_code=False)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"model.config: cannot build {built.model_type}: {error}") from error
    return asdict(measure_model(model))


if __name__ == "__main__":
    try:
        print(json.dumps(count_parameters(json.load(sys.stdin))))
    except UserError as error:
        print(f"turbolm: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
