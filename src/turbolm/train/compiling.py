"""A rank that compiles is silent for long, and does not hang."""

from __future__ import annotations

from torch._dynamo.callback import CallbackArgs, callback_handler

from turbolm.reliability import heartbeat


def tell_of_compiling() -> None:
    """Have every compilation of torch show in this rank's signs of life."""
    before: list[str | None] = []

    def start(_: CallbackArgs) -> None:
        before.append(heartbeat.change_phase(heartbeat.COMPILING))

    def end(_: CallbackArgs) -> None:
        phase = before.pop() if before else None
        if phase is not None:
            heartbeat.change_phase(phase)

    callback_handler.register_start_callback(start)
    callback_handler.register_end_callback(end)
