"""One process of a training run: from a recipe to a trained model, on whatever ranks the launcher started."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist

from turbolm.checkpoint.fragments import own_fragments, stepped_partitions
from turbolm.checkpoint.manifest import clear_leftovers
from turbolm.checkpoint.retention import Retention
from turbolm.checkpoint.save import gather_over
from turbolm.checkpoint.saver import CheckpointSaver
from turbolm.checkpoint.verify import Hashed, hash_ahead
from turbolm.data.loader import BatchLoader
from turbolm.data.order import recipe_order
from turbolm.data.prepare import find_store
from turbolm.data.store import TokenStore, check_tokenizer, open_store
from turbolm.errors import EXIT_OK, EXIT_REQUEUE, UserError
from turbolm.models.attention import choose_attention, model_inputs
from turbolm.models.build import (
    build_config,
    build_model,
    carries_state_across_documents,
    check_all_trained,
    model_class,
)
from turbolm.models.compile import apply_compile, keep_layers_whole
from turbolm.models.fp8 import apply_fp8
from turbolm.models.initialise import count_parameters, seed_for_rank
from turbolm.models.isolation import check_isolation
from turbolm.models.loss import attach_loss, choose_loss
from turbolm.models.recompute import apply_activation_checkpointing
from turbolm.optim.build import build_optimizer, eight_bit_share
from turbolm.optim.cautious import CautiousAdamW
from turbolm.optim.groups import group_table
from turbolm.optim.muon import Muon
from turbolm.plan.flops import peak_half_flops, training_flops_per_token
from turbolm.plan.machine import Machine, check_machine, detect_machine
from turbolm.plan.plan import Plan, build_plan
from turbolm.recipe.contract import contract_of, fingerprint
from turbolm.recipe.schema import Recipe
from turbolm.reliability import heartbeat
from turbolm.reliability.anomalies import AnomalyWatch
from turbolm.reliability.build_locks import clear_stale_locks, extensions_root
from turbolm.reliability.run_lock import RunLock
from turbolm.reliability.stop import StopRequest
from turbolm.train.compiling import tell_of_compiling
from turbolm.train.engine import build_accelerator, clip_by_value, control_group
from turbolm.train.finish import finish_run, summary
from turbolm.train.gate import UpdateGate
from turbolm.train.loop import Session, train
from turbolm.train.metrics import MetricsLog, measure_peak_flops
from turbolm.train.pace import Pace
from turbolm.train.recover import newest_valid, restore
from turbolm.train.restarts import choose_start
from turbolm.train.run_directory import (
    RunDirectory,
    is_finished,
    known_fingerprints,
    open_attempt,
    refuse_links_out,
    run_directory,
    settle_contract,
    write_attempt,
    write_outcome,
)

_LAST_WRITE_SEC = 60


def run_worker(recipe: Recipe, attempt: int | None = None) -> int:
    """Train `recipe` as one rank of the launched world; returns the process's exit code.

    `attempt` is the number of the attempt's folder when the launcher has opened one. Raises UserError, and RunError
    when the newest state cannot be saved.
    """
    lock = RunLock(run_directory(recipe).path)
    try:
        return _run_locked(recipe, attempt, lock)
    finally:
        lock.release()


def _run_locked(recipe: Recipe, attempt: int | None, lock: RunLock) -> int:
    """`run_worker`; rank 0 takes the lock."""
    heartbeat.advance()  # all is imported
    machine = detect_machine()
    check_machine(recipe, machine)
    plan = build_plan(recipe, machine, int(os.environ.get("WORLD_SIZE", "1")))
    torch.set_num_threads(plan.threads_per_process)
    store = _open_prepared_store(recipe)
    run = run_directory(recipe)
    stop = StopRequest(run.stop_file)
    stop.listen()
    hashed = hash_ahead(run.checkpoints, (int(os.environ.get("RANK", "0")), plan.world_size))
    accelerator = build_accelerator(
        plan.ds_config,
        device=plan.device,
        precision=plan.precision,
        timeout_sec=recipe.execution.process_group_timeout,
    )
    group = control_group()
    heartbeat.advance()
    if os.environ["LOCAL_RANK"] == "0":  # the other ranks come to building only after this one has opened the run
        for message in clear_stale_locks(extensions_root(os.environ)):
            print(f"turbolm: {message}", flush=True)
    attempt, plan, contracts = _open_run(run, plan, machine, store, attempt, group, lock)
    heartbeat.set_attempt(attempt)
    terminal = redirect_output(run.attempt(attempt) / f"log.rank{dist.get_rank()}.txt")
    if is_finished(run, recipe.train.budget):
        if dist.get_rank() == 0:
            terminal.write(f"{run.path} is complete; see {run.results}\n")
            write_outcome(run, attempt, "complete", EXIT_OK)
        return EXIT_OK
    session = _build_session(accelerator, plan, run, store, stop, attempt, terminal, group, machine, contracts)
    session.saver.before_commit = lock.check
    heartbeat.advance()
    _resume(session, hashed)
    heartbeat.advance()
    num_parameters = count_parameters(session.engine.module)
    try:
        evaluation = train(session) if choose_start(session) else None
    except BaseException:
        session.saver.wait(_LAST_WRITE_SEC)  # what is being written is a good state
        raise
    session.log.flush()
    dist.barrier(group=group)
    if dist.get_rank() == 0 and evaluation is not None:
        session.log.say("exporting the model")
        with heartbeat.phase(heartbeat.EXPORTING):
            results = finish_run(run, plan, store, evaluation, num_parameters)
        write_outcome(run, attempt, "finished", EXIT_OK)
        session.log.say(summary(results))
    elif dist.get_rank() == 0:
        write_outcome(run, attempt, "stopped", EXIT_REQUEUE)
        session.log.say(f"stopped after step {session.step}; the same command resumes there")
    return EXIT_REQUEUE if evaluation is None else EXIT_OK


def redirect_output(log: Path) -> TextIO:
    """Send what this process prints to its log file; returns the terminal that standard output was.

    At the level of file descriptors, so that libraries written in C++ are caught as well.
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
    pretrained = recipe.model.pretrained
    if pretrained is not None and (Path(pretrained) / "tokenizer.json").is_file():
        check_tokenizer(store, pretrained)  # a model goes on learning only in the tokens it knows
    return store


def _open_run(
    run: RunDirectory,
    plan: Plan,
    machine: Machine,
    store: TokenStore,
    attempt: int | None,
    group: Any,
    lock: RunLock,
) -> tuple[int, Plan, frozenset[str]]:
    """Rank 0 settles contract and attempt; every rank gets the attempt's number, the plan with the run's budgets, and
    the fingerprints its checkpoints may have.

    Every rank raises the UserError of rank 0.
    """
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            refuse_links_out(run)
            lock.acquire()
            budgets = settle_contract(run, plan.recipe, store.fingerprint)
            number = attempt or open_attempt(run)
            write_attempt(run, number, plan.with_budgets(budgets), machine)
            answer = [(number, budgets, known_fingerprints(run, plan.recipe, budgets))]
        except (UserError, OSError) as error:
            answer = [str(error)]
    dist.broadcast_object_list(answer, src=0, group=group)
    if isinstance(answer[0], str):
        raise UserError(answer[0])
    number, budgets, contracts = answer[0]
    return number, plan.with_budgets(budgets), frozenset(contracts)


def _build_session(
    accelerator: Any,
    plan: Plan,
    run: RunDirectory,
    store: TokenStore,
    stop: StopRequest,
    attempt: int,
    terminal: TextIO,
    group: Any,
    machine: Machine,
    contracts: frozenset[str],
) -> Session:
    """Model, engine, data and logging of a run that is about to train or resume."""
    recipe = plan.recipe
    engine, attention = build_engine(accelerator, plan, store, run)
    data = recipe.data
    if data.packing != "single":
        engine.eval()  # dropout would move the logits by itself
        leak = check_isolation(
            engine,
            vocab_size=store.vocab_size,
            seq_len=min(data.seq_len, 64),
            attention=attention,
            device=engine.device,
            precision=plan.precision,
        )
        engine.train()
        print(f"packed documents are isolated: a change moved its neighbour's logits by {leak:.1e}")
    if recipe.train.fp8 != "off":  # after the check: a scale shared by a whole tensor is rounding that all rows share
        print(f"products in 8 bits: {len(apply_fp8(engine.module, recipe.train.fp8))} linear layers")
    world_size, rank = dist.get_world_size(), dist.get_rank()
    if rank > 0:
        dist.barrier(group=group)
    order = recipe_order(recipe, store, plan.curriculum, save=rank == 0)
    if rank == 0:
        dist.barrier(group=group)  # the others find the table in the cache
    # What is compiled sees one size for each row length: the most pieces there are in the whole run.
    max_pieces = order.max_pieces(plan.num_steps) if recipe.execution.compile != "none" else None
    loader = BatchLoader(order, store, "train", world_size, rank, recipe.execution.micro_batch, max_pieces)
    num_matmul = count_parameters(engine.module, min_dims=2)
    config = engine.module.config.to_dict()

    def flops_per_target(mean_span: float) -> float:
        known = training_flops_per_token(config, mean_span)
        return 6.0 * num_matmul if known is None else known

    log = MetricsLog(
        path=run.metrics,
        attempt=attempt,
        curriculum=plan.curriculum,
        peak_flops=_peak_flops(engine, plan, machine),
        group=group,
        terminal=terminal,
        pace=Pace(gather_over(group)(platform.node())),
    )
    gate = UpdateGate(engine, AnomalyWatch(recipe.anomalies))
    return Session(
        plan=plan,
        run=run,
        engine=engine,
        store=store,
        loader=loader,
        attention=attention,
        saver=_build_saver(plan, run, engine, stop, log),
        group=group,
        stop=stop,
        log=log,
        gate=gate,
        contracts=contracts,
        flops_per_target=flops_per_target,
    )


def _build_saver(plan: Plan, run: RunDirectory, engine: Any, stop: StopRequest, log: MetricsLog) -> CheckpointSaver:
    """Collective: the threads that write agree over a process group of their own."""
    settings, batch_tokens = plan.recipe.checkpoint, plan.batch.global_batch_tokens

    def report(text: str) -> None:
        log.say(text)
        if settings.on_failure == "stop":
            stop.request("a checkpoint that was not written")

    every = settings.keep_every
    return CheckpointSaver(
        folder=run.checkpoints,
        engine=engine,
        retention=Retention(
            keep_last=settings.keep_last,
            keep_every_tokens=every.tokens(plan.recipe.train.budget, batch_tokens) if every else None,
            keep_best=settings.keep_best,
        ),
        contract_fingerprint=fingerprint(contract_of(plan.recipe)),
        asynchronous=settings.asynchronous,
        group=dist.new_group(backend="gloo"),
        report=report,
    )


def build_engine(accelerator: Any, plan: Plan, store: TokenStore, run: RunDirectory) -> tuple[Any, str]:
    """The DeepSpeed engine around a freshly initialised model, and the attention kernel it was built with.

    Rank 0 saves configuration and tokenizer to the run.
    """
    recipe = plan.recipe
    config = build_config(
        recipe.model,
        seq_len=recipe.data.seq_len,
        vocab_size=store.vocab_size,
        bos_token_id=store.manifest["bos_id"],
        eos_token_id=store.manifest["eos_id"],
    )
    kind = model_class(config)
    reason = carries_state_across_documents(config, kind)
    if reason and recipe.data.packing != "single":
        raise UserError(f"data.packing: {reason}, so packed documents cannot be kept apart; set data.packing: single")
    attention = choose_attention(recipe.execution.attention, plan.device, plan.precision, kind)
    sharded_by = plan.ds_config if recipe.execution.zero_stage == 3 else None
    model = build_model(recipe.model, config, seed=recipe.train.seed, attention=attention, sharded_by=sharded_by)
    check_all_trained(model)
    if dist.get_rank() == 0:
        config.save_pretrained(run.model)
        from turbolm.checkpoint.export import tokenizer

        tokenizer(store.tokenizer_dir).save_pretrained(run.model)
    apply_activation_checkpointing(model, recipe.execution.activation_checkpointing)
    execution = recipe.execution
    needs_layers_whole = execution.compile == "layers" or execution.activation_checkpointing == "selective"
    if execution.zero_stage == 3 and needs_layers_whole:
        keep_layers_whole(model)
    optimizer = build_optimizer(model, recipe)
    print(group_table(recipe.optimizer.name, optimizer.param_groups))
    if recipe.train.max_grad_value is not None:
        clip_by_value(optimizer, recipe.train.max_grad_value)
    engine, _ = accelerator.prepare(model, optimizer)
    if recipe.optimizer.name == "adamw_8bit":
        share = eight_bit_share(stepped_partitions(engine) or list(engine.module.parameters()))
        print(f"moments in 8 bits for {share:.1%} of the parameters here; the others' are not in whole blocks: fp32")
    if isinstance(optimizer, (Muon, CautiousAdamW)) and execution.zero_stage > 0:
        optimizer.distribute(stepped_partitions(engine), own_fragments(engine), engine.device)
    tokens = np.arange(8)[None]
    probe = model_inputs({"input_ids": tokens, "position_ids": tokens}, attention, engine.device)
    loss = choose_loss(execution.loss, engine, engine.module, probe, plan.precision, plan.batch.micro_batch_tokens)
    attach_loss(engine.module, loss, z_loss=recipe.train.z_loss)
    apply_compile(engine.module, execution.compile)
    tell_of_compiling()
    heartbeat.advance()
    seed_for_rank(recipe.train.seed, dist.get_rank())
    engine.train()
    return engine, attention


def _resume(session: Session, hashed: Hashed) -> None:
    """Continue from the newest valid checkpoint, which all ranks verify and choose together."""
    run = session.run
    if dist.get_rank() == 0:
        clear_leftovers(run.checkpoints)
    newest, rejected = newest_valid(session, hashed=hashed)
    for reason in rejected:
        session.log.say(f"rejected checkpoint {reason}")
    if newest is None and rejected:
        raise UserError(
            f"no checkpoint of {run.path} is valid. To start over, move {run.checkpoints} away; nothing was changed"
        )
    if newest is None:
        return
    restore(session, newest)
    session.log.say(f"resumed from {newest}")
    session.log.restart_clock()


def _peak_flops(engine: Any, plan: Plan, machine: Machine) -> float | None:
    """Peak of all devices together: from the data sheet, else measured as a matrix product on every rank at once."""
    known = peak_half_flops(machine.gpu_name) if plan.device == "cuda" and plan.precision != "fp32" else None
    if known is not None:
        return known * plan.world_size
    peak = torch.tensor([measure_peak_flops(engine.device, next(engine.module.parameters()).dtype)])
    if plan.device == "cuda":
        return None  # an unlisted GPU: kernel launches are not finished when torch returns, so do not guess
    dist.all_reduce(peak)
    return float(peak)
