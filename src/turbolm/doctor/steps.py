"""Whole steps of training that `calibrate` times: a small model in turbolm's own DeepSpeed engine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from turbolm.doctor.pieces import Case, Subject, build_subject, model_amounts
from turbolm.engine.device import DTYPES
from turbolm.engine.start import build_accelerator, wrap
from turbolm.models.loss import attach_loss
from turbolm.plan.weight_bytes import gradient_bytes, update_bytes
from turbolm.plan.work import Amounts, add

_GROUP_SEC = 60
STEP_WEIGHT = 3.0  # of a step in the fit beside a piece: steps are what the rates are for


def step_cases(
    subjects: Sequence[Mapping[str, Any]], ds_config: Mapping[str, Any], device: torch.device, precision: str
) -> Iterator[Case]:
    """Yield steps at ZeRO stage 2 with one process: forward, backward, reduction of gradients, clipping and update.

    In pieces a cache is warm that a step leaves cold, and Python's time for each tensor and layer is missing.
    """
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK=str(device.index or 0))
    os.environ.pop("MASTER_ADDR", None)
    os.environ.pop("MASTER_PORT", None)
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)  # it warns of a second engine, for its backward
    accelerator = build_accelerator(dict(ds_config), device=device.type, precision=precision, timeout_sec=_GROUP_SEC)
    for values in subjects:
        yield _step_case(Subject(**values), accelerator, device, precision)


def _step_case(subject: Subject, accelerator: Any, device: torch.device, precision: str) -> Case:
    dtype = DTYPES[precision]
    model, inputs, targets = build_subject(subject, device, dtype)
    counted = model_amounts(subject, model, inputs, dtype)
    weights, size = sum(one.numel() for one in model.parameters()), dtype.itemsize
    updated: Amounts = {
        "gradient_bytes": weights * gradient_bytes(2, size, 1, 1),
        "gradients": 2.0 * sum(1 for _ in model.parameters()),
        "optimizer_bytes": weights * update_bytes(2, size, 1),
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    engine = wrap(accelerator, model, optimizer)
    attach_loss(engine.module, subject.loss)
    engine.train()

    def run() -> None:
        loss = engine(**inputs, targets=targets)[0] / targets.numel()
        engine.backward_and_step(loss, is_boundary=True)
        float(loss.detach())

    name = f"step of {subject.num_layers} layers, width {model.config.hidden_size}"
    return Case(f"{name}, {subject.sequences} x {subject.seq_len} tokens", add(counted, updated), run, STEP_WEIGHT)
