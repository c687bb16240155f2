"""`python -m turbolm.train --recipe RECIPE [key=value ...]`, one process of a world that a launcher started."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from typing import TextIO

from turbolm.engine.versions import check_versions
from turbolm.environment import cpu_environment, use_expandable_segments, use_flight_recorder
from turbolm.errors import RunError, UserError
from turbolm.recipe.load import load_recipe
from turbolm.redaction import redact
from turbolm.reliability import heartbeat
from turbolm.reliability.open_files import raise_open_files
from turbolm.reliability.orphans import LAUNCHER, end_with_launcher
from turbolm.reliability.outcome import DONE, classify, conclude, record_rank_end
from turbolm.reliability.stop import look
from turbolm.reliability.watchdog import watch_over
from turbolm.train.run_directory import run_directory


def main() -> int:
    """Parse the arguments, train, and report errors once."""
    parser = argparse.ArgumentParser(prog="python -m turbolm.train", description=__doc__)
    parser.add_argument("--recipe", required=True, help="a recipe file")
    parser.add_argument("--attempt", type=int, help="the attempt's number when the launcher opened its folder")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # older launchers pass it
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_args()
    raise_open_files()
    terminal = os.fdopen(os.dup(2), "w", errors="replace")
    use_expandable_segments(os.environ)  # torch is not imported yet
    if LAUNCHER in os.environ:
        end_with_launcher(int(os.environ[LAUNCHER]))
    run = None
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        if recipe.cluster.device == "cpu":
            os.environ.update(cpu_environment())
        run = run_directory(recipe)
        use_flight_recorder(os.environ, run.attempt(arguments.attempt) if arguments.attempt else None)
        seen = look(run.stop_file)
        limits = recipe.execution.hang_timeout, recipe.execution.startup_timeout
        watch_over(run.path, *limits, arguments.attempt)
        check_versions()
        from turbolm.train.worker import run_worker

        end = run_worker(recipe, arguments.attempt, seen), DONE, ""
    except BaseException as error:
        end = classify(error)
        _tell(error, terminal)
    attempt = arguments.attempt or heartbeat.attempt()
    if run is not None and attempt:
        with contextlib.suppress(OSError):
            record_rank_end(run.attempt(attempt), *end)
            if not arguments.attempt and os.environ.get("RANK", "0") == "0":
                conclude(run.attempt(attempt))  # no launcher of ours does
    return end[0]


def _tell(error: BaseException, terminal: TextIO) -> None:
    """Print a message once, by rank 0; a traceback by every rank, to its log as well."""
    rank = os.environ.get("RANK", "0")
    if isinstance(error, UserError | RunError):
        if rank == "0":
            print(f"turbolm: {error}", file=terminal, flush=True)
        return
    text = redact(f"rank {rank}:\n{''.join(traceback.format_exception(error))}")
    print(text, file=sys.stderr, flush=True)  # the rank's log
    with contextlib.suppress(OSError):
        print(text, file=terminal, flush=True)


if __name__ == "__main__":
    code = main()
    heartbeat.advance(heartbeat.ENDED)
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is saved and synced. Python's own exit would run native destructors in an order that aborts about one
    # ZeRO-3 process in twelve.
    os._exit(code)
