"""What `turbolm.engine` uses of DeepSpeed and Accelerate beyond their documentation, by name and where it is used.

A new version of DeepSpeed that renames one of these fails here first, and says which.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

import turbolm.engine
from tests.world import run_world

# Of DeepSpeed's optimizer, by layout: ZeRO stage and precision, or with the optimizer offloaded.
_GATED = {"_update_scale", "overflow", "loss_scale", "loss_scaler"}
_OF_STAGE_2 = {"bit16_groups", "single_partition_of_fp32_groups", "update_lp_params", "scaled_global_norm", *_GATED}
_OF_STAGE_3 = {
    "fp16_groups", "fp32_partitioned_groups_flat", "sub_group_to_group_id", "grad_position", "get_param_id",
    "_get_param_partition_rank", "empty_partition_cache", "_reassign_or_swap_out_partitioned_parameters",
    "invalidate_secondary_tensor", "persistent_parameters", "_get_norm_groups", *_GATED,
}  # fmt: skip
OPTIMIZER: dict[str, set[str]] = {
    "stage 0": {"param_groups"},
    "stage 1": _OF_STAGE_2,
    "stage 1 in bf16": {
        "bf16_groups", "fp32_groups_flat_partition", "update_lp_params", "overflow", "_global_grad_norm",
    },
    "stage 2": _OF_STAGE_2,
    "stage 2 offloaded": {"cpu_offload", "averaged_gradients", "all_grad_tensors", *_OF_STAGE_2},
    "stage 3": _OF_STAGE_3,
}  # fmt: skip
PARAMETER = {
    "stage 0": set(),
    **dict.fromkeys(("stage 1", "stage 1 in bf16", "stage 2", "stage 2 offloaded"), {"_hp_mapping"}),
    "stage 3": {"ds_id", "ds_shape", "ds_numel", "ds_persist", "ds_tensor", "ds_secondary_tensor", "partition_numel"},
}
ENGINE = {
    "module", "device", "optimizer", "zero_optimization_stage", "fp16_enabled", "backward", "step", "zero_grad",
    "set_gradient_accumulation_boundary", "get_global_grad_norm", "train", "eval", "destroy",
}  # fmt: skip


def _missing_by_layout() -> dict[str, list[str]]:
    """What one rank does not find, by layout; it trains one step in each."""
    import torch
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from turbolm.engine.start import build_accelerator, wrap

    found: dict[str, list[str]] = {}
    for layout in OPTIMIZER:
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        stage, in_bf16 = int(layout[6]), "bf16" in layout
        zero: dict[str, Any] = {"stage": stage}
        if "offloaded" in layout:
            zero["offload_optimizer"] = {"device": "cpu"}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
            "zero_optimization": zero,
            "bf16": {"enabled": in_bf16},
            "data_types": {"grad_accum_dtype": "fp32" if in_bf16 else None},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        precision = "bf16" if in_bf16 else "fp32"
        accelerator = build_accelerator(config, device="cpu", precision=precision, timeout_sec=60)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        engine = wrap(accelerator, model, torch.optim.AdamW(model.parameters(), lr=0.1))  # type: ignore[arg-type]
        before = {fragment.name: fragment.view(fragment.flat).clone() for fragment in engine.fragments()}
        inputs = torch.ones(1, 4, dtype=torch.bfloat16 if in_bf16 else torch.float32)
        norm = engine.backward_and_step(engine(inputs).float().square().sum(), is_boundary=True)
        missing = [f"engine.{name}" for name in ENGINE if not hasattr(engine.deepspeed_engine, name)]
        outer = engine.deepspeed_engine.optimizer
        missing += [f"optimizer.{name}" for name in OPTIMIZER[layout] if not hasattr(outer, name)]
        first = next(engine.module.parameters())
        missing += [f"parameter.{name}" for name in PARAMETER[layout] if not hasattr(first, name)]
        after = engine.fragments()
        if {fragment.name for fragment in after} != {name for name, _ in model.named_parameters()}:
            missing.append("fragments: not those of all parameters")
        if any(torch.equal(before[one.name], one.view(one.flat)) for one in after) or not float(norm or 0) > 0:
            missing.append("fragments: a step does not change what they show")
        for fragment in after:
            fragment.view(fragment.flat).fill_(0.25)
        engine.publish_weights()
        if not torch.equal(engine(torch.zeros_like(inputs)).float(), torch.full((1, 2), 0.4375)):
            missing.append("publish_weights: the model does not compute with what was written")
        found[layout] = sorted(missing)
        engine.deepspeed_engine.destroy()
    return found


def test_deepspeed_has_what_the_engine_uses_of_it() -> None:
    assert run_world(1, _missing_by_layout)[0] == {layout: [] for layout in OPTIMIZER}


def test_modules_have_what_the_engine_uses_of_them() -> None:
    import deepspeed
    import torch
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
    from deepspeed.runtime.utils import combine_grad_norm_groups
    from deepspeed.utils import groups, set_z3_leaf_modules
    from torch.distributed import distributed_c10d

    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    assert callable(groups._get_zero_param_intra_parallel_group)
    assert callable(combine_grad_norm_groups) and callable(set_z3_leaf_modules)
    wanted = {
        deepspeed.zero.Init: {"config_dict_or_path", "zero_param_parallel_group", "tensor_overrides"},
        deepspeed.zero.Init._post_init_method: {"module"},
        deepspeed.zero.Init._convert_to_deepspeed_param: {"param"},
        deepspeed.zero.GatheredParameters: {"params", "modifier_rank"},
        DeepSpeedPlugin: {"hf_ds_config", "zero3_init_flag"},
        InitProcessGroupKwargs: {"backend", "timeout"},
    }
    for function, names in wanted.items():
        assert names <= set(inspect.signature(function).parameters), function
    assert hasattr(distributed_c10d, "default_pg_timeout") and hasattr(distributed_c10d, "default_pg_nccl_timeout")
    assert hasattr(torch.optim.SGD([torch.zeros(1)]), "_optimizer_step_pre_hooks")


def test_every_attribute_of_deepspeeds_optimizer_that_the_engine_uses_is_in_the_contract() -> None:
    named = {"optimizer"}.union(*OPTIMIZER.values(), *PARAMETER.values())
    used = set()
    for path in Path(turbolm.engine.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            is_zero = ast.unparse(node.value) in ("zero", "self._zero")
            if is_zero or node.attr.startswith("ds_") or node.attr == "_hp_mapping":
                used.add(node.attr)
    assert len(used) > 20
    assert used <= named, f"not in the contract: {sorted(used - named)}"


@pytest.mark.parametrize(("name", "version"), [("deepspeed", "0.18.9"), ("accelerate", "2.0.1")])
def test_a_version_that_was_not_tested_is_refused_before_it_is_imported(
    name: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import metadata

    from turbolm.engine.versions import check_versions
    from turbolm.errors import UserError

    check_versions()
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda asked: version if asked == name else installed(asked))
    with pytest.raises(UserError, match=f"{name} {version} is installed, and turbolm was tested with .*pip install"):
        check_versions()
