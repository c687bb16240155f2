"""Keys of the `model` section that change a configuration: noise on routers, factors of rotary positions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from tests.models.small import small_config
from turbolm.errors import UserError
from turbolm.models.build import build_model
from turbolm.models.settings import apply_router_noise, fix_rope_factors
from turbolm.recipe.schema import Model

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 8, "long_factor": [1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0],
}  # fmt: skip
PHIMOE = {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


def noise_after(model_type: str, section: dict[str, Any], **changes: Any) -> dict[str, Any]:
    config = small_config(model_type, **changes)
    apply_router_noise(config, Model(config={"model_type": model_type, **section.pop("config", {})}, **section))
    inner = {name: vars(value) for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)}
    everything = {**vars(config), **{name: value for values in inner.values() for name, value in values.items()}}
    return {name: value for name, value in everything.items() if "jitter" in name and "pos_embed" not in name}


def test_routers_have_the_noise_of_the_recipe() -> None:
    published = {"router_jitter_noise": 0.1}
    assert noise_after("mixtral", {}, **published) == {"router_jitter_noise": 0.0}
    assert noise_after("mixtral", {"router_noise": "config"}, **published) == {"router_jitter_noise": 0.1}
    assert noise_after("mixtral", {"router_noise": 0.3}, **published) == {"router_jitter_noise": 0.3}
    assert noise_after("mixtral", {"config": published}, **published) == {"router_jitter_noise": 0.1}
    assert noise_after("dbrx", {}) == {"moe_jitter_eps": None}
    assert noise_after("dbrx", {"router_noise": 0.3}) == {"moe_jitter_eps": 0.3}
    nested = {"config": {"ffn_config": {"moe_jitter_eps": 0.2}}, "router_noise": 0.3}
    assert noise_after("dbrx", nested, ffn_config={"moe_jitter_eps": 0.2}) == {"moe_jitter_eps": 0.2}
    # phimoe's `router_jitter_noise` is a threshold of its router, which counts in evaluation too.
    kept = {"router_jitter_noise": 0.01}
    assert noise_after("phimoe", {}, input_jitter_noise=0.1) == {"input_jitter_noise": 0.0, **kept}
    with pytest.raises(UserError, match=r"model\.router_noise: llama has no noise on its routers"):
        noise_after("llama", {"router_noise": 0.3})


@pytest.mark.parametrize(("noise", "is_random"), [(0.0, False), ("config", True)])
def test_phimoe_samples_its_experts_only_when_asked(noise: Any, is_random: bool) -> None:
    section = Model(config={"model_type": "phimoe"}, router_noise=noise)
    config = small_config("phimoe", router_jitter_noise=0.4)  # a threshold that leaves more than one expert
    model = build_model(section, config, seed=0, attention="eager").train()
    tokens = torch.arange(32)[None]
    logits = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        logits.append(model(tokens, use_cache=False).logits)
    assert torch.equal(*logits) != is_random
    logits[0].sum().backward()
    assert model.model.layers[0].mlp.router.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("model_type", "rope", "factors"),
    [
        ("phi3", LONGROPE, "short"),
        ("phi3", LONGROPE, "long"),
        ("phimoe", PHIMOE, "short"),
        ("phimoe", PHIMOE, "long"),
        ("llama", DYNAMIC, "short"),
        ("llama", DYNAMIC, "long"),
    ],
)
def test_fixed_factors_are_those_of_transformers_at_one_length(
    model_type: str, rope: dict[str, Any], factors: str, tmp_path: Path
) -> None:
    """Sequences up to 16 tokens get Transformers' short factors, longer ones its long ones; then all get the same."""
    untouched = copy.deepcopy(rope)
    positions = 16 if model_type == "llama" else 48  # dynamic scaling begins beyond the positions
    config = small_config(model_type, max_position_embeddings=positions, rope_parameters=rope)
    if model_type == "phi3":
        config.original_max_position_embeddings = config.rope_parameters["original_max_position_embeddings"] = 16
    reference = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    fix_rope_factors(config, Model(config={"model_type": model_type}, rope_factors=factors), 40)
    assert all(rope[name] == value for name, value in untouched.items()), "the recipe's own mapping is as it was"
    config.save_pretrained(tmp_path)
    fixed = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), attn_implementation="eager").eval()
    fixed.load_state_dict(reference.state_dict())
    length, other = (10, 40) if factors == "short" else (40, 10)
    tokens = torch.arange(40)[None]

    @torch.no_grad()
    def differs(length: int) -> float:
        logits = [model(tokens[:, :length], use_cache=False).logits for model in (fixed, reference)]
        return float((logits[0] - logits[1]).abs().max())

    assert differs(length) < 1e-5
    assert differs(other) > 1e-4
    longer = fixed(tokens, use_cache=False).logits[:, :10]
    assert (
        longer - fixed(tokens[:, :10], use_cache=False).logits
    ).abs().max() < 1e-5  # fp32 rounds otherwise at another length; logits are of size 1


def test_a_model_without_such_factors_refuses_the_key() -> None:
    with pytest.raises(UserError, match=r"model\.rope_factors: llama has no rotary factors that follow the length"):
        fix_rope_factors(small_config("llama"), Model(config={"model_type": "llama"}, rope_factors="short"), 16)
