"""Build what an attempt needs from its plan: the engine around the model, the data, the log, the saver."""

from __future__ import annotations

import platform

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from transformers import PreTrainedModel

from turbolm.checkpoint.agreement import gather_over
from turbolm.checkpoint.mirroring import Mirroring
from turbolm.checkpoint.retention import Retention
from turbolm.checkpoint.saver import CheckpointSaver
from turbolm.checkpoint.verify import Hashed, not_hashed
from turbolm.data.batch.loader import BatchLoader
from turbolm.data.order.batch_order import recipe_order
from turbolm.data.store.token_store import TokenStore
from turbolm.engine.device import DTYPES
from turbolm.engine.engine import Engine
from turbolm.engine.start import wrap
from turbolm.errors import UserError
from turbolm.models.attention import check_long_sequences, choose_attention, model_inputs
from turbolm.models.build import (
    build_config,
    build_model,
    carries_state_across_documents,
    check_all_trained,
    model_class,
)
from turbolm.models.flash import start_kernels
from turbolm.models.initialise import seed_for_rank
from turbolm.models.isolation import check_isolation, outputs_that_count
from turbolm.models.loss import attach_loss, choose_loss
from turbolm.models.parallel_attention import check_shared_sequences, share_attention
from turbolm.models.positions import check_positions
from turbolm.models.router import find_routers, freeze_balancing_biases
from turbolm.models.sequence_parallel import start_sequence_group
from turbolm.optim.build import build_optimizer, eight_bit_share
from turbolm.optim.groups import group_table
from turbolm.plan.machine import Machine
from turbolm.plan.plan import Plan
from turbolm.recipe.contract import contract_of, fingerprint
from turbolm.recipe.gpus import peak_flops
from turbolm.reliability import heartbeat
from turbolm.reliability.anomalies import AnomalyWatch
from turbolm.train.compiling import report_compilation
from turbolm.train.context import Context
from turbolm.train.evaluation import left_out_note, read_scored_together
from turbolm.train.gate import UpdateGate
from turbolm.train.metrics import MetricsLog, measure_peak_flops
from turbolm.train.model_flops import count_batch_flops
from turbolm.train.pace import Pace
from turbolm.train.pinned import pinned_memory
from turbolm.train.recover import SavedWeights, saved_weights
from turbolm.train.run_directory import RunDirectory
from turbolm.train.session import Session
from turbolm.train.start_times import mark
from turbolm.train.trackers import build_trackers
from turbolm.train.tricks import apply_tricks
from turbolm.train.weight_average import RunningAverage


def build_session(accelerator: Accelerator, context: Context, hashed: Hashed = not_hashed) -> Session:
    """Build model, engine, data and logging of a run that is about to train or resume. Collective.

    The engine of a run with checkpoints has their weights; `resume` restores the rest.
    """
    plan, recipe, group = context.plan, context.recipe, context.group
    scored = read_scored_together(context)
    saved = saved_weights(context, hashed)
    engine, attention = build_engine(accelerator, plan, context.store, context.run, saved)
    loader = _build_loader(plan, context.store, engine.device)
    log = MetricsLog(
        path=context.run.metrics,
        attempt=context.attempt,
        curriculum=plan.curriculum,
        peak_flops=_peak_flops(engine, plan, context.machine),
        group=group,
        terminal=context.terminal,
        pace=Pace(gather_over(group)(platform.node())),
    )
    if dist.get_rank() == 0:
        log.trackers = build_trackers(context, log.say)
    routers = find_routers(engine.module, recipe.train.router_aux_loss, recipe.train.router_bias_update)
    if routers is not None:
        log.say(routers.message)
    for note in filter(None, (left_out_note(recipe, context.store), *(scored.notes if scored else ()))):
        log.say(note)
    saver, mirroring = _build_saver(context, engine, log), None
    if context.upload is not None:
        mirroring = Mirroring(context.upload, log.say)
        saver.on_commit = mirroring.request
    return Session(
        context=context,
        engine=engine,
        attention=attention,
        loader=loader,
        saver=saver,
        mirroring=mirroring,
        log=log,
        gate=UpdateGate(engine, AnomalyWatch(recipe.anomalies)),
        training_flops=count_batch_flops(context, engine.module),
        scored=scored,
        has_saved_weights=saved is not None,
        average=RunningAverage(engine, plan) if engine.averaged else None,
    )


def build_engine(
    accelerator: Accelerator, plan: Plan, store: TokenStore, run: RunDirectory, saved: SavedWeights | None = None
) -> tuple[Engine, str]:
    """Return the DeepSpeed engine around a newly initialized model, and the attention kernel it was built with.

    With `saved` no weight is drawn, nor read from `model.pretrained`: it has those of a checkpoint. Rank 0 saves
    configuration and tokenizer to the run. Collective.
    """
    recipe = plan.recipe
    model, attention = _build_model(accelerator, plan, store, saved)
    mark("model")
    if dist.get_rank() == 0:
        model.config.save_pretrained(run.model)
        from turbolm.checkpoint.export import tokenizer

        tokenizer(store.tokenizer_dir).save_pretrained(run.model)
    apply_tricks("model", model, recipe)
    optimizer = build_optimizer(model, recipe)
    print(group_table(recipe.optimizer.name, optimizer.param_groups))
    apply_tricks("optimizer", optimizer, recipe)
    engine = wrap(accelerator, model, optimizer)
    mark("engine")
    if recipe.optimizer.name == "adamw_8bit":
        share = eight_bit_share(engine.stepped_partitions() or list(engine.module.parameters()))
        print(f"moments in 8 bits for {share:.1%} of the parameters here; the others' are not in whole blocks: fp32")
    if engine.zero_stage > 0 and hasattr(optimizer, "distribute"):  # it needs to know whole parameters
        optimizer.distribute(engine.stepped_partitions(), engine.fragments(), engine.device)
    if saved:
        saved.load(engine)  # the checks below run the model
        heartbeat.advance()
    print(start_kernels(attention, engine.device))
    _check_isolation(engine, plan, store, attention)
    tokens = np.arange(8)[None]
    probe = model_inputs({"input_ids": tokens, "position_ids": tokens}, attention, engine.device)
    kernel, micro_batch_tokens = recipe.execution.loss, plan.batch.process_tokens
    loss = choose_loss(kernel, engine, engine.module, probe, plan.precision, micro_batch_tokens)
    attach_loss(engine.module, loss, z_loss=recipe.train.z_loss)
    apply_tricks("engine", engine, recipe)
    report_compilation()
    heartbeat.advance()
    seed_for_rank(recipe.train.seed, dist.get_rank())
    engine.train()
    mark("checks of the model")
    return engine, attention


def _build_model(
    accelerator: Accelerator, plan: Plan, store: TokenStore, saved: SavedWeights | None
) -> tuple[PreTrainedModel, str]:
    """Return the model of the recipe, checked, and its attention kernel. Collective at stage 3."""
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
    sizes = {"seq_len": recipe.data.seq_len, "joined_tokens": plan.batch.micro_batch_tokens}
    check_long_sequences(config, attention, packed=recipe.data.packing != "single", **sizes)
    shared_by = recipe.execution.sequence_parallel
    if shared_by > 1:
        check_shared_sequences(config, attention, shared_by=shared_by, seq_len=recipe.data.seq_len, reason=reason)
    sharded_by = plan.ds_config if recipe.execution.zero_stage == 3 else None
    model = build_model(
        recipe.model,
        config,
        seed=recipe.train.seed,
        attention=attention,
        sharded_by=sharded_by,
        saved=saved.parameters if saved else None,
        held_as=(DTYPES[plan.precision], accelerator.device),
    )
    if start_sequence_group(shared_by) is not None:
        share_attention(model, attention)
    freeze_balancing_biases(model)
    check_all_trained(model)
    check_positions(model, recipe.data.seq_len)
    return model, attention


def _check_isolation(engine: Engine, plan: Plan, store: TokenStore, attention: str) -> None:
    """Raise UserError if a later token or another document changes the model's output. Collective."""
    data = plan.recipe.data
    has_one_sequence = plan.batch.micro_batch_bins == 1 and plan.curriculum.seq_lens == (data.seq_len,)
    engine.train()  # as it trains; the check draws the same random numbers in every pass
    with outputs_that_count(engine.module, plan.recipe.model.init):
        moved = check_isolation(
            engine,
            vocab_size=store.vocab_size,
            seq_len=data.seq_len,
            attention=attention,
            precision=plan.precision,
            packed=data.packing != "single",
            num_sequences=1 if has_one_sequence else 2,
            config=engine.module.config,
        )
    print(f"documents are isolated, and read from left to right: a change moved its neighbour's logits by {moved:.1e}")


def _build_loader(plan: Plan, store: TokenStore, device: torch.device) -> BatchLoader:
    """Every rank reads the plan table that `prepare` left, and plans by itself what is missing: none waits for another.

    A world that was started by hand may lack it; rank 0 then keeps it for the next start.
    """
    recipe, world_size, rank = plan.recipe, dist.get_world_size(), dist.get_rank()
    order = recipe_order(recipe, store, plan.curriculum, save=rank == 0, on_progress=lambda _: heartbeat.beat())
    # What is compiled sees few sizes for each sequence length, up to the most slices there are in the whole run.
    max_slices = order.max_slices(plan.num_steps) if recipe.execution.compile != "none" else None
    micro_batch, shared_by = recipe.execution.micro_batch, recipe.execution.sequence_parallel
    memory = pinned_memory(device)
    return BatchLoader(order, store, "train", world_size, rank, micro_batch, max_slices, memory, shared_by)


def _build_saver(context: Context, engine: Engine, log: MetricsLog) -> CheckpointSaver:
    recipe, batch_tokens = context.recipe, context.plan.batch.global_batch_tokens
    settings, every = recipe.checkpoint, recipe.checkpoint.keep_every

    def report(text: str) -> None:
        log.say(text)
        if settings.on_failure == "stop":
            context.stop.request("a checkpoint that was not written")

    return CheckpointSaver(
        folder=context.run.checkpoints,
        engine=engine,
        retention=Retention(
            keep_last=settings.keep_last,
            keep_every_tokens=every.tokens(recipe.train.budget, batch_tokens) if every else None,
            keep_best=settings.keep_best,
        ),
        contract_fingerprint=fingerprint(contract_of(recipe)),
        asynchronous=settings.asynchronous,
        group=context.group,
        report=report,
    )


def _peak_flops(engine: Engine, plan: Plan, machine: Machine) -> float | None:
    """Return the peak of all devices: from the data sheet, else measured as a matrix product on every rank at once."""
    known = peak_flops(machine.gpu_name, plan.precision) if plan.device == "cuda" else None
    if known is not None:
        return known * plan.world_size
    peak = torch.tensor([measure_peak_flops(engine.device, next(engine.module.parameters()).dtype)])
    if plan.device == "cuda":
        return None  # an unlisted GPU: kernel launches are not finished when torch returns, so do not guess
    dist.all_reduce(peak)
    return float(peak)
