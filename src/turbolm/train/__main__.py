"""`python -m turbolm.train --recipe RECIPE [key=value ...]`, one process of a world that a launcher started."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from pathlib import Path

from turbolm.engine.versions import check_versions
from turbolm.errors import EXIT_BAD_INPUT, EXIT_FAILED, RunError, UserError
from turbolm.recipe.load import load_recipe
from turbolm.redaction import redact
from turbolm.reliability import heartbeat
from turbolm.reliability.failures import failure_kind, record_rank_end
from turbolm.reliability.orphans import END_WITH_PARENT, end_with_parent
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
    terminal = os.fdopen(os.dup(2), "w", errors="replace")
    if END_WITH_PARENT in os.environ:
        end_with_parent()
    folder = None
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        folder = run_directory(recipe).attempt(arguments.attempt) if arguments.attempt else None
        limits = recipe.execution.hang_timeout, recipe.execution.startup_timeout
        watch_over(run_directory(recipe).path, *limits, arguments.attempt)
        check_versions()
        from turbolm.train.worker import run_worker

        code = run_worker(recipe, arguments.attempt)
        _record(folder, code, "done")
        return code
    except UserError as error:
        _record(folder, EXIT_BAD_INPUT, "refused", str(error))
        if os.environ.get("RANK", "0") == "0":
            print(f"turbolm: {error}", file=terminal, flush=True)
        return EXIT_BAD_INPUT
    except RunError as error:
        _record(folder, EXIT_FAILED, "error", str(error))
        if os.environ.get("RANK", "0") == "0":
            print(f"turbolm: {error}", file=terminal, flush=True)
        return EXIT_FAILED
    except BaseException as error:
        _record(folder, 1, failure_kind(error), f"{type(error).__name__}: {error}".partition("\n")[0])
        text = redact(f"rank {os.environ.get('RANK', '0')}:\n{traceback.format_exc()}")
        print(text, file=sys.stderr, flush=True)  # the rank's log
        with contextlib.suppress(OSError):
            print(text, file=terminal, flush=True)
        return 1


def _record(folder: Path | None, exit_code: int, kind: str, message: str = "") -> None:
    """Tell the launchers of all nodes how this rank ended."""
    if folder is not None:
        with contextlib.suppress(OSError):
            record_rank_end(folder, exit_code, kind, message)


if __name__ == "__main__":
    code = main()
    heartbeat.advance(heartbeat.ENDED)
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is saved and synced. Python's own exit would run native destructors in an order that aborts about one
    # ZeRO-3 process in twelve.
    os._exit(code)
