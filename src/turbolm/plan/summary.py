"""Everything `turbolm plan` shows, as plain data with stable keys. Torch-free."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from turbolm.errors import UserError
from turbolm.plan.batch import BatchPlan
from turbolm.plan.count import ModelFacts, ModelSize, examine_model
from turbolm.plan.deepspeed import untested_note
from turbolm.plan.estimate import Estimate, estimate_run
from turbolm.plan.exchange import exchange_note
from turbolm.plan.fitting import Fit, examine_fit
from turbolm.plan.flops import training_flops_per_token
from turbolm.plan.footprint import Footprint
from turbolm.plan.machine import Machine, cpu_request_note, described_machine, detect_machine, missing_package
from turbolm.plan.memory import HostMemory, ModelState, estimate_host_memory, estimate_model_state, host_memory_note
from turbolm.plan.plan import Plan, build_plan
from turbolm.plan.preview import (
    SourceUse,
    StoreSize,
    constant_span,
    mean_span_of_run,
    min_tokens_notes,
    run_out_notes,
    source_uses,
)
from turbolm.plan.profile import ModelProfile
from turbolm.plan.rates import step_rates
from turbolm.plan.spans import check_spans, span_notes
from turbolm.plan.suggestions import Suggestion, is_accepted, nearest_batch, suggest
from turbolm.plan.traffic import Traffic, step_traffic
from turbolm.recipe.gpus import GPUS, peak_flops
from turbolm.recipe.questions import check_files
from turbolm.recipe.scale import Scaling
from turbolm.recipe.schema import Execution, Recipe
from turbolm.units import format_bytes, format_duration

FLOPS_FORMULA = "6 x (matrices and output head) + 12 x layers x attention width x mean span"
ASSUMED_MFU = 0.4  # of the GPU's dense half-precision peak; until it is measured
NUM_CURVE_POINTS = 61

T = TypeVar("T")

AccelerateConfig = Callable[[Plan, int], Mapping[str, object]]  # of a plan on so many nodes


@dataclass(frozen=True)
class Cost:
    """The cost of the run; None if the model type or the GPU is unknown."""

    flops_formula: str
    mean_span_tokens: float  # mean keys per query, see plan/preview.py
    flops_per_token: float | None
    total_flops: float | None
    peak_flops_per_gpu: float | None
    assumed_mfu: float
    estimated_sec: float | None


@dataclass(frozen=True)
class Summary:
    """A plan with everything that is derived from it."""

    recipe_file: str
    overrides: tuple[str, ...]
    plan: Plan
    machine: Machine
    is_described: bool  # planned for the machines that the recipe describes, not for this one
    size: ModelSize | None
    cost: Cost
    memory: ModelState | None
    profile: ModelProfile | None
    footprint: Footprint | None  # None without a profile or a GPU
    estimate: Estimate | None  # None without a profile, or without rates of the machine
    advice: tuple[str, ...]  # overrides with which the run fits, a set a line, if it does not
    gpu_memory_bytes: int | None
    host_memory: HostMemory | None
    learning_rate: tuple[tuple[int, float], ...]  # (tokens seen after the step, its rate), as in metrics.jsonl
    sources: tuple[SourceUse, ...]
    constant_span_tokens: float  # the mean span if every sequence had the longest length
    accelerate_config: Mapping[str, object]
    notes: tuple[str, ...]
    scaling: Scaling | None  # what the recipe's `scale` derives, if it has one

    @property
    def recipe(self) -> Recipe:
        """Return the recipe with its precision resolved."""
        return self.plan.recipe

    @property
    def batch(self) -> BatchPlan:
        """Return the batch arithmetic."""
        return self.plan.batch

    @property
    def suggestion(self) -> Suggestion | None:
        """Return the choice of a scaling law, if the size of the model is known."""
        size = self.size
        return suggest(size.total - size.embedding - size.head, self.recipe.train.budget) if size else None

    @cached_property
    def suggested_batch(self) -> int | None:
        """Return the law's batch in tokens, rounded to one that this recipe accepts, or None."""
        law = self.suggestion
        return nearest_batch(self.recipe, self.machine, law.global_batch_tokens) if law else None

    @cached_property
    def traffic(self) -> Traffic | None:
        """Return the collectives of a step and the bytes that they send, if the model has a profile."""
        return step_traffic(self.profile.tensors, self.plan, self.profile.heads) if self.profile else None

    @property
    def verb(self) -> str:
        """Return the command that starts the run: submit or train."""
        cluster = self.recipe.cluster
        return "submit" if cluster.num_nodes > 1 or cluster.slurm is not None else "train"

    @property
    def launch_command(self) -> str:
        """Return the line that starts the run."""
        return shlex.join(["turbolm", self.verb, self.recipe_file, *self.overrides])

    @property
    def accelerate_command(self) -> str:
        """Return the same with `accelerate launch`; with several nodes, run it once on each (launch/README.md)."""
        num_nodes, plan = self.recipe.cluster.num_nodes, self.plan
        kind = "multi_node" if num_nodes > 1 else "gpu" if plan.device == "cuda" else "cpu"
        flags = f"--num_machines {num_nodes} --num_processes {plan.world_size} --mixed_precision no --dynamo_backend no"
        if num_nodes > 1:
            flags += (
                ' --machine_rank "$RANK" --main_process_ip "$HEAD" --main_process_port "$PORT" '
                "--rdzv_backend static --same_network"
            )
        recipe = shlex.join(["--recipe", self.recipe_file, *self.overrides])
        return f"accelerate launch --config_file launch/accelerate/{kind}.yaml {flags} -m turbolm.train {recipe}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON types; the keys are a stable interface."""
        plan, batch, recipe, law = self.plan, self.batch, self.recipe, self.suggestion
        return {
            "recipe": {"file": self.recipe_file, "name": recipe.name, "overrides": list(self.overrides)},
            "cluster": {
                "is_described": self.is_described,
                "num_nodes": recipe.cluster.num_nodes,
                "processes_per_node": plan.processes_per_node,
                "world_size": plan.world_size,
                "device": plan.device,
                "gpu": self.machine.gpu_name if plan.device == "cuda" else None,
                "gpu_memory_bytes": self.gpu_memory_bytes,
                "precision": plan.precision,
                "zero_stage": recipe.execution.zero_stage,
            },
            "batch": {**asdict(batch), "micro_batch_tokens": batch.micro_batch_tokens},
            "schedule": {
                "num_steps": plan.num_steps,
                "first_step": plan.curriculum.first_step,
                "budget_tokens": recipe.train.budget,
                "tokens": plan.curriculum.tokens_seen(plan.num_steps),
                "restart_steps": plan.random_restart_steps,
                "restart_tokens": plan.random_restart_tokens,
                "evaluate_every_steps": plan.evaluate_every_steps if recipe.is_evaluated else None,
                "checkpoint_every_steps": plan.checkpoint_every_steps,
                "learning_rate": [list(point) for point in self.learning_rate],
                "global_batch_tokens": [[s.first_token, s.global_batch_tokens] for s in plan.curriculum.segments],
                "seq_len": [[s.first_token, list(s.seq_lens)] for s in plan.curriculum.segments],
            },
            "data": {
                "sources": [asdict(use) for use in self.sources],
                "mean_span_tokens": self.cost.mean_span_tokens,
                "constant_mean_span_tokens": self.constant_span_tokens,
            },
            "parameters": asdict(self.size) if self.size else None,
            "cost": asdict(self.cost),
            "estimate": self.estimate.as_dict() if self.estimate else None,
            "memory": {**asdict(self.memory), "device_bytes": self.memory.device_bytes} if self.memory else None,
            "footprint": self._footprint(),
            "traffic": self.traffic.as_dict() if self.traffic else None,
            "host_memory": asdict(self.host_memory) | {"total_bytes": self.host_memory.total_bytes}
            if self.host_memory
            else None,
            "ds_config": plan.ds_config,
            "accelerate_config": dict(self.accelerate_config),
            "launch": {"command": self.launch_command, "accelerate_command": self.accelerate_command},
            "scaling": self.scaling.as_dict() if self.scaling else None,
            "suggestions": {**asdict(law), "global_batch_tokens": self.suggested_batch} if law else None,
            "notes": list(self.notes),
        }

    def _footprint(self) -> dict[str, Any] | None:
        if self.footprint is None or self.gpu_memory_bytes is None:
            return None
        found, gpu_bytes = self.footprint, self.gpu_memory_bytes
        totals = {"counted_bytes": found.counted_bytes, "total_bytes": found.total_bytes}
        return asdict(found) | totals | {"verdict": found.verdict(gpu_bytes), "fitting_overrides": list(self.advice)}


def collect_summary(
    recipe: Recipe,
    recipe_file: str,
    overrides: Sequence[str],
    accelerate_config: AccelerateConfig,
    store: StoreSize | None = None,
    *,
    scaling: Scaling | None = None,
    may_trace: bool = False,
) -> Summary:
    """Derive everything; `store` is the size of the recipe's store if it has been prepared, `scaling` what `scale` did.

    With `may_trace` a model without a profile is traced if the run is on GPUs, which takes seconds the first time.
    Raises UserError with all problems, one per line.
    """
    problems: list[str] = []
    machine = (described := described_machine(recipe)) or detect_machine()
    plan = _collect(problems, lambda: build_plan(recipe, machine))
    _collect(problems, lambda: check_spans(recipe))
    _collect(problems, lambda: check_files(recipe.evaluation, must_exist=False))
    facts = _collect(problems, lambda: examine_model(recipe, recipe_file)) or ModelFacts(None, None)
    memory, fit, size = None, Fit(), facts.size
    gpu_bytes = GPUS[recipe.cluster.gpu].memory_bytes if described and recipe.cluster.gpu else None
    if plan is not None and size is not None and facts.config is not None:
        memory = _state(plan, recipe.execution, size.total)
        fit = examine_fit(plan, machine, facts.config, gpu_bytes, may_trace=may_trace)
        if fit.is_refused(gpu_bytes):
            problems += [fit.refusal(gpu_bytes), *fit.ways]
        elif fit.footprint is None and gpu_bytes is not None and memory.device_bytes > gpu_bytes:
            problems.append(_too_large(plan, machine, memory, gpu_bytes, size.total))
    if problems or plan is None:
        raise UserError("\n".join(f"{recipe_file}: {line}" for problem in problems for line in problem.splitlines()))
    host, uses = _host_memory(plan, memory, size, fit.footprint), source_uses(recipe, plan.curriculum, store)
    notes = [*facts.assumed, *facts.notes, *fit.notes, *_recipe_notes(plan, host, fit.profile)]
    return Summary(
        recipe_file=recipe_file,
        overrides=tuple(overrides),
        plan=plan,
        machine=machine,
        is_described=described is not None,
        size=size,
        cost=_cost(plan, machine, _flops_per_token(plan, fit.profile or facts.size, store), store),
        memory=memory,
        profile=fit.profile,
        footprint=fit.footprint,
        estimate=estimate_run(plan, machine, fit.profile, facts.config, store.sample_lengths if store else ()),
        advice=fit.ways,
        gpu_memory_bytes=gpu_bytes,
        host_memory=host,
        learning_rate=_learning_rate(plan),
        sources=uses,
        constant_span_tokens=constant_span(plan.curriculum, store),
        accelerate_config=accelerate_config(plan, recipe.cluster.num_nodes),
        notes=(*notes, *span_notes(recipe, plan.curriculum), *min_tokens_notes(recipe, store), *run_out_notes(uses)),
        scaling=scaling,
    )


def _recipe_notes(plan: Plan, host: HostMemory | None, profile: ModelProfile | None) -> Iterator[str]:
    """Yield what to know about settings of the execution."""
    recipe = plan.recipe
    said = (
        missing_package(recipe),
        untested_note(recipe.execution),
        cpu_request_note(recipe),
        host_memory_note(recipe, host) if host else None,
        exchange_note(plan, profile),
    )
    yield from filter(None, said)
    yield from _hang_notes(recipe.execution)


def memory_request_note(recipe: Recipe, recipe_file: str | Path) -> str | None:
    """Return `host_memory_note` for a recipe that describes its machines; None where the need is not known."""
    machine = described_machine(recipe)
    if machine is None:
        return None
    try:
        plan, size = build_plan(recipe, machine), examine_model(recipe, recipe_file).size
    except UserError:  # `plan` and the start of the run tell
        return None
    host = size and _host_memory(plan, _state(plan, recipe.execution, size.total), size)
    return host_memory_note(recipe, host) if host else None


def _collect(problems: list[str], action: Callable[[], T]) -> T | None:
    """Return what `action` does, or None with its UserError among the problems."""
    try:
        return action()
    except UserError as error:
        problems.append(str(error))
        return None


def _state(plan: Plan, execution: Execution, num_parameters: int) -> ModelState:
    kept = plan.recipe.kept_bytes, plan.recipe.optimizer.owner_bytes
    return estimate_model_state(execution, plan.ds_config, num_parameters, plan.world_size, plan.precision, *kept)


def _host_memory(
    plan: Plan, memory: ModelState | None, size: ModelSize | None, footprint: Footprint | None = None
) -> HostMemory | None:
    if memory is None or size is None or plan.device == "cpu":  # a CPU's model state and activations are host memory
        return None
    state, activations = (footprint.host_bytes, footprint.offloaded) if footprint else (memory.host_bytes, 0)
    return estimate_host_memory(plan.recipe, state, size.total, plan.world_size, plan.processes_per_node, activations)


def _too_large(plan: Plan, machine: Machine, memory: ModelState, gpu_bytes: int, num_parameters: int) -> str:
    """Return the message if the model state alone does not fit, with the first stage that would."""
    recipe, execution = plan.recipe, plan.recipe.execution
    wanted = (
        f"its model state takes {format_bytes(memory.device_bytes)} of each GPU, which has {format_bytes(gpu_bytes)}"
    )
    for stage in range(execution.zero_stage + 1, 4):
        other = execution.model_copy(update={"zero_stage": stage})
        if not is_accepted(recipe, execution=other):
            continue
        planned = build_plan(recipe.model_copy(update={"execution": other}), machine)  # its buckets are others too
        if _state(planned, other, num_parameters).device_bytes < gpu_bytes:
            return f"execution.zero_stage: {wanted}; zero_stage: {stage} fits"
    offloaded = execution.model_copy(update={"offload_optimizer": True})
    offload = ", execution.offload_optimizer=true" if is_accepted(plan.recipe, execution=offloaded) else ""
    return f"execution.zero_stage: {wanted}; use more GPUs{offload} or a smaller model"


def _flops_per_token(plan: Plan, model: ModelProfile | ModelSize | None, store: StoreSize | None) -> float | None:
    """Return the training FLOPs of a token, None without a model."""
    if model is None:
        return None
    return training_flops_per_token(model, lambda kind, limit: mean_span_of_run(plan.curriculum, store, kind, limit))


def _cost(plan: Plan, machine: Machine, per_token: float | None, store: StoreSize | None) -> Cost:
    span = mean_span_of_run(plan.curriculum, store)
    num_tokens = plan.curriculum.own_tokens + plan.random_restart_tokens
    total = None if per_token is None else per_token * num_tokens
    peak = peak_flops(machine.gpu_name, plan.precision) if plan.device == "cuda" else None
    seconds = None if total is None or peak is None else total / (plan.world_size * peak * ASSUMED_MFU)
    return Cost(FLOPS_FORMULA, span, per_token, total, peak, ASSUMED_MFU, seconds)


def _learning_rate(plan: Plan) -> tuple[tuple[int, float], ...]:
    """Return the exact learning rate of at most NUM_CURVE_POINTS steps, including the first and the last."""
    first, last = plan.curriculum.first_step, plan.num_steps - 1
    steps = sorted(
        {first + round((last - first) * index / (NUM_CURVE_POINTS - 1)) for index in range(NUM_CURVE_POINTS)}
    )
    return tuple((plan.curriculum.tokens_seen(step + 1), step_rates(plan, step).lr) for step in steps)


def _hang_notes(execution: Execution) -> list[str]:
    """Warn if collectives time out before the watchdog, which alone knows which rank hangs."""
    hang, group = execution.hang_timeout, execution.process_group_timeout
    if hang is None or hang < group:
        return []
    return [
        f"execution.hang_timeout ({format_duration(hang)}) should be shorter than execution.process_group_timeout "
        f"({format_duration(group)}): otherwise a hang ends in an error of the waiting ranks, and the one that "
        "hangs is not named"
    ]
