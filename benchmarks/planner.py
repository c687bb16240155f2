"""Predicted memory against counted tensors and resident memory of real DeepSpeed steps on the CPU.

    python benchmarks/planner.py [--points N] [--large] [--processes 2]

Every point is a small model trained for three steps by two processes: seven types x recomputation x fp32 and bf16 x
ZeRO stages; every pair is covered. What the planner says (a traced profile, DeepSpeed's layout of the state) is
compared with what the rank that holds most has

* after a forward pass: the storages that operators made and that are alive, watched in a dispatch mode, without weights
  and inputs (activations);
* before a forward pass: all tensors of the process, found by the garbage collector (state at rest);
* when the optimizer steps: the same, with gradients and their copies (state in the update);
* with --large, on models that need 300 MB and more: the rise of the anonymous resident memory (RssAnon) from before the
  model is built, against the predicted worst moment of a step.

Each rank runs all points one after another; what one leaves behind is taken off the next. HELD_OUT names the types that
were not run while the planner was built. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from start_memory import Peak

MB = 2**20
MEDIAN_LIMIT, WORST_LIMIT, RSS_LIMIT = 0.02, 0.05, 0.10
HELD_OUT = ("olmo2", "olmoe")
_SIZES = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
          "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    "gpt2": {"vocab_size": 2048, "n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 1024},
    "qwen3": _SIZES | {"head_dim": 64},
    "gemma2": _SIZES | {"head_dim": 64, "sliding_window": 128},
    "olmo2": _SIZES | {"pad_token_id": 0},
    "qwen3_moe": _SIZES | {"head_dim": 64, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2},
    "olmoe": _SIZES | {"intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2, "pad_token_id": 0},
}
_WIDE = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 4,
         "vocab_size": 8192}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One run."""

    model: str
    recomputation: str
    precision: str
    stage: int
    is_large: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """Return the model's configuration."""
        wide = {"n_embd": 768, "n_head": 12, "vocab_size": 8192} if self.model == "gpt2" else _WIDE
        return {"model_type": self.model, **MODELS[self.model], **(wide if self.is_large else {})}

    @property
    def recipe(self) -> dict[str, Any]:
        """Return the recipe."""
        seq_len, tokens = (512, 2048) if self.is_large else (256, 1024)
        return {
            "name": "planner",
            "model": {"config": self.config},
            "tokenizer": {"train": {}},
            "data": {"seq_len": seq_len},
            "train": {"budget": "1M", "global_batch": 2 * tokens, "precision": self.precision},
            "execution": {
                "communication_bucket": 8_000_000 if self.is_large else 500_000,  # less than the model, as in real runs
                "zero_stage": self.stage,
                "micro_batch": tokens,
                "activation_checkpointing": self.recomputation,
                "loss": "full",
            },
        }


def grid() -> list[Point]:
    """Return 35 points in which every two values of different columns meet; turbolm refuses bf16 at stage 0."""
    modes, precisions = ("none", "selective", "full"), ("fp32", "bf16")
    points = []
    for place, model in enumerate(MODELS):
        for stage in range(4):
            mode, precision = modes[(place + stage) % 3], precisions[(place + place // 3 + stage) % 2 if stage else 0]
            points.append(Point(model, mode, precision, stage))
        stage = 1 + place % 3
        other = precisions[(place + place // 3 + stage + 1) % 2]
        points.append(Point(model, modes[(place + stage + 1) % 3], other, stage))
    return points


def large_points() -> list[Point]:
    """Return points of 300 MB and more."""
    kinds = (("none", "fp32", 0), ("full", "fp32", 3), ("none", "bf16", 2), ("selective", "fp32", 1))
    models = ("llama", "gpt2", "qwen3", "olmo2")
    return [Point(model, *kind, is_large=True) for model, kind in zip(models, kinds, strict=True)]


# ------------------------------------------------------------------------------------------------------------ one rank


def measure(point: Point, profile: Any) -> dict[str, Any]:
    """Train three steps as one rank and return bytes: predicted and counted. Collective."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from turbolm.plan.footprint import used_kernel
    from turbolm.plan.machine import Machine
    from turbolm.plan.plan import build_plan
    from turbolm.recipe.schema import Recipe

    recipe = Recipe.model_validate(point.recipe)
    machine = Machine(0, None, None, 2, cpu_has_bf16=True, memory_bytes=0)
    plan = build_plan(recipe, machine, world_size=int(os.environ["WORLD_SIZE"]))
    tokens = plan.batch.micro_batch_tokens

    class Live(TorchDispatchMode):
        """Storages that operators make, while they are alive."""

        def __init__(self) -> None:
            super().__init__()
            self.seen: dict[int, Any] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            for one in tree_leaves(output):
                if isinstance(one, torch.Tensor):
                    storage = one.untyped_storage()
                    self.seen[storage._cdata] = (torch.UntypedStorage._weak_ref(storage), storage.nbytes())  # type: ignore[attr-defined]
            return output

        def bytes_without(self, known: set[int]) -> int:
            return sum(
                size
                for key, (ref, size) in self.seen.items()
                if key not in known and not torch.UntypedStorage._expired(ref)  # type: ignore[attr-defined]
            )

    inputs = _inputs(plan, point.config["vocab_size"], used_kernel(plan, profile))
    before, peak = _tensor_bytes(), Peak()
    engine = _engine(plan, used_kernel(plan, profile))
    counted = dict.fromkeys(("activations", "resting", "updating"), 0.0)

    def note(*_: Any) -> None:
        counted["updating"] = max(counted["updating"], _tensor_bytes() - before)

    handle = None if point.is_large else engine.optimizer.register_step_pre_hook(note)
    for step in range(3):
        if step == 1 and not point.is_large:
            counted["resting"] = _tensor_bytes() - before
            stays = [*engine.module.buffers(), *(one for one in inputs.values() if isinstance(one, torch.Tensor))]
            with Live() as live:
                objective, *_ = engine(**inputs)
            stays += list(engine.module.parameters())
            counted["activations"] = live.bytes_without({one.untyped_storage()._cdata for one in stays})
        else:
            objective, *_ = engine(**inputs)
        engine.backward_and_step(objective * (plan.world_size / (2 * tokens)), is_boundary=True)
        del objective
    counted["rss"], _ = peak.stop()
    if handle is not None:
        handle.remove()
    engine.deepspeed_engine.destroy()
    most = torch.tensor(list(counted.values()), dtype=torch.float64)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    foreseen = predict(plan, profile)
    return {name: [foreseen[name], value] for name, value in zip(counted, most.tolist(), strict=True)}


def predict(plan: Any, profile: Any) -> dict[str, float]:
    """Return what the planner says, under the names of what is counted."""
    from turbolm.plan.deepspeed import ELEMENT_BYTES
    from turbolm.plan.footprint import estimate_activations, estimate_footprint, router_loss
    from turbolm.plan.zero_memory import estimate_zero_memory

    state, batch = estimate_zero_memory(profile.tensors, plan), plan.batch
    loss = profile.loss("full", ELEMENT_BYTES[plan.precision]).saved.at(batch.micro_batch_tokens, batch.seq_len)
    always = state.weights + state.master + state.optimizer
    return {
        "activations": estimate_activations(plan, profile).saved + loss + router_loss(plan, profile).saved,
        "resting": always + state.small_weights + state.resting.gradients + state.resting.buckets,
        "updating": always + state.updating.gradients + state.updating.buckets + state.updating.copies,
        "rss": estimate_footprint(plan, profile).counted_bytes,
    }


def _tensor_bytes() -> int:
    """Return the bytes of all storages that Python knows."""
    import torch

    gc.collect()
    found = {}
    for one in gc.get_objects():
        if type(one) in (torch.Tensor, torch.nn.Parameter):
            for tensor in (one, one.grad if one.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu" and tensor.layout == torch.strided:
                    found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return sum(found.values())


def _engine(plan: Any, kernel: str) -> Any:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from turbolm.engine.start import build_accelerator, wrap
    from turbolm.models.build import build_config, build_model
    from turbolm.models.loss import attach_loss
    from turbolm.models.recompute import apply_activation_checkpointing
    from turbolm.models.router import attach_router_loss, find_routers
    from turbolm.optim.build import build_optimizer

    for one in (AcceleratorState, GradientState, PartialState):
        one._shared_state.clear()
    recipe = plan.recipe
    accelerator = build_accelerator(plan.ds_config, device="cpu", precision=plan.precision, timeout_sec=300)
    vocabulary = recipe.model.config["vocab_size"]
    config = build_config(
        recipe.model, seq_len=recipe.data.seq_len, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0
    )
    sharded_by = plan.ds_config if recipe.execution.zero_stage == 3 else None
    model = build_model(recipe.model, config, seed=0, attention=kernel, sharded_by=sharded_by)
    apply_activation_checkpointing(model, recipe.execution.activation_checkpointing)
    engine = wrap(accelerator, model, build_optimizer(model, recipe))
    attach_loss(engine.module, "full")
    routers = find_routers(engine.module, recipe.train.router_aux_loss)
    if routers is not None:
        attach_router_loss(engine.module, routers)
    engine.train()
    return engine


def _inputs(plan: Any, vocabulary: int, kernel: str) -> dict[str, Any]:
    """Return a micro-batch of sequences that hold two documents each."""
    import numpy as np
    import torch

    from turbolm.models.attention import model_inputs

    sequences, seq_len = plan.batch.micro_batch_bins, plan.batch.seq_len
    tokens = np.random.default_rng(0).integers(0, vocabulary, (sequences, seq_len))
    positions = np.tile(np.arange(seq_len // 2), (sequences, 2))
    inputs = model_inputs({"input_ids": tokens, "position_ids": positions}, kernel, torch.device("cpu"))
    return {**inputs, "targets": torch.from_numpy(tokens)}


def run_rank(folder: Path) -> None:
    """Measure every point and print the answers, one a line."""
    import torch

    from turbolm.plan.profile import ModelProfile

    torch.set_num_threads(1)
    for values in json.loads((folder / "points.json").read_text()):
        point = Point(**values)
        name = json.dumps(point.config, sort_keys=True)
        profile = ModelProfile.from_dict(json.loads((folder / "profiles.json").read_text())[name])
        print(json.dumps(measure(point, profile)), flush=True)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
    os._exit(0)  # ZeRO-3 may abort at exit


# --------------------------------------------------------------------------------------------------------- all of them


def run(points: list[Point], processes: int) -> Iterator[dict[str, Any]]:
    """Yield what the ranks measured at each point, after tracing the models here."""
    from turbolm.plan.profiles import find_profile

    with tempfile.TemporaryDirectory() as made:
        profiles = {}
        for point in points:
            name = json.dumps(point.config, sort_keys=True)
            if name not in profiles:
                profile, why = find_profile(point.config, 0.0, Path.home() / ".cache/turbolm")
                assert profile is not None, f"{point.model}: {why}"
                profiles[name] = json.loads(profile.to_json())
        (Path(made) / "profiles.json").write_text(json.dumps(profiles))
        (Path(made) / "points.json").write_text(json.dumps([asdict(point) for point in points]))
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            port = str(listening.getsockname()[1])
        world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
                 "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}  # fmt: skip
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank", made],
                env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
                stderr=subprocess.DEVNULL if rank else None,
                text=True,
            )
            for rank in range(processes)
        ]
        assert ranks[0].stdout is not None
        for line in ranks[0].stdout:
            if line.startswith('{"activations"'):
                yield json.loads(line)
        for rank in ranks:
            rank.wait(timeout=60)


def error(predicted: float, counted: float) -> float:
    """Return the relative error of a prediction."""
    return predicted / counted - 1


def main() -> None:
    """Run the points and print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, help="only so many of the grid, evenly spread")
    parser.add_argument("--large", action="store_true", help="the points that are compared with resident memory")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        run_rank(Path(arguments.rank))
    points = large_points() if arguments.large else grid()
    if arguments.points:
        points = points[:: max(1, len(points) // arguments.points)]
    kinds = ("rss",) if arguments.large else ("activations", "resting", "updating")
    errors = []
    for point, answer in zip(points, run(points, arguments.processes), strict=True):
        errors.append(max((error(*answer[kind]) for kind in kinds), key=abs))
        shown = "  ".join(
            f"{kind} {answer[kind][0] / MB:8.2f} / {answer[kind][1] / MB:8.2f} MiB {error(*answer[kind]):+6.2%}"
            for kind in kinds
        )
        print(f"{point.model:9} {point.recomputation:9} {point.precision} ZeRO-{point.stage}  {shown}", flush=True)
    median, worst = statistics.median(map(abs, errors)), max(map(abs, errors))
    limits = {"worst": RSS_LIMIT} if arguments.large else {"median": MEDIAN_LIMIT, "worst": WORST_LIMIT}
    figures = {"median": median, "worst": worst, "points": len(points)}
    met = {name: figures[name] <= limit for name, limit in limits.items()}
    print(json.dumps({"bench": "planner", "figures": figures, "rivals": {}, "targets": limits, "met": met}))


if __name__ == "__main__":
    main()
