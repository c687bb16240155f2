"""A model folder made by someone else: its weights are read from safetensors alone, and none of its code runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.canary import assert_it_sings, pickles
from turbolm.checkpoint.export import tokenizer
from turbolm.errors import UserError
from turbolm.models.build import build_config, build_model
from turbolm.plan.count import read_model_config, size_model
from turbolm.recipe.schema import Model

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}
AUTO_MAP = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModelForCausalLM": "evil.EvilModel",
    "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration, weights and a tokenizer."""
    from tokenizers import Tokenizer, models

    folder = tmp_path_factory.mktemp("models") / "whole"
    model = build(Model(config=CONFIG))
    model.save_pretrained(folder)
    Tokenizer(models.BPE({"a": 0, "b": 1, "</s>": 2}, [])).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def build(model: Model) -> torch.nn.Module:
    config = build_config(model, seq_len=32, vocab_size=300, bos_token_id=0, eos_token_id=0)
    return build_model(model, config, seed=0, attention="eager")


def use(folder: Path) -> torch.nn.Module:
    return build(Model(pretrained=str(folder)))


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | changes))


def plant_code(folder: Path, canary: Path) -> None:
    """Code for everything that Transformers could import from a folder."""
    sing = f"import os\nos.mkdir({str(canary)!r})\n"
    for name in (
        "evil.py",
        "modeling_llama.py",
        "configuration_llama.py",
        "custom_generate/generate.py",
        "__init__.py",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(sing)
    edit(folder / "config.json", auto_map=AUTO_MAP)
    edit(folder / "tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="EvilTokenizer")
    edit(folder / "generation_config.json", auto_map=AUTO_MAP, custom_generate=str(folder))


@pytest.mark.parametrize("kind", ["pickle", "torch.save", "text"])
def test_pickled_weights_are_not_read(kind: str, folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    expected = {name: value.clone() for name, value in use(folder).state_dict().items()}
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "model.pt"):
        (folder / name).write_bytes(pickles(canary)[kind])
    for name, value in use(folder).state_dict().items():
        assert torch.equal(value, expected[name])
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model has no \*\.safetensors, the only weights that are read"):
        use(folder)
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_bytes(pickles(canary)[kind])
        with pytest.raises(UserError, match="model"):
            use(folder)
    with pytest.raises(UserError, match=r"config\.json"):
        read_model_config(_recipe(folder), "recipe.yaml")
    assert_it_sings(canary)


@pytest.mark.parametrize("name", ["../outside.safetensors", "pytorch_model.bin", "/etc/hostname", 3])
def test_an_index_names_safetensors_of_its_folder_alone(name: object, folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    shutil.copy(folder / "model.safetensors", tmp_path / "outside.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickles(canary)["torch.save"])
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(use_names(folder), name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="which is no safetensors file of its folder"):
        use(folder)
    (folder / "model.safetensors.index.json").write_bytes(pickles(canary)["text"])
    with pytest.raises(UserError, match="is no index of weights"):
        use(folder)
    assert_it_sings(canary)


def use_names(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "model-00001-of-00001.safetensors", framework="pt") as file:
        return list(file.keys())


def test_code_of_a_known_model_type_is_ignored(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    plant_code(folder, canary)
    assert type(use(folder)).__module__ == "transformers.models.llama.modeling_llama"
    with pytest.raises(UserError, match="Transformers cannot read the tokenizer"):
        tokenizer(folder)
    edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    tokenizer(folder)
    assert_it_sings(canary)


def test_an_unknown_model_type_with_code_is_refused(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    plant_code(folder, canary)
    edit(folder / "config.json", model_type="evil", architectures=["EvilModel"])
    with pytest.raises(UserError, match=r"config\.json is no configuration"):
        use(folder)
    config, _ = read_model_config(_recipe(folder), "recipe.yaml")
    assert config is not None
    with pytest.raises(UserError, match="knows no causal language model 'evil'"):
        size_model(config, tmp_path)
    assert_it_sings(canary)


def test_a_kernel_named_by_the_configuration_is_not_fetched(folder: Path) -> None:
    """`attn_implementation: owner/name` would download and run code; the recipe alone chooses the kernel."""
    edit(folder / "config.json", attn_implementation="evil/kernel", _attn_implementation="evil/kernel")
    assert use(folder).config._attn_implementation == "eager"


def _recipe(folder: Path) -> object:
    from tests.train.harness import make_recipe

    return make_recipe(folder.parent, model={"config": None, "pretrained": str(folder)})
