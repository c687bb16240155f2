"""Ranks that share sequences compute what one rank computes for whole ones, and documents stay apart exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from tests.models.small import small_config
from tests.models.test_isolation import CONFIGS, SEQ_LEN, SHAPE, SPLIT, VOCAB, make_model, packed_sequence
from tests.models.varlen_stubs import STUBS
from tests.world import run_world
from turbolm.errors import UserError
from turbolm.models.attention import model_inputs
from turbolm.models.isolation import check_isolation
from turbolm.models.parallel_attention import check_shared_sequences, share_attention
from turbolm.models.sequence_parallel import repeated_heads, start_sequence_group
from turbolm.plan.batch import BatchPlan
from turbolm.plan.exchange import exchange_bytes

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
            expected, gradient = outputs(make_model(MODELS[name], "sdpa"), batches[0], "sdpa")
        for size in sizes:
            group = start_sequence_group(size)
            assert group is not None
            model = make_model(MODELS[name], "sdpa")
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
    names, sizes = (list(MODELS), [2, 4]) if attention != "flex" else (["llama"], [2])
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


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank sends to the others of its group, in both passes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.num_bytes = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "_c10d_functional::all_to_all_single":
            self.num_bytes += args[0].numel() * args[0].element_size() * (self.size - 1) // self.size
        return func(*args, **(kwargs or {}))


def sent_and_saved(config: dict[str, Any], size: int, recomputation: str | int) -> tuple[int, int]:
    """Bytes that the calling rank sends in a step, and those of activations it keeps between the passes."""
    dist.init_process_group("gloo")
    group = start_sequence_group(size)
    model = make_model(config, "sdpa", recomputation)
    if group is not None:
        share_attention(model, "sdpa")
    batch = {key: np.concatenate([packed_sequence(seed)[key] for seed in (1, 2)]) for key in packed_sequence(0)}
    part = batch if group is None else group.share(batch)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}  # by storage

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:  # masks are of the whole, as planned
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with Sent(size) as sent:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**model_inputs(part, "sdpa", CPU)).logits.square().sum()
        saved = sum(kept.values())
        loss.backward()
    return sent.num_bytes, saved


@pytest.mark.parametrize(
    ("name", "recomputation"),
    [("llama", "none"), pytest.param("gpt2", "full", marks=SLOW), pytest.param("qwen3", 2, marks=SLOW)],
)
def test_what_is_sent_is_what_the_plan_says_and_activations_fall_with_the_group(
    name: str, recomputation: str | int
) -> None:
    saved = {}
    for size in (1, 2, 4):
        answers = run_world(size, sent_and_saved, CONFIGS[name], size, recomputation)
        assert len(set(answers)) == 1, "all ranks send and keep the same"
        sent, saved[size] = answers[0]
        batch = BatchPlan(
            seq_len=SEQ_LEN,
            global_batch_tokens=2 * SEQ_LEN,
            bins_per_batch=2,
            world_size=size,
            micro_batch_bins=2,
            gradient_accumulation_steps=1,
            num_filler_bins=0,
            sequence_parallel=size,
        )
        assert sent == exchange_bytes(CONFIGS[name], batch, precision="fp32", recomputation=recomputation)
        assert (sent > 0) == (size > 1)
    for size in (2, 4):  # and the output of attention on both sides of the exchange
        assert 0.99 < size * saved[size] / saved[1] < 1.15, saved
