"""Ranks that share sequences compute what one rank computes for whole ones, and documents stay apart exactly."""

from __future__ import annotations

import sys
import types
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import varlen
from transformers import PreTrainedModel

from tests.models.small import small_config
from tests.models.test_isolation import CONFIGS, SEQ_LEN, SHAPE, SPLIT, VOCAB, make_model, packed_sequence
from tests.models.varlen_stubs import STUBS
from tests.world import run_world
from turbolm.errors import UserError
from turbolm.models.attention import model_inputs
from turbolm.models.isolation import check_isolation
from turbolm.models.loss import attach_loss
from turbolm.models.parallel_attention import check_shared_sequences, share_attention
from turbolm.models.sequence_parallel import repeated_heads, start_sequence_group
from turbolm.plan.batch import IGNORED_TARGET
from turbolm.plan.exchange import kept_elements
from turbolm.plan.profile import Heads

CPU = torch.device("cpu")
MODELS = CONFIGS | {
    "one-key-head": {"model_type": "llama", "num_key_value_heads": 1, **SHAPE},
    "twelve-heads": {
        **SHAPE,
        "model_type": "llama",
        "hidden_size": 96,
        "num_attention_heads": 12,
        "num_key_value_heads": 6,
    },
}
MORE = {
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, **SHAPE},
    "olmo2": {"model_type": "olmo2", "num_key_value_heads": 2, **SHAPE},
    "smollm3": {"model_type": "smollm3", "num_key_value_heads": 2, **SHAPE, "num_hidden_layers": 4},  # one without rope
}
LFM2 = {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2}


def outputs(model: PreTrainedModel, batch: dict[str, np.ndarray], attention: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [sequences, tokens, vocabulary] and the gradient of the sum of their squares, one flat tensor."""
    model.zero_grad()
    logits = model(**model_inputs(batch, attention, CPU)).logits
    if logits.requires_grad:
        logits.square().sum().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return logits.detach().reshape(*batch["input_ids"].shape, -1), torch.cat([g.flatten() for g in gradients])


def compare(names: list[str], sizes: list[int], attention: str) -> dict[tuple[str, int], tuple[float, float, float]]:
    """(error of the logits, of the gradient's norm, leak) by model and size of the group, of the calling rank."""
    dist.init_process_group("gloo")
    varlen.varlen_attn = STUBS["2.13"]
    found = {}
    for name in names:
        start_sequence_group(1)
        batches = [
            {key: np.concatenate([packed_sequence(seed)[key], packed_sequence(7)[key]]) for key in packed_sequence(0)}
            for seed in (1, 2)
        ]
        with torch.set_grad_enabled(attention != "flex"):  # torch has no backward pass of it on a CPU
            expected, gradient = outputs(make_model((MODELS | MORE)[name], "sdpa"), batches[0], "sdpa")
        for size in sizes:
            group = start_sequence_group(size)
            assert group is not None
            model = make_model((MODELS | MORE)[name], "sdpa")
            share_attention(model, attention)
            results = []
            for batch in batches:
                with torch.set_grad_enabled(attention != "flex"):
                    local, own = outputs(model, group.share(batch), attention)
                dist.all_reduce(own, group=group.group)
                results.append((group.gather_logits(local), own))
            (logits, summed), (changed, _) = results
            found[name, size] = (
                float((logits - expected).abs().max() / expected.abs().max()),
                float((summed - gradient).norm() / gradient.norm().clamp(min=1e-9)) if attention != "flex" else 0.0,
                float((logits - changed)[0, SPLIT:].abs().max() + (logits - changed)[1].abs().max()),
            )
            assert (logits - changed)[0, :SPLIT].abs().max() > 1e-3
            if attention == "sdpa":
                settings = {"vocab_size": VOCAB, "seq_len": SEQ_LEN, "precision": "fp32"}
                assert check_isolation(model, attention=attention, **settings) == 0.0
    return found


SLOW = pytest.mark.slow


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("varlen", marks=SLOW), pytest.param("flex", marks=SLOW)])
def test_slices_give_what_whole_sequences_give_and_leak_nothing(attention: str) -> None:
    """Groups of 2 and 4; key heads that groups repeat: 2 and 1 for groups of 4, 6 to 12 for groups of 4."""
    names, sizes = {
        "sdpa": (list(MODELS), [2, 4]), "varlen": ([*MODELS, *MORE], [2, 4]), "flex": (["llama"], [2])
    }[attention]  # fmt: skip
    for answers in run_world(sizes[-1], compare, names, sizes, attention):
        assert len(answers) == len(sizes) * len(names)
        for key, (logits_error, gradient_error, leak) in answers.items():
            assert logits_error < 1e-6 and gradient_error < 1e-5, (key, logits_error, gradient_error)
            assert leak == 0.0, key


def refusal(config: dict[str, Any]) -> str:
    dist.init_process_group("gloo")
    start_sequence_group(2)
    model = make_model(config, "sdpa")
    share_attention(model, "sdpa")
    with torch.no_grad():
        for parameter in model.parameters():  # convolutions hardly count at initial weights
            parameter.mul_(5.0 if parameter.dim() > 1 else 1.0)
    try:
        check_isolation(model, vocab_size=VOCAB, seq_len=SEQ_LEN, attention="sdpa", precision="fp32", packed=False)
    except UserError as error:
        return str(error)
    return ""


def test_the_check_at_the_start_finds_tokens_that_meet_outside_attention() -> None:
    """Were a type with convolutions not known by name."""
    answers = run_world(2, refusal, {"model_type": "lfm2", **LFM2, **SHAPE})
    assert len(set(answers)) == 1
    assert answers[0].startswith("execution.sequence_parallel: this model does not compute for slices of a sequence")


def test_as_few_heads_are_repeated_as_let_ranks_share_them() -> None:
    repeated = {
        (12, 12, 4): 1,
        (12, 4, 2): 1,
        (12, 4, 4): 1,
        (12, 1, 4): 4,
        (12, 2, 4): 2,
        (12, 6, 4): 2,
        (32, 8, 16): 2,
    }
    assert {key: repeated_heads(*key) for key in repeated} == repeated
    with pytest.raises(ValueError, match="5 processes cannot share 12"):
        repeated_heads(12, 4, 5)


def test_models_that_cannot_be_shared_are_refused_by_name() -> None:
    def refused(model_type: str, shared_by: int = 2, seq_len: int = 64, **changes: Any) -> str:
        config, attention = small_config(model_type, **changes.pop("config", {})), changes.pop("attention", "sdpa")
        settings = {"shared_by": shared_by, "seq_len": seq_len, "reason": changes.pop("reason", None)}
        with pytest.raises(UserError) as caught:
            check_shared_sequences(config, attention, **settings)
        return str(caught.value).removeprefix("execution.sequence_parallel: ")

    assert refused("llama", 3) == "must divide the 4 attention heads of llama, got 3; set one of 1, 2, 4"
    assert refused("llama", attention="eager").startswith("llama has eager attention here")
    mamba = "mamba carries a recurrent state from token to token"
    assert (
        refused("mamba", reason=mamba, attention="eager")
        == f"{mamba}, across the slices of a sequence, outside attention; set 1"
    )
    assert "chooses its rotary factors by the longest document" in refused(
        "llama", config={"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    )
    chunked = {"layer_types": ["chunked_attention"] * 2, "attention_chunk_size": 32}
    assert "by chunks of 32 tokens" in refused("llama4_text", config=chunked)
    tuned = {"layer_types": ["full_attention"] * 2, "attn_temperature_tuning": True, "floor_scale": 16}
    assert "from token 16 on" in refused("llama4_text", config=tuned)


def kept_bytes(config: dict[str, Any], sizes: list[int]) -> dict[int, dict[str, int]]:
    """By size of the group: bytes that the calling rank keeps between the passes, of dense masks and of all else."""
    dist.init_process_group("gloo")
    batch = {key: np.concatenate([packed_sequence(seed)[key] for seed in (1, 2)]) for key in packed_sequence(0)}
    return {size: _kept_in_group(config, size, batch) for size in sizes}


def _kept_in_group(config: dict[str, Any], size: int, batch: dict[str, np.ndarray]) -> dict[str, int]:
    group, model = start_sequence_group(size), make_model(config, "sdpa")
    if group is not None:
        share_attention(model, "sdpa")
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[bool, int]] = {}  # by storage

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (tensor.shape[-2:] == (SEQ_LEN, SEQ_LEN), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**model_inputs(group.share(batch) if group else batch, "sdpa", CPU)).logits.square().sum()
    found = {name: sum(number for is_mask, number in kept.values() if is_mask == (name == "masks"))
             for name in ("masks", "others")}  # fmt: skip
    loss.backward()
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", pytest.param("qwen3", marks=SLOW)])
def test_what_is_kept_falls_with_the_group_but_for_what_the_plan_counts(name: str) -> None:
    """To the byte: the output of attention on both sides of the exchange; masks are of whole sequences.

    Some bytes (`Cost.fixed`, such as rotary frequencies) depend on no token.
    """
    (first, *others) = run_world(4, kept_bytes, CONFIGS[name], [1, 2, 4])
    assert all(one == first for one in others), "all ranks keep the same"
    fixed = []
    layers, tokens = 2, 2 * SEQ_LEN
    heads = Heads(layers, 4, 4 if name == "gpt2" else 2, 16)
    for size in (2, 4):
        extra = layers * tokens * kept_elements(heads, size, "sdpa", "none") * 4
        assert extra == layers * tokens * 64 * 4
        fixed.append((size * first[size]["others"] - first[1]["others"] - extra) / (size - 1))
        assert first[size]["masks"] == first[1]["masks"] > 0
    assert fixed[0] == fixed[1] and 0 <= fixed[0] < 1024


def test_what_a_layer_keeps_for_a_group_by_hand() -> None:
    """4 heads of 16, 2 of keys: groups of 4 repeat keys and values once more, unless the kernel does so anyway."""
    heads = Heads(2, 4, 2, 16)
    kept = {
        (2, "flash", "none"): 64,
        (4, "flash", "none"): 64 + 2 * 2 * 16,
        (4, "sdpa", "none"): 64,
        (2, "flash", "selective"): 64 + 32,
    }
    assert {key: kept_elements(heads, *key) for key in kept} == kept  # type: ignore[arg-type]


class PlainLiger:
    """In place of Liger's class, which needs a GPU: its arguments and its answer, in plain PyTorch."""

    def __init__(self, *, ignore_index: int, reduction: str, lse_square_scale: float, **_: Any) -> None:
        self.z_loss, self.settings = lse_square_scale, {"ignore_index": ignore_index, "reduction": reduction}

    def __call__(self, weight: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, bias: Any) -> Any:
        logits = F.linear(rows, weight, bias)
        counted = targets != self.settings["ignore_index"]
        squares = self.z_loss * (logits.logsumexp(-1).square() * counted).sum()
        return SimpleNamespace(loss=F.cross_entropy(logits, targets, **self.settings) + squares, z_loss=squares)


def losses_and_gradient(kind: str, size: int, config: dict[str, Any]) -> list[torch.Tensor]:
    """The objective, the negative log likelihood and the gradient of two sequences, summed over a group."""
    group, model = start_sequence_group(size), make_model(config, "sdpa")
    if group is not None:
        share_attention(model, "sdpa")
    attach_loss(model, kind, z_loss=1e-2)
    batch = {key: np.concatenate([packed_sequence(seed)[key] for seed in (1, 2)]) for key in packed_sequence(0)}
    batch["targets"] = np.random.default_rng(5).integers(0, VOCAB, batch["input_ids"].shape)
    batch["targets"][0, 3:SPLIT] = IGNORED_TARGET
    batch["targets"][1, -1] = IGNORED_TARGET
    part = group.share(batch) if group else batch
    objective, nll = model(**model_inputs(part, "sdpa", CPU), targets=torch.from_numpy(part["targets"]))
    objective.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    found = [objective.detach(), nll.detach(), gradient]
    for one in found if group else ():
        dist.all_reduce(one, group=group.group)
    return found


def liger_errors(names: list[str]) -> list[float]:
    dist.init_process_group("gloo")
    sys.modules["liger_kernel"] = sys.modules["liger_kernel.transformers"] = types.ModuleType("liger_kernel")
    sys.modules["liger_kernel.transformers"].LigerFusedLinearCrossEntropyLoss = PlainLiger  # type: ignore[attr-defined]
    errors = []
    for name in names:
        expected = losses_and_gradient("full", 1, CONFIGS[name])
        found = losses_and_gradient("liger", 2, CONFIGS[name])
        errors += [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    return errors


def test_the_liger_loss_of_slices_adds_up_to_the_full_loss() -> None:
    for errors in run_world(2, liger_errors, ["llama", "gpt2"]):
        assert len(errors) == 6 and max(errors) < 1e-5
