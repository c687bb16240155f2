"""Generate the tables of recipes/README.md from the recipes and tricks. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from turbolm.plan.count import examine_model
from turbolm.plan.machine import described_machine
from turbolm.plan.summary import collect_summary
from turbolm.recipe.load import load_recipe
from turbolm.recipe.schema import Recipe
from turbolm.shipped import recipes_by_name, shipped
from turbolm.units import format_bytes, format_count

_TRICK_COLUMNS = ("trick", "family", "changes", "works", "claimed", "source")
_COLUMNS = (
    "recipe",
    "model",
    "parameters",
    "cluster",
    "tokens",
    "steps",
    "memory of a GPU",
    "days",
    "price (USD)",
    "measured",
)


def trick_files() -> list[Path]:
    """Return the paths of all shipped tricks, by name."""
    return sorted(shipped("recipes", "_tricks").glob("*.yaml"))


def read_header(path: Path) -> dict[str, str]:
    """Parse the opening comment: command, hardware, runtime and loss of a recipe, or the fields of a trick."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line)
    return {match[1]: match[2] for line in lines if (match := re.match(r"# (\w+): +(\S.*)$", line))}


def render_readme() -> str:
    """Return the text of recipes/README.md with its two tables up to date."""
    text = shipped("recipes", "README.md").read_text(encoding="utf-8")
    recipes = _table(_COLUMNS, [_row(name, path) for name, path in recipes_by_name().items()])
    tricks = _table(_TRICK_COLUMNS, [_trick_row(path) for path in trick_files()])
    for table in (recipes, tricks):
        header = re.escape(table.partition("\n")[0])
        old = re.search(rf"^{header}\n(\|.*\n)*", text, flags=re.MULTILINE)
        text = text if old is None else text.replace(old[0], table)
    return text


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (columns, ["---"] * len(columns), *rows))


def _trick_row(path: Path) -> tuple[str, ...]:
    header = read_header(path)
    return (f"[{path.stem}](_tricks/{path.name})", *(header.get(name, "") for name in _TRICK_COLUMNS[1:]))


def _row(name: str, path: Path) -> tuple[str, ...]:
    recipe = load_recipe(path)
    facts = examine_model(recipe, path)
    runtime = read_header(path).get("runtime", "")
    is_measured = "measured" in runtime and not re.search("(until|not) measured", runtime)
    return (
        f"[{name}]({name}/config.yaml)",
        str(facts.config["model_type"]) if facts.config else "",
        format_count(facts.size.total) if facts.size else "",
        _cluster(recipe),
        format_count(recipe.train.budget),
        f"{-(-recipe.train.budget // recipe.train.global_batch):,}",
        *_planned(recipe, path),
        re.sub(r" *\(.*\)", "", runtime) if is_measured else "not measured",
    )


def _cluster(recipe: Recipe) -> str:
    cluster = recipe.cluster
    return f"{cluster.num_nodes} x {cluster.gpus_per_node} {cluster.gpu}" if cluster.gpu else "any"


def _planned(recipe: Recipe, path: Path) -> tuple[str, str, str]:
    """Return memory, days and price as the planner has them; empty where it does not know."""
    if described_machine(recipe) is None:
        return "", "", ""
    summary = collect_summary(recipe, str(path), (), lambda *_: {})
    found, gpu_bytes = summary.footprint, summary.gpu_memory_bytes
    memory = f"{format_bytes(found.total_bytes)} of {format_bytes(gpu_bytes)}" if found and gpu_bytes else ""
    if summary.estimate is None:
        return memory, "", ""
    bill = summary.estimate.bill
    price = f"{float(f'{bill.price_usd:.2g}'):,.0f}" if bill.price_usd is not None else ""
    return memory, f"{bill.run_sec / 86400:.2g}", price
