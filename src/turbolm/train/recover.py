"""Choose the checkpoint a run resumes from: the newest valid one at a start, the last good one after anomalies."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from turbolm.checkpoint.agreement import gather_over
from turbolm.checkpoint.load import load_weights
from turbolm.checkpoint.manifest import (
    TRAINER_STATE,
    clear_leftovers,
    discard,
    list_checkpoints,
    read_manifest,
    step_of,
)
from turbolm.checkpoint.verify import Hashed, find_newest_valid, not_hashed
from turbolm.data.batch.loader import GlobalBatch
from turbolm.engine.engine import Engine
from turbolm.errors import RunError, UserError
from turbolm.files import load_json
from turbolm.reliability import heartbeat
from turbolm.reliability.anomalies import Anomaly, Decision
from turbolm.train.context import Context
from turbolm.train.session import Session, restore, set_skipped


def newest_valid(
    session: Session, below_step: int | None = None, hashed: Hashed = not_hashed
) -> tuple[Path | None, list[str]]:
    """Return the newest valid checkpoint, and why newer ones were rejected. Collective; all ranks verify it."""
    context = session.context
    agree = gather_over(context.group)
    return find_newest_valid(context.run.checkpoints, context.contracts, agree, below_step, hashed)


@dataclass(frozen=True)
class SavedWeights:
    """The weights that a run resumes from: the names of the parameters, and `load`, which sets them in an engine."""

    parameters: frozenset[str]
    load: Callable[[Engine], None]


def saved_weights(context: Context, hashed: Hashed) -> SavedWeights | None:
    """Return what a run with checkpoints loads in place of initial weights; None for a run without. Collective."""
    agree = gather_over(context.group)
    names = agree.broadcast(_saved_parameters(context.run.checkpoints) if agree.rank == 0 else None)
    if names is None:
        return None

    def load(engine: Engine) -> None:
        """Load the newest valid weights. Raises UserError where `resume` would."""
        below_step, passed_over = None, []
        while True:
            checkpoint, rejected = find_newest_valid(
                context.run.checkpoints, context.contracts, agree, below_step, hashed
            )
            passed_over += rejected
            if checkpoint is None:
                raise _none_valid(context, passed_over)
            try:
                return load_weights(checkpoint, engine, agree)
            except UserError as error:
                passed_over.append(f"{checkpoint}: {error}")
                below_step = step_of(checkpoint)

    return SavedWeights(frozenset(names), load)


def _saved_parameters(folder: Path) -> list[str] | None:
    """Return the parameters of the newest checkpoint with a manifest, [] if none has one; None without checkpoints."""
    checkpoints = list_checkpoints(folder)
    for _, checkpoint in sorted(checkpoints, reverse=True):
        with suppress(UserError, KeyError, TypeError):
            return list(read_manifest(checkpoint)["parameters"])
    return [] if checkpoints else None


def _none_valid(context: Context, passed_over: list[str]) -> UserError:
    run, mirror = context.run, context.recipe.checkpoint.mirror
    return UserError(
        f"no checkpoint of {run.path} is valid. To {'resume from checkpoint.mirror' if mirror else 'start over'}, move "
        f"{run.checkpoints} away; nothing was changed. "
        f"The newest: {passed_over[0] if passed_over else 'it disappeared while the run started'}"
    )


def restore_newest(session: Session, hashed: Hashed = not_hashed) -> tuple[Path | None, list[str]]:
    """Restore the newest checkpoint that is valid and loads; newer ones are skipped with a reason. Collective.

    Returns that checkpoint or None, and the reasons.
    """
    passed_over: list[str] = []
    below_step: int | None = None
    while True:
        checkpoint, rejected = newest_valid(session, below_step, hashed)
        for reason in rejected:
            session.log.say(f"rejected checkpoint {reason}")
        passed_over += rejected
        if checkpoint is None:
            return None, passed_over
        failure = try_restore(session, checkpoint)
        if failure is None:
            return checkpoint, passed_over
        passed_over.append(failure)
        below_step = step_of(checkpoint)


def try_restore(session: Session, checkpoint: Path) -> str | None:
    """Restore the session, or log and return why this valid checkpoint does not load. Collective; same on all ranks.

    Nothing half-loaded is trained on: another checkpoint restores everything, or the run ends.
    """
    try:
        restore(session, checkpoint)
    except UserError as error:
        session.log.say(f"passed over checkpoint {checkpoint}, which does not load: {error}")
        return f"{checkpoint}: {error}"
    return None


def resume(session: Session, hashed: Hashed) -> None:
    """Resume from the newest checkpoint that is valid and loads, if the run has any; all ranks choose it together.

    Collective. Raises UserError if there are checkpoints and none can be used.
    """
    run = session.context.run
    if dist.get_rank() == 0:
        clear_leftovers(run.checkpoints, is_mirrored=session.mirroring is not None)
    checkpoint, passed_over = restore_newest(session, hashed)
    if checkpoint is None and (passed_over or session.has_saved_weights):
        raise _none_valid(session.context, passed_over)
    if checkpoint is None:
        return
    session.log.say(f"resumed from {checkpoint}")
    if session.mirroring is not None:
        session.mirroring.request(session.step)  # a copy that was interrupted goes on
    session.log.reset_clock()


def settle_anomaly(session: Session, batch: GlobalBatch, anomaly: Anomaly | None) -> Decision | None:
    """Log an anomaly of the last step and apply the policy. Collective; the same on every rank.

    After a rollback the session is at the last good checkpoint, and every batch from there to this one is skipped.
    Raises RunError if the run must stop.
    """
    watch, step = session.gate.watch, session.step
    decision = watch.decide(anomaly)
    if anomaly is None or decision is None:
        return None
    session.log.flush()
    event: dict[str, Any] = {
        "anomaly": anomaly.kind,
        "anomaly/loss": anomaly.loss,
        "anomaly/grad_norm": anomaly.grad_norm,
        "anomaly/limit": anomaly.limit,
        "anomaly/policy": session.plan.recipe.anomalies.model_dump(mode="json"),
        "anomaly/in_a_row": watch.in_a_row,
        "anomaly/decision": decision,
        "data/batch": batch.index,
        "data/samples": batch.samples_digest,
    }
    what = f"step {step}, batch {batch.index}: {anomaly}"
    try:
        if decision == "rollback":
            with heartbeat.phase(heartbeat.STARTING):  # as long as a start may take to verify and load
                checkpoint = roll_back(session, batch)
            heartbeat.advance(step=session.step)
            event |= {"anomaly/to_step": session.step, "anomaly/skipped_batches": session.skipped.windows[-1]}
            first, end = session.skipped.windows[-1]
            what += f"; back to {checkpoint}, skipping batches {first} to {end - 1}"
        elif decision == "skip":
            what += f"; the update is skipped ({watch.in_a_row} in a row)"
        else:
            raise RunError(f"stopped at {what}. {_why_stopped(session, anomaly)}")
    except RunError:
        session.log.add_event(step, {**event, "anomaly/decision": "stop"})
        raise
    session.log.add_event(step, event)
    session.log.say(what)
    return decision


def roll_back(session: Session, batch: GlobalBatch) -> Path:
    """Roll back to the last good checkpoint, and skip the batches from there to `batch`. Collective.

    A checkpoint saved between consecutive anomalies contains their cause, and is removed. Raises RunError if there is
    no good one.
    """
    session.saver.wait()
    rollbacks, given_up, below_step = session.gate.watch.num_rollbacks, [], None
    while True:
        checkpoint, rejected = newest_valid(session, below_step)
        for reason in rejected:
            session.log.say(f"rejected checkpoint {reason}")
        if checkpoint is None:
            raise RunError(
                f"stopped after step {session.step}: too many anomalies, and there is no earlier checkpoint to go back "
                "to. Nothing was updated in these steps. Save more often (checkpoint.every), or start with a lower "
                "learning rate or a longer warmup"
            )
        state = load_json(checkpoint / TRAINER_STATE)
        if state.get("anomalies", {}).get("in_a_row", 0):
            given_up.append(checkpoint)
        elif try_restore(session, checkpoint) is None:
            break
        below_step = step_of(checkpoint)
    if dist.get_rank() == 0:
        for later in given_up:
            discard(later)
    dist.barrier(group=session.context.group)
    watch = session.gate.watch
    if session.mirroring is not None:
        session.mirroring.request(session.step, went_back=True)  # removes the copies of those given up
    watch.in_a_row, watch.num_rollbacks = 0, rollbacks + 1
    first = session.skipped.batch_index(session.step)
    set_skipped(session, session.skipped.without(first, batch.index + 1))
    session.log.reset_clock()
    return checkpoint


def _why_stopped(session: Session, anomaly: Anomaly) -> str:
    policy, metrics = session.plan.recipe.anomalies, session.context.run.metrics
    if anomaly.kind == "non_finite" and policy.non_finite == "stop":
        why = "anomalies.non_finite is `stop`; with `skip` or `rollback` the same command resumes"
    else:
        count = session.gate.watch.num_rollbacks
        why = (
            f"The run has rolled back {count} times, and anomalies continue. A lower learning rate or other data may "
            "help; anomalies.max_rollbacks allows more"
        )
    return f"{why}. The update was not applied; checkpoints are as they were, and the event is in {metrics}"
