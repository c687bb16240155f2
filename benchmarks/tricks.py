"""What every trick that works on a CPU is worth: `turbolm ablate` on a small Llama, and one table of all tricks.

    python benchmarks/tricks.py [--corpus corpus.parquet] [--seeds 3 --only muon,best_fit] [--studies NAME ...]

Each study is one ablation of `benchmarks/speedrun.yaml` (AdamW, cosine, fixed sequences cut from the stream): the
baseline and each trick alone, one process with one thread, at the baseline's learning rate unless the trick sets its
own. Studies compare processor time, which other work on the machine disturbs less than wall-clock time. The runs are
in `runs/ablations/tricks*` below the working directory; after an interruption, the same command resumes. `--seeds` and
`--only` give the named tricks more seeds. Tricks that need a GPU are listed as not measured; `benchmarks/gpu.sh` has
those. Without a corpus, the model learns the source files of the running Python. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbolm.ablate.verdict import UNRESOLVED
from turbolm.plan.recipe_table import read_header, trick_files

HERE = Path(__file__).parent
CLEAR = 2.5  # standard deviations


@dataclass(frozen=True)
class Study:
    """Tricks with a baseline in common."""

    about: str
    settings: tuple[str, ...]
    tricks: tuple[str, ...]


STUDIES = {
    "tricks": Study(
        "bf16, 400k tokens in batches of 2,048",
        ("train.budget=400k", "evaluation.every=10%", "evaluation.tokens=40k"),
        (
            "muon_at_1e-2:optimizer.name=muon+optimizer.lr=1e-2", "muon", "best_fit", "linear_to_zero", "growth",
            "remix", "stages:data.length_schedule={name: stages, at: {0%: 128, 25%: 256, 50%: 512}}", "buckets",
            "lion", "ademamix", "cautious_adamw", "adamw_8bit", "rmsprop:optimizer.name=rmsprop",
            "sgd:optimizer.name=sgd+optimizer.lr=0.3", "z_loss", "depth_scaled_init", "strong_weight_decay", "wsd",
            "wsd_sqrt", "restarts", "inverse_sqrt", "momentum_ramp", "weight_decay_ramp", "no_clip", "clip_by_value",
            "random_restarts", "full_loss", "fp32:train.precision=fp32", "adamw_at_4e-3:optimizer.lr=4e-3",
            "lion_at_1e-3:optimizer.name=lion+optimizer.lr=1e-3+optimizer.weight_decay=0.5",
            "ademamix_at_4e-3:optimizer.name=ademamix+optimizer.betas=[0.9, 0.95, 0.999]+optimizer.lr=4e-3",
            "cautious_adamw_at_4e-3:optimizer.name=cautious_adamw+optimizer.lr=4e-3",
        ),
    ),
    "tricks-unsharded": Study(
        "fp32, for optimizers that need ZeRO 0; else as above",
        ("train.budget=400k", "evaluation.every=10%", "evaluation.tokens=40k", "train.precision=fp32"),
        ("soap", "adafactor"),
    ),
    "tricks-batch": Study(
        "bf16, 800k tokens in batches of 8,192",
        ("train.budget=800k", "evaluation.every=10%", "evaluation.tokens=40k", "train.global_batch=8192"),
        ("batch_ramp",),
    ),
    "tricks-execution": Study(
        "fp32, 100k tokens, ZeRO 1: the result is the same, only time and memory count",
        ("train.budget=100k", "evaluation.every=10%", "evaluation.tokens=8k", "train.precision=fp32"),
        (
            "zero0", "zero2", "zero3", "recompute_full", "recompute_selective", "recompute_offloaded", "chunked_loss",
            "compile_layers", "compile_model", "offload_optimizer", "overlap",
        ),
    ),
}  # fmt: skip
WHY_NOT = {
    "bf16": "the baseline has it: see fp32 and the speedrun",
    "concat": "the baseline",
    "cosine": "the baseline",
    "fp16": "needs a GPU",
    "fp8": "needs a Hopper GPU",
    "liger_loss": "needs a GPU",
    "padded_vocab": "the vocabulary is such a multiple",
    "speedrun": "see the speedrun",
    "tied_embeddings": "the baseline",
    "weight_average": "one run measures both: see averaged weights",
    "zero1": "the baseline",
    "zeropp": "needs nodes of 8 GPUs",
}


def ablate(name: str, study: Study, corpus: Path | None, seeds: int, only: list[str]) -> dict[str, Any] | None:
    """Run or resume one study; returns the results that `turbolm ablate --json` prints."""
    tricks = [trick for trick in study.tricks if not only or trick.partition(":")[0] in only]
    if not tricks:
        return None
    settings = [*study.settings, "cluster.processes_per_node=1", "execution.threads_per_process=1"]
    settings.append("logging.sample_tokens=0")
    if corpus:
        settings.append(f'data.sources=[{{"type":"parquet","path":{json.dumps(str(corpus))}}}]')
    options = ["--tricks", ",".join(tricks), "--alone", "--clock", "cpu", "--seeds", str(seeds)]
    command = [str(Path(sys.executable).with_name("turbolm")), "ablate", str(HERE / "speedrun.yaml"), *settings]
    done = subprocess.run([*command, *options, "--name", name, "--json"], stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout)


def figures_of(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What each trick changed, as ratios to the baseline's means."""
    baseline = results["arms"][0]["mean"]
    found = {}
    for arm in results["arms"][1:]:
        mean = arm["mean"]
        ratios = {
            key: mean[key] / baseline[key] if mean.get(key) and baseline.get(key) else None
            for key in ("target_tokens", "target_sec", "tokens_per_sec", "peak_bytes")
        }
        found[arm["arm"].removeprefix("+")] = {
            "baseline_loss": baseline["final_loss"],
            "final_loss": mean["final_loss"],
            **ratios,
            "p_loss": arm["versus_baseline"]["final_loss"]["p"],
            "seeds": len(arm["runs"]),
            "verdict": arm["verdict"],
            "loss_verdict": arm["versus_baseline"]["final_loss"]["verdict"],
        }
    return found


def judge(found: dict[str, Any], spread: float | None) -> str:
    """The verdict. Tricks that change what is learned are judged by the final loss; with one seed, only a difference
    that exceeds what seeds do to the baseline counts. Tricks that leave the loss alone are judged by time.
    """
    if found["study"] == "tricks-execution":
        return {"loss": "slower", "gain": "faster", "inconclusive": "inconclusive"}.get(found["verdict"], UNRESOLVED)
    difference = found["final_loss"] - found["baseline_loss"]
    if found["seeds"] == 1 and spread is not None and abs(difference) < CLEAR * spread:
        return UNRESOLVED
    return {"loss": "worse"}.get(found["loss_verdict"], found["loss_verdict"])


def measured_cell(found: dict[str, Any], spread: float | None) -> str:
    """The figures of a trick in words, including a target it did not reach."""
    loss = f"loss {found['baseline_loss']:.3f} → {found['final_loss']:.3f}"
    if found["p_loss"] is not None:
        loss += f" (p {found['p_loss']:.2g})"
    ratios = (("tokens", "target_tokens"), ("time", "target_sec"), ("tokens/s", "tokens_per_sec"))
    parts = [f"{word} {found[key]:.2f}x" for word, key in ratios if found[key]]
    if not found["target_tokens"]:
        at_once = found["verdict"] == "inconclusive"
        parts.insert(0, "target met at the first evaluation" if at_once else "target not reached")
    seeds = f"{found['seeds']} seed{'s' * (found['seeds'] > 1)}"
    return f"**{judge(found, spread)}**: {loss}; {', '.join(parts)}; memory {found['peak_bytes']:.2f}x ({seeds})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="a parquet file with a column `text`")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="", help="names of tricks, with commas between; those of --seeds")
    arguments = parser.parse_args()
    corpus = arguments.corpus.resolve() if arguments.corpus else None
    only = [name for name in arguments.only.split(",") if name]
    measured: dict[str, dict[str, Any]] = {}
    spread = None
    for name in arguments.studies:
        study = STUDIES[name]
        first = ablate(name, study, corpus, 1, [])
        more = ablate(name, study, corpus, arguments.seeds, only) if arguments.seeds > 1 else None
        if more:
            losses = [run["final_loss"] for run in more["arms"][0]["runs"]]
            spread = statistics.stdev(losses)
            print(f"{name}: the baseline's seeds end at {', '.join(f'{loss:.3f}' for loss in losses)}")
        for results in (first, more):
            for trick, found in figures_of(results).items() if results else ():
                measured[trick] = {"study": name, **found}
    for name in arguments.studies:
        print(f"{name}: {STUDIES[name].about}")
    files = {path.stem: path for path in trick_files()}
    print("\n| trick | claimed | measured |\n|---|---|---|")
    for trick in [*files, *(name for name in measured if name not in files)]:
        claimed = read_header(files[trick])["claimed"] if trick in files else ""
        found = measured.get(trick)
        cell = f"{found['study']}: {measured_cell(found, spread)}" if found else WHY_NOT.get(trick, "not measured")
        print(f"| {trick} | {claimed} | {cell} |")
    print(json.dumps({"bench": "tricks", "figures": measured, "rivals": {}, "targets": {}, "met": {}}))


if __name__ == "__main__":
    main()
