"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from turbolm.checkpoint.saver import CheckpointSaver
from turbolm.data.batch.loader import BatchLoader, GlobalBatch
from turbolm.data.store.token_store import TokenStore
from turbolm.engine.engine import Engine
from turbolm.models.loss import IGNORED_TARGET
from turbolm.plan.plan import Plan
from turbolm.plan.rates import step_rates
from turbolm.reliability import heartbeat
from turbolm.reliability.anomalies import SkippedBatches
from turbolm.reliability.replicas import check_replicas
from turbolm.reliability.stop import StopRequest
from turbolm.train.evaluation import EvaluationResult, evaluate
from turbolm.train.gate import UpdateGate
from turbolm.train.metrics import MetricsLog
from turbolm.train.recover import settle_anomaly
from turbolm.train.run_directory import RunDirectory
from turbolm.train.step import StepResult, train_step


@dataclass
class Session:
    """Everything a run holds while it trains; `step` counts the finished optimizer steps and is all that changes."""

    plan: Plan
    run: RunDirectory
    engine: Engine
    store: TokenStore
    loader: BatchLoader
    attention: str
    saver: CheckpointSaver
    group: dist.ProcessGroup | None
    stop: StopRequest
    log: MetricsLog
    gate: UpdateGate
    contracts: frozenset[str]  # the fingerprints that this run's checkpoints may have
    flops_per_target: Any  # mean attended keys per target -> training FLOPs
    skipped: SkippedBatches = SkippedBatches()
    step: int = 0
    saved_step: int = -1
    best_eval_loss: float = math.inf
    evaluation: EvaluationResult | None = None  # of the trained model; None where nothing is held out
    restarts: dict[str, Any] | None = None  # which candidate the run goes on from, and how all of them did


def train(session: Session) -> bool:
    """Train to the end of the budget and evaluate; False when the run was asked to stop (everything is saved)."""
    plan, recipe, num_steps = session.plan, session.plan.recipe, session.plan.num_steps
    for batch in batches_to_train(session):
        reason = agree_to_stop(session, batch)
        if reason:
            session.log.say(f"asked to stop by {reason}: saving after step {session.step}")
            save(session, last=True)
            return False
        result = take_step(session, batch)
        if settle_anomaly(session, batch, result.anomaly) == "rollback":
            continue
        check_replicas_when_due(session)
        is_last = session.step == num_steps
        if session.step % recipe.logging.every_steps == 0 or is_last:
            session.log.flush(show=True)
        if session.step % plan.evaluate_every_steps == 0 and not is_last:
            run_evaluation(session)
        if session.step % plan.checkpoint_every_steps == 0 and not is_last:
            save(session)
    if not recipe.checkpoint.keep_best:  # else only after the evaluation it is judged by
        save(session)
    session.evaluation = run_evaluation(session)
    save(session, last=True)
    return session.evaluation is not None or not recipe.data.validation


def take_step(session: Session, batch: GlobalBatch) -> StepResult:
    """The next step, at the rates of its place in the run; an anomaly is left to the caller. Collective."""
    plan = session.plan
    rates = step_rates(plan, session.step, batch.index)
    session.engine.set_rates(rates)
    segment = plan.curriculum.segment(batch.index).first_step
    result = train_step(
        session.engine, batch.micro_batches, batch.num_targets, session.attention, session.gate, segment
    )
    session.step += 1
    heartbeat.advance(heartbeat.STEP, session.step)
    session.saver.prepare()
    session.log.add_step(session.step, rates.lr, batch, result, batch_flops(session, batch))
    return result


def batches_to_train(session: Session) -> Iterator[GlobalBatch]:
    """The batches of the steps that are left; from another place in the data on after a rollback."""
    num_steps = session.plan.num_steps
    while session.step < num_steps:
        first = session.skipped.batch_index(session.step)
        with closing(session.loader.iterate(first, first + num_steps - session.step)) as batches:
            for batch in batches:
                yield batch
                if session.skipped.batch_index(session.step) != batch.index + 1:
                    break


def check_replicas_when_due(session: Session, *, before_save: bool = False) -> None:
    """Compare the ranks' copies of the weights, as often as the recipe asks for."""
    every = session.plan.recipe.execution.replica_check
    if every != "off" and (before_save or (isinstance(every, int) and session.step % every == 0)):
        check_replicas(session.engine, session.step, session.group)


def agree_to_stop(session: Session, batch: GlobalBatch) -> str | None:
    """Whether any rank was asked to stop, and by what. Collective, once a step, on the host.

    The same message checks that the ranks' parts of the global batch add up to it: a rank that reads other data than
    its neighbours would train on silently.
    """
    valid = sum(int(np.count_nonzero(micro["targets"] != IGNORED_TARGET)) for micro in batch.micro_batches)
    message = torch.tensor([valid, session.stop.reason is not None], dtype=torch.int64)
    heartbeat.advance()
    arrived = time.perf_counter()
    dist.all_reduce(message, group=session.group)
    session.log.pace.add_wait(time.perf_counter() - arrived)
    heartbeat.advance()
    if int(message[0]) != batch.num_targets:
        raise RuntimeError(f"the ranks hold {int(message[0])} targets of batch {batch.index}, not {batch.num_targets}")
    return (session.stop.reason or "another rank") if message[1] else None


def batch_flops(session: Session, batch: GlobalBatch) -> float:
    """Training FLOPs of a global batch, with the attention its documents really need."""
    span = batch.attention_pairs / batch.num_targets
    return float(session.flops_per_target(span) * batch.num_targets)


def any_rank_asked_to_stop(session: Session) -> bool:
    """The same answer on every rank. Collective, on the host."""
    asked = torch.tensor([session.stop.reason is not None], dtype=torch.int64)
    dist.all_reduce(asked, group=session.group)
    return bool(asked[0])


def run_evaluation(session: Session) -> EvaluationResult | None:
    """Evaluate and log, and save the best so far where the recipe says so.

    None where nothing is held out, or when the run was asked to stop meanwhile, which the next step notices as well.
    """
    if not session.plan.recipe.data.validation:
        return None
    session.log.flush()
    with heartbeat.phase(heartbeat.EVALUATION):
        result = evaluate(
            session.engine,
            session.store,
            session.plan,
            session.attention,
            session.group,
            should_stop=lambda: any_rank_asked_to_stop(session),
        )
    if result is None:
        session.log.say(f"asked to stop while evaluating after step {session.step}")
        return None
    session.log.add_evaluation(session.step, result.loss, result.bits_per_byte)
    session.log.restart_clock()
    if session.plan.recipe.checkpoint.keep_best and result.loss < session.best_eval_loss:
        session.best_eval_loss = result.loss
        save(session, eval_loss=result.loss)
    return result


def trainer_state(session: Session) -> dict[str, Any]:
    """What a checkpoint holds beside the tensors, and `recover.restore` reads."""
    best = session.best_eval_loss
    return {
        "step": session.step,
        "tokens_seen": session.plan.curriculum.tokens_seen(session.step),
        "order_digest": session.loader.order.digest(session.skipped.batch_index(session.step)),
        "best_eval_loss": best if math.isfinite(best) else None,
        "anomalies": {**session.gate.watch.state(), "skipped_batches": session.skipped.windows},
        **({"restarts": session.restarts} if session.restarts else {}),
    }


@heartbeat.phase(heartbeat.SAVING)
def save(session: Session, *, eval_loss: float | None = None, last: bool = False) -> None:
    """Save a checkpoint of the current step, once, beside the training.

    With `last` it is on disk on return, tried again if that had failed; RunError when it fails now.
    """
    session.log.flush()
    if last:
        session.saver.wait()  # then all ranks know alike whether it failed
    is_saved = session.saved_step == session.step and not (last and session.saver.failure)
    if not is_saved and session.step > 0:
        check_replicas_when_due(session, before_save=True)
        session.saver.save(session.step, trainer_state(session), eval_loss)
        session.saved_step = session.step
        session.log.restart_clock()
    if last:
        session.saver.finish()
