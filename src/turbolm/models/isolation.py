"""Prove, on the model that is about to be trained, that packed documents cannot see each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from turbolm.errors import UserError
from turbolm.models.attention import model_inputs

# Relative to the largest logit. Every kernel that isolates gave exactly 0 in fp32; the smallest leak seen at initial
# weights was 4e-3 (ALiBi in Bloom), the usual one above 1e-1.
_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}


@torch.no_grad()
def measure_leak(
    forward: Callable[..., Any], *, vocab_size: int, seq_len: int, attention: str, device: torch.device, seed: int = 0
) -> tuple[float, float]:
    """How far the second document's logits move when only the first one changes.

    Runs `forward` (the model or its engine) twice on one row of `seq_len` tokens that holds two documents. Returns
    the largest absolute difference in the second document's logits, and the largest absolute logit.
    """
    split = seq_len // 2
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, vocab_size, (1, seq_len))
    positions = np.concatenate([np.arange(split), np.arange(seq_len - split)])[None]
    logits = []
    for _ in range(2):
        inputs = model_inputs({"input_ids": tokens, "position_ids": positions}, attention, device)
        logits.append(forward(**inputs).logits[0, split:].float())
        tokens = tokens.copy()
        tokens[0, :split] = (tokens[0, :split] + 1 + generator.integers(0, vocab_size - 1, split)) % vocab_size
    return float((logits[0] - logits[1]).abs().max()), float(logits[0].abs().max())


def check_isolation(
    forward: Callable[..., Any], *, vocab_size: int, seq_len: int, attention: str, device: torch.device, precision: str
) -> float:
    """Refuse to train when documents of one row leak into each other; returns the measured leak.

    Every rank must call it: under ZeRO-3 the forward pass gathers weights. A compiled model runs as it was before: its
    graphs do the same, and compiling one for the row of this check would take longer than all the rest.
    """
    with torch.compiler.set_stance("force_eager"):
        leak, scale = measure_leak(forward, vocab_size=vocab_size, seq_len=seq_len, attention=attention, device=device)
    if leak > _TOLERANCE[precision] * max(scale, 1e-6):
        raise UserError(
            f"data.packing: with {attention} attention this model lets packed documents see each other (changing one "
            f"moved its neighbour's logits by {leak:.2g}); set `data.packing: single` or another execution.attention"
        )
    return leak
