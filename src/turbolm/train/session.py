"""The state of a run while it trains, and how it is saved and restored."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from turbolm.checkpoint.agreement import gather_over
from turbolm.checkpoint.load import load_checkpoint
from turbolm.checkpoint.mirroring import Mirroring
from turbolm.checkpoint.ranks import in_step
from turbolm.checkpoint.saver import CheckpointSaver
from turbolm.data.batch.loader import BatchLoader, GlobalBatch
from turbolm.data.batch.scored import ScoredDocuments
from turbolm.engine.engine import Engine
from turbolm.errors import UserError
from turbolm.plan.plan import Plan
from turbolm.reliability import heartbeat
from turbolm.reliability.anomalies import SkippedBatches
from turbolm.reliability.replicas import check_replicas
from turbolm.train.context import Context
from turbolm.train.evaluation import EvaluationResult
from turbolm.train.gate import UpdateGate
from turbolm.train.measured import StepMeasure
from turbolm.train.metrics import MetricsLog
from turbolm.train.weight_average import RunningAverage


@dataclass
class Session:
    """The state of a run during training; `step` counts the finished optimizer steps."""

    context: Context
    engine: Engine
    attention: str  # the kernel that the model was built with
    loader: BatchLoader
    saver: CheckpointSaver
    log: MetricsLog
    gate: UpdateGate
    training_flops: Callable[[GlobalBatch], float]
    skipped: SkippedBatches = SkippedBatches()
    scored: ScoredDocuments | None = None  # of evaluation.sets and evaluation.tasks
    step: int = 0
    saved_step: int = -1
    best_eval_loss: float = math.inf
    evaluation: EvaluationResult | None = None  # of the trained model; None if there is nothing to evaluate on
    evaluated_step: int = -1  # the last one that this start evaluated
    has_saved_weights: bool = False  # the engine was built with those of a checkpoint, which `resume` must find again
    has_run_largest: bool = False  # see train.largest
    measure: StepMeasure | None = None  # on rank 0 of a run
    average: RunningAverage | None = None  # of the weights, if the recipe asks for it
    mirroring: Mirroring | None = None  # on rank 0 of a run with `checkpoint.mirror`
    random_restarts: dict[str, Any] | None = None  # which candidate the run continues, and the results of all

    @property
    def plan(self) -> Plan:
        return self.context.plan


def trainer_state(session: Session) -> dict[str, Any]:
    """Return a checkpoint's state beside the tensors, which `restore` reads."""
    best, average = session.best_eval_loss, session.average.state() if session.average else {}
    return {
        "step": session.step,
        "tokens_seen": session.plan.curriculum.tokens_seen(session.step),
        "order_digest": session.loader.order.digest(session.skipped.batch_index(session.step)),
        "best_eval_loss": best if math.isfinite(best) else None,
        "anomalies": {**session.gate.watch.state(), "skipped_batches": session.skipped.windows},
        **({"restarts": session.random_restarts} if session.random_restarts else {}),
        **({"weight_average": average} if average else {}),
    }


@heartbeat.phase(heartbeat.SAVING)
def save(session: Session, *, eval_loss: float | None = None, last: bool = False) -> None:
    """Save a checkpoint of the current step, once, while training continues.

    With `last` it is on disk on return, and a failed save is tried again; raises RunError if it fails now.
    """
    session.log.flush()
    if last:
        session.saver.wait()  # then all ranks agree on whether it failed
    is_saved = session.saved_step == session.step and not (last and session.saver.failure)
    if not is_saved and session.step > 0:
        check_replicas_when_due(session, before_save=True)
        session.saver.save(session.step, trainer_state(session), eval_loss)
        session.saved_step = session.step
        session.log.reset_clock()
    if last:
        session.saver.finish()


def restore(session: Session, checkpoint: Path) -> None:
    """Restore the session from `checkpoint`. Collective; the checkpoint has been verified.

    A failure on any rank is a UserError on all: the session must then be restored from another checkpoint.
    """
    agree = gather_over(session.context.group)
    state = load_checkpoint(checkpoint, session.engine, agree)
    in_step(agree, lambda: _take_state(session, state, checkpoint), UserError)


def _take_state(session: Session, state: dict[str, Any], checkpoint: Path) -> None:
    """Restore `trainer_state`."""
    step, anomalies, best = int(state["step"]), state.get("anomalies", {}), state.get("best_eval_loss")
    windows = anomalies.get("skipped_batches", ())
    skipped = SkippedBatches(tuple((int(first), int(end)) for first, end in windows))
    order, position = session.loader.order, skipped.batch_index(step)
    is_fork = position == order.first_index > 0  # nothing of this order has been trained: `fork` has named another
    if not is_fork and state["order_digest"] != order.digest(position):
        raise UserError(
            f"the order of the data is not the one {checkpoint} was trained with, so the run cannot resume exactly: "
            "another version of turbolm wrote it. Use that version, or start a run with a new `name`"
        )
    session.gate.watch.restore(anomalies)
    set_skipped(session, skipped)
    session.step = session.saved_step = step
    session.random_restarts = state.get("restarts")
    if session.average is not None and (message := session.average.restore(state.get("weight_average"), step)):
        session.log.say(message)
    session.best_eval_loss = math.inf if best is None else float(best)


def set_skipped(session: Session, skipped: SkippedBatches) -> None:
    """Skip these batches. The run then reads further into the data, where sequences may hold more documents."""
    session.skipped = skipped
    loader = session.loader
    if loader.max_slices is not None and skipped.windows:
        most = loader.order.max_slices(session.plan.num_steps + skipped.num_batches)
        session.loader = replace(loader, max_slices=most)


def check_replicas_when_due(session: Session, *, before_save: bool = False) -> None:
    """Compare the ranks' copies of the weights, as often as the recipe says."""
    every = session.plan.recipe.execution.replica_check
    if every != "off" and (before_save or (isinstance(every, int) and session.step % every == 0)):
        check_replicas(session.engine, session.step, session.context.group)
