"""What an attempt trains with, made from its plan: the engine around the model, the data, the log, the saver."""

from __future__ import annotations

import platform
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist

from turbolm.checkpoint.retention import Retention
from turbolm.checkpoint.save import gather_over
from turbolm.checkpoint.saver import CheckpointSaver
from turbolm.data.batch.loader import BatchLoader
from turbolm.data.order.batch_order import recipe_order
from turbolm.data.store.token_store import TokenStore
from turbolm.engine.engine import Engine
from turbolm.engine.start import wrap
from turbolm.errors import UserError
from turbolm.models.attention import check_long_rows, choose_attention, model_inputs
from turbolm.models.build import (
    build_config,
    build_model,
    carries_state_across_documents,
    check_all_trained,
    model_class,
)
from turbolm.models.compile import apply_compile, keep_layers_whole
from turbolm.models.fp8 import apply_fp8
from turbolm.models.initialise import seed_for_rank
from turbolm.models.isolation import check_isolation
from turbolm.models.loss import attach_loss, choose_loss
from turbolm.models.positions import check_positions
from turbolm.models.recompute import apply_activation_checkpointing
from turbolm.models.router import attach_router_loss, find_routers, freeze_balancing_biases
from turbolm.models.size import measure_model
from turbolm.optim.build import build_optimizer, eight_bit_share
from turbolm.optim.cautious import CautiousAdamW
from turbolm.optim.groups import group_table
from turbolm.optim.muon import Muon
from turbolm.plan.flops import training_flops_per_token
from turbolm.plan.machine import Machine
from turbolm.plan.plan import Plan
from turbolm.recipe.contract import contract_of, fingerprint
from turbolm.recipe.gpus import peak_flops
from turbolm.reliability import heartbeat
from turbolm.reliability.anomalies import AnomalyWatch
from turbolm.reliability.stop import StopRequest
from turbolm.train.compiling import tell_of_compiling
from turbolm.train.gate import UpdateGate
from turbolm.train.loop import Session
from turbolm.train.metrics import MetricsLog, measure_peak_flops
from turbolm.train.pace import Pace
from turbolm.train.run_directory import RunDirectory
from turbolm.train.tricks import clip_by_value


def build_session(
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
    if recipe.train.fp8 != "off":  # after the check: a scale shared by a whole tensor is rounding that all rows share
        print(f"products in 8 bits: {len(apply_fp8(engine.module, recipe.train.fp8))} linear layers")
    loader = _build_loader(plan, store, group)
    config, size = engine.module.config.to_dict(), measure_model(engine.module)

    def flops_per_target(mean_span: float) -> float:
        return training_flops_per_token(config, mean_span, size) or 0.0  # None only without a size

    log = MetricsLog(
        path=run.metrics,
        attempt=attempt,
        curriculum=plan.curriculum,
        peak_flops=_peak_flops(engine, plan, machine),
        group=group,
        terminal=terminal,
        pace=Pace(gather_over(group)(platform.node())),
    )
    routers = find_routers(engine.module, recipe.train.router_aux_loss)
    if routers is not None:
        log.say(routers.message)
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


def build_engine(accelerator: Any, plan: Plan, store: TokenStore, run: RunDirectory) -> tuple[Engine, str]:
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
    requested, carries_state = recipe.execution.attention, reason is not None
    attention = choose_attention(requested, plan.device, plan.precision, kind, carries_state=carries_state)
    rows = {"seq_len": recipe.data.seq_len, "row_tokens": plan.batch.micro_batch_tokens}
    check_long_rows(config, attention, packed=recipe.data.packing != "single", **rows)
    sharded_by = plan.ds_config if recipe.execution.zero_stage == 3 else None
    model = build_model(recipe.model, config, seed=recipe.train.seed, attention=attention, sharded_by=sharded_by)
    freeze_balancing_biases(model)
    check_all_trained(model)
    check_positions(model, recipe.data.seq_len)
    if dist.get_rank() == 0:
        model.config.save_pretrained(run.model)
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
    engine = wrap(accelerator, model, optimizer)
    if recipe.optimizer.name == "adamw_8bit":
        share = eight_bit_share(engine.stepped_partitions() or list(engine.module.parameters()))
        print(f"moments in 8 bits for {share:.1%} of the parameters here; the others' are not in whole blocks: fp32")
    if isinstance(optimizer, (Muon, CautiousAdamW)) and execution.zero_stage > 0:
        optimizer.distribute(engine.stepped_partitions(), engine.fragments(), engine.device)
    _check_isolation(engine, plan, store, attention)
    tokens = np.arange(8)[None]
    probe = model_inputs({"input_ids": tokens, "position_ids": tokens}, attention, engine.device)
    loss = choose_loss(execution.loss, engine, engine.module, probe, plan.precision, plan.batch.micro_batch_tokens)
    attach_loss(engine.module, loss, z_loss=recipe.train.z_loss)
    routers = find_routers(engine.module, recipe.train.router_aux_loss)
    if routers is not None:
        attach_router_loss(engine.module, routers)
    apply_compile(engine.module, execution.compile)
    tell_of_compiling()
    heartbeat.advance()
    seed_for_rank(recipe.train.seed, dist.get_rank())
    engine.train()
    return engine, attention


def _check_isolation(engine: Engine, plan: Plan, store: TokenStore, attention: str) -> None:
    """Raise UserError where a later token or another document changes what the model makes of one. Collective."""
    data = plan.recipe.data
    has_one_row = plan.batch.micro_batch_bins == 1 and plan.curriculum.seq_lens == (data.seq_len,)
    engine.train()  # as it trains; the check draws the same random numbers in every pass
    moved = check_isolation(
        engine,
        vocab_size=store.vocab_size,
        seq_len=data.seq_len,
        attention=attention,
        device=engine.device,
        precision=plan.precision,
        packed=data.packing != "single",
        num_rows=1 if has_one_row else 2,
        config=engine.module.config,
    )
    print(f"documents are isolated, and read from left to right: a change moved its neighbour's logits by {moved:.1e}")


def _build_loader(plan: Plan, store: TokenStore, group: Any) -> BatchLoader:
    """Collective: rank 0 makes the plan table, the others find it in the cache."""
    recipe, world_size, rank = plan.recipe, dist.get_world_size(), dist.get_rank()
    if rank > 0:
        dist.barrier(group=group)
    order = recipe_order(recipe, store, plan.curriculum, save=rank == 0)
    if rank == 0:
        dist.barrier(group=group)
    # What is compiled sees one size for each row length: the most pieces there are in the whole run.
    max_pieces = order.max_pieces(plan.num_steps) if recipe.execution.compile != "none" else None
    return BatchLoader(order, store, "train", world_size, rank, recipe.execution.micro_batch, max_pieces)


def _build_saver(plan: Plan, run: RunDirectory, engine: Engine, stop: StopRequest, log: MetricsLog) -> CheckpointSaver:
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


def _peak_flops(engine: Engine, plan: Plan, machine: Machine) -> float | None:
    """Peak of all devices together: from the data sheet, else measured as a matrix product on every rank at once."""
    known = peak_flops(machine.gpu_name, plan.precision) if plan.device == "cuda" else None
    if known is not None:
        return known * plan.world_size
    peak = torch.tensor([measure_peak_flops(engine.device, next(engine.module.parameters()).dtype)])
    if plan.device == "cuda":
        return None  # an unlisted GPU: kernel launches are not finished when torch returns, so do not guess
    dist.all_reduce(peak)
    return float(peak)
