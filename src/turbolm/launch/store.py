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
from turbolm.errors import EXIT_REQUEUE, EXIT_SIGNAL, EXIT_STOPPED, UserError
from turbolm.recipe.schema import Recipe
from turbolm.reliability.stop import SignalRequests
from turbolm.units import format_bytes


def prepare_store(recipe: Recipe) -> Path:
    """The recipe's token store, built unless it is there. Ctrl-C and TERM stop it cleanly and end the process."""
    stopped_by = 0

    def stop(number: int) -> None:
        nonlocal stopped_by
        stopped_by = number
        raise KeyboardInterrupt

    def end(number: int) -> None:  # the workers end with this process
        print("\nprepare: ended at once; the shards at work are lost, finished ones are kept", file=sys.stderr)
        sys.stderr.flush()
        os._exit(EXIT_SIGNAL + number)

    show = ProgressLine()
    try:
        with SignalRequests(stop, end):
            folder = prepare(recipe, on_progress=show)
    except (KeyboardInterrupt, UserError):  # a worker that had only begun ends by a signal to the process group
        if not stopped_by:
            raise
        show.end()
        count, text_bytes = finished_shards(recipe)
        print(
            f"prepare: stopped. {count} finished shards ({format_bytes(text_bytes)} of text) are kept; "
            "run the same command again to go on from there.",
            file=sys.stderr,
        )
        raise SystemExit(EXIT_STOPPED if stopped_by == signal.SIGINT else EXIT_REQUEUE) from None
    finally:
        show.end()
    for line in tell_left_out(read_manifest(folder)):
        print(line)
    return folder
