"""The varlen kernel's adapter, against sdpa: the kernel itself needs a GPU, so a plain loop stands in for it here."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.attention.varlen as varlen
from transformers import (
    FalconForCausalLM,
    Lfm2ForCausalLM,
    LlamaForCausalLM,
    MambaForCausalLM,
    StableLmForCausalLM,
)

from tests.models.test_isolation import CONFIGS, SEQ_LEN, SHAPE, SPLIT, VOCAB, make_model, packed_sequence
from tests.models.varlen_stubs import STUBS
from turbolm.data.batch.collate import fill_cu_seqlens
from turbolm.errors import UserError
from turbolm.models import attention as attention_module
from turbolm.models.attention import choose_attention, model_inputs, takes_gqa, varlen_attention_forward
from turbolm.models.isolation import check_isolation

CPU = torch.device("cpu")


INSTALLED = torch.__version__[:4]  # such as 2.13


def test_the_stub_has_the_signature_of_the_installed_torch() -> None:
    real, stub = (inspect.signature(one).parameters.values() for one in (varlen.varlen_attn, STUBS[INSTALLED]))
    assert [(one.name, one.kind, one.default) for one in stub] == [(one.name, one.kind, one.default) for one in real]


def install(version: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Have that torch's kernel called; returns the keywords of each call, which grows."""
    calls: list[dict[str, Any]] = []

    def varlen_attn(query: torch.Tensor, key: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        calls.append({"heads": (query.shape[1], key.shape[1]), "max": arguments[-1], **keywords})
        return STUBS[version](query, key, *arguments, **keywords)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention_module, "_TAKES_GQA", takes_gqa(STUBS[version]))
    return calls


@pytest.mark.parametrize("version", STUBS)
def test_fewer_key_heads_are_handed_on_as_they_are(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 query heads and 2 of keys; gradients too, which the kernel sums over a group."""
    calls = install(version, monkeypatch)
    sequences = [packed_sequence(seed) for seed in (1, 2, 3)]
    batch = {key: np.concatenate([one[key] for one in sequences]) for key in sequences[0]}
    results = {}
    for attention in ("sdpa", "varlen"):
        model = make_model(CONFIGS["llama"], attention)
        logits = model(**model_inputs(batch, attention, CPU)).logits
        logits.square().mean().backward()
        results[attention] = [logits.view(3, SEQ_LEN, -1)] + [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(results["varlen"], results["sdpa"], rtol=1e-4, atol=1e-5)
    told = {} if version == "2.11" else {"enable_gqa": True}
    expected = {"heads": (4, 2), "max": SEQ_LEN - SPLIT, "scale": 16**-0.5, "window_size": (-1, 0), **told}
    assert calls == [expected] * 2  # one in each layer


def test_of_torch_2_12_every_fewer_head_must_be_told() -> None:
    """Else the stubs would not notice a call without it."""
    states, ends = torch.ones(4, 2, 8), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="the same number of heads"):
        STUBS["2.12"](states, states[:, :1], states[:, :1], ends, ends, 4, 4)


def test_the_length_is_that_of_the_longest_document_or_one_of_few() -> None:
    """By hand: 24 tokens in two sequences, and padding."""
    positions = np.array([[0, 1, 2, 0, 1, 2, 3, 4, 0, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]])
    batch = {"input_ids": positions, "position_ids": positions}
    inputs = model_inputs(batch, "varlen", CPU)
    assert inputs["cu_seq_lens_q"].tolist() == [0, 3, 8, 9, 10, 12, 19, 24]
    assert (inputs["max_length_q"], inputs["max_length_k"]) == (7, 7)
    inputs = model_inputs(
        {**batch, "cu_seqlens": fill_cu_seqlens(inputs["cu_seq_lens_q"][1:].numpy(), 30)}, "varlen", CPU
    )
    assert inputs["cu_seq_lens_q"].tolist() == [0, 3, 8, 9, 10, 12, 19, 24, 24]
    assert (inputs["max_length_q"], inputs["max_length_k"]) == (8, 8)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-sliding", "gpt2"])
def test_varlen_gives_what_sdpa_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(INSTALLED, monkeypatch)
    sequences = [packed_sequence(seed) for seed in (1, 2, 3)]
    batch = {key: np.concatenate([one[key] for one in sequences]) for key in sequences[0]}  # [3, seq_len]
    expected = make_model(CONFIGS[name], "sdpa")(**model_inputs(batch, "sdpa", CPU)).logits
    flat = make_model(CONFIGS[name], "varlen")(**model_inputs(batch, "varlen", CPU)).logits
    assert flat.shape[:2] == (1, 3 * SEQ_LEN)
    torch.testing.assert_close(flat.view(expected.shape), expected, rtol=1e-4, atol=1e-5)
    starts = np.flatnonzero(batch["position_ids"].ravel() == 0)
    padded = np.append(starts, [3 * SEQ_LEN] * 9).astype(np.int32)
    inputs = model_inputs({**batch, "cu_seqlens": padded}, "varlen", CPU)
    assert inputs["cu_seq_lens_q"].tolist() == padded.tolist()
    torch.testing.assert_close(make_model(CONFIGS[name], "varlen")(**inputs).logits, flat)


def test_what_joins_rows_is_kept_from_models_that_carry_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second sequence would begin with the state that the first one ends with."""
    install(INSTALLED, monkeypatch)
    layers = {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2}
    model = make_model({"model_type": "lfm2", **layers, **SHAPE}, "varlen")
    settings = {"vocab_size": VOCAB, "seq_len": SEQ_LEN, "precision": "fp32", "packed": False}
    with pytest.raises(UserError, match="sequences of a micro-batch see each other .* set execution.attention: sdpa"):
        check_isolation(model, attention="varlen", **settings)
    model.set_attn_implementation("sdpa")
    check_isolation(model, attention="sdpa", **settings)


def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert choose_attention("auto", "cuda", "bf16", LlamaForCausalLM) == "varlen"
    assert choose_attention("auto", "cuda", "bf16", Lfm2ForCausalLM, carries_state=True) == "sdpa"
    assert choose_attention("auto", "cuda", "bf16", FalconForCausalLM) == "sdpa"  # knows no kernels but its own
    assert choose_attention("auto", "cuda", "bf16", StableLmForCausalLM) == "sdpa"


def test_auto_takes_sdpa_where_there_is_no_gpu() -> None:
    assert choose_attention("auto", "cpu", "bf16", LlamaForCausalLM) == "sdpa"
    assert choose_attention("auto", "cpu", "bf16", MambaForCausalLM) == "eager"
    assert choose_attention("eager", "cpu", "bf16", LlamaForCausalLM) == "eager"


def test_varlen_drops_no_mask_that_a_model_makes() -> None:
    states, lengths = torch.ones(1, 2, 4, 8), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="varlen attention takes no mask"):
        varlen_attention_forward(None, states, states, states, torch.ones(1, 1, 4, 4), cu_seq_lens_q=lengths)
