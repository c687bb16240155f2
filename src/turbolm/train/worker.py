"""One process of a training run: from a recipe to a trained model, on the ranks that the launcher started."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from turbolm.checkpoint.agreement import gather_over
from turbolm.checkpoint.verify import hash_ahead
from turbolm.data import native
from turbolm.data.prepare.build import find_store
from turbolm.data.prepare.reader import check_left_out
from turbolm.data.store.token_store import TokenStore, check_held_out, check_tokenizer, open_store
from turbolm.engine.start import build_accelerator, control_group
from turbolm.environment import use_flight_recorder
from turbolm.errors import EXIT_OK, EXIT_REQUEUE, UserError
from turbolm.hub import pretrained_folder
from turbolm.models.count import examine
from turbolm.models.initialise import count_parameters
from turbolm.plan.affinity import bind_to_gpu
from turbolm.plan.count import check_model
from turbolm.plan.deepspeed import untested_note
from turbolm.plan.machine import check_machine, detect_machine
from turbolm.plan.plan import build_plan
from turbolm.plan.planned import planned_figures
from turbolm.recipe.schema import Recipe
from turbolm.reliability import heartbeat
from turbolm.reliability.build_locks import clear_stale_locks, extensions_root
from turbolm.reliability.open_files import check_open_files, gloo_sharing, num_gloo_groups
from turbolm.reliability.outcome import STOPPED, Outcome, write_outcome
from turbolm.reliability.run_lock import RunLock, this_process
from turbolm.reliability.stop import Seen, StopRequest, look
from turbolm.train.arrival import meet_ranks
from turbolm.train.build import build_session
from turbolm.train.context import Context
from turbolm.train.finish import complete_run, finish_run, summary
from turbolm.train.from_mirror import copy_last, start_mirroring, wait_at_stop_sec
from turbolm.train.loop import due_to_stop, train
from turbolm.train.measured import StepMeasure
from turbolm.train.recover import resume
from turbolm.train.run_contract import as_started, known_fingerprints, settle_contract, with_commits
from turbolm.train.run_directory import (
    is_finished,
    open_attempt,
    refuse_links_out,
    run_directory,
    stop_seen,
    write_attempt,
)
from turbolm.train.session import Session
from turbolm.train.start_times import mark
from turbolm.train.tricks import apply_tricks

_LAST_WRITE_SEC = 60
_SAMPLED_DOCUMENTS = 20_000  # whose lengths the plan of the times takes


def run_worker(recipe: Recipe, attempt: int | None = None, seen: Seen | None = None) -> int:
    """Train `recipe` as one rank of the launched world; returns the process's exit code.

    `attempt` is the number of the attempt's folder if the launcher has opened one; else `seen` is what the run's stop
    file was when this process began, by default now. Raises UserError, and RunError if the newest state cannot be
    saved.
    """
    run = run_directory(recipe)
    lock = RunLock(run.path)
    try:
        return _run_locked(recipe, attempt, lock, StopRequest(run.stop_file, seen or look(run.stop_file)))
    finally:
        lock.release()


def _run_locked(recipe: Recipe, attempt: int | None, lock: RunLock, stop: StopRequest) -> int:
    """`run_worker`; rank 0 takes the lock."""
    heartbeat.advance()  # all is imported
    mark("imports")
    machine = detect_machine()
    check_machine(recipe, machine)
    for note in check_model(recipe, "recipe", examine):
        print(note)
    recipe, pinned = as_started(recipe)
    recipe = with_commits(recipe)
    plan = build_plan(recipe, machine, int(os.environ.get("WORLD_SIZE", "1")))
    if plan.device == "cuda":
        here = os.environ.get("LOCAL_WORLD_SIZE", str(plan.processes_per_node))
        bind_to_gpu(int(os.environ.get("LOCAL_RANK", "0")), int(here))
    torch.set_num_threads(plan.threads_per_process)
    store, run = _open_prepared_store(recipe), run_directory(recipe)
    sharing = gloo_sharing(plan.device, recipe.execution.sequence_parallel)
    check_open_files(plan.world_size, num_gloo_groups(plan.device), sharing)
    stop.listen()
    timeout_sec = recipe.execution.process_group_timeout
    mark("plan and token store")
    rendezvous = meet_ranks(plan.device, plan.precision, store.fingerprint, timeout_sec)
    mark("wait for all ranks")
    accelerator = build_accelerator(
        plan.ds_config, device=plan.device, precision=plan.precision, timeout_sec=timeout_sec
    )
    context = Context(plan, run, store, machine, control_group(), stop, sys.stdout, attempt or 0)
    del rendezvous  # the process group has a store of its own
    heartbeat.advance()
    mark("process groups")
    if os.environ["LOCAL_RANK"] == "0":  # the other ranks come to building only after this one has opened the run
        clear_stale_locks(extensions_root(os.environ), lambda text: print(f"turbolm: {text}", flush=True))
    context = _open_run(context, lock)
    mark("run directory")
    for line in pinned:
        print(f"as this run was started: {line}")
    if is_finished(run, recipe.train.budget):
        return _complete(context) if dist.get_rank() == 0 else EXIT_OK
    hashed = hash_ahead(run.checkpoints, gather_over(context.group))  # while the model is built
    measure = StepMeasure(context.plan) if dist.get_rank() == 0 else None
    session = build_session(accelerator, context, hashed)
    session.measure = measure
    session.saver.before_commit = lock.check
    for note in filter(None, (untested_note(recipe.execution), *store.notes)):
        session.log.say(note)
    heartbeat.advance()
    mark("order, log, trackers")
    resume(session, hashed)
    heartbeat.advance()
    mark("resume")
    return _train(session)


def _train(session: Session) -> int:
    """Train to the end or until asked to stop, and finish the run."""
    context, num_parameters = session.context, count_parameters(session.engine.module)
    try:
        apply_tricks("start", session, context.recipe)
        is_done = train(session)
    except BaseException:
        session.saver.wait(_LAST_WRITE_SEC)  # what is being written is a good state
        _finish_mirroring(session, _LAST_WRITE_SEC)
        session.log.close()
        raise
    session.log.flush()
    session.log.close()
    dist.barrier(group=context.group)
    halted = not is_done and due_to_stop(session) is not None and context.stop.reason is None
    code = EXIT_OK if is_done or halted else EXIT_REQUEUE
    if not is_done:
        if dist.get_rank() == 0:
            write_outcome(context.run.attempt(context.attempt), Outcome(STOPPED, code))
        _finish_mirroring_together(session, wait_at_stop_sec(context.recipe))
    if dist.get_rank() > 0:
        return code
    if not is_done:
        how = "a start without execution.stop_after goes on" if halted else "the same command resumes"
        session.log.say(f"stopped after step {session.step}; {how} there")
        return code
    session.log.say("exporting the model")
    with heartbeat.phase(heartbeat.EXPORTING):
        results = finish_run(context, session.evaluation, num_parameters, session.log.say)
    _finish_mirroring(session, context.recipe.checkpoint.mirror_wait)
    session.log.say(summary(results))
    return EXIT_OK


def _finish_mirroring(
    session: Session, timeout_sec: float, meanwhile: Callable[[], object] = heartbeat.advance
) -> None:
    """Wait for the copy of the last checkpoint, on rank 0 of a run that is mirrored."""
    if session.mirroring is not None:
        session.mirroring.finish(timeout_sec, meanwhile)


def _finish_mirroring_together(session: Session, timeout_sec: float) -> None:
    """The same while the other ranks wait: where one ends with a code, torchelastic kills rank 0 soon. Collective.

    They hear from rank 0 about once a second: the copy may take longer than the process group's time limit.
    """

    def tell(is_finished: bool) -> bool:
        heartbeat.advance()
        word = torch.tensor([int(is_finished)])
        dist.broadcast(word, src=0, group=session.context.group)
        return bool(word.item())

    if dist.get_rank() == 0:
        _finish_mirroring(session, timeout_sec, lambda: tell(False))
        tell(True)
    else:
        while not tell(False):
            pass


def _complete(context: Context) -> int:
    """Finish a run that has results, whose export or push may have failed or been interrupted. Rank 0 only."""

    def say(text: str) -> None:
        print(text, flush=True)
        context.terminal.write(f"{text}\n")

    code = complete_run(context, say)
    copy_last(context.plan, context.upload, say)
    return code


def redirect_output(log: Path) -> TextIO:
    """Redirect this process's output to its log file; return the terminal that was standard output.

    It redirects file descriptors, so that the output of C++ libraries is included.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    terminal = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace", buffering=1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    return terminal


def _open_prepared_store(recipe: Recipe) -> TokenStore:
    folder = find_store(recipe)
    if folder is None:
        raise UserError("the data is not prepared; run `turbolm prepare RECIPE` once, before the ranks start")
    store = open_store(folder)
    native.library()  # a missing compiler is reported before the model is built
    check_held_out(store.num_documents("validation"), store.manifest["validation"])
    check_left_out(store.manifest, recipe.data.on_bad_document)
    pretrained = pretrained_folder(recipe.model) if recipe.model.pretrained is not None else None
    if pretrained is not None and (pretrained / "tokenizer.json").is_file():
        # A pretrained model must continue with its own tokens
        check_tokenizer(store, pretrained, may_extend=recipe.model.resize_embeddings)
    return store


def _open_run(context: Context, lock: RunLock) -> Context:
    """Rank 0 settles contract and attempt; every rank gets the attempt's number, the plan with the run's budgets, and
    the fingerprints its checkpoints may have, and then prints to its log. Collective.

    Every rank raises the UserError of rank 0.
    """
    run, plan = context.run, context.plan
    answer: list[Any] = [None]
    upload = None
    if dist.get_rank() == 0:
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            refuse_links_out(run)
            lock.acquire()
            budgets = settle_contract(run, plan.recipe, context.store.fingerprint)
            attempt = context.attempt or open_attempt(run, context.stop.seen, this_process())
            lengths = context.store.lengths("train", 0, min(context.store.num_documents("train"), _SAMPLED_DOCUMENTS))
            planned = planned_figures(plan, context.machine, lengths.tolist(), context.store.vocab_size)
            write_attempt(run, attempt, plan.with_budgets(budgets), context.machine, planned)
            seen = stop_seen(run.attempt(attempt))
            upload = start_mirroring(plan, attempt)
            answer = [(attempt, budgets, known_fingerprints(run, plan.recipe, budgets), seen)]
        except (UserError, OSError) as error:
            answer = [str(error)]
    dist.broadcast_object_list(answer, src=0, group=context.group)
    if isinstance(answer[0], str):
        raise UserError(answer[0])
    attempt, budgets, contracts, seen = answer[0]
    context.stop.join(seen, run.attempt_stop_file(attempt))
    heartbeat.set_attempt(attempt)
    use_flight_recorder(os.environ, run.attempt(attempt))  # its file, where no launcher has opened the attempt
    terminal = redirect_output(run.attempt(attempt) / f"log.rank{dist.get_rank()}.txt")
    known = {"attempt": attempt, "contracts": frozenset(contracts), "terminal": terminal, "upload": upload}
    return replace(context, plan=plan.with_budgets(budgets), **known)
