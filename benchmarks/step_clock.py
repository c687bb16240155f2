"""The time of `transformers.Trainer`'s steps alone."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback


class StepClock(TrainerCallback):
    """After a call of `train`, `seconds` has what its steps took: not its set-up, which a long run pays once.

    The work of the device is included. `timer` may be `time.process_time`.
    """

    def __init__(self, timer: Any = time.perf_counter):
        self.timer, self.start, self.seconds = timer, 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.start = self.timer()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds = self.timer() - self.start
