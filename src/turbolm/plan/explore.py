"""`turbolm plan --search` and `--project`: other ways to run a recipe, and on other numbers of GPUs. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbolm.errors import UserError
from turbolm.plan.count import read_model_config
from turbolm.plan.estimate import Estimate, estimate, rates_for
from turbolm.plan.exchange import group_sizes
from turbolm.plan.footprint import estimate_footprint
from turbolm.plan.machine import described_machine
from turbolm.plan.parameters import head_dim_of
from turbolm.plan.plan import Plan, build_plan
from turbolm.plan.profiles import find_profile
from turbolm.plan.projection import project, projection_lines, projections
from turbolm.plan.search import Goal, search, search_lines
from turbolm.recipe.gpus import GPUS
from turbolm.recipe.schema import Recipe
from turbolm.units import parse_duration

Draw = Callable[[Mapping[str, Any], Path], None]


@dataclass(frozen=True)
class Asked:
    """What was asked on the command line."""

    search: bool = False
    gpus: int | None = None
    deadline: str | None = None
    budget_usd: float | None = None
    project: bool = False
    html: Path | None = None
    as_json: bool = False
    steps: bool = False

    @property
    def is_plain(self) -> bool:
        """Return whether this asks for neither, but for the plan itself."""
        return self == Asked(as_json=self.as_json, steps=self.steps)


def explore(recipe: Recipe, recipe_file: str, overrides: Sequence[str], asked: Asked, draw: Draw) -> Iterator[str]:
    """Yield the lines of a search, of projections, or of both; `draw` makes the page. Raises UserError."""
    _check(asked)
    machine = described_machine(recipe)
    if machine is None or recipe.cluster.gpu is None:
        raise UserError("--search and --project need cluster.gpu and cluster.gpus_per_node, whose rates are known")
    gpu_bytes = GPUS[recipe.cluster.gpu].memory_bytes
    if asked.budget_usd is not None and recipe.cluster.price_per_gpu_hour is None:
        raise UserError("--budget-usd needs cluster.price_per_gpu_hour, such as cluster.price_per_gpu_hour=2.5")
    if asked.gpus is not None:
        recipe = _on_gpus(recipe, asked.gpus)
        overrides = [one for one in overrides if not one.startswith("cluster.num_nodes=")]
        overrides = [*overrides, f"cluster.num_nodes={recipe.cluster.num_nodes}"]
    goal = Goal(_deadline(asked.deadline), asked.budget_usd)
    config, _ = read_model_config(recipe, recipe_file)
    if config is None:
        raise UserError("model.pretrained: its configuration is not on this machine, so nothing can be estimated")
    profile, why = find_profile(config, recipe.model.dropout, recipe.execution.cache_dir)
    if profile is None:
        raise UserError(f"model: {why}, so nothing can be estimated")
    width = head_dim_of(config)

    def estimator(plan: Plan) -> Estimate | None:
        return estimate(plan, profile, machine, head_dim=width)

    def verdict(plan: Plan) -> str:
        return estimate_footprint(plan, profile).verdict(gpu_bytes)

    plan = build_plan(recipe, machine)
    rates = rates_for(plan, machine)
    if rates is None:
        raise UserError(f"cluster.gpu: no rates of {recipe.cluster.gpu} in this precision are known")
    if asked.search:
        found = search(recipe, machine, profile, gpu_bytes, estimator, goal, groups=group_sizes(plan, config, profile))
        verb = "submit" if recipe.cluster.slurm is not None or recipe.cluster.num_nodes > 1 else "train"
        yield from search_lines(found, goal, recipe_file, overrides, verb)
    if asked.project:
        strong, weak = (project(recipe, machine, estimator, verdict, weak=weak) for weak in (False, True))
        projected = {"recipe": recipe.name, "gpu": recipe.cluster.gpu, **projections(strong, weak, rates)}
        yield from [json.dumps(projected, indent=2)] if asked.as_json else projection_lines(projected)
        if asked.html is not None:
            draw(projected, asked.html)
            yield from () if asked.as_json else (f"plots: {asked.html}",)


def _check(asked: Asked) -> None:
    if asked.html is not None and not asked.project:
        raise UserError("--html draws projections; add --project")
    if not (asked.search or asked.project):
        raise UserError("--gpus, --deadline and --budget-usd choose among execution plans; add --search")
    if asked.steps:
        raise UserError("--steps shows the steps of one plan; leave out --search and --project")
    if asked.search and asked.as_json:
        raise UserError("--search prints text; leave out --json")


def _on_gpus(recipe: Recipe, gpus: int) -> Recipe:
    per_node = recipe.cluster.gpus_per_node or 1
    if gpus % per_node:
        raise UserError(f"--gpus: expected a multiple of cluster.gpus_per_node ({per_node}), got {gpus}")
    return recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"num_nodes": gpus // per_node})})


def _deadline(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(parse_duration(text))
    except ValueError as error:
        raise UserError(f"--deadline: {error}") from None
