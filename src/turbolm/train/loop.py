"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from turbolm.data.batch.loader import GlobalBatch
from turbolm.plan.batch import IGNORED_TARGET
from turbolm.plan.rates import shown_lrs, step_rates
from turbolm.reliability import heartbeat
from turbolm.train.evaluation import EvaluationResult, evaluate
from turbolm.train.garbage import collect_when_due, manual_collection
from turbolm.train.largest import memory_told, run_largest
from turbolm.train.profile import profiled
from turbolm.train.recover import settle_anomaly
from turbolm.train.session import Session, check_replicas_when_due, save
from turbolm.train.start_times import first_step_done
from turbolm.train.step import StepResult, train_step


@manual_collection()
def train(session: Session) -> bool:
    """Train to the end of the budget and evaluate; return False if the run was asked to stop (everything is saved)."""
    plan, recipe, num_steps = session.plan, session.plan.recipe, session.plan.num_steps
    for batch in profiled(session, batches_to_train(session)):
        reason = agree_to_stop(session, batch)
        if reason is None and (reason := due_to_stop(session)):
            evaluate_if_missed(session)
        if reason:
            session.log.say(f"asked to stop by {reason}: saving after step {session.step}")
            save(session, last=True)
            return False
        result = take_step(session, batch)
        if settle_anomaly(session, batch, result.anomaly) == "rollback":
            continue
        if session.average is not None:
            session.average.add(session.step)
        check_replicas_when_due(session)
        collect_when_due(session.step)
        is_last = session.step == num_steps
        if session.step % recipe.logging.every_steps == 0 or is_last:
            session.log.flush(show=True)
        if session.step % plan.evaluate_every_steps == 0 and not is_last:
            run_evaluation(session)
        if session.step % plan.checkpoint_every_steps == 0 and not is_last:
            save(session)
    if not recipe.checkpoint.keep_best:  # otherwise only after the evaluation that decides about it
        save(session)
    session.evaluation = run_evaluation(session)
    save(session, last=True)
    return session.evaluation is not None or not recipe.is_evaluated


def take_step(session: Session, batch: GlobalBatch) -> StepResult:
    """Train the next step with its learning rate and momentum; the caller handles an anomaly. Collective."""
    plan = session.plan
    rates = step_rates(plan, session.step, batch.index)
    session.engine.set_rates(rates)
    if not session.has_run_largest:
        run_largest(session)
        session.has_run_largest = True
    segment = plan.curriculum.segment(batch.index).first_step
    shape = batch.micro_batches[0]["input_ids"].shape
    attempt_folder = session.context.run.attempt(session.context.attempt)
    measured = session.measure.step(batch, session.step + 1, attempt_folder) if session.measure else nullcontext()
    with measured, memory_told(plan, f"step {session.step + 1}, micro-batches of {shape[0]} x {shape[1]} tokens"):
        result = train_step(
            session.engine, batch.micro_batches, batch.num_targets, session.attention, session.gate, segment
        )
    session.step += 1
    heartbeat.advance(heartbeat.STEP, session.step)
    first_step_done(attempt_folder, dist.get_rank())
    session.saver.prepare()
    session.log.add_step(session.step, shown_lrs(plan, rates), batch, result, session.training_flops(batch))
    return result


def batches_to_train(session: Session) -> Iterator[GlobalBatch]:
    """Yield the batches of the remaining steps; after a rollback from another data position."""
    num_steps = session.plan.num_steps
    while session.step < num_steps:
        first = session.skipped.batch_index(session.step)
        with closing(session.loader.iterate(first, first + num_steps - session.step)) as batches:
            for batch in batches:
                yield batch
                if session.skipped.batch_index(session.step) != batch.index + 1:
                    break


def agree_to_stop(session: Session, batch: GlobalBatch) -> str | None:
    """Return whether any rank was asked to stop, and by what. Collective, once a step, on the host.

    The same message checks that the ranks' parts of the global batch add up to it: otherwise a rank that reads other
    data than the others would train silently.
    """
    context = session.context
    valid = sum(int(np.count_nonzero(micro["targets"] != IGNORED_TARGET)) for micro in batch.micro_batches)
    message = torch.tensor([valid, context.stop.reason is not None], dtype=torch.int64)
    heartbeat.advance()
    arrived = time.perf_counter()
    dist.all_reduce(message, group=context.group)
    session.log.pace.add_wait(time.perf_counter() - arrived)
    heartbeat.advance()
    if int(message[0]) != batch.num_targets:
        raise RuntimeError(f"the ranks hold {int(message[0])} targets of batch {batch.index}, not {batch.num_targets}")
    return (context.stop.reason or "another rank") if message[1] else None


def due_to_stop(session: Session) -> str | None:
    """Return `execution.stop_after` where the run has come that far; the same on all ranks."""
    last = session.plan.stop_step
    return f"execution.stop_after {session.plan.recipe.execution.stop_after}" if last and session.step >= last else None


def evaluate_if_missed(session: Session) -> None:
    """Evaluate where this start stops: an earlier start may have been interrupted in the evaluation of this step."""
    if session.step % session.plan.evaluate_every_steps == 0 and session.evaluated_step != session.step:
        run_evaluation(session)


def run_evaluation(session: Session) -> EvaluationResult | None:
    """Evaluate and log, and save the best checkpoint so far if the recipe asks for it.

    Returns None if there is nothing to evaluate on, or if the run was asked to stop meanwhile, which the next step
    notices too.
    """
    if not session.plan.recipe.is_evaluated:
        return None
    session.log.flush()
    with heartbeat.phase(heartbeat.EVALUATION):
        result = _evaluate(session)
    if result is None:
        session.log.say(f"asked to stop while evaluating after step {session.step}")
        return None
    session.evaluated_step = session.step
    session.log.add_evaluation(session.step, result)
    session.log.reset_clock()
    loss = result.loss
    if session.plan.recipe.checkpoint.keep_best and loss is not None and loss < session.best_eval_loss:
        session.best_eval_loss = loss
        save(session, eval_loss=loss)
    return result


def _evaluate(session: Session) -> EvaluationResult | None:
    """Evaluate the weights and their mean, if there is one; None if asked to stop meanwhile. Collective."""

    def evaluate_once() -> EvaluationResult | None:
        return evaluate(session.engine, session.context, session.attention, session.scored)

    result = evaluate_once()
    if result is None or session.average is None or not session.average.count:
        return result
    session.engine.swap_average()  # an error before it is swapped back ends the run, which saves nothing then
    average = evaluate_once()
    session.engine.swap_average()
    return None if average is None else replace(result, average=average)
