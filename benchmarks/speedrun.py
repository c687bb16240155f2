"""Tokens and time that `recipes/_tricks/speedrun.yaml` takes to a tuned baseline's held-out loss, and to tuned Muon's.

    python benchmarks/speedrun.py [--corpus corpus.parquet] [--share 0.3] [--folder FOLDER]

The baseline is `benchmarks/speedrun.yaml`: AdamW with a cosine to zero on sequences of one length, cut from the stream
of documents. Speedrun gets `--share` of its token budget, and its schedules are made for that: there it has to be at
the mean of the baseline's final losses. The second rival is Muon alone, the baseline with `recipes/_tricks/muon.yaml`,
which gets 1.15 times the tokens of speedrun: speedrun has to be at its mean. Of each arm all learning rates are
multiplied by the same `--factors` with the first seed, then the other seeds are trained with the best one.

Every run has one process of one thread, and `--parallel` of them run at a time, the same for all. Seconds are those of
the steps by the clock, without start-up and evaluation, which all need alike; `cpu` is their processor time, which
other work on the machine disturbs less, and the target of the time is judged by it. Runs go factor by factor through
the arms, so that a load that changes meets all of them. Without a corpus, the source files of the running Python are
learned. With `--folder` an interrupted benchmark goes on. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from turbolm.recipe.load import load_recipe
from turbolm.units import parse_count

HERE = Path(__file__).parent
TRICKS = HERE.parent / "recipes/_tricks"
ARMS: dict[str, list[Path]] = {"baseline": [], "muon": [TRICKS / "muon.yaml"], "speedrun": [TRICKS / "speedrun.yaml"]}
MUON_TOKENS = 1.15  # of speedrun's
TARGETS = {"tokens": 2.6, "time": 2.3, "muon_tokens": MUON_TOKENS}
Result = dict[str, float]


def write_recipe(folder: Path, arm: str, tricks: list[Path]) -> Path:
    file = folder / f"{arm}.yaml"
    extends = [str(path) for path in (HERE / "speedrun.yaml", *tricks)]
    file.write_text(f"extends: {json.dumps(extends)}\nname: {arm}\n")
    return file


def scaled_rates(recipe: Path, overrides: list[str], factor: float) -> list[str]:
    """Overrides that multiply every learning rate of a recipe."""
    optimizer = load_recipe(recipe, overrides).optimizer
    scaled = optimizer.at_lr(factor * optimizer.lr)
    peaks = {f"peak_lrs.{kind}": peak for kind, peak in getattr(scaled, "peak_lrs", ()) if peak is not None}
    return [f"optimizer.{name}={rate:.6g}" for name, rate in {"lr": scaled.lr, **peaks}.items()]


def train(folder: Path, recipe: Path, name: str, overrides: list[str]) -> Result:
    """Train one run unless it is finished; its held-out loss, tokens, seconds and bytes."""
    settings = [f"name={name}", f"execution.runs_dir={folder / 'runs'}", *overrides]
    settings += ["cluster.processes_per_node=1", "execution.threads_per_process=1", "logging.sample_tokens=0"]
    results = folder / "runs" / name / "results.json"
    if not results.exists():
        command = [str(Path(sys.executable).with_name("turbolm")), "train", str(recipe), *settings]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-800:]}")
    lines = [json.loads(line) for line in results.with_name("metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    result = {
        "eval_loss": json.loads(results.read_text())["eval_loss"],
        "tokens": steps[-1]["tokens_seen"],
        "seconds": sum(line["data/batch_tokens"] / line["perf/tokens_per_sec"] for line in steps),
        "cpu": sum(line.get("perf/cpu_sec") or 0.0 for line in steps),
        "step_cpu": statistics.mean(line.get("perf/cpu_sec") or 0.0 for line in steps),
        "peak_bytes": max(line["memory/peak_bytes"] for line in steps),
    }
    print(f"{name}: {json.dumps(result)}", file=sys.stderr, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="a parquet file with a column `text`")
    parser.add_argument("--folder", type=Path, help="for the runs; default: a temporary one")
    parser.add_argument("--budget", default="1.2M", help="tokens of the baseline")
    parser.add_argument("--share", type=float, default=0.3, help="of the budget that speedrun gets")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time")
    parser.add_argument("--factors", nargs="+", type=float, default=[0.25, 0.5, 1, 2, 4], help="on the learning rates")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        budget = parse_count(arguments.budget)
        common = [f"execution.cache_dir={folder / 'cache'}"]
        if arguments.corpus:
            common.append(f'data.sources=[{{"type": "parquet", "path": "{arguments.corpus.resolve()}"}}]')
        shares = {"baseline": 1, "muon": arguments.share * MUON_TOKENS, "speedrun": arguments.share}
        recipes = {arm: write_recipe(folder, arm, tricks) for arm, tricks in ARMS.items()}
        prepare = [str(Path(sys.executable).with_name("turbolm")), "prepare", str(recipes["baseline"]), *common]
        subprocess.run(prepare, check=True, stdout=sys.stderr)

        def run(arm: str, factor: float, seed: int) -> Result:
            settings = [*common, *scaled_rates(recipes[arm], [], factor), f"train.budget={int(budget * shares[arm])}"]
            return train(folder, recipes[arm], f"{arm}-x{factor:g}-seed{seed}", [*settings, f"train.seed={seed}"])

        with ThreadPoolExecutor(arguments.parallel) as pool:
            jobs = {(factor, arm): pool.submit(run, arm, factor, 0) for factor in arguments.factors for arm in ARMS}
            swept = {arm: {factor: jobs[factor, arm].result() for factor in arguments.factors} for arm in ARMS}
            best = {arm: min(swept[arm], key=lambda factor, arm=arm: swept[arm][factor]["eval_loss"]) for arm in ARMS}
            more = {(s, arm): pool.submit(run, arm, best[arm], s) for s in range(1, arguments.seeds) for arm in ARMS}
            others = range(1, arguments.seeds)
            runs = {arm: [swept[arm][best[arm]], *(more[seed, arm].result() for seed in others)] for arm in ARMS}
    report({arm: {f: run["eval_loss"] for f, run in swept[arm].items()} for arm in ARMS}, best, runs)


def report(sweeps: dict[str, dict[float, float]], best: dict[str, float], runs: dict[str, list[Result]]) -> None:
    for arm, losses in sweeps.items():
        print(
            f"\n{arm}, held-out loss by factor: " + ", ".join(f"{rate:g} {loss:.4f}" for rate, loss in losses.items())
        )
        if best[arm] in (min(losses), max(losses)):
            print(f"the best factor of {arm}, {best[arm]:g}, is at the edge of its sweep")
    print("\n| seed | baseline | muon | speedrun | tokens | processor time | wall-clock | tokens beside muon |")
    print("|---" * 8 + "|")
    ratios: dict[str, list[float]] = {"tokens": [], "time": [], "wall": [], "muon_tokens": []}
    for seed, (old, muon, new) in enumerate(zip(*(runs[arm] for arm in ARMS), strict=True)):
        pairs = {"tokens": (old, "tokens"), "time": (old, "cpu"), "wall": (old, "seconds")}
        for name, (rival, key) in {**pairs, "muon_tokens": (muon, "tokens")}.items():
            ratios[name].append(rival[key] / new[key] if new[key] else 0.0)
        losses = " | ".join(f"{run['eval_loss']:.4f}" for run in (old, muon, new))
        print(f"| {seed} | {losses} | " + " | ".join(f"{found[-1]:.2f}x" for found in ratios.values()) + " |")
    means = {arm: statistics.mean(run["eval_loss"] for run in runs[arm]) for arm in ARMS}
    figures: dict[str, Any] = {name: statistics.median(values) for name, values in ratios.items()}
    for rival in ("baseline", "muon"):
        figures[f"seeds_at_{rival}"] = sum(run["eval_loss"] <= means[rival] for run in runs["speedrun"])
    print("\nmean losses: " + ", ".join(f"{arm} {loss:.4f}" for arm, loss in means.items()))
    met = {
        name: means["speedrun"] <= means["muon" if name == "muon_tokens" else "baseline"] and figures[name] >= goal
        for name, goal in TARGETS.items()
    }
    result: dict[str, Any] = {
        "bench": "speedrun",
        "figures": {**figures, "losses": means},
        "rivals": {**runs, "sweeps": sweeps, "factors": best},
        "targets": TARGETS,
        "met": met,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
