"""Random restarts: train a few steps from several initial weights, and continue with the best.

Start many, stop early, continue some (Dodge et al. 2020, arXiv 2002.06305, of fine-tuning). Only the initial weights
differ: the data order and dropout's random numbers are the same, so that the losses are comparable. A candidate is
judged by its mean training loss over the last quarter of its steps. All candidates see the same batches there, usually
for the first time, so an evaluation would add little and cost more.

The candidates are trained one after the other in the engine of the run, which is reset in between from a checkpoint of
step 0. In runs/<name>/restarts/:
  candidates.json     the losses of those that are done      candidate-<n>.jsonl  the steps of each, but of the best
  start/, <n>/        checkpoints of step 0 and of the best so far, until the run has its own
"""

from __future__ import annotations

import copy
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist

from turbolm.checkpoint.agreement import gather_over
from turbolm.checkpoint.manifest import checkpoint_name, remove_folder
from turbolm.checkpoint.retention import Retention
from turbolm.checkpoint.save import write_checkpoint
from turbolm.checkpoint.snapshot import take_snapshot
from turbolm.checkpoint.verify import find_newest_valid
from turbolm.errors import RunError
from turbolm.files import read_json, write_json
from turbolm.models.build import build_model
from turbolm.reliability import heartbeat
from turbolm.train.loop import agree_to_stop, take_step
from turbolm.train.session import Session, restore, save, trainer_state

_SEED_STRIDE = 1_000_003  # far from the consecutive seeds that people choose


def candidate_seed(seed: int, candidate: int) -> int:
    """Return the seed of a candidate's initial weights; the first has those of a run without random restarts."""
    return (seed + _SEED_STRIDE * candidate) % 2**32


def choose_start(session: Session) -> None:
    """Train the candidates of a run that begins, and leave the session with the best one. Collective.

    Does nothing for a run that has begun. Candidates that an earlier attempt finished are not trained again; an
    interrupted one is. If asked to stop, it leaves the session at step 0, where training stops too. Raises RunError if
    every candidate has an anomaly, or none can be saved.
    """
    settings = session.plan.recipe.train.random_restarts
    if settings is None or session.step > 0:
        return
    folder, seed = session.context.run.random_restarts, session.plan.recipe.train.seed
    num_steps = session.plan.random_restart_steps
    losses = _finished(session)
    _save(session, folder / "start")
    for candidate in range(len(losses), settings.seeds):
        with heartbeat.phase(heartbeat.STARTING):
            restore(session, folder / "start" / checkpoint_name(0))
            if candidate > 0:
                _draw_again(session, candidate_seed(seed, candidate))
        name = f"candidate {candidate + 1} of {settings.seeds}"
        session.log.say(f"{name}: {num_steps} steps from initial weights of seed {candidate_seed(seed, candidate)}")
        stopped, loss = _train_candidate(session, _metrics(folder, candidate), num_steps)
        if stopped:
            session.log.say(f"asked to stop by {stopped}: {name} will be trained again")
            session.step = 0
            session.context.stop.request(stopped)  # and stays 0: these are not the weights to train from
            return
        before, losses = _best(losses), [*losses, loss]
        if _best(losses) == candidate:
            _save(session, folder / str(candidate))
        session.log.say(f"{name}: " + ("given up for its anomaly" if loss is None else f"loss {loss:.4f}"))
        if dist.get_rank() == 0:
            write_json(folder / "candidates.json", {"steps": num_steps, "losses": losses})
            if before is not None and _best(losses) == candidate:
                remove_folder(folder / str(before))
    best = _best(losses)
    if best is None:
        raise RunError(
            "every candidate of train.random_restarts met an anomaly; try a lower learning rate or a longer warmup, "
            f"and move {folder} away"
        )
    with heartbeat.phase(heartbeat.STARTING):
        restore(session, folder / str(best) / checkpoint_name(num_steps))
    session.random_restarts = {
        "steps": num_steps,
        "seeds": [candidate_seed(seed, candidate) for candidate in range(settings.seeds)],
        "losses": losses,
        "chosen": best,
        "extra_tokens": session.plan.random_restart_tokens,
    }
    session.saved_step = -1  # not among the run's own checkpoints yet
    if dist.get_rank() == 0 and _metrics(folder, best).exists():
        _metrics(folder, best).replace(session.context.run.metrics)  # its steps are the run's first
    save(session, last=True)
    if dist.get_rank() == 0:
        for name in ("start", str(best)):
            remove_folder(folder / name)
    session.log.say(f"continuing with candidate {best + 1}: initial weights of seed {candidate_seed(seed, best)}")


def _train_candidate(session: Session, metrics: Path, num_steps: int) -> tuple[str | None, float | None]:
    """Return (what asked it to stop, its loss in nats per target); no loss after an anomaly, which ends it."""
    session.log.path, run_metrics = metrics, session.log.path
    if dist.get_rank() == 0:
        metrics.unlink(missing_ok=True)  # from an attempt that ended within this candidate
    session.log.reset_clock()
    stopped: str | None = None
    judged, num_targets, is_sound = torch.zeros((), dtype=torch.float64), 0, True
    with closing(session.loader.iterate(0, num_steps)) as batches:
        for batch in batches:
            stopped = agree_to_stop(session, batch)
            if stopped:
                break
            result = take_step(session, batch)
            is_sound = result.anomaly is None
            if not is_sound:
                break
            if session.average is not None:
                session.average.add(session.step)
            if session.step > num_steps - max(1, num_steps // 4):
                judged += result.loss_sum.double().cpu()
                num_targets += batch.num_targets
            if session.step % session.plan.recipe.logging.every_steps == 0:
                session.log.flush(show=True)
    session.log.flush()
    session.log.path = run_metrics
    dist.all_reduce(judged, group=session.context.group)
    return stopped, float(judged) / num_targets if is_sound and not stopped else None


def _draw_again(session: Session, seed: int) -> None:
    """Set the initial weights of another seed in an engine that has not trained a step. Collective."""
    engine, plan = session.engine, session.plan
    sharded_by = plan.ds_config if plan.recipe.execution.zero_stage == 3 else None
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):  # dropout continues as if nothing had been drawn
        config = copy.deepcopy(engine.module.config)
        drawn = build_model(plan.recipe.model, config, seed=seed, attention=session.attention, sharded_by=sharded_by)
    engine.copy_weights(drawn)


def _finished(session: Session) -> list[float | None]:
    """Return the losses of candidates that earlier attempts finished; none if the best one's checkpoint is gone.

    Collective.
    """
    folder, agree = session.context.run.random_restarts, gather_over(session.context.group)
    record = agree(read_json(folder / "candidates.json"))[0] or {}
    losses = record.get("losses")
    if not isinstance(losses, list) or record.get("steps") != session.plan.random_restart_steps:
        return []
    best = _best(losses)
    if best is not None and find_newest_valid(folder / str(best), session.context.contracts, agree)[0] is None:
        session.log.say(f"no valid checkpoint of the best candidate in {folder}: all candidates are trained again")
        return []
    return losses


def _best(losses: list[float | None]) -> int | None:
    """Return the candidate with the lowest loss, the first of several."""
    sound = [(loss, candidate) for candidate, loss in enumerate(losses) if loss is not None]
    return min(sound)[1] if sound else None


@heartbeat.phase(heartbeat.SAVING)
def _save(session: Session, folder: Path) -> None:
    """Save the current session immediately. Collective. Raises RunError."""
    about, agree = {"contract": session.saver.contract_fingerprint}, gather_over(session.context.group)
    try:
        snapshot = take_snapshot(session.engine, session.step, trainer_state(session))
        write_checkpoint(folder, snapshot, about, Retention(keep_last=1), agree=agree)
    except RuntimeError as error:
        raise RunError(
            f"a candidate of train.random_restarts was not saved: {error}; the same command tries again"
        ) from error


def _metrics(folder: Path, candidate: int) -> Path:
    return folder / f"candidate-{candidate}.jsonl"
