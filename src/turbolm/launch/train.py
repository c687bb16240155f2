"""Prepare the data and train on this machine: what `turbolm train` does. Torch-free."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import nullcontext

from turbolm.checkpoint.push import check_token
from turbolm.data.store.token_store import open_store
from turbolm.environment import drop_foreign
from turbolm.errors import EXIT_OK, UserError
from turbolm.files import read_json
from turbolm.launch.attempt import attempt_of, stoppable
from turbolm.launch.local import launch
from turbolm.launch.store import prepare_order, prepare_profile, prepare_store
from turbolm.plan.machine import check_machine, detect_machine
from turbolm.plan.plan import build_plan
from turbolm.recipe.schema import Recipe
from turbolm.reliability.run_lock import RunLock
from turbolm.reliability.stop import look
from turbolm.train.from_mirror import copy_last, fetch_run
from turbolm.train.run_contract import as_started, check_contract, settle_commits
from turbolm.train.run_directory import is_finished, lacks_export, run_directory
from turbolm.train.run_export import lacks_push, push_run


def train_here(recipe: Recipe, recipe_file: str, overrides: Sequence[str]) -> int:
    """Prepare and train on this machine; returns the run's exit code. Raises UserError."""
    drop_foreign()
    refuse_several_nodes(recipe, recipe_file, overrides)
    run = run_directory(recipe)
    seen = look(run.stop_file)
    machine = detect_machine()
    check_machine(recipe, machine)
    if recipe.export.push_to is not None:
        check_token("export.push_to")
    with stoppable(run, seen):
        fetch_run(recipe)
    recipe, _ = as_started(recipe)
    check_contract(run, build_plan(recipe, machine).recipe, None)  # what data say is compared once they are prepared
    is_complete = is_finished(run, recipe.train.budget) and not lacks_export(run)
    with nullcontext() if is_complete else attempt_of(run, seen) as attempt:
        with stoppable(run, seen):
            recipe = settle_commits(recipe)
            plan = build_plan(recipe, machine)
            store = open_store(prepare_store(recipe))
            check_contract(run, plan.recipe, store.fingerprint)
            if attempt is not None:
                prepare_order(recipe, store)
                prepare_profile(recipe, recipe_file, store)
        if attempt is None:
            print(f"{run.path} is complete. Results: {run.results}, report: {run.path / 'report.html'}")
            print("Raise train.budget to train on, or give a new run a `name` of its own.")
            copy_last(plan)
            push_if_lacking(recipe)
            return EXIT_OK
        print(
            f"{recipe.name}: {plan.world_size} processes on {plan.device}, {plan.precision}, "
            f"ZeRO-{recipe.execution.zero_stage}, {plan.num_steps} steps of {plan.batch.global_batch_tokens} tokens",
            flush=True,
        )
        return launch(plan, run, attempt, recipe_file, overrides)


def push_if_lacking(recipe: Recipe) -> None:
    """Push the export of a complete run that was not pushed: its recipe may say so only now. Raises UserError."""
    run = run_directory(recipe)
    if not lacks_push(recipe, read_json(run.results) or {}):
        return
    lock = RunLock(run.path)
    lock.acquire()  # the start that exported it may be pushing it
    try:
        print(f"pushed to {push_run(run, recipe)}")
    finally:
        lock.release()


def refuse_several_nodes(recipe: Recipe, recipe_file: str, overrides: Sequence[str]) -> None:
    """Raises UserError with the commands that train on several machines."""
    num_nodes = recipe.cluster.num_nodes
    if num_nodes == 1:
        return
    words = shlex.join([recipe_file, *overrides])
    processes = recipe.cluster.gpus_per_node or recipe.cluster.processes_per_node
    total = processes * num_nodes if isinstance(processes, int) else f"PROCESSES_OF_ALL_{num_nodes}_MACHINES"
    raise UserError(
        f"cluster.num_nodes is {num_nodes}, and `turbolm train` starts one machine. Train with one of\n"
        f"  turbolm submit {words}   (on Slurm)\n"
        f"  launch/ssh.sh HOSTFILE {words}   (over ssh)\n"
        f"  accelerate launch --config_file launch/accelerate/multi_node.yaml --mixed_precision no --dynamo_backend no "
        f"--num_machines {num_nodes} --num_processes {total} --machine_rank RANK --main_process_ip HEAD "
        f"--main_process_port PORT --rdzv_backend static --same_network -m turbolm.train --recipe {words}   "
        "(once on each machine, RANK counted from 0, after `turbolm prepare`; launch/README.md)\n"
        "or train on this machine alone with cluster.num_nodes=1"
    )
