"""An attempt on this machine, opened before its data are prepared and closed with why it ended. Torch-free."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from turbolm.errors import EXIT_REQUEUE, EXIT_STOPPED
from turbolm.recipe.paths import make_folder
from turbolm.reliability.outcome import outcome_of, read_outcome, write_outcome
from turbolm.reliability.run_lock import RunLock, this_process
from turbolm.reliability.stop import STOP_SIGNALS, Seen, SignalRequests, asked_since
from turbolm.train.run_directory import RunDirectory, open_attempt, refuse_links_out

_LOOK_SEC = 0.5


@contextmanager
def attempt_of(run: RunDirectory, seen: Seen) -> Iterator[int]:
    """Open an attempt of the run; `seen` is what its stop file was when this command began. Raises UserError.

    If an error ends the block, the reason is recorded in the attempt's folder, unless the ranks recorded one.
    """
    make_folder(run.path, "execution.runs_dir")
    refuse_links_out(run)
    RunLock(run.path).wait_until_free()
    number = open_attempt(run, seen, this_process())
    try:
        yield number
    except BaseException as error:
        if read_outcome(run.attempt(number)) is None:
            write_outcome(run.attempt(number), outcome_of(error))
        raise


@contextmanager
def stoppable(run: RunDirectory, seen: Seen) -> Iterator[None]:
    """While no rank runs yet: a stop signal, or a request to stop the run, ends this process cleanly."""

    def end(number: int) -> None:
        raise SystemExit(EXIT_STOPPED if number == signal.SIGINT else EXIT_REQUEUE)

    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(run, seen, ended), name="turbolm-stop", daemon=True)
    with SignalRequests(end, end):
        watch.start()
        try:
            yield
        finally:
            ended.set()
            watch.join()  # a process with threads cannot safely be forked


def _watch(run: RunDirectory, seen: Seen, ended: threading.Event) -> None:
    while True:
        if asked_since(run.stop_file, seen):
            print(f"turbolm: {run.stop_file} asks to stop", file=sys.stderr, flush=True)
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, STOP_SIGNALS[0])  # as Ctrl-C does; a call that blocks is interrupted
            return
        if ended.wait(_LOOK_SEC):
            return
