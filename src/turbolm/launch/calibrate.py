"""`turbolm calibrate`: measure the rates of this node and keep them for `turbolm plan`. Torch-free."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from turbolm.errors import UserError
from turbolm.launch.local import rank_environment
from turbolm.launch.network import free_port
from turbolm.plan.count import read_model_config
from turbolm.plan.machine import Machine, detect_machine
from turbolm.plan.machine_rates import Rates, keep_rates, kind_of, measured_link, network_link
from turbolm.plan.plan import Plan, build_plan
from turbolm.plan.profiles import find_profile
from turbolm.plan.work import Unit
from turbolm.recipe.execution import Execution
from turbolm.recipe.gpus import find_gpu
from turbolm.recipe.load import load_recipe
from turbolm.recipe.schema import Recipe

START_SEC = 180  # to import torch and build the models, on a slow file system
_LAYERS = 2
# Widths and micro-batches (sequences, tokens of each) that are measured beside a recipe's own.
_WIDTHS = {  # hidden size, intermediate size, heads, vocabulary
    "cpu": ((128, 384, 2, 1024), (256, 768, 4, 4096), (512, 1536, 8, 2048)),
    "cuda": ((2048, 8192, 32, 32768), (4096, 14336, 32, 32768)),
}
# Whole steps: which of the widths, layers, sequences, tokens of each. The last is hardly more than starting operators.
_STEPS = {
    "cpu": ((1, 2, 2, 512), (2, 2, 8, 256), (1, 4, 4, 256), (0, 6, 1, 256)),
    "cuda": ((0, 2, 4, 2048), (1, 2, 1, 8192), (0, 6, 1, 512)),
}
_BATCHES = {"cpu": ((2, 512), (8, 256), (1, 1024)), "cuda": ((4, 2048), (2, 8192))}
_MAX_TOKENS = {"cpu": 2048, "cuda": 32768}  # of a recipe's own micro-batch, so that a piece takes seconds at most


def calibrate(
    recipe_file: str | None, overrides: Sequence[str], budget_sec: float, clock: str = "wall", *, with_own: bool = True
) -> Rates:
    """Measure for about `budget_sec`, keep the result and return it. Raises UserError.

    `with_own`: measure the recipe's own model beside the usual ones.
    """
    machine, plan = detect_machine(), None
    if recipe_file is not None:
        recipe = load_recipe(recipe_file, overrides)
        recipe = recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"num_nodes": 1})})
        plan = build_plan(recipe, machine)
    device = plan.device if plan else "cuda" if machine.num_gpus else "cpu"
    num_ranks = plan.processes_per_node if plan else machine.num_gpus or min(2, machine.num_cpus)
    threads = plan.threads_per_process if plan else max(1, machine.num_cpus // num_ranks)
    precision = plan.precision if plan else "bf16" if device == "cuda" or machine.cpu_has_bf16 else "fp32"
    cache_dir = plan.recipe.execution.cache_dir if plan else Execution().cache_dir
    subjects = [
        *_default_subjects(device, precision),
        *(_own_subjects(plan, recipe_file or "") if plan and with_own else ()),
    ]
    order = {
        "device": device,
        "precision": precision,
        "num_ranks": num_ranks,
        "threads": threads,
        "port": free_port("127.0.0.1"),
        "subjects": subjects,
        "steps": list(_step_subjects(device, precision)),
        "ds_config": _step_config(machine, device, precision),
        "budget_sec": budget_sec,
        "clock": clock,
    }
    found = _measure(order, budget_sec)
    gpu = find_gpu(machine.gpu_name) if device == "cuda" else None
    node = measured_link({int(size): sec for size, sec in found["messages"].items()}, num_ranks, gpu)
    rates = Rates(
        kind=kind_of(device, machine.gpu_name, precision, threads),
        is_calibrated=True,
        sec_per=found["sec_per"],
        node=node,
        network=network_link(gpu, num_ranks) if gpu else node,  # one node cannot measure it
        errors=(found["errors"][0], found["errors"][1]),
        date=datetime.date.today().isoformat(),
    )
    print(f"{keep_rates(cache_dir, rates, found)}: rates of {rates.kind}")
    return rates


def calibration_lines(rates: Rates) -> Iterator[str]:
    """Yield what was measured, in words."""
    rows: tuple[tuple[Unit, str, str], ...] = (
        ("matrix_flops", "matrix products, large", "GFLOP/s"),
        ("memory_bytes", "memory-bound operators", "GB/s"),
        ("gradient_bytes", "handling of gradients", "GB/s"),
        ("optimizer_bytes", "update of the weights", "GB/s"),
    )
    for unit, name, word in rows:
        if sec := rates.sec_per.get(unit):
            yield f"{name:<24} {1e-9 / sec:,.4g} {word}"
    link = f"{rates.node.bytes_per_sec / 1e9:,.4g} GB/s, {rates.node.message_sec * 1e6:.3g} us a hop"
    yield f"{'all-reduce in the node':<24} {link}"
    if rates.errors is not None:
        yield f"error on what was measured: median {rates.errors[0]:.1%}, worst {rates.errors[1]:.1%}"


def _measure(order: Mapping[str, Any], budget_sec: float) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "turbolm.doctor.calibrate", json.dumps(order)],
            stdout=subprocess.PIPE,
            env=rank_environment(order["device"], order["threads"]),
            text=True,
            timeout=START_SEC + 4 * budget_sec,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"calibrate: nothing measured in {START_SEC + 4 * budget_sec:.0f} s; is this node idle?"
        ) from None
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise UserError(f"calibrate: its ranks ended with code {done.returncode}; the lines above say why") from None
    return answer


def _default_subjects(device: str, precision: str) -> Iterator[dict[str, Any]]:
    for width in range(len(_WIDTHS[device])):
        for sequences, seq_len in _BATCHES[device]:
            yield _subject(_llama(device, width, _LAYERS), device, precision, sequences, seq_len)


def _step_subjects(device: str, precision: str) -> Iterator[dict[str, Any]]:
    for width, layers, sequences, seq_len in _STEPS[device]:
        yield _subject(_llama(device, width, layers), device, precision, sequences, seq_len) | {"num_layers": layers}


def _llama(device: str, width: int, layers: int) -> dict[str, Any]:
    hidden, inner, heads, vocabulary = _WIDTHS[device][width]
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }


def _step_config(machine: Machine, device: str, precision: str) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a step by one process, without accumulation.

    Of a recipe of its own: those in recipes/ are there to be edited.
    """
    values: dict[str, Any] = {
        "name": "calibrate",
        "model": {"config": _llama(device, 0, _LAYERS)},
        "tokenizer": {"train": {"vocab_size": _WIDTHS[device][0][-1]}},
        "data": {"seq_len": 256},
        "train": {"budget": 256, "global_batch": 256, "max_grad_norm": 1.0, "precision": precision},
        "cluster": {"device": device, "processes_per_node": 1},
        "execution": {"zero_stage": 2, "micro_batch": 256},
    }
    return build_plan(Recipe.model_validate(values), machine).ds_config


def _own_subjects(plan: Plan, recipe_file: str) -> Iterator[dict[str, Any]]:
    """Yield the recipe's model at its micro-batch and at half of it."""
    config, _ = read_model_config(plan.recipe, recipe_file)
    if config is None:
        return
    find_profile(config, plan.recipe.model.dropout, plan.recipe.execution.cache_dir)  # kept, for `plan`
    batch = plan.batch
    most = max(1, min(batch.micro_batch_bins, _MAX_TOKENS[plan.device] // batch.seq_len))
    for sequences in sorted({most, max(1, most // 2)}):
        yield _subject(config, plan.device, plan.precision, sequences, batch.seq_len)


def _subject(config: Mapping[str, Any], device: str, precision: str, sequences: int, seq_len: int) -> dict[str, Any]:
    return {
        "config": dict(config),
        "num_layers": _LAYERS,
        "sequences": sequences,
        "seq_len": seq_len,
        "attention": "varlen" if device == "cuda" and precision != "fp32" else "sdpa",
        "loss": "full" if precision in ("fp32", "fp16") else "chunked",
    }
