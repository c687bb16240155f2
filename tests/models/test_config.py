"""The values of a model's configuration: each that does not work is named, what Transformers reads counts, and what a
recipe lays over a file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from turbolm.models.build import build_config
from turbolm.models.config import Source, check_config
from turbolm.models.count import examine
from turbolm.recipe.model_config import NOT_LEARNED, is_dropout
from turbolm.recipe.schema import Model

PUBLISHED = json.loads((Path(__file__).parent.parent / "fixtures/published_configs.json").read_text(encoding="utf-8"))
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {"model_type": "llama", **SIZES}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}
MIXTRAL = {"model_type": "mixtral", **SIZES, "num_key_value_heads": 2, "num_local_experts": 4}
QWEN2 = {"model_type": "qwen2", **SIZES, "num_key_value_heads": 2}
LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**LLAMA, "hidden_act": "gleu"}, "hidden_act: llama knows no 'gleu'; did you mean 'gelu'?"),
        (
            {**LLAMA, "num_attention_heads": 3},
            "num_attention_heads: llama cannot be built with 3: The hidden size (32)",
        ),
        ({**LLAMA, "num_key_value_heads": 3}, "num_key_value_heads: 4 attention heads cannot share 3 heads"),
        ({**LLAMA, "hidden_size": "32"}, "hidden_size: expected a whole number, got '32'"),
        ({**LLAMA, "hidden_size": None}, "hidden_size: expected a whole number, got nothing"),
        ({**LLAMA, "hidden_size": -32}, "hidden_size: expected a whole number of at least 1, got -32"),
        ({**LLAMA, "hidden_size": 10**12}, "hidden_size: expected at most 268435456, got 1000000000000"),
        ({**LLAMA, "num_hidden_layers": 0}, "num_hidden_layers: expected a whole number of at least 1, got 0"),
        ({**LLAMA, "num_hidden_layers": 10**9}, "num_hidden_layers: expected at most 2000, got 1000000000"),
        ({**LLAMA, "pad_token_id": -1}, "pad_token_id: expected a token from 0 to 31999, got -1"),
        ({**LLAMA, "torch_dtype": "bfloat61"}, "torch_dtype: llama cannot be built with 'bfloat61': AttributeError"),
        ({**LLAMA, "rope_theta": "1e4"}, "rope_theta: llama cannot be built with '1e4': TypeError"),
        (
            {**LLAMA, "rope_scaling": {**LINEAR, "rope_type": "lineer"}},
            "rope_scaling.rope_type: llama knows no 'lineer'",
        ),
        (
            {**LLAMA, "rope_scaling": {**LINEAR, "beta_fast": 32}},
            "rope_scaling.beta_fast: rotary positions of type 'lin",
        ),
        (
            {**LLAMA, "rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}},
            "rope_theta: has no effect beside rope_par",
        ),
        ({**LLAMA, "return_dict": False}, "return_dict: the trainer needs it true; remove the key"),
        ({**LLAMA, "quantization_config": {"bits": 4}}, "quantization_config: new weights are trained unquantized"),
        (
            {**LLAMA, "per_layer_config": {"1": {"hed_dim": 16}}},
            "per_layer_config.1.hed_dim: llama has no such setting",
        ),
        ({**QWEN2, "layer_types": ["full_attention"]}, "layer_types: qwen2 cannot be built with a list of 1"),
        ({**MIXTRAL, "num_experts_per_tok": 9}, "num_experts_per_tok: mixtral cannot be built with 9: "),
        ({**GPT2, "n_head": 3}, "n_head: gpt2 cannot be built with 3: `embed_dim` must be divisible by num_heads"),
        (
            {"model_type": "dbrx", "attn_config": {"rope_theta": 1e4, "clip_qvk": 8}},
            "attn_config.clip_qvk: dbrx has no",
        ),
        ({"model_type": "nemotron", "hidden_size": 32}, "num_key_value_heads: nemotron needs it: TypeError"),
        ({"model_type": "gemma3"}, "model_type: gemma3 wraps a text model; set model.config.model_type: gemma3_text, "),
        ({"model_type": "t5"}, "model_type: transformers has no causal language model 't5'"),
    ],
    ids=lambda value: value.partition(":")[0] if isinstance(value, str) else "",
)
def test_a_value_that_does_not_work_is_one_line_with_its_key(config: dict[str, Any], message: str) -> None:
    answer = examine(None, config)
    assert [problem[: len("model.config.") + len(message)] for problem in answer.problems] == [
        f"model.config.{message}"
    ]
    assert "\n" not in answer.problems[0]
    assert answer.size is None


def test_everything_wrong_is_said_at_once() -> None:
    config = {**LLAMA, "hidden_act": "gleu", "num_hidden_layers": "2", "rope_parameters": {"theta": 3.0}}
    config["hiden_size"] = config.pop("hidden_size")
    assert [problem.partition(": ")[0] for problem in examine(None, config).problems] == [
        f"model.config.{key}" for key in ("rope_parameters.theta", "hiden_size", "num_hidden_layers", "hidden_act")
    ]


@pytest.mark.parametrize(
    "config",
    [
        {**LLAMA, "rope_theta": 5e5, "torch_dtype": "bfloat16", "architectures": ["X"], "transformers_version": "4"},
        {**LLAMA, "use_cache": False, "pretraining_tp": 1, "sliding_window": None, "use_qk_norm": False},
        {**LLAMA, "rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {**GPT2, "n_ctx": 1024, "attn_pdrop": 0.1},
        {"model_type": "qwen3_moe", **SIZES, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2},
        {"model_type": "gemma3_text", **SIZES, "rope_local_base_freq": 5000.0, "sliding_window_pattern": 2},
        {"model_type": "gpt_neox", **SIZES, "rotary_emb_base": 20000, "rotary_pct": 0.5},
    ],
    ids=lambda config: str(config["model_type"]),
)
def test_old_names_and_those_that_only_the_code_reads_count(config: dict[str, Any]) -> None:
    assert examine(None, config).problems == ()
    fields = {key: value for key, value in config.items() if key != "model_type"}
    theirs = AutoConfig.for_model(config["model_type"], **json.loads(json.dumps(fields))).to_dict()
    ours = build_config(Model(config=config), seq_len=8, vocab_size=100, bos_token_id=0, eos_token_id=1).to_dict()
    unlike = {"vocab_size", "n_ctx", *NOT_LEARNED, *filter(is_dropout, theirs)}
    assert {k: v for k, v in ours.items() if k not in unlike} == {k: v for k, v in theirs.items() if k not in unlike}


def test_what_a_class_writes_down_of_itself_is_accepted() -> None:
    """Derived settings too, which no class declares: `qk_head_dim` of deepseek_v3, `num_key_value_heads` of dbrx."""
    for model_type in ("llama", "deepseek_v3", "dbrx", "kimi_linear", "gpt_bigcode", "gemma4_text", "opt"):
        written = json.loads(CONFIG_MAPPING[model_type]().to_json_string(use_diff=False))
        assert check_config(Source(None, written)).problems == [], model_type
        assert check_config(Source(written, None)).problems == [], model_type


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_theta": 1e6}, {"rope_theta": 1e6, "rope_type": "llama3", "factor": 32.0}),
        ({"rope_scaling": {"factor": 8.0}}, {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}),
        ({"rope_scaling": LINEAR}, {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}),
        ({"rope_scaling": None}, {"rope_theta": 5e5, "rope_type": "default"}),
    ],
)
def test_the_recipe_is_laid_over_the_file(config: dict[str, Any], expected: dict[str, Any]) -> None:
    checked = check_config(Source(PUBLISHED["Llama-3.2-1B"], config))
    assert checked.problems == []
    rope = checked.search.result.rope_parameters
    assert {key: rope.get(key) for key in expected} == expected
    assert len(rope) == len(expected) + (3 if rope["rope_type"] == "llama3" else 0)


def test_what_the_file_overrules_is_refused_and_not_ignored() -> None:
    old, new = PUBLISHED["Llama-3.2-1B"], dict(PUBLISHED["Llama-3.2-1B"])
    new["rope_parameters"] = {**new.pop("rope_scaling"), "rope_theta": new.pop("rope_theta")}
    patterned = {**PUBLISHED["gemma-3-1b"], "layer_types": ["full_attention"] * 26}
    for file, config, key, by in (
        (old, {"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters", "rope_scaling"),
        (new, {"rope_theta": 1e6}, "rope_theta", "rope_parameters"),
        (patterned, {"sliding_window_pattern": 2}, "sliding_window_pattern", "layer_types"),
    ):
        source = Source(file, config)
        expected = f"model.config.{key}: has no effect beside {by} of model.config_file; set model.config.{by}"
        assert [source.line(problem) for problem in check_config(source).problems] == [expected]
    assert check_config(Source(new, {"rope_theta": 500000.0})).problems == [], "it says what is the case"


def test_names_of_a_file_that_nothing_reads_are_told_in_one_line_and_misspellings_apart() -> None:
    rope = {"rope_type": "default", "rope_thet": 1}
    answer = examine({**PUBLISHED["SmolLM2-135M"], "rope_scaling": rope, "tie_word_embedding": True}, None)
    assert answer.problems == ()
    assert answer.notes[0] == "model.config_file: nothing reads is_llama_config, rope_interleaved"
    assert sorted(answer.notes[1:]) == [
        "model.config_file: nothing reads rope_scaling.rope_thet; did you mean rope_theta?",
        "model.config_file: nothing reads tie_word_embedding; did you mean tie_word_embeddings, which is there as "
        "well?",
    ]


def test_a_multimodal_file_gives_its_text_part_when_asked_by_name() -> None:
    text = {"model_type": "gemma3_text", **SIZES, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 100}
    file = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 7}}
    assert examine(file, None).problems == (
        "model.config_file: model_type: gemma3 wraps a text model; set model.config.model_type: gemma3_text, "
        "which takes the text part of the file",
    )
    answer = examine(file, {"model_type": "gemma3_text"})
    assert answer.problems == ()
    assert answer.size is not None
    assert answer.size == examine(None, text).size
