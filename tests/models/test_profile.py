"""Traces on meta tensors against real runs on the CPU: bytes saved, FLOPs and parameters."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from tests.models.record_profiles import requests, trace
from turbolm.models import recompute
from turbolm.models.loss import attach_loss
from turbolm.models.profile import _build, _trace, profile_model
from turbolm.models.shrink import shrink
from turbolm.models.stand_ins import LigerLoss, _cpu_attention, stand_ins
from turbolm.plan.profiles import find_profile

SMALL = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
MOE = SMALL | {"head_dim": 16, "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
TYPES = "llama gpt2 qwen3 gemma2 olmo2 mistral qwen2 phi3 gpt_neox granite starcoder2 cohere".split()


def config_of(model_type: str, **values: Any) -> PreTrainedConfig:
    made: PreTrainedConfig = AutoConfig.for_model(model_type, **values)
    for name in vars(made):
        if "dropout" in name or name.endswith("_pdrop"):
            setattr(made, name, 0.0)
    return made


def saved_bytes(run: Callable[[], torch.Tensor], known: set[int]) -> int:
    """Bytes of the storages that autograd keeps, without those of `known` tensors."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    total = sum(kept.values())
    del output
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_the_stand_in_for_sdpa_saves_what_the_kernel_saves(dtype: torch.dtype, masked: bool) -> None:
    found = []
    for device, function in (("cpu", F.scaled_dot_product_attention), ("meta", _cpu_attention)):
        query, key, value = (torch.zeros(2, 4, 64, 16, device=device, dtype=dtype).requires_grad_() for _ in range(3))
        mask = torch.ones(2, 1, 64, 64, device=device, dtype=torch.bool) if masked else None
        run = lambda f=function, q=query, k=key, v=value, m=mask: f(q, k, v, attn_mask=m, is_causal=m is None)  # noqa: E731
        found.append(saved_bytes(run, set()))
    assert found[0] == found[1] > 0


def test_the_stand_in_for_liger_saves_gradients_alone() -> None:
    """As `LigerFusedLinearCrossEntropyFunction` does: ctx.save_for_backward(grad_input, grad_weight, grad_bias)."""
    rows = torch.zeros(64, 32, device="meta", dtype=torch.bfloat16).requires_grad_()
    weight = torch.zeros(100, 32, device="meta", dtype=torch.bfloat16).requires_grad_()
    targets = torch.zeros(64, device="meta", dtype=torch.long)
    assert saved_bytes(lambda: LigerLoss.apply(rows, weight, targets, 16), set()) == 2 * (64 * 32 + 100 * 32)


@pytest.mark.parametrize(
    ("model_type", "values"),
    [("llama", SMALL), pytest.param("qwen3_moe", MOE, marks=pytest.mark.slow)],
    ids=["llama", "qwen3_moe"],
)
def test_a_profile_is_what_a_real_run_saves(model_type: str, values: dict[str, Any]) -> None:
    """Every tensor that autograd keeps on the CPU, of packed documents, at a shape that was not traced."""
    config = config_of(model_type, **values)
    profile = profile_model(config)
    tokens = torch.zeros(3, 96, dtype=torch.long)
    positions = torch.arange(48).repeat(3, 2)
    for size, dtype in ((4, torch.float32), (2, torch.bfloat16)):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()
        attach_loss(model, "full")
        stays = [*model.parameters(), *model.buffers(), tokens, positions]
        known = {one.untyped_storage()._cdata for one in stays}
        run = lambda m=model: m(input_ids=tokens, position_ids=positions, targets=tokens, use_cache=False)[0]  # noqa: E731
        real = saved_bytes(run, known)
        predicted = profile.saved("none", "sdpa", size) + profile.loss("full", size).saved
        assert predicted.at(288, 96) == pytest.approx(real, rel=0.01)


def test_what_offloaded_recomputation_sends_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The input of each layer, as tests/plan/test_footprint.py expects of the plan: tokens x width, and no masks."""
    packed: list[int] = []

    def counting(**_: Any) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (packed.append(tensor.untyped_storage().nbytes()), tensor.clone())[1], lambda tensor: tensor
        )

    monkeypatch.setattr(recompute, "save_on_cpu", counting)
    config = config_of("llama", **SMALL)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    attach_loss(model, "full")
    recompute.apply_activation_checkpointing(model, "offloaded")
    tokens, positions = torch.zeros(3, 96, dtype=torch.long), torch.arange(48).repeat(3, 2)
    model(input_ids=tokens, position_ids=positions, targets=tokens, use_cache=False)
    assert packed == [3 * 96 * 64 * 4] * 3


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_flops_are_those_of_torchs_counter(model_type: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    padding = {"pad_token_id": 0} if model_type == "phi3" else {}  # its own lies outside so small a vocabulary
    config = config_of(**shrink(AutoConfig.for_model(model_type)) | {"vocab_size": 96} | padding)
    real = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    tokens = torch.zeros(2, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        real(input_ids=tokens, use_cache=False)
    with stand_ins():
        model = _build(config, "sdpa" if real._supports_sdpa else "eager", torch.float32)
        attach_loss(model, "full")
        meter = _trace(model, "sdpa", 2, 32)
    pairs = 2 * 32 * 32
    traced = sum(one.matrix_flops + 2 * one.head_width * pairs for one in meter.sections.values())
    assert traced == counter.get_total_flops()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in real.parameters())


@pytest.mark.slow
def test_flops_of_experts_by_hand() -> None:
    profile = profile_model(config_of("qwen3_moe", **MOE))
    attention = 64 * (64 + 2 * 32 + 64)
    experts = 2 * 3 * 64 * 48  # two of four are active
    expected = 2 * (3 * (attention + 4 * 64 + experts) + 128 * 64)
    assert profile.matrix_flops_per_token == expected
    assert profile.idle_parameters == 3 * 2 * 3 * 64 * 48
    assert profile.parameters_by_kind()["expert"] == 3 * 4 * 3 * 64 * 48


@pytest.mark.slow
def test_windows_limit_attention() -> None:
    profile = profile_model(config_of("gemma2", **SMALL | {"head_dim": 16, "sliding_window": 8}))
    kinds = {kind.name: (kind.span_kind, kind.span_limit) for kind in profile.layers}
    assert kinds == {"sliding_attention": ("window", 8), "full_attention": ("full", None)}
    per_pair = 2 * 2 * 4 * 16
    assert {kind.attention_flops_per_pair for kind in profile.layers} == {per_pair}


@pytest.mark.slow
@pytest.mark.parametrize("key", {request["config"]["model_type"]: key for key, request in requests().items()}.values())
def test_the_shipped_profiles_are_what_a_fresh_trace_finds(key: str, tmp_path: Any) -> None:
    request = requests()[key]
    profile, _ = find_profile(request["config"], request["dropout"], tmp_path, may_trace=False)
    fresh = trace(request)
    assert profile is not None and json.loads(profile.to_json()) | {"heads": None} == fresh  # heads are not traced
