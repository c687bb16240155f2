"""`turbolm plan` as a user runs it: text, JSON, every problem at once, and no torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from turbolm.errors import UserError
from turbolm.plan.batch import plan_batch
from turbolm.plan.count import Answer
from turbolm.plan.deepspeed import resolve_ds_config
from turbolm.plan.memory import estimate_model_state
from turbolm.plan.overview import render_overview
from turbolm.plan.summary import Summary, collect_summary
from turbolm.plan.text import plot, render_summary
from turbolm.recipe.load import load_recipe, load_scaled
from turbolm.recipe.schema import Execution, Recipe

REPOSITORY = Path(__file__).parents[2]
LLAMA_8B = "recipes/llama3.1-8b/pretrain/config.yaml"
# Runs the command and then says on stderr which of the heavy packages it has imported.
RUN = """
import atexit, runpy, sys
heavy = ("torch", "transformers", "deepspeed", "accelerate", "datasets", "pandas", "scipy")
atexit.register(lambda: print("heavy:", [name for name in heavy if name in sys.modules], file=sys.stderr))
sys.argv = ["turbolm", *sys.argv[1:]]
runpy.run_module("turbolm.cli", run_name="__main__")
"""


def plan(*arguments: str, code: int = 0, folder: Path = REPOSITORY) -> tuple[str, str]:
    """stdout and stderr of `turbolm plan`, which must not import torch."""
    command = [sys.executable, "-c", RUN, "plan", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == code, done.stderr
    errors, _, heavy = done.stderr.rpartition("heavy: ")
    assert heavy.strip() == "[]"
    return done.stdout, errors


def summary_of(recipe: str, *overrides: str) -> Summary:
    path = str(REPOSITORY / recipe)
    return collect_summary(load_recipe(path, overrides), path, overrides, lambda *_: {})


@pytest.mark.parametrize(
    ("slurm", "note"),
    [
        ({}, "set 1[0-9][0-9]G, or 0 for all"),
        ({"exclusive": True}, None),
        ({"mem": "0"}, None),
        ({"mem": "1T"}, None),
        ({"mem": "100G"}, "and 100G is asked for"),
        ({"mem": "100000"}, "and 100000 is asked for"),  # MB
    ],
)
def test_the_host_memory_of_a_node(slurm: dict[str, Any], note: str | None) -> None:
    """8B with AdamW on one node of 8 GPUs: 12 bytes a parameter are copied for a checkpoint, 8 processes run."""
    overrides = [f"cluster.slurm.{key}={value}" for key, value in slurm.items()] or ["cluster.slurm={}"]
    summary = summary_of(LLAMA_8B, "cluster.num_nodes=1", "cluster.slurm.exclusive=false", *overrides)
    size, host = summary.size, summary.host_memory
    assert size is not None and host is not None
    assert host.checkpoint_copy == pytest.approx(12 * size.total, rel=1e-6)
    assert host.total_bytes - host.checkpoint_copy == 8 * 6 * 2**30 and host.offloaded == 0
    said = [text for text in summary.notes if text.startswith("cluster.slurm.mem")]
    assert (note is None and not said) or (note is not None and re.search(note, said[0]))
    offloaded = summary_of(LLAMA_8B, "cluster.num_nodes=1", "execution.offload_optimizer=true").host_memory
    # Master weights, moments, gradients; the new weights in bf16, and on each rank the largest gradient.
    expected = (4 + 8 + 4 + 2) * size.total + 8 * 2 * 128256 * 4096
    assert offloaded is not None and offloaded.offloaded == pytest.approx(expected, rel=1e-6)
    assert "copy of a checkpoint" in render_summary(summary)


def test_random_restarts_show_what_they_cost() -> None:
    """Of 8 candidates that take 10% of the budget each, 7 come on top."""
    plain = summary_of(LLAMA_8B, "train.budget=100B")
    with_restarts = summary_of(
        LLAMA_8B, "train.budget=100B", "train.random_restarts.seeds=8", "train.random_restarts.over=10%"
    )
    schedule, batch = with_restarts.as_dict()["schedule"], with_restarts.batch.global_batch_tokens
    assert schedule["restart_steps"] == 2385 == -(-(10**10) // batch)
    assert schedule["restart_tokens"] == 7 * 2385 * batch
    assert schedule["tokens"] == plain.as_dict()["schedule"]["tokens"], "the budget is as it was"
    flops, plain_flops = with_restarts.cost.total_flops, plain.cost.total_flops
    assert flops is not None and plain_flops is not None
    assert flops / plain_flops == pytest.approx(1 + 7 * 2385 / 23842)
    text = render_summary(with_restarts)
    assert "random restarts: 8 candidates of 2385 steps each; those not chosen take 70" in text
    assert "tokens on top (70.0%)" in text and "random restarts" not in render_summary(plain)


def test_the_verbose_text_has_everything() -> None:
    text, errors = plan(LLAMA_8B, "train.budget=100B", "--verbose")
    assert errors == ""
    for expected in (
        "8 nodes x 8 processes = 64 on NVIDIA H100 (as the recipe describes), bf16, ZeRO-2",
        "1 x 8192 tokens of a micro-batch x 8 accumulated x 64 processes = 4194304 tokens (512 sequences)",
        "23842 steps, 100B tokens",
        "learning rate: cosine, warmup 8000 steps",
        "0.0003 │",
        "8,030,261,248 parameters",
        "FLOPs a token = 6 x",
        "(not calibrated: assumed for H100-80GB, bf16; `turbolm calibrate` measures on one such node)",
        "optimizer moments",
        '"train_batch_size": 512',
        "distributed_type: DEEPSPEED",
        f"turbolm submit {LLAMA_8B} train.budget=100B",
        "accelerate launch --config_file launch/accelerate/multi_node.yaml --num_machines 8 --num_processes 64",
    ):
        assert expected in text
    assert '"auto"' not in text


def test_json_has_the_same_and_stable_keys() -> None:
    text, _ = plan(LLAMA_8B, "--json")
    found = json.loads(text)
    keys = "recipe cluster batch schedule data parameters cost estimate memory footprint traffic host_memory ds_config "
    keys += "accelerate_config launch scaling suggestions notes"
    assert list(found) == keys.split()
    recipe = load_recipe(REPOSITORY / LLAMA_8B)
    assert found["ds_config"] == resolve_ds_config(recipe, plan_batch(recipe, 64), "cuda", "bf16")
    assert found["cluster"] == {
        "is_described": True,
        "num_nodes": 8,
        "processes_per_node": 8,
        "world_size": 64,
        "device": "cuda",
        "gpu": "NVIDIA H100",
        "gpu_memory_bytes": 80 * 2**30,
        "precision": "bf16",
        "zero_stage": 2,
    }
    batch = found["batch"]
    assert batch["micro_batch_tokens"] * batch["gradient_accumulation_steps"] * batch["world_size"] == 4194304
    assert found["schedule"]["learning_rate"][0] == [4194304, pytest.approx(3e-4 / 8000 / 2)]  # the middle of step 1
    assert found["schedule"]["learning_rate"][-1] == [238419 * 4194304, pytest.approx(3e-6)]
    assert found["parameters"]["total"] == 8_030_261_248
    assert found["accelerate_config"]["num_processes"] == 64
    assert found["launch"]["command"] == f"turbolm submit {LLAMA_8B}"
    # 6 x 7.50e9 weights that are multiplied + 12 x 32 layers x 4096 wide x a mean span of 4096.5
    assert found["cost"]["flops_per_token"] == pytest.approx(6 * 7_504_658_432 + 12 * 32 * 4096 * 4096.5)
    assert found["memory"]["device_bytes"] == sum(
        found["memory"][part] for part in ("weights", "gradients", "master", "optimizer", "gathered", "buckets")
    )


def test_what_is_scaled_from_a_tuned_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "larger.yaml"
    tuned = REPOSITORY / "recipes/quickstart/config.yaml"
    config = "model: {config: {hidden_size: 256, intermediate_size: 768, num_attention_heads: 8}}"
    recipe.write_text(f"extends: {tuned}\nname: larger\nscale: {{from: {tuned}}}\n{config}\n")
    arguments = (str(recipe), "optimizer.weight_decay=0.3", "cluster.device=cpu")
    loaded, scaling = load_scaled(recipe, arguments[1:])
    summary = collect_summary(loaded, str(recipe), arguments[1:], lambda *_: {}, scaling=scaling)
    page, details = " ".join(render_overview(summary).split()), render_summary(summary)
    assert f"scaled from {tuned}: optimizer.lr_multipliers.matrices 0.5, " in page
    assert "not derived: optimizer.weight_decay" in page
    assert (
        "  optimizer.lr_multipliers.matrices 0.5\n    = 1 x (128 / 256)^1; muP, arXiv 2203.03466, table 3\n" in details
    )
    assert "  optimizer.weight_decay 0.2; the recipe sets 0.3\n" in details
    found = json.loads(plan(*arguments, "--json")[0])["scaling"]
    assert found["reference"] == str(tuned)
    status = {one["key"]: (one["status"], one["suggested"], one["value"]) for one in found["derived"]}
    assert status["optimizer.weight_decay"] == ("set in the recipe", 0.2, 0.3)
    assert status["optimizer.lr_multipliers.embeddings"] == ("derived", 0.7071, 0.7071)


def test_here_it_is_planned_for_this_machine() -> None:
    text, _ = plan("recipes/quickstart/config.yaml", "cluster.processes_per_node=3", "cluster.device=cpu", "--verbose")
    assert "1 node x 3 processes = 3 on CPU (as found here)" in text
    assert "8192 tokens (32 sequences), with 16 filler sequences on top" in text
    assert "fillers count in nothing, but take 33.3% of the time; another micro_batch can leave 1" in text
    assert "turbolm train recipes/quickstart/config.yaml cluster.processes_per_node=3 cluster.device=cpu" in text
    assert "launch/accelerate/cpu.yaml --num_machines 1 --num_processes 3" in text


def test_a_checkpoint_that_is_elsewhere_is_noted(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "name: a\nmodel: {pretrained: nowhere}\ntokenizer: {path: nowhere}\ndata: {seq_len: 128}\n"
        "train: {budget: 1M, global_batch: 8192}\ncluster: {gpu: H100-80GB, gpus_per_node: 8}\n"
    )
    text = " ".join(plan("a.yaml", folder=tmp_path)[0].split())
    assert "nowhere is not on this machine: the size of the model is unknown" in text
    assert "parameters: unknown here" in text
    (tmp_path / "nowhere").mkdir()
    _, errors = plan("a.yaml", code=2, folder=tmp_path)
    assert "model.pretrained: nowhere/config.json is missing" in errors
    config = {"model_type": "gpt2"}
    (tmp_path / "nowhere/config.json").write_text(json.dumps(config))
    # On GPUs it would be traced, which takes seconds.
    text, _ = plan("a.yaml", "cluster.gpu=null", "cluster.gpus_per_node=null", folder=tmp_path)
    assert "124,439,808 parameters" in text


def test_every_problem_at_once_with_exit_code_2() -> None:
    _, errors = plan(
        LLAMA_8B, "cluster.num_nodes=100", "execution.zero_stage=1", "execution.quantized_weights=true", "a=1", code=2
    )
    lines = errors.splitlines()
    assert len(lines) == 3
    assert "too few for 800 processes; use at most 512 processes" in errors
    assert "execution.quantized_weights: needs execution.zero_stage 3, got 1" in errors
    assert "a: unknown key" in errors


def test_a_problem_of_the_model_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What Transformers finds is asked once, and kept."""
    found = Answer(("model.config.hidden_size: expected a whole number, got 'four'",), ())
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("turbolm.plan.count._run_examiner", lambda request: asked.append(json.loads(request)) or found)
    changes = ("model.config.hidden_size=four", f"execution.cache_dir={tmp_path}", "cluster.device=cpu")
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            summary_of("recipes/quickstart/config.yaml", *changes)
        assert str(caught.value).endswith(f"config.yaml: {found.problems[0]}")
    with pytest.raises(UserError, match="too few for 33 processes"):
        summary_of("recipes/quickstart/config.yaml", *changes, "cluster.processes_per_node=33")
    assert [(one["config"]["hidden_size"], one["file"]) for one in asked] == [("four", None)]


@pytest.mark.parametrize("setting", ["router_bias_update=0.001", "router_aux_loss=0.01"])
def test_settings_of_routers_are_refused_where_there_are_none(setting: str) -> None:
    key = setting.partition("=")[0]
    with pytest.raises(UserError, match=rf"train\.{key}: 0\.0+1 cannot act: llama has no experts; set "):
        summary_of(LLAMA_8B, f"train.{setting}")


def test_a_model_state_that_cannot_fit_is_refused_with_what_would() -> None:
    _, errors = plan(
        "recipes/llama3.1-70b/pretrain/config.yaml",
        *("execution.zero_stage=2", "execution.hierarchical_partition=null"),
        code=2,
    )
    assert "takes 156 GiB of each GPU, which has 80 GiB" in errors and "DOES NOT FIT" in errors
    assert "fits with execution.zero_stage=3 (31.4 GiB of 80 GiB)" in errors
    # Another depth has no profile: the number of parameters alone says enough.
    changes = ("execution.zero_stage=2", "execution.hierarchical_partition=null", "model.config.num_hidden_layers=77")
    with pytest.raises(UserError, match="its model state takes 1.. GiB of each GPU, which has 80 GiB; zero_stage: 3"):
        summary_of("recipes/llama3.1-70b/pretrain/config.yaml", *changes)


@pytest.mark.parametrize(
    ("num_nodes", "slurm", "verb"), [(1, None, "train"), (2, None, "submit"), (1, "{}", "submit"), (2, "{}", "submit")]
)
def test_the_command_follows_the_cluster(num_nodes: int, slurm: str | None, verb: str) -> None:
    overrides = [f"cluster.num_nodes={num_nodes}", *([f"cluster.slurm={slurm}"] if slurm else [])]
    summary = summary_of("recipes/gpt2-124m/pretrain/config.yaml", *overrides)
    assert summary.launch_command.startswith(f"turbolm {verb} ")


# ---------------------------------------------------------------------------------------------------------- memory

PSI, N = 7_500_000_000, 64  # the example of arXiv 1910.02054's figure 1: 7.5B parameters on 64 GPUs


def state(stage: int, precision: str = "bf16", **execution: Any) -> Any:
    options = Execution.model_validate({"zero_stage": stage} | execution)
    return estimate_model_state(options, {"zero_optimization": {"stage": stage}}, PSI, N, precision)


def test_model_state_as_in_the_zero_paper() -> None:
    """Figure 1 has 31.4, 16.6 and 1.9 GB with gradients in half precision; fp32 gradients add 2 bytes at least."""
    assert state(1).device_bytes == pytest.approx(31.4e9 + 4 * PSI, rel=0.01)  # half-precision ones, and fp32 ones
    assert state(2).device_bytes == pytest.approx(16.6e9 + 2 * PSI / N, rel=0.01)
    assert state(3).device_bytes == pytest.approx(1.9e9 + 2 * PSI / N, rel=0.02)


@pytest.mark.parametrize(
    ("stage", "reduced_in", "offloads", "expected"),
    [
        (1, "fp32", False, 500_000_000 * 4),  # flattened as they are accumulated, whatever the bucket
        (1, "bf16", False, 500_000_000 * (4 + 2)),  # and converted
        (1, "fp32", True, 50_000_000 * (2 * 2 + 2 + 4)),  # two buffers in bf16, flattened once more, converted
        (2, "fp32", False, 50_000_000 * (2 * 2 + 2 + 4)),
        (2, "bf16", False, 100_000_000 * (2 * 2 + 2)),
        (3, "fp32", False, 50_000_000 * (2 + 4 + 4) + 100_000_000 * 2),  # buffer, converted, flattened; prefetched
        (3, "bf16", False, 100_000_000 * (2 + 2) + 100_000_000 * 2),
    ],
)
def test_buckets_are_counted_as_deepspeed_holds_them(
    stage: int, reduced_in: str, offloads: bool, expected: int
) -> None:
    path = str(REPOSITORY / LLAMA_8B)
    recipe = load_recipe(path, [f"execution.zero_stage={stage}", f"execution.reduce_precision={reduced_in}"])
    recipe = recipe.model_copy(
        update={"execution": recipe.execution.model_copy(update={"offload_optimizer": offloads})}
    )
    config = resolve_ds_config(recipe, plan_batch(recipe, N), "cuda", "bf16")
    assert config["communication_data_type"] == reduced_in
    assert estimate_model_state(recipe.execution, config, int(PSI), N, "bf16").buckets == expected


def test_model_state_of_fp32() -> None:
    assert state(0, "fp32").device_bytes == 16 * PSI
    assert state(3, "fp32").device_bytes == pytest.approx(20 * PSI / N), "DeepSpeed clones the weights"
    assert state(2, "fp32").master == pytest.approx(4 * PSI / N)


def test_what_is_offloaded_moves_to_the_host() -> None:
    for stage in (1, 2, 3):
        offloaded, plain = state(stage, offload_optimizer=True), state(stage)
        assert (offloaded.master, offloaded.optimizer) == (0, 0)
        # Master weights, moments and gradients; stage 3 has gradients twice, the others the new weights in bf16.
        assert offloaded.host_bytes == pytest.approx((20 if stage == 3 else 18) * PSI / N)
        assert offloaded.weights == plain.weights
        # DeepSpeed 0.19.8 keeps the reduced fp32 gradients of half precision on the GPU until the update.
        assert offloaded.gradients == pytest.approx({1: 6 * PSI, 2: 4 * PSI / N, 3: 0}[stage])
    both = state(3, offload_optimizer=True, offload_parameters=True)
    assert both.device_bytes == 0
    assert both.host_bytes == pytest.approx(22 * PSI / N)


def test_the_second_copy_of_hierarchical_partitioning() -> None:
    assert state(3, hierarchical_partition=8).weights == pytest.approx(2 * PSI / N + 2 * PSI / 8)


def test_plot() -> None:
    assert plot([0, 1, 2], num_rows=1) == [" ▄█"]
    assert plot([0, 1, 2], num_rows=2) == ["  █", " ██"]
    assert plot([0, 0], num_rows=1) == ["  "]


def test_a_recipe_that_names_no_vocabulary_takes_that_of_its_tokenizer() -> None:
    summary = summary_of("recipes/quickstart/config.yaml")
    assert isinstance(summary.recipe, Recipe)
    assert summary.size is not None
    assert summary.size.embedding == 4096 * 128


def test_options_that_no_test_has_trained_with_are_noted() -> None:
    recipe = "recipes/llama3.1-70b/pretrain/config.yaml"
    assert not [note for note in summary_of(recipe).notes if "not tested" in note]
    for key in ("execution.quantized_weights", "execution.quantized_gradients"):
        assert [note for note in summary_of(recipe, f"{key}=true").notes if note.startswith(f"{key}: not tested")]


def test_a_hang_time_out_that_comes_too_late_is_noted() -> None:
    recipe = "recipes/quickstart/config.yaml"
    assert not [note for note in summary_of(recipe).notes if "hang_timeout" in note]
    assert not [note for note in summary_of(recipe, "execution.hang_timeout=off").notes if "hang_timeout" in note]
    (note,) = [note for note in summary_of(recipe, "execution.hang_timeout=30m").notes if "hang_timeout" in note]
    assert note.startswith(
        "execution.hang_timeout (30m00s) should be shorter than execution.process_group_timeout (30m"
    )
