"""Wall-clock and tokens that `recipes/_tricks/speedrun.yaml` takes to a tuned baseline's held-out loss.

    python benchmarks/speedrun.py [--corpus corpus.parquet] [--share 0.45] [--folder FOLDER]

The baseline is `benchmarks/speedrun.yaml`: AdamW with a cosine to zero on sequences of one length, cut from the stream
of documents. Both learning rates are swept with the first seed, then the other seeds are trained at the best ones.
Every run has one process of one thread, and `--parallel` of them run at a time, the same for both. Speedrun gets
`--share` of the baseline's token budget, and its schedules are made for that: there it has to be at the mean of the
baseline's final losses. Seconds are those of the steps by the clock, without start-up and evaluation, which both need
alike; `cpu` is their processor time. Without a corpus, the source files of the running Python are learned. With
`--folder` an interrupted benchmark goes on. The last line is one JSON object.
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

HERE = Path(__file__).parent
TRICK = HERE.parent / "recipes/_tricks/speedrun.yaml"
TARGETS = {"wall": 1.8, "tokens": 1.6}
Result = dict[str, float]


def recipe_text(arm: str) -> str:
    extends = [str(HERE / "speedrun.yaml"), *[str(TRICK)] * (arm == "speedrun")]
    return f"extends: {json.dumps(extends)}\nname: {arm}\n"


def train(folder: Path, arm: str, name: str, overrides: list[str]) -> Result:
    """Train one run unless it is finished; its held-out loss, tokens and seconds."""
    recipe = folder / f"{arm}.yaml"
    recipe.write_text(recipe_text(arm))
    settings = [f"name={name}", f"execution.runs_dir={folder / 'runs'}", *overrides]
    settings += ["cluster.processes_per_node=1", "execution.threads_per_process=1"]
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
    }
    print(f"{name}: {json.dumps(result)}", file=sys.stderr, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="a parquet file with a column `text`")
    parser.add_argument("--folder", type=Path, help="for the runs; default: a temporary one")
    parser.add_argument("--budget", default="1.2M", help="tokens of the baseline")
    parser.add_argument("--share", type=float, default=0.45, help="of the budget that speedrun gets")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time")
    parser.add_argument("--rates", nargs="+", default=["5e-4", "1e-3", "2e-3", "4e-3", "8e-3"], help="of the baseline")
    parser.add_argument("--speedrun-rates", nargs="+", default=["2.5e-3", "5e-3", "1e-2", "2e-2", "4e-2"])
    arguments = parser.parse_args()
    from turbolm.units import parse_count

    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        budget = parse_count(arguments.budget)
        common = [f"execution.cache_dir={folder / 'cache'}"]
        if arguments.corpus:
            common.append(f'data.sources=[{{"type": "parquet", "path": "{arguments.corpus.resolve()}"}}]')
        budgets = {"baseline": budget, "speedrun": int(budget * arguments.share)}
        rates = {"baseline": arguments.rates, "speedrun": arguments.speedrun_rates}
        settings = {arm: [*common, f"train.budget={budgets[arm]}"] for arm in budgets}
        prepare = [str(Path(sys.executable).with_name("turbolm")), "prepare"]
        (folder / "baseline.yaml").write_text(recipe_text("baseline"))
        subprocess.run([*prepare, str(folder / "baseline.yaml"), *common], check=True, stdout=sys.stderr)

        def run(arm: str, rate: str, seed: int) -> Result:
            name = f"{arm}-{rate}-seed{seed}"
            return train(folder, arm, name, [*settings[arm], f"optimizer.lr={rate}", f"train.seed={seed}"])

        with ThreadPoolExecutor(arguments.parallel) as pool:
            jobs = {arm: {rate: pool.submit(run, arm, rate, 0) for rate in rates[arm]} for arm in rates}
            swept = {arm: {rate: job.result() for rate, job in jobs[arm].items()} for arm in rates}
            best = {arm: min(rates[arm], key=lambda rate, arm=arm: swept[arm][rate]["eval_loss"]) for arm in rates}
            more = {arm: [pool.submit(run, arm, best[arm], s) for s in range(1, arguments.seeds)] for arm in rates}
            runs = {arm: [swept[arm][best[arm]], *(job.result() for job in more[arm])] for arm in rates}
        sweeps = {arm: {rate: result["eval_loss"] for rate, result in swept[arm].items()} for arm in rates}
    report(sweeps, best, runs)


def report(sweeps: dict[str, dict[str, float]], best: dict[str, str], runs: dict[str, list[Result]]) -> None:
    for arm, losses in sweeps.items():
        print(f"\n{arm}, held-out loss by rate: " + ", ".join(f"{rate} {loss:.4f}" for rate, loss in losses.items()))
    for arm, rate in best.items():
        if rate in (list(sweeps[arm])[0], list(sweeps[arm])[-1]):
            print(f"the best rate of {arm}, {rate}, is at the edge of its sweep")
    target = statistics.mean(run["eval_loss"] for run in runs["baseline"])
    print(
        "\n| seed | baseline loss | speedrun loss | wall-clock | processor time | tokens |\n|---|---|---|---|---|---|"
    )
    ratios: dict[str, list[float]] = {"wall": [], "cpu": [], "tokens": []}
    for seed, (old, new) in enumerate(zip(runs["baseline"], runs["speedrun"], strict=True)):
        pairs = {"wall": "seconds", "cpu": "cpu", "tokens": "tokens"}
        for name, key in pairs.items():
            ratios[name].append(old[key] / new[key] if new[key] else 0.0)
        figures = " | ".join(f"{ratios[name][-1]:.2f}x" for name in pairs)
        print(f"| {seed} | {old['eval_loss']:.4f} | {new['eval_loss']:.4f} | {figures} |")
    mean = statistics.mean(run["eval_loss"] for run in runs["speedrun"])
    reached = [run["eval_loss"] <= target for run in runs["speedrun"]]
    print(f"\ntarget {target:.4f}, speedrun's mean {mean:.4f}; {sum(reached)} of {len(reached)} seeds reach it")
    figures_out = {name: statistics.median(values) for name, values in ratios.items()}
    met = {name: mean <= target and figures_out[name] >= goal for name, goal in TARGETS.items()}
    result: dict[str, Any] = {
        "bench": "speedrun",
        "figures": figures_out | {"target_loss": target, "speedrun_loss": mean, "seeds_that_reach_it": sum(reached)},
        "rivals": {"baseline": runs["baseline"], "speedrun": runs["speedrun"], "sweeps": sweeps, "rates": best},
        "targets": TARGETS,
        "met": met,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
