"""The varlen kernel's adapter, against sdpa: the kernel itself needs a GPU, so a plain loop stands in for it here."""

from __future__ import annotations

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

from tests.models.test_isolation import CONFIGS, SEQ_LEN, SHAPE, VOCAB, make_model, packed_sequence
from turbolm.errors import UserError
from turbolm.models.attention import choose_attention, model_inputs, varlen_attention_forward
from turbolm.models.isolation import check_isolation

CPU = torch.device("cpu")


def loop_over_documents(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
    max_q: int, max_k: int, *, scale: float | None, window_size: tuple[int, int], **_: Any,
) -> torch.Tensor:  # fmt: skip
    """What `varlen_attn` documents: (tokens, heads, head_dim), a window of (left, right) neighbours."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    outputs = []
    bounds = cu_seq_q.tolist()
    assert bounds[0] == 0 and bounds[-1] == query.shape[0]
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        assert 0 <= end - start <= max_q == max_k  # empty ones fill up to a fixed size
        q, k, v = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = distance >= 0
        if window_size[0] >= 0:
            seen &= distance <= window_size[0]
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-sliding", "gpt2"])
def test_varlen_gives_what_sdpa_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", loop_over_documents)
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
    monkeypatch.setattr(varlen, "varlen_attn", loop_over_documents)
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
