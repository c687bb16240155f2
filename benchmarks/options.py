"""What each option of Muon, of weight decay and of the schedule is worth upon tuned Muon, and some upon AdamW or
upon the speedrun.

    python benchmarks/options.py [--corpus corpus.parquet] [--folder FOLDER] [--studies muon adamw] [--only soap]

The runs are those of `benchmarks/speedrun.py`: its recipe, one process of one thread each, the same batch and a budget
of `--budget` tokens, for which each schedule is made. All learning rates of every arm, the baseline's too, are
multiplied by the same `--factors` with the first seed; the best factor gets the other seeds (of `--more`, all arms by
default; the others stay with one).

An effect is the mean over the seeds of the difference of the final held-out losses, paired by seed. In tokens it is
exp(difference / slope), where the slope is that of the baseline's loss over the logarithm of its budget, from as many
runs of 1.5 times the budget. The smallest effect that can be resolved is t s / sqrt(n): s is the standard deviation of
the paired differences, pooled over the arms with several seeds; t the two-sided 95% point of Student's distribution
with the degrees of freedom of s; n the seeds of the arm. A smaller effect "cannot be resolved". Where no arm has a
second seed, none can. What a step costs is measured by `option_costs.py`. Finished runs in the folder are read again.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speedrun import HERE, TRICKS, Result, scaled_rates, train, write_recipe

from turbolm.ablate.verdict import UNRESOLVED, critical_t
from turbolm.units import parse_count

BASE = "baseline"
# As recipes/_tricks/muon.yaml does, for a model without a head of its own.
MUON = ["optimizer.name=muon", "optimizer.lr=4e-2", "optimizer.peak_lrs={matrices: 1e-2}"]


@dataclass(frozen=True)
class Study:
    """Arms with a baseline in common: overrides and names of tricks upon benchmarks/speedrun.yaml."""

    common: list[str]
    arms: dict[str, list[str]]


STUDIES = {
    "muon": Study(
        MUON,
        {
            "recipe_rate": ["optimizer.lr=2e-3"],
            "cautious_weight_decay": ["cautious_weight_decay"],
            "decay_to_0": ["weight_decay_ramp"],
            "ema_nesterov": ["optimizer.ema_nesterov={mean_decay: 0.9}"],
            "row_beta2": ["optimizer.row_beta2=0.95"],
            "polar_express": ["optimizer.orthogonalization=polar_express"],
            "soap": ["optimizer.soap={every: 10}"],
            "wsd_40": ["schedule={name: wsd, warmup: 4%, decay: 40%, min_lr_ratio: 0}"],
            "split_cooldown": ["split_cooldown"],
        },
    ),
    "adamw": Study(
        [],
        {
            "soap": ["optimizer.name=soap"],
            "cautious_weight_decay": ["cautious_weight_decay"],
            "ema_nesterov": ["optimizer.ema_nesterov={mean_decay: 0.9}"],
            "embeddings_4x": ["optimizer.lr_multipliers={embeddings: 4}"],
        },
    ),
    "speedrun": Study(
        ["speedrun"],
        {
            "split_cooldown": ["split_cooldown"],
            "soap": ["optimizer.soap={every: 10}"],
        },
    ),
}


def run_study(
    folder: Path, name: str, study: Study, common: list[str], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Train what is not finished; the runs of each arm at its best factor, and the losses of its sweep."""
    only = [arm for arm in arguments.only.split(",") if arm]
    arms = {BASE: [], **{arm: added for arm, added in study.arms.items() if not only or arm in only}}
    more = arguments.more.split(",") if arguments.more else list(arms)
    budget = parse_count(arguments.budget)
    tricks = {
        arm: [TRICKS / f"{added}.yaml" for added in (*study.common, *arms[arm]) if "=" not in added] for arm in arms
    }
    recipes = {arm: write_recipe(folder, f"{name}-{arm}", tricks[arm]) for arm in arms}

    def run(arm: str, factor: float, seed: int, tokens: int) -> Result:
        settings = [setting for setting in (*study.common, *arms[arm]) if "=" in setting]
        settings += scaled_rates(recipes[arm], settings, factor)
        settings += [*common, f"train.budget={tokens}", f"train.seed={seed}", "evaluation.tokens=100k"]
        return train(folder, recipes[arm], f"{name}-{arm}-x{factor:g}-{tokens // 1000}k-seed{seed}", settings)

    with ThreadPoolExecutor(arguments.parallel) as pool:
        jobs = {(f, arm): pool.submit(run, arm, f, 0, budget) for f in arguments.factors for arm in arms}
        swept = {arm: {f: jobs[f, arm].result() for f in arguments.factors} for arm in arms}
        best = {arm: min(swept[arm], key=lambda f, arm=arm: swept[arm][f]["eval_loss"]) for arm in arms}
        seeds = range(1, arguments.seeds)
        named = [arm for arm in arms if arm == BASE or arm in more]
        others = {(seed, arm): pool.submit(run, arm, best[arm], seed, budget) for seed in seeds for arm in named}
        longer = [pool.submit(run, BASE, best[BASE], seed, budget * 3 // 2) for seed in range(arguments.seeds)]
        runs = {
            arm: [swept[arm][best[arm]], *(others[seed, arm].result() for seed in seeds if arm in named)]
            for arm in arms
        }
        long = statistics.mean(job.result()["eval_loss"] for job in longer)
    slope = (statistics.mean(run["eval_loss"] for run in runs[BASE]) - long) / math.log(1.5)
    losses = {arm: {f"{f:g}": run["eval_loss"] for f, run in swept[arm].items()} for arm in arms}
    return {"runs": runs, "best": best, "sweeps": losses, "slope": slope}


def effects(study: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What each arm changed, and the smallest change that could have been told from chance."""
    runs, base = study["runs"], study["runs"][BASE]
    paired = {
        arm: [run["eval_loss"] - old["eval_loss"] for run, old in zip(runs[arm], base, strict=False)]
        for arm in runs
        if arm != BASE
    }
    spreads = [(len(found) - 1, statistics.variance(found)) for found in paired.values() if len(found) > 1]
    degrees = sum(free for free, _ in spreads)
    pooled = math.sqrt(sum(free * spread for free, spread in spreads) / degrees) if degrees else math.inf
    found = {}
    for arm, differences in paired.items():
        least = critical_t(degrees) * pooled / math.sqrt(len(differences)) if degrees else math.inf
        loss = statistics.mean(differences)
        found[arm] = {
            "loss": loss,
            "differences": differences,
            "tokens": math.exp(loss / study["slope"]),
            "smallest_loss": least if degrees else None,
            "smallest_tokens": 1 - math.exp(-least / study["slope"]) if degrees else None,
            "seeds": len(differences),
            "verdict": UNRESOLVED if abs(loss) < least else "gain" if loss < 0 else "loss",
        }
    return found


def show(name: str, study: dict[str, Any], found: dict[str, dict[str, Any]]) -> None:
    base = [run["eval_loss"] for run in study["runs"][BASE]]
    print(
        f"\n{name}: the baseline's seeds end at {', '.join(f'{loss:.3f}' for loss in base)}; slope {study['slope']:.3f}"
    )
    print("\n| option | loss by factor | difference by seed | tokens to the same loss | smallest effect | verdict |")
    print("|---" * 6 + "|")
    for arm, losses in study["sweeps"].items():
        best = f"{study['best'][arm]:g}"
        cells = ", ".join(
            f"**{factor}: {loss:.3f}**" if factor == best else f"{factor}: {loss:.3f}"
            for factor, loss in losses.items()
        )
        if arm == BASE:
            print(f"| {arm} | {cells} | | | | |")
            continue
        effect = found[arm]
        by_seed = ", ".join(f"{difference:+.3f}" for difference in effect["differences"])
        least = "unknown: one seed"
        if effect["smallest_loss"] is not None:
            least = f"{effect['smallest_loss']:.3f}, {effect['smallest_tokens']:.1%} of the tokens"
        print(f"| {arm} | {cells} | {by_seed} | {effect['tokens']:.2f}x | {least} | {effect['verdict']} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="a parquet file with a column `text`")
    parser.add_argument("--folder", type=Path, help="for the runs; default: a temporary one")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--only", default="", help="names of options, with commas between; default: all")
    parser.add_argument("--more", default="", help="those that get all seeds; default: all")
    parser.add_argument("--budget", default="200k")
    parser.add_argument("--factors", nargs="+", type=float, default=[0.5, 1, 2], help="on the learning rates")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args()
    options = {arm for name in arguments.studies for arm in STUDIES[name].arms}
    if unknown := {arm for arm in f"{arguments.only},{arguments.more}".split(",") if arm} - options - {BASE}:
        parser.error(f"no such option: {', '.join(sorted(unknown))}; there are {', '.join(sorted(options))}")
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        common = [f"execution.cache_dir={folder / 'cache'}"]
        if arguments.corpus:
            common.append(f'data.sources=[{{"type": "parquet", "path": "{arguments.corpus.resolve()}"}}]')
        prepare = [str(Path(sys.executable).with_name("turbolm")), "prepare", str(HERE / "speedrun.yaml"), *common]
        subprocess.run(prepare, check=True, stdout=sys.stderr)
        for name in arguments.studies:
            if arguments.only and not set(arguments.only.split(",")) & set(STUDIES[name].arms):
                continue
            study = run_study(folder, name, STUDIES[name], common, arguments)
            found = effects(study)
            show(name, study, found)
            figures[name] = {**study, "effects": found}
    print(json.dumps({"bench": "options", "figures": figures, "rivals": {}, "targets": {}, "met": {}}))


if __name__ == "__main__":
    main()
