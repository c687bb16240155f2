"""The DeepSpeed configuration leaves nothing open, and DeepSpeed accepts it."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from turbolm.errors import UserError
from turbolm.plan.deepspeed import resolve_ds_config
from turbolm.recipe.schema import Recipe

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Batch:
    world_size: int = 1
    micro_batch_bins: int = 4
    gradient_accumulation_steps: int = 3


def recipe(stage: int, offload: bool = False, execution: dict | None = None, **train) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": {"config": {"model_type": "llama"}},
            "tokenizer": {"train": {}},
            "data": {"seq_len": 64},
            "train": {"budget": 1000, "global_batch": 128} | train,
            "execution": {"zero_stage": stage, "offload_optimizer": offload} | (execution or {}),
        }
    )


# Options of stage 3 that have a base of their own.
STAGE_3 = {
    "zero3_offload": [{"offload_parameters": True}, {"offload_parameters": True, "offload_optimizer": True}],
    "zeropp": [
        {"hierarchical_partition": 2},
        {"hierarchical_partition": 4, "offload_optimizer": True},
        {"quantized_weights": True},
        {"quantized_gradients": True, "quantized_weights": True, "hierarchical_partition": 2},
    ],
}


def every_config() -> dict[str, dict]:
    configs = {}
    for execution in (options for several in STAGE_3.values() for options in several):
        name = f"zero3 {execution}"
        configs[name] = resolve_ds_config(recipe(3, execution=execution), Batch(world_size=4), "cuda", "bf16")
        configs[name]["train_batch_size"] //= 4  # of the one process that reads it here
    for stage in range(4):
        for device, precision in (("cpu", "fp32"), ("cpu", "bf16"), ("cuda", "bf16"), ("cuda", "fp16")):
            for offload in (False, True):
                if stage == 0 and (offload or precision != "fp32"):
                    continue
                name = f"zero{stage} {device} {precision} offload={offload}"
                configs[name] = resolve_ds_config(recipe(stage, offload), Batch(), device, precision)
    return configs


def test_the_batch_is_exact():
    config = resolve_ds_config(recipe(2), Batch(world_size=8), "cuda", "bf16")
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 3
    assert config["train_batch_size"] == 96


def test_clipping_that_is_off_is_written_as_zero():
    assert resolve_ds_config(recipe(1), Batch(), "cpu", "fp32")["gradient_clipping"] == 1.0
    assert resolve_ds_config(recipe(1, max_grad_norm="off"), Batch(), "cpu", "fp32")["gradient_clipping"] == 0.0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_base_stays_as_it_is_and_auto_is_gone(stage):
    first = resolve_ds_config(recipe(stage), Batch(), "cpu", "fp32")
    assert '"auto"' not in json.dumps(first)
    assert first["zero_optimization"]["stage"] == stage
    assert first["bf16"]["enabled"] is False
    assert first["fp16"]["enabled"] is False
    assert ("data_types" in first) == (stage > 0)
    first["bf16"]["enabled"] = "changed"
    assert resolve_ds_config(recipe(stage), Batch(), "cpu", "fp32")["bf16"]["enabled"] is False


def test_overlap_and_pinned_memory_need_a_gpu():
    for device, world_size in (("cpu", 2), ("cuda", 2), ("cuda", 1)):
        zero = resolve_ds_config(recipe(2, offload=True), Batch(world_size), device, "bf16")["zero_optimization"]
        assert zero["overlap_comm"] == (device == "cuda" and world_size > 1), "one process has nothing to reduce"
        assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": device == "cuda"}
    assert "offload_optimizer" not in resolve_ds_config(recipe(2), Batch(), "cpu", "fp32")["zero_optimization"]


@pytest.mark.parametrize("base", STAGE_3)
def test_the_options_of_stage_3_keep_the_rest_of_its_base(base):
    plain = resolve_ds_config(recipe(3), Batch(world_size=4), "cuda", "bf16")
    for execution in STAGE_3[base]:
        config = resolve_ds_config(recipe(3, execution=execution), Batch(world_size=4), "cuda", "bf16")
        if execution.get("quantized_gradients"):  # its kernels take bf16 only
            bf16 = recipe(3, execution={"reduce_precision": "bf16"})
            plain = resolve_ds_config(bf16, Batch(world_size=4), "cuda", "bf16")
        assert {**config, "zero_optimization": 0} == {**plain, "zero_optimization": 0}
        for key, value in plain["zero_optimization"].items():
            assert config["zero_optimization"][key] == value
        zero = config["zero_optimization"]
        assert ("offload_param" in zero) == execution.get("offload_parameters", False)
        assert ("offload_optimizer" in zero) == execution.get("offload_optimizer", False)
        assert zero.get("zero_hpz_partition_size", 1) == execution.get("hierarchical_partition", 1)
        assert zero.get("zero_quantized_weights", False) == execution.get("quantized_weights", False)
        assert zero.get("zero_quantized_gradients", False) == execution.get("quantized_gradients", False)


@pytest.mark.parametrize(
    ("stage", "device", "execution", "message"),
    [
        (3, "cpu", {"quantized_gradients": True}, "need CUDA"),
        (3, "cpu", {"hierarchical_partition": 3}, "must divide the 4 processes, got 3"),
    ],
)
def test_what_cannot_work_is_refused(stage, device, execution, message):
    with pytest.raises(UserError, match=message):
        resolve_ds_config(recipe(stage, execution=execution), Batch(world_size=4), device, "fp32")


def test_a_base_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setenv("TURBOLM_HOME", str(tmp_path))
    with pytest.raises(UserError, match="TURBOLM_HOME"):
        resolve_ds_config(recipe(2), Batch(), "cpu", "fp32")
    base = json.loads((REPOSITORY / "ds_configs/zero2.json").read_text())
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs/zero2.json").write_text(json.dumps(base | {"wall_clock_breakdown": True}))
    assert resolve_ds_config(recipe(2), Batch(), "cpu", "fp32")["wall_clock_breakdown"] is True
    (tmp_path / "ds_configs/zero2.json").write_text(json.dumps(base | {"unknown": [{"key": "auto"}]}))
    with pytest.raises(AssertionError, match=r"unknown\[0\]\.key"):
        resolve_ds_config(recipe(2), Batch(), "cpu", "fp32")


def test_deepspeed_reads_every_value_that_was_written():
    script = """
import json, sys
from deepspeed.runtime.config import DeepSpeedConfig
for name, config in json.load(sys.stdin).items():
    try:
        read = DeepSpeedConfig(config)
    except Exception as error:
        sys.exit(f"{name}: {error}")
    zero = config["zero_optimization"]
    names = {"bf16": read.bfloat16_config, "fp16": read.float16_config, "zero_optimization": read.zero_config}
    for section, known in names.items():
        for key, value in config[section].items():
            field = next((n for n, f in type(known).model_fields.items() if key in (n, f.alias)), None)
            assert field, f"{name}: DeepSpeed does not know {section}.{key}"
            held = getattr(known, field)
            if isinstance(value, dict):
                held = {inner: getattr(held, inner) for inner in value}
                held = {inner: getattr(kept, "value", kept) for inner, kept in held.items()}
            assert held == value, f"{name}: {section}.{key}"
    assert read.gradient_clipping == config["gradient_clipping"]
    assert (read.grad_accum_dtype == "fp32") == (zero["stage"] > 0)
    assert not read.timers_config.enabled and not read.timers_config.synchronized
"""
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(every_config()), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_key_of_the_bases_is_explained():
    readme = (REPOSITORY / "ds_configs/README.md").read_text()
    explained_as_a_group = {
        "initial_scale_power",
        "loss_scale_window",
        "hysteresis",
        "min_loss_scale",
        "stage",
        "enabled",
    }
    for path in sorted((REPOSITORY / "ds_configs").glob("*.json")):
        base = json.loads(path.read_text())
        keys = [key for value in base.values() if isinstance(value, dict) for key in value] + list(base)
        sections = {key for key, value in base.items() if isinstance(value, dict)}
        assert [key for key in keys if key not in readme and key not in explained_as_a_group | sections] == []
