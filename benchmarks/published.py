"""The planner's memory and speed beside figures that others published, with their sources.

    python benchmarks/published.py

Nothing is measured here: every row is a run that somebody else measured with another trainer, and what
`turbolm plan --json` says about the nearest recipe of ours. The rows tell what the planner's assumptions (efficiencies,
CUDA context, eager activations) come to, and no row was used to choose them. The last line is one JSON object.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 2**30
TITAN = "https://github.com/pytorch/torchtitan/blob/main/benchmarks/llama3_h100_202412_torchtitan.md"
TITAN_A100 = "https://github.com/pytorch/torchtitan/blob/041336434916bdc0f88c1f89fda176fd3c2092e4/docs/performance.md"
FOUNDRY = "https://github.com/mosaicml/llm-foundry/blob/main/scripts/train/benchmarking/README.md"
_LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
LLAMA_8B = {**_LLAMA3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "tie_word_embeddings": False}  # fmt: skip
LLAMA_70B = {**LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
             "num_attention_heads": 64}  # fmt: skip


def mpt(width: int, layers: int, heads: int) -> dict[str, Any]:
    """Return MPT's size as a GPT-2 for 2,048 tokens: the same matrices, and biases, which MPT has not."""
    sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 2048}
    return {"model_type": "gpt2", "vocab_size": 50368, "activation_function": "gelu", **sizes}


MPT_1B, MPT_7B, MPT_30B = mpt(2048, 24, 16), mpt(4096, 32, 32), mpt(7168, 48, 56)


@dataclass(frozen=True)
class Run:
    """A published run. `sequences` are those of a micro-batch; `memory_gib` is what its authors read off the GPU."""

    name: str
    source: str
    gpu: str
    gpus: int
    config: dict[str, Any]
    seq_len: int
    sequences: int
    recomputation: str
    tokens_per_sec: float  # a GPU
    memory_gib: float | None = None
    accumulation: int = 1
    compiled: bool = False
    fp8: bool = False

    def recipe(self) -> dict[str, Any]:
        """Return the nearest recipe: fully sharded means ZeRO-3, as they shard weights, too."""
        tokens = self.sequences * self.seq_len
        longest = {"n_positions": self.seq_len} if "n_embd" in self.config else {}
        return {
            "name": "published",
            "model": {"config": {**self.config, **longest}},
            "tokenizer": {"train": {}},
            "data": {"seq_len": self.seq_len},
            "train": {
                "budget": "1T",
                "global_batch": self.gpus * self.accumulation * tokens,
                "precision": "bf16",
                **({"fp8": True} if self.fp8 else {}),
            },
            "cluster": {"gpu": self.gpu, "num_nodes": self.gpus // 8, "gpus_per_node": 8},
            "execution": {
                "zero_stage": 3,
                "micro_batch": tokens,
                "attention": "flash",
                "activation_checkpointing": self.recomputation,
                "compile": "layers" if self.compiled else "none",
            },
        }


RUNS = (
    # torchtitan: local batch size 2, 8k tokens; H100 with 96 GB and 500 W. Its selective recomputation keeps every
    # second matrix product, ours all of them.
    Run("torchtitan FSDP", TITAN, "H100-80GB", 8, LLAMA_8B, 8192, 2, "selective", 5762, 82.4),
    Run("torchtitan + compile", TITAN, "H100-80GB", 8, LLAMA_8B, 8192, 2, "selective", 6667, 77.0, compiled=True),
    Run("torchtitan FSDP", TITAN, "H100-80GB", 128, LLAMA_8B, 8192, 2, "selective", 5605, 67.0),
    Run("torchtitan + compile", TITAN, "H100-80GB", 128, LLAMA_8B, 8192, 2, "selective", 6514, 62.0, compiled=True),
    Run("torchtitan selective", TITAN_A100, "A100-80GB", 64, LLAMA_8B, 8192, 1, "selective", 2973, compiled=True),
    Run("torchtitan 70B full", TITAN_A100, "A100-80GB", 64, LLAMA_70B, 8192, 1, "full", 331, compiled=True),
    # LLM-foundry: FSDP, amp_bf16, FlashAttention.
    Run("foundry 1B", FOUNDRY, "H100-80GB", 8, MPT_1B, 2048, 14, "none", 45455),
    Run("foundry 1B", FOUNDRY, "A100-80GB", 8, MPT_1B, 2048, 14, "none", 20513, accumulation=4),
    Run("foundry 7B", FOUNDRY, "H100-80GB", 8, MPT_7B, 2048, 6, "none", 10643),
    Run("foundry 7B", FOUNDRY, "A100-80GB", 8, MPT_7B, 2048, 6, "none", 4641, accumulation=2),
    Run("foundry 7B", FOUNDRY, "A100-40GB", 128, MPT_7B, 2048, 18, "full", 3623),
    Run("foundry 30B", FOUNDRY, "H100-80GB", 8, MPT_30B, 2048, 3, "full", 2002, accumulation=21),
    Run("foundry 30B", FOUNDRY, "H100-80GB", 16, MPT_30B, 2048, 10, "full", 2263, accumulation=3),
    Run("foundry 30B", FOUNDRY, "H100-80GB", 32, MPT_30B, 2048, 14, "full", 2308, accumulation=3),
    Run("foundry 30B", FOUNDRY, "A100-80GB", 8, MPT_30B, 2048, 3, "full", 916, accumulation=21),
)


def plan(run: Run, folder: Path) -> dict[str, Any]:
    """Return what `turbolm plan --json` prints, or the line with which it refuses."""
    recipe = folder / "config.yaml"
    recipe.write_text(json.dumps(run.recipe()))
    done = subprocess.run(
        [sys.executable, "-m", "turbolm.cli", "plan", str(recipe), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if str(recipe) in line]
        return {"refused": said[0].partition(": ")[2]}
    answer: dict[str, Any] = json.loads(done.stdout)
    if answer["footprint"] is None or answer["estimate"] is None:
        return {"refused": "; ".join(answer["notes"])}
    return answer


def main() -> None:
    """Print a table and one JSON object."""
    rows, speed, memory = [], [], []
    for run in RUNS:
        with tempfile.TemporaryDirectory() as made:
            answer = plan(run, Path(made))
        row: dict[str, Any] = {
            "run": f"{run.name}, {run.gpus} {run.gpu}, {run.sequences} x {run.seq_len}, {run.recomputation}"
        }
        row |= {"published_tokens_per_sec": run.tokens_per_sec, "published_gib": run.memory_gib, "source": run.source}
        if "refused" in answer:
            row["refused"] = answer["refused"]
        else:
            found = answer["footprint"]
            row["tokens_per_sec"] = round(answer["estimate"]["tokens_per_sec"] / run.gpus)
            row["tensors_gib"], row["gib"] = (found[key] / GIB for key in ("counted_bytes", "total_bytes"))
            row["moment"] = found["moment"]
            speed.append(row["tokens_per_sec"] / run.tokens_per_sec - 1)
            if run.memory_gib:
                memory.append(row["gib"] / run.memory_gib - 1)
        rows.append(row)
        print(_line(row), flush=True)
    figures = {
        "runs": len(RUNS),
        "speed": {"median": statistics.median(speed), "least": min(speed), "most": max(speed)},
        "memory": {"median": statistics.median(memory), "least": min(memory), "most": max(memory)},
        "rows": rows,
    }
    print(json.dumps({"bench": "published", "figures": figures, "rivals": {}, "targets": {}, "met": {}}))


def _line(row: dict[str, Any]) -> str:
    if "refused" in row:
        return f"| {row['run']} | {row['published_tokens_per_sec']:,} | | refused: {row['refused'][:90]} |"
    seen = row["published_gib"]
    memory = f"{row['gib']:.1f}" + (f" | {seen} | {row['gib'] / seen - 1:+.0%}" if seen else " | | ")
    speed = row["tokens_per_sec"] / row["published_tokens_per_sec"] - 1
    return (
        f"| {row['run']} | {row['tokens_per_sec']:,} | {row['published_tokens_per_sec']:,} | {speed:+.0%} | {memory} |"
    )


if __name__ == "__main__":
    main()
