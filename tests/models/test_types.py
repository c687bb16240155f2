"""Every causal language model of Transformers trains as Transformers itself computes it, or is refused."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import Llama4TextConfig

from tests.models.test_attention import INSTALLED, install
from turbolm.errors import UserError
from turbolm.models import start, table, trial
from turbolm.models.attention import check_long_sequences, choose_attention
from turbolm.models.build import build_config
from turbolm.plan.count import causal_model_types
from turbolm.recipe.schema import Model

NAMES = {name: outcome for outcome, name in table.OUTCOMES.items()}
WRITTEN = {
    model_type: NAMES[name] for model_type, name in re.findall(r"^\| ([\w-]+) \| ([\w ]+) \|", table.read_table(), re.M)
}
FAST = """apertus bart bert bloom cpmant deepseek_v3 falcon gemma2 gemma3_text gpt2 gpt_neox gpt_oss llama mamba mistral
    mixtral nemotron olmo2 openai-gpt opt phi3 qwen2 qwen3 qwen3_moe roberta smollm3 stablelm""".split()
NUM_SHARDS = 6


def is_as_written(model_type: str) -> None:
    tried = trial.try_type(model_type)
    assert tried.outcome == WRITTEN[model_type], f"{tried}: `make models` writes the table again"


@pytest.mark.parametrize("model_type", FAST)
def test_common_types_are_as_the_table_says(model_type: str) -> None:
    is_as_written(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(NUM_SHARDS))
def test_all_types_are_as_the_table_says(shard: int) -> None:
    for model_type in causal_model_types()[shard::NUM_SHARDS]:
        if model_type not in FAST:
            is_as_written(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(NUM_SHARDS))
def test_no_type_is_trained_wrongly_with_what_a_gpu_chooses(shard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is varlen there, which joins sequences and gets no mask; a plain loop stands in for its kernel."""
    install(INSTALLED, monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))

    def choose(requested: str, _: str, __: str, kind: Any, **settings: Any) -> str:
        return choose_attention(requested, "cuda", "bf16", kind, **settings)

    monkeypatch.setattr(start, "choose_attention", choose)
    for model_type in causal_model_types()[shard::NUM_SHARDS]:
        tried = trial.try_type(model_type)
        trains = tried.outcome in ("packed", "single")
        has_cure = tried.outcome == "refused" and tried.reason.endswith(("set execution.attention: sdpa", "; set sdpa"))
        assert trains or has_cure or (tried.outcome, WRITTEN[model_type]) == ("refused", "refused"), tried


def test_the_table_has_every_type_and_none_that_is_trained_wrongly() -> None:
    if f"Transformers {transformers.__version__}, " in table.read_table():  # another one has other types
        assert list(WRITTEN) == sorted(causal_model_types())
    counts = Counter(WRITTEN.values())
    assert counts["failed"] == 0
    assert counts["packed"] >= 87 and counts["packed"] + counts["single"] >= 120


def test_a_trial_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed though its documents see each other; an exception that is no message to the user."""
    monkeypatch.setattr(start, "check_isolation", lambda *_, **__: 0.0)
    leaking = trial.try_type("bloom")
    assert leaking.outcome == "failed" and "Transformers' own" in leaking.reason
    monkeypatch.setattr(start, "build_model", lambda *_, **__: 1 / 0)
    assert "ZeroDivisionError" in trial.try_type("llama").reason


@pytest.mark.parametrize("model_type", ["big_bird", "reformer"])
def test_attention_that_is_another_one_in_long_rows_is_refused(model_type: str) -> None:
    """Probes are short; big_bird reads both ways from some 700 tokens on, reformer sorts sequences by hashes."""
    section = Model(config={"model_type": model_type, "is_decoder": True})
    with pytest.raises(UserError, match="attention_type: big_bird's block_sparse|reformer sorts a sequence's tokens"):
        build_config(section, seq_len=32, vocab_size=50000, bos_token_id=0, eos_token_id=0)


def test_long_rows_of_llama4() -> None:
    """Its temperature counts the tokens of a sequence, and varlen attention knows no chunks."""
    config = Llama4TextConfig(attention_chunk_size=64, floor_scale=64)
    check_long_sequences(config, "sdpa", seq_len=63, joined_tokens=63, packed=True)
    check_long_sequences(config, "sdpa", seq_len=128, joined_tokens=256, packed=False)
    with pytest.raises(UserError, match="not in its document, from 64 on; set `data.packing: single` and"):
        check_long_sequences(config, "sdpa", seq_len=64, joined_tokens=64, packed=True)
    with pytest.raises(UserError, match="sequence of 80 tokens, not in its document"):
        check_long_sequences(config, "varlen", seq_len=40, joined_tokens=80, packed=False)
    with pytest.raises(UserError, match="varlen has no attention by chunks, which llama4_text has of 64 tokens"):
        check_long_sequences(config, "varlen", seq_len=65, joined_tokens=65, packed=True)


def test_a_type_that_kills_its_process_costs_only_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "trial.py"
    script.write_text(
        "import json, os, sys, time\n"
        "for line in sys.stdin:\n"
        "    if line.strip() == 'dies': os._exit(3)\n"
        "    if line.strip() == 'hangs': time.sleep(60)\n"
        "    print(json.dumps({'model_type': line.strip(), 'outcome': 'packed', 'reason': ''}), flush=True)\n"
    )
    monkeypatch.setattr(table, "COMMAND", [sys.executable, str(script)])
    monkeypatch.setattr(table, "TIMEOUT_SEC", 1)
    results = table.try_types(["one", "dies", "two", "hangs", "three"], num_processes=1)
    assert [(one["model_type"], one["outcome"], one["reason"]) for one in results] == [
        ("one", "packed", ""), ("dies", "failed", "its process died with code 3"), ("two", "packed", ""),
        ("hangs", "failed", "its process died with code -9"), ("three", "packed", ""),
    ]  # fmt: skip


def test_the_written_table_is_what_was_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# Models\n\nOther text.\n\n{table.HEADING}\n\n| old | refused | |\n")
    monkeypatch.setattr(table, "README", readme)
    leak = "data.packing: with sdpa attention it leaks (changing one moved its neighbour's logits by 0.5); "
    leak += "set `data.packing: single` or more"
    table.write_table(
        [
            {"model_type": "z", "outcome": "single", "reason": leak},
            {"model_type": "a", "outcome": "refused", "reason": "model: a | b"},
            {"model_type": "b", "outcome": "packed", "reason": ""},
        ]
    )
    text = readme.read_text()
    assert text.startswith("# Models\n\nOther text.\n\n## Every") and "old" not in text
    assert "3 types: 1 packed, 1 one document per sequence, 1 refused." in text
    assert text.splitlines()[-3:] == [
        "| a | refused | a \\| b |", "| b | packed |  |", "| z | one document per sequence | with sdpa attention it leaks |",  # noqa: E501
    ]  # fmt: skip
