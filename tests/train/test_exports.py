"""What is exported is what was trained: plain Transformers computes the run's own evaluation loss from it."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from tests.models.small import small_config
from tests.train.harness import BINS_PER_BATCH, MODELS, SEQ_LEN, make_recipe
from tests.world import run_world
from turbolm.checkpoint.export import export_checkpoint
from turbolm.checkpoint.manifest import list_checkpoints
from turbolm.data.prepare.build import find_store, prepare
from turbolm.data.store.token_store import open_store
from turbolm.errors import UserError
from turbolm.recipe.schema import Recipe
from turbolm.train.run_directory import run_directory

VOCAB = 300
SHAPE = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip


def tied_but_with_a_head(folder: Path) -> Path:
    """Published weights, saved by torch.compile's wrapper, whose configuration says tied; they hold another head."""
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=64, tie_word_embeddings=False, **SHAPE)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file({f"_orig_mod.{name}": value for name, value in weights.items()}, folder / "model.safetensors")
    edit_config(folder, tie_word_embeddings=True)
    return folder


def recipe_of(folder: Path, name: str, model: dict[str, Any]) -> Recipe:
    recipe = make_recipe(
        folder,
        model={"config": None, **model},
        train={"budget": 3 * BINS_PER_BATCH * SEQ_LEN},
        optimizer={"lr": 3e-2},
        logging={"sample_tokens": 0},
        checkpoint={"every": "100%"},
    )
    return recipe.model_copy(update={"name": name})


def test_plain_transformers_computes_the_runs_loss_from_its_export(tmp_path: Path) -> None:
    models: dict[str, dict[str, Any]] = {
        "tied-but-head": {"pretrained": str(tied_but_with_a_head(tmp_path / "published"))},
        "padded": {"config": {**MODELS["llama"], "tie_word_embeddings": True}, "pad_vocab_to_multiple": 64},
        "soft-capped": {"config": {"model_type": "gemma2", "final_logit_softcapping": 1.0,
                                   "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 1, **SHAPE}},
        "experts": {"config": {"model_type": "mixtral", "num_local_experts": 4, **SHAPE}},
    }  # fmt: skip
    recipes = [recipe_of(tmp_path, name, model) for name, model in models.items()]
    prepare(recipes[0])
    codes, different = run_world(2, _train, recipes)[0]
    assert codes == [0] * len(recipes)
    assert different == [], "initial weights whole and sharded"
    for recipe in recipes:
        run = run_directory(recipe)
        results = json.loads(run.results.read_text())
        model = AutoModelForCausalLM.from_pretrained(run.path / "export", dtype=torch.float32)
        loss, num_targets = loss_of_each_slice(model, recipe)
        assert num_targets == results["eval_targets"]
        assert loss == pytest.approx(results["eval_loss"], rel=1e-6), recipe.name
        is_tied = model.lm_head.weight is model.get_input_embeddings().weight
        assert is_tied == model.config.tie_word_embeddings == (recipe.name in ("padded", "soft-capped"))
    _, checkpoint = list_checkpoints(run_directory(recipes[0]).checkpoints)[-1]
    check_exports_again(checkpoint, run_directory(recipes[0]).model, tmp_path / "again")


def check_exports_again(checkpoint: Path, model_folder: Path, out: Path) -> None:
    """The checkpoint of a head of its own, with the configuration that an older version wrote; and a faulty writer."""
    code = {"AutoModelForCausalLM": "owner/model--modeling.Evil"}
    edit_config(model_folder, tie_word_embeddings=True, auto_map=code, custom_pipelines={"x": {"impl": "a.B"}})
    tokenizer_config = json.loads((model_folder / "tokenizer_config.json").read_text())
    (model_folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer_config, "auto_map": code}))
    export_checkpoint(checkpoint, model_folder, out, precision="fp32", card="turbolm")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    for path in out.glob("*.json"):
        assert not {"auto_map", "custom_pipelines"} & json.loads(path.read_text()).keys(), path
    clean_save = PreTrainedModel.save_pretrained

    def faulty_save(model: Any, *arguments: Any, **keywords: Any) -> None:
        model.model.norm.weight.data = model.model.norm.weight.data + 1
        clean_save(model, *arguments, **keywords)

    weights = (out / "model.safetensors").read_bytes()
    refused = pytest.raises(UserError, match=r"the export of model\.norm\.weight is not what was trained")
    with patch.object(PreTrainedModel, "save_pretrained", faulty_save), refused:
        export_checkpoint(checkpoint, model_folder, out, precision="bf16", card="turbolm")
    assert (out / "model.safetensors").read_bytes() == weights, "the older export stays"
    export_checkpoint(checkpoint, model_folder, out, precision="fp32", card="of turbolm, again")
    assert (out / "README.md").read_text() == "of turbolm, again"
    (out / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"changed since: README\.md; move that away"):
        export_checkpoint(checkpoint, model_folder, out, precision="fp32", card="turbolm")
    assert (out / "README.md").read_text() == "mine"


def edit_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


@torch.no_grad()
def loss_of_each_slice(model: Any, recipe: Recipe) -> tuple[float, int]:
    """Nats per token over the held-out documents, cut at seq_len, each slice alone."""
    store, total, num_targets = open_store(find_store(recipe) or "missing"), 0.0, 0
    for number in range(store.num_documents("validation")):
        length = int(store.lengths("validation", number, number + 1)[0])
        tokens = torch.from_numpy(np.asarray(store.read("validation", number, 0, length)).astype(np.int64))
        for start in range(0, length - 1, SEQ_LEN):
            part = tokens[start : start + SEQ_LEN + 1]
            logits = model(part[None, :-1]).logits[0].double()
            total += float(torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum"))
            num_targets += len(part) - 1
    return total / num_targets, num_targets


def _train(recipes: list[Recipe]) -> tuple[list[int], list[str]]:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from turbolm.train.worker import run_worker

    codes = []
    for recipe in recipes:
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        gc.collect()
        codes.append(run_worker(recipe))
    return codes, [*_different_when_sharded("fp32"), *_different_when_sharded("bf16")]


def _different_when_sharded(precision: str) -> list[str]:
    """The weights that ZeRO-3 draws otherwise.

    Constructors set some of apertus and openai-gpt; CTRL's head with a bias is drawn after its embedding, tied to it.
    """
    import deepspeed

    from turbolm.models.build import build_model
    from turbolm.recipe.schema import Model

    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3},
                "bf16": {"enabled": precision == "bf16"}}  # fmt: skip
    different = []
    for model_type in ("apertus", "openai-gpt", "ctrl", "llama"):
        keywords = {"seed": 1, "attention": "eager"}
        model = Model(config={"model_type": model_type})
        whole = build_model(model, small_config(model_type), **keywords)
        sharded = build_model(model, small_config(model_type), **keywords, sharded_by=settings)
        for name, parameter in sharded.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                if not torch.equal(parameter.data, whole.get_parameter(name).data.to(parameter.dtype)):
                    different.append(f"{precision} {name}")
    return different
