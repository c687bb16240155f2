"""Report compilation as progress, so the watchdog does not take it for a hang."""

from __future__ import annotations

from torch._dynamo.callback import CallbackArgs, callback_handler

from turbolm.reliability import heartbeat


def report_compilation() -> None:
    """Have every compilation of torch show in this rank's heartbeat."""
    before: list[str | None] = []

    def start(_: CallbackArgs) -> None:
        before.append(heartbeat.change_phase(heartbeat.COMPILING))

    def end(_: CallbackArgs) -> None:
        phase = before.pop() if before else None
        if phase is not None:
            heartbeat.change_phase(phase)

    callback_handler.register_start_callback(start)
    callback_handler.register_end_callback(end)
