"""Prepare a recipe's data before a run starts: show progress, and stop cleanly."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from turbolm.data.batch.kept_sets import list_sets
from turbolm.data.batch.scored import keep_sets
from turbolm.data.order.batch_order import is_order_kept, open_order, stays_in_memory, table_folder
from turbolm.data.prepare.build import find_store, finished_shards, prepare
from turbolm.data.prepare.progress import Meter, ProgressLine, locked
from turbolm.data.prepare.reader import SHORT_KEY, tell_left_out
from turbolm.data.store.token_store import TokenStore, open_store, read_manifest
from turbolm.errors import EXIT_REQUEUE, EXIT_SIGNAL, EXIT_STOPPED, UserError
from turbolm.plan.curriculum import Curriculum, build_curriculum
from turbolm.plan.machine import detect_machine
from turbolm.plan.preview import StoreSize
from turbolm.plan.profiles import profile_of_run
from turbolm.recipe.questions import check_files
from turbolm.recipe.schema import Recipe
from turbolm.reliability.stop import SignalRequests
from turbolm.train.run_contract import budgets_of
from turbolm.train.run_directory import run_directory
from turbolm.units import format_bytes


def prepare_store(recipe: Recipe) -> Path:
    """The recipe's token store, built unless it is there. Ctrl-C and TERM stop it cleanly and end the process."""

    def kept() -> str:
        if recipe.execution.store is not None:
            return "what was fetched is kept"
        count, text_bytes = finished_shards(recipe)
        return f"{count} finished shards ({format_bytes(text_bytes)} of text) are kept"

    check_files(recipe.evaluation, must_exist=True)
    list_sets(recipe)  # what cannot be listed is told before hours of work
    with _stops_cleanly(kept, "the shards at work are lost, finished ones are kept") as show:
        folder = prepare(recipe, on_progress=show)
        if listings := list_sets(recipe):  # as they are now
            keep_sets(recipe, open_store(folder), listings)
    for line in tell_left_out(read_manifest(folder)):
        print(line)
    return folder


def store_size(recipe: Recipe) -> StoreSize | None:
    """Return the size of the recipe's store, if it has been prepared and is intact."""
    try:
        folder = find_store(recipe)
        store = open_store(folder) if folder else None
    except UserError:
        return None  # sources or tokenizer on another machine; `plan` works for any machine
    if store is None:
        return None
    sample = store.lengths("train", 0, min(store.num_documents("train"), 20_000))
    short = tuple(store.manifest.get(SHORT_KEY, ()))
    return StoreSize(tuple(store.source_positions()), tuple(sample.tolist()), short)


def prepare_order(recipe: Recipe, store: TokenStore) -> None:
    """Plan the order of the run's batches into the cache, unless it is there, so that no rank has to. Raises UserError.

    Stops as `prepare_store` does. Where the cache cannot be written, a line says that the ranks plan it in memory.
    """
    curriculum = run_curriculum(recipe)
    if is_order_kept(recipe, store, curriculum):
        return
    kept = "what was planned of the order of the batches is kept"
    with _stops_cleanly(lambda: kept, kept) as show:
        try:
            folder = table_folder(recipe, store, curriculum)
            folder.parent.mkdir(parents=True, exist_ok=True)
            with locked(folder.with_suffix(".lock"), show):
                order, meter = open_order(recipe, store, curriculum, check=True), Meter("order", show)
                meter.skip(0, order.num_steps / curriculum.num_steps)

                def report(num_steps: int) -> None:
                    meter.report(num_steps, 0, min(1.0, num_steps / curriculum.num_steps))

                order.build(curriculum.num_steps, report, save=True)
        except OSError as error:
            print(stays_in_memory(error), file=sys.stderr)


def prepare_profile(recipe: Recipe, recipe_file: str, store: TokenStore) -> None:
    """Trace the model of a run on GPUs into the cache, unless a profile is there: MFU while training is counted by it.

    The ranks trace nothing; without a profile they count by formula. It takes some 20 s, once for each model, which a
    run on a CPU, whose MFU is against a measured product, does not spend.
    """
    cluster = recipe.cluster
    if cluster.gpus_per_node is None and (cluster.device == "cpu" or not detect_machine().num_gpus):
        return
    if profile_of_run(recipe, recipe_file, store.vocab_size)[0] is not None:
        return
    profile, why = profile_of_run(recipe, recipe_file, store.vocab_size, may_trace=True)
    print("the model is traced, for MFU" if profile else f"the model is not traced: {why}", file=sys.stderr)


def run_curriculum(recipe: Recipe) -> Curriculum:
    """What the next start of the recipe's run trains on: as its ranks will find it."""
    return build_curriculum(recipe, budgets_of(run_directory(recipe), recipe))


@contextmanager
def _stops_cleanly(kept: Callable[[], str], lost: str) -> Iterator[ProgressLine]:
    """Ctrl-C and TERM raise KeyboardInterrupt in the block, and end the process once it is left.

    `kept` says what a stop has kept, and `lost` what a second request loses.
    """
    stopped_by = 0

    def stop(number: int) -> None:
        nonlocal stopped_by
        stopped_by = number
        raise KeyboardInterrupt

    def end(number: int) -> None:  # the workers end with this process
        print(f"\nprepare: ended at once; {lost}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(EXIT_SIGNAL + number)

    show = ProgressLine()
    try:
        with SignalRequests(stop, end):
            yield show
    except (KeyboardInterrupt, UserError):  # a worker that had only begun ends by a signal to the process group
        if not stopped_by:
            raise
        show.end()
        print(f"prepare: stopped. {kept()}; run the same command again to go on from there.", file=sys.stderr)
        raise SystemExit(EXIT_STOPPED if stopped_by == signal.SIGINT else EXIT_REQUEUE) from None
    finally:
        show.end()
