"""A published folder is loaded whole or refused by name; nothing of it is drawn at random or left out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.models.small import small_config
from turbolm.errors import UserError
from turbolm.models.build import build_config, build_model
from turbolm.recipe.schema import Model

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "whole"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(small_config("llama", hidden_size=32, tie_word_embeddings=False)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def use(folder: Path) -> PreTrainedModel:
    section = Model(pretrained=str(folder))
    config = build_config(section, seq_len=16, vocab_size=128, bos_token_id=0, eos_token_id=0)
    return build_model(section, config, seed=0, attention="sdpa")


def rewrite(folder: Path, change: Callable[[Weights], Weights], **config: Any) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))


def without(*parts: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: value for name, value in weights.items() if not any(part in name for part in parts)}


def same(weights: Weights) -> Weights:
    return weights


def plus(name: str, value: torch.Tensor) -> Callable[[Weights], Weights]:
    return lambda weights: {**weights, name: value}


def renamed(rename: Callable[[str], str]) -> Callable[[Weights], Weights]:
    return lambda weights: {rename(name): value for name, value in weights.items()}


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (without("lm_head"), {}, r"lacks 1 of the model's weights: lm_head.weight; .*tie_word_embeddings: true"),
        (without("model.norm"), {}, r"lacks 1 of the model's weights: model.norm.weight; they would be random$"),
        (without("layers.1."), {}, r"lacks 9 of .*: model.layers.1.input_layernorm.weight, .* and 5 more"),
        (same, {"num_hidden_layers": 3}, "lacks 9 of"),
        (same, {"num_hidden_layers": 1}, "9 weights that LlamaForCausalLM has no place for: model.layers.1"),
        (same, {"vocab_size": 192}, r"lm_head.weight is \[128, 32\], \[192, 32\] by config.json, model.embed_tokens"),
        (plus("embed_out.weight", torch.zeros(128, 32)), {}, "1 weights that .* has no place for: embed_out.weight"),
        (plus("model.layers.0.self_attn.q_proj.bias", torch.zeros(32)), {}, "no place for: .*q_proj.bias"),
        (plus("model.layers.0.mlp.e_score_correction_bias", torch.zeros(4)), {}, "no place for"),
        (plus("model.norm.weight", torch.full((32,), torch.nan)), {}, "NaN or infinite values in 1 .*: model.norm"),
        (plus("model.norm.weight", torch.full((32,), -torch.inf)), {}, "NaN or infinite values in 1 weights"),
        (plus("module.model.norm.weight", torch.ones(32)), {}, "holds model.norm.weight for a second time, as module."),
        (plus("model.layers.0.self_attn.q_proj.lora_A.weight", torch.ones(4, 32)), {}, "adapter weights .*not merged"),
        (plus("model.norm.weight", torch.ones(32).to(torch.float8_e4m3fn)), {}, r"quantized weights \(model.norm"),
        (plus("model.norm.weight", torch.ones(32).to(torch.int8)), {}, r"quantized weights \(model.norm.weight is I8"),
        (same, {"quantization_config": {"quant_method": "gptq"}}, r"quantized weights \(gptq\), which cannot be"),
    ],
)  # fmt: skip
def test_weights_that_do_not_make_the_model_are_refused_by_name(
    change: Callable[[Weights], Weights], config: dict[str, Any], message: str, folder: Path
) -> None:
    rewrite(folder, change, **config)
    with pytest.raises(UserError, match=message) as error:
        use(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (same, ""),
        (renamed(lambda name: f"_orig_mod.{name}"), "stripped of a wrapper's part, such as _orig_mod.lm_head"),
        (renamed(lambda name: f"module._orig_mod.{name}"), "names were stripped"),
        (renamed(lambda name: f"base_model.model.{name}"), "names were stripped"),
        (renamed(lambda name: name.replace("layers.0.", "layers.0._orig_mod.")), "9 names were stripped"),
        (renamed(lambda name: name.removeprefix("model.")), ""),
        (renamed(lambda name: f"model.{name}"), ""),
        (plus("model.vision_tower.embeddings.weight", torch.zeros(4, 4)), "1 weights of other parts are skipped: mo"),
        (plus("value_head.weight", torch.zeros(1, 32)), "1 weights of other parts are skipped: value_head.weight"),
        (plus("model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(8)), ""),
        (plus("model.layers.0.self_attn.bias", torch.ones(1, 1, 8, 8, dtype=torch.uint8)), ""),
        (lambda weights: {name: value.double() for name, value in weights.items()}, ""),
    ],
)  # fmt: skip
def test_every_tensor_arrives(
    change: Callable[[Weights], Weights], told: str, folder: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(folder, change)
    assert_same(use(folder), load_file(whole / "model.safetensors"))
    out = capsys.readouterr().out
    assert told in out if told else "model.pretrained" not in out


def assert_same(model: PreTrainedModel, expected: Weights) -> None:
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def test_a_head_of_its_own_is_kept_whatever_the_configuration_says(folder: Path, whole: Path) -> None:
    rewrite(folder, same, tie_word_embeddings=True)
    model = use(folder)
    assert_same(model, load_file(whole / "model.safetensors"))
    assert model.config.tie_word_embeddings is False
    rewrite(folder, lambda weights: {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    model = use(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True
    rewrite(folder, without("lm_head"))
    assert use(folder).lm_head.weight.shape == (128, 32)


def test_shards_are_read_as_their_index_says(folder: Path, whole: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    files = {name: f"model-0000{1 + (name in names[9:])}-of-00002.safetensors" for name in names}
    for file in set(files.values()):
        save_file({name: weights[name] for name in names if files[name] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    with pytest.raises(UserError, match="has both model.safetensors and the shards of model.safetensors.index.json"):
        use(folder)
    (folder / "model.safetensors").unlink()
    assert_same(use(folder), weights)
    index.write_text(json.dumps({"weight_map": {name: file for name, file in files.items() if "-00001-" in file}}))
    with pytest.raises(UserError, match=r"lacks 12 of the model's weights: model\.layers\.0"):
        use(folder)
    index.write_text(json.dumps({"weight_map": files}))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="lacks 1 of the 2 files of its index: model-00002-of-00002.safetensors"):
        use(folder)


def test_other_folders_get_their_own_sentence(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read: "):
        use(folder)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match="a Git LFS pointer: run `git lfs pull`"):
        use(folder)
    file.rename(folder / "model.fp16.safetensors")
    with pytest.raises(UserError, match=r"has neither model.safetensors nor .*; it has model.fp16.safetensors"):
        use(folder)
    (folder / "model.fp16.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \*\.safetensors, .*it has pytorch_model.bin.*AutoModelForCausalLM"):
        use(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x/y"}')
    with pytest.raises(UserError, match=r"is an adapter \(LORA\) of x/y, not a model; merge it first"):
        use(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="is an adapter"):
        use(folder)


def test_experts_saved_one_by_one_are_joined(tmp_path: Path) -> None:
    """Transformers writes a mixture's experts apart; one that is missing is missed."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config("mixtral"))
    model.save_pretrained(tmp_path)
    assert_same(use(tmp_path), dict(model.named_parameters()))
    rewrite(tmp_path, without("layers.1.block_sparse_moe.experts.3.w1", "layers.1.mlp.experts.3.gate_proj"))
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        use(tmp_path)
