"""A model's positions: what it takes, and what is sampled from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from turbolm.checkpoint.export import generate_sample
from turbolm.data.prepare.tokenizer import save_tokenizer, train_tokenizer
from turbolm.errors import UserError
from turbolm.models.positions import check_positions, num_positions

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 300}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24, "vocab_size": 300}
WITH_TABLES: list[dict[str, Any]] = [
    GPT2,
    {**SMALL, "model_type": "opt", "ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 24},
    {**SMALL, "model_type": "roberta", "intermediate_size": 16, "is_decoder": True, "max_position_embeddings": 26},
    {"model_type": "whisper", "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "encoder_layers": 1,
     "encoder_attention_heads": 2, "max_target_positions": 24, "vocab_size": 300, "pad_token_id": 0},
]  # fmt: skip


def build(config: dict[str, Any]) -> Any:
    values = dict(config)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values)).eval()


@pytest.mark.parametrize("config", WITH_TABLES, ids=lambda config: config["model_type"])
def test_one_token_more_than_the_positions_fails(config: dict[str, Any]) -> None:
    model = build(config)
    positions = num_positions(model)
    assert positions == 24
    check_positions(model, 24)
    with pytest.raises(UserError, match="data.seq_len: the model has positions for 24 tokens, fewer than 25"):
        check_positions(model, 25)
    model(input_ids=torch.full((1, positions), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, positions + 1), 5))


def test_a_model_without_a_limit() -> None:
    assert num_positions(build({"model_type": "bloom", "hidden_size": 16, "n_layer": 1, "n_head": 2})) is None


def test_a_sample_is_cut_to_the_positions(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(["abc " * 50, "xyz, (q)" * 50, "".join(map(chr, range(32, 999)))], 300), tmp_path)
    model = build(GPT2)
    lengths = []
    forward = type(model).forward

    def count(self: Any, *arguments: Any, **keywords: Any) -> Any:
        lengths.append(keywords["input_ids"].shape[1])
        return forward(self, *arguments, **keywords)

    model.save_pretrained(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "forward", count)
        assert generate_sample(tmp_path, 500)
        assert sum(lengths) == 24  # tokens that went in, the first one at the start of a document
        assert generate_sample(tmp_path, 3)
        assert sum(lengths) == 24 + 3
        assert generate_sample(tmp_path, 0) == ""
