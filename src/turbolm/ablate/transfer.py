"""Check that learning rates transfer: tune a recipe, move the best by the scaling rules, and compare at a larger size.

The tuned recipe and the larger one are trained with the same grid of learning rates; the larger one also with the tuned
recipe's best, as the rules move it (`turbolm.recipe.scale`). All kinds of parameters have the same place on the grid.
Moved and unmoved learning rates are measured against the larger recipe's best run, moved or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from turbolm.ablate.results import measured
from turbolm.ablate.runner import Runner
from turbolm.ablate.settings import Options
from turbolm.ablate.trainer import Say, Trainer, check_runs, run_recipe
from turbolm.ablate.tricks import check_name, parse_tricks
from turbolm.errors import EXIT_FAILED, EXIT_OK, UserError
from turbolm.files import write_json
from turbolm.plan.count import check_model, examine_model
from turbolm.plan.machine import Machine, check_machine
from turbolm.plan.plan import build_plan
from turbolm.recipe.load import load_recipe, load_scaled
from turbolm.recipe.model_config import FEED_FORWARD, HEADS, KEY_VALUE_HEADS, OTHER_FEED_FORWARD, WIDTH, size_of
from turbolm.recipe.optimizers import Muon, Optimizer
from turbolm.recipe.paths import use_path
from turbolm.recipe.scale import RULES, Scaling, derive, find_problems
from turbolm.recipe.schema import Recipe
from turbolm.units import align_columns

WITHIN = 0.01  # of the loss of the best run
_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # on the recipe's learning rates, without a grid
_GROW = (
    *WIDTH,
    *HEADS,
    *KEY_VALUE_HEADS,
    *FEED_FORWARD,
    *OTHER_FEED_FORWARD,
    "word_embed_proj_dim",
)  # the last: OPT's
_GROWTH = 0.1  # relative; norms, biases and routers grow less than with the square of the width


@dataclass(frozen=True)
class Larger:
    """A recipe that learning rates are moved to: `rules` move them, the file of the tuned one is `reference`."""

    label: str
    recipe: Recipe
    rules: tuple[str, ...]
    reference: str

    def moved(self, tuned: Recipe) -> Scaling:
        """Return what the rules make of the tuned recipe's values, with the batch that this recipe has."""
        return derive(self.recipe, tuned, self.reference, self.rules, lambda key: key == "train.global_batch")


@dataclass
class Transfer:
    """The recipes to compare, in a folder of their runs."""

    folder: Path
    tuned: Recipe
    larger: tuple[Larger, ...]
    lrs: tuple[float, ...]  # `lr` of the tuned recipe, with which all its learning rates go
    options: Options
    failures: dict[str, int] = field(default_factory=dict)  # exit codes by run name

    @staticmethod
    def prepare(
        recipe_file: str, overrides: Sequence[str], tricks: Sequence[str], to: str, machine: Machine, options: Options
    ) -> Transfer:
        """Build the recipes; `to` is widths such as `256,512`, or the file of a larger recipe. The tricks are in all.

        Raises UserError with what cannot be compared.
        """
        if options.target_loss is not None or options.alone or options.halving or options.num_jobs > 1:
            raise UserError(
                "--transfer: compares final losses of whole runs, one after another; leave out --target-loss, --alone, "
                "--halving and --jobs"
            )
        used = parse_tricks(tricks) if tricks else []
        layers = [*overrides, *(override for trick in used for override in trick.overrides)]
        tuned = _planned(load_recipe(recipe_file, layers), recipe_file, machine)
        if not tuned.data.validation:
            raise UserError("data.validation: 0 leaves no held-out loss to compare by; set data.validation=1%")
        larger = tuple(_larger(recipe_file, layers, tuned, to, machine))
        default = "-".join([tuned.name, *(trick.name for trick in used), "transfer"])
        name = check_name("--name", options.name or default, 100)
        folder = use_path(tuned.execution.runs_dir, "execution.runs_dir") / "ablations" / name
        lrs = options.sweep.lrs if options.sweep else [factor * tuned.optimizer.lr for factor in _FACTORS]
        return Transfer(folder, tuned, larger, tuple(lrs), options)

    def grid(self, recipe: Recipe, label: str) -> list[list[Recipe]]:
        """Return the runs of a grid, lowest learning rate first: a list of seeds for each."""
        return [
            self._seeds(recipe, label, _four_digits(_lrs_of(self.tuned.optimizer, recipe.optimizer).at_lr(lr)))
            for lr in self.lrs
        ]

    def moved(self, larger: Larger, best: Recipe) -> list[Recipe]:
        """Return the runs of the larger recipe with what the rules make of the tuned one's `best` run."""
        optimizer: Any = _lrs_of(best.optimizer, larger.recipe.optimizer)
        for key, value in larger.moved(best).applied.items():
            optimizer = _set(optimizer, key.removeprefix("optimizer.").split("."), value)
        return self._seeds(larger.recipe, f"{larger.label}-moved", optimizer)

    def loss(self, runs: Sequence[Recipe]) -> float | None:
        """Return the mean final loss of a point's seeds: None before all are finished, infinite where one failed."""
        found = [measured(run) for run in runs]
        if any(run.name in self.failures for run in runs):
            return math.inf
        losses = [one.final_loss for one in found if one is not None]
        return fmean(losses) if len(losses) == len(runs) else None

    def best(self) -> list[Recipe] | None:
        """Return the runs of the tuned recipe's lowest loss."""
        grid = self.grid(self.tuned, "tuned")
        losses = [(loss, runs) for runs in grid if (loss := self.loss(runs)) is not None and math.isfinite(loss)]
        return min(losses, key=lambda pair: pair[0])[1] if losses else None

    def points(self, grid: Sequence[list[Recipe]]) -> list[dict[str, Any]]:
        """Return the learning rate and loss of each point in plain JSON types."""
        losses = [self.loss(runs) for runs in grid]
        return [
            {"lr": runs[0].optimizer.lr, "loss": loss if loss is not None and math.isfinite(loss) else None}
            for runs, loss in zip(grid, losses, strict=True)
        ]

    def _seeds(self, recipe: Recipe, label: str, optimizer: Optimizer) -> list[Recipe]:
        seeds = [recipe.train.seed + index for index in range(self.options.num_seeds)]
        label = f"{label}-lr{optimizer.lr:.4g}"
        return [
            run_recipe(recipe, self.folder, f"{label}-seed{seed}", seed=seed, optimizer=optimizer) for seed in seeds
        ]


def run_transfer(transfer: Transfer, runner: Runner, say: Say, *, dry_run: bool = False) -> tuple[int, dict[str, Any]]:
    """Train what is left to train; return an exit code and the results, which are also in transfer.json.

    Raises UserError when the folder holds runs of another recipe.
    """
    tuned = _flat(transfer.grid(transfer.tuned, "tuned"))
    check_runs(
        transfer.folder, [*tuned, *(run for larger in transfer.larger for run in _larger_runs(transfer, larger))]
    )
    if dry_run:
        return EXIT_OK, collect(transfer)
    num_starts = len(tuned) + len(transfer.larger) * (len(tuned) + transfer.options.num_seeds)
    trainer = Trainer(transfer.folder, runner, say, num_starts, transfer.failures)
    code = trainer.train(tuned)
    for larger in transfer.larger if transfer.best() else ():
        if code != EXIT_OK:
            break
        runs = _larger_runs(transfer, larger)
        check_runs(transfer.folder, runs)  # the best is known by now, and what it is moved to
        code = trainer.train(runs)
    results = collect(transfer)
    write_json(transfer.folder / "transfer.json", results)
    return EXIT_FAILED if code == EXIT_OK and transfer.failures else code, results


def _larger_runs(transfer: Transfer, larger: Larger) -> list[Recipe]:
    best = transfer.best()
    return [*_flat(transfer.grid(larger.recipe, larger.label)), *(transfer.moved(larger, best[0]) if best else [])]


def _flat(points: Sequence[list[Recipe]]) -> list[Recipe]:
    return [run for runs in points for run in runs]


def collect(transfer: Transfer) -> dict[str, Any]:
    """Return the losses so far and what they say, in plain JSON types. The keys are a stable interface."""
    small, best = transfer.grid(transfer.tuned, "tuned"), transfer.best()
    found: dict[str, Any] = {
        "command": transfer.options.command,
        "num_seeds": transfer.options.num_seeds,
        "within": WITHIN,
        "tuned": {
            "name": transfer.tuned.name,
            "budget_tokens": transfer.tuned.train.budget,
            "grid": transfer.points(small),
            "best_lr": best[0].optimizer.lr if best else None,
            "is_at_edge": best in (small[0], small[-1]),
        },
        "larger": [],
    }
    tuned, place = (best[0], small.index(best)) if best else (transfer.tuned, 0)
    for larger in transfer.larger:
        grid, moved = transfer.grid(larger.recipe, larger.label), transfer.moved(larger, tuned)
        found["larger"].append(
            {
                "name": larger.label,
                "budget_tokens": larger.recipe.train.budget,
                "derived": larger.moved(tuned).as_dict()["derived"],
                "grid": transfer.points(grid),
                "moved": transfer.points([moved])[0],
                **judge([transfer.loss(runs) for runs in grid], transfer.loss(moved), place),
            }
        )
    return found


def judge(grid: Sequence[float | None], moved: float | None, unmoved: int) -> dict[str, Any]:
    """Compare final losses at the larger size: of a grid of learning rates, in which number `unmoved` is the tuned
    recipe's best, and of the moved one. A loss is None before its runs are finished, infinite where they diverged.
    """
    losses = [loss for loss in (*grid, moved) if loss is not None]
    if len(losses) <= len(grid) or not math.isfinite(min(losses)):
        return {"moved_excess": None, "unmoved_excess": None, "is_at_edge": None, "verdict": "not finished"}
    assert moved is not None
    best = min(losses)
    loss = grid[unmoved]
    assert loss is not None
    excess, unmoved_excess = moved / best - 1, loss / best - 1
    own = list(grid).index(min(one for one in grid if one is not None))
    transfers, stays = excess <= WITHIN, unmoved_excess <= WITHIN
    if transfers and not stays:
        verdict = "transfers: the moved learning rate ends within 1% of the best loss, the unmoved one does not"
    elif transfers:
        verdict = "both end within 1% of the best loss: this does not tell the rule from leaving learning rates alone"
    elif stays:
        verdict = "does not transfer: the unmoved learning rate ends within 1% of the best loss, the moved one does not"
    else:
        verdict = "neither the moved nor the unmoved learning rate ends within 1% of the best loss"
    return {
        "moved_excess": excess if math.isfinite(excess) else None,
        "unmoved_excess": unmoved_excess if math.isfinite(unmoved_excess) else None,
        "is_at_edge": own in (0, len(grid) - 1),
        "verdict": verdict,
    }


def render_transfer(results: dict[str, Any]) -> str:
    """Return the losses as a table, and a sentence for each larger recipe."""
    sizes = [results["tuned"], *results["larger"]]
    rows = [["lr", *(size["name"] for size in sizes)]]
    for number, point in enumerate(results["tuned"]["grid"]):
        rows.append([f"{point['lr']:g}", *(_shown(size["grid"][number]["loss"]) for size in sizes)])
    lines = [align_columns(rows)]
    for size in results["larger"]:
        changes = ", ".join(
            f"{one['key']} {one['reference']:g} -> {one['suggested']:g}"
            for one in size["derived"]
            if one["suggested"] != one["reference"]
        )
        lines.append(f"{size['name']}: moved by {changes or 'nothing'}: {_shown(size['moved']['loss'])}")
        shares = [
            f"{name} {'diverged' if size[key] is None else format(size[key], '+.2%')}"
            for name, key in (("moved", "moved_excess"), ("unmoved", "unmoved_excess"))
        ]
        is_known = size["is_at_edge"] is not None
        lines.append(f"{size['name']}: {size['verdict']}" + (f" ({', '.join(shares)} above it)" if is_known else ""))
    for size in sizes:
        if size["is_at_edge"]:
            lines.append(f"{size['name']}: its best learning rate is at the edge of the grid: widen it with --sweep-lr")
    return "\n".join(lines)


def _shown(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


# ------------------------------------------------------------------------------------------------------- the recipes


def _planned(recipe: Recipe, recipe_file: str, machine: Machine) -> Recipe:
    check_machine(recipe, machine)
    check_model(recipe, recipe_file)
    return build_plan(recipe, machine).recipe


def _larger(recipe_file: str, layers: list[Any], tuned: Recipe, to: str, machine: Machine) -> Iterator[Larger]:
    if to.endswith((".yaml", ".yml")):
        loaded, scaling = load_scaled(to, layers, layers)
        if scaling is None or Path(scaling.reference).resolve() != Path(recipe_file).resolve():
            raise UserError(f"--transfer: {to} must say `scale: {{from: {recipe_file}}}`, relative to itself")
        rules = tuple(dict.fromkeys(one.rule for one in scaling.derived if one.status != "rule left out"))
        recipe = _planned(loaded, to, machine)
        yield Larger(recipe.name, recipe, rules, recipe_file)
        return
    for text in to.split(","):
        recipe = _planned(load_recipe(recipe_file, [*layers, *_wider(tuned, text)]), recipe_file, machine)
        problems = [*find_problems(recipe, tuned, recipe_file, RULES), *_growth_problems(recipe, tuned, recipe_file)]
        if problems:
            raise UserError("\n".join(f"--transfer: {problem}" for problem in problems))
        yield Larger(f"w{int(text)}", recipe, RULES, recipe_file)


def _wider(tuned: Recipe, text: str) -> list[str]:
    """Return the overrides for a width: everything that is as wide, and heads of one size. Raises UserError."""
    config = tuned.model.full_config or {}
    width = size_of(config.get, WIDTH)
    if width is None or size_of(config.get, HEADS) is None:
        raise UserError("--transfer: model.config must name its width and heads, such as hidden_size: 128")
    if not text.strip().isdecimal() or not 0 < int(text) < 10**6:
        raise UserError(f"--transfer: expected widths such as 256,512 or a recipe's .yaml file, got {text[:100]!r}")
    overrides = []
    for key in _GROW:
        if (size := size_of(config.get, [key])) is None:
            continue
        value, rest = divmod(size * int(text), width)
        if rest:
            raise UserError(f"--transfer: {text} is no width: model.config.{key} would not be whole; heads keep a size")
        overrides.append(f"model.config.{key}={value}")
    return overrides


def _growth_problems(recipe: Recipe, tuned: Recipe, recipe_file: str) -> Iterator[str]:
    """Yield what is wrong where the weights do not grow with the square of the width: some size was not named."""
    widths, weights = [], []
    for one in (tuned, recipe):
        widths.append(size_of((one.model.full_config or {}).get, WIDTH) or 0)
        size = examine_model(one, recipe_file).size
        weights.append(size.total - size.embedding - size.head if size else 0)
    grown, wanted = weights[1] / max(weights[0], 1), (widths[1] / widths[0]) ** 2
    if abs(grown / wanted - 1) > _GROWTH:
        yield (
            f"at width {widths[1]} the weights beside the embeddings are {grown:.3g} times as many, not {wanted:.3g}: "
            f"name every width, such as {FEED_FORWARD[0]}, under model.config, or give a larger recipe: --transfer "
            "LARGER.yaml"
        )


def _lrs_of(source: Optimizer, optimizer: Optimizer) -> Optimizer:
    """Return `optimizer` with the learning rates and weight decay of `source`, which has the same name."""
    names = ["lr", "lr_multipliers", "weight_decay", *(["peak_lrs"] if isinstance(source, Muon) else [])]
    return optimizer.model_copy(update={name: getattr(source, name) for name in names})


def _four_digits(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer with all peak learning rates rounded."""
    update: dict[str, Any] = {"lr": float(f"{optimizer.lr:.4g}")}
    if isinstance(optimizer, Muon):
        peaks = {kind: float(f"{peak:.4g}") for kind, peak in optimizer.peak_lrs if peak is not None}
        update["peak_lrs"] = optimizer.peak_lrs.model_copy(update=peaks)
    return optimizer.model_copy(update=update)


def _set(section: Any, path: Sequence[str], value: float) -> Any:
    """Return a frozen section with another value at `path`."""
    return section.model_copy(
        update={path[0]: value if len(path) == 1 else _set(getattr(section, path[0]), path[1:], value)}
    )
