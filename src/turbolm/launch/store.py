"""Prepare a recipe's data before a run starts: show progress, and stop cleanly."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from turbolm.data.prepare.build import finished_shards, prepare
from turbolm.data.prepare.progress import ProgressLine
from turbolm.data.prepare.reader import tell_left_out
from turbolm.data.store.token_store import read_manifest
from turbolm.errors import EXIT_REQUEUE, EXIT_SIGNAL, EXIT_STOPPED
from turbolm.recipe.schema import Recipe
from turbolm.units import format_bytes


def prepare_store(recipe: Recipe) -> Path:
    """The recipe's token store, built unless it is there. Ctrl-C and TERM stop it cleanly and end the process."""
    stopped_by = signal.SIGINT

    def stop(number: int, frame: object) -> None:
        nonlocal stopped_by
        stopped_by = signal.Signals(number)
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, lambda *_: os._exit(EXIT_SIGNAL + number))  # the workers end with this process
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    show = ProgressLine()
    try:
        folder = prepare(recipe, on_progress=show)
    except KeyboardInterrupt:
        show.end()
        count, text_bytes = finished_shards(recipe)
        print(
            f"prepare: stopped. {count} finished shards ({format_bytes(text_bytes)} of text) are kept; "
            "run the same command again to go on from there.",
            file=sys.stderr,
        )
        raise SystemExit(EXIT_REQUEUE if stopped_by == signal.SIGTERM else EXIT_STOPPED) from None
    finally:
        show.end()
        for number, handler in before.items():
            signal.signal(number, handler)
    for line in tell_left_out(read_manifest(folder)):
        print(line)
    return folder
