"""A recipe for a model that no recipe is there for: it loads, its plan holds, and its values follow from the model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from tests.adapt.conftest import Adapt
from tests.hub_stub import serve_hub
from tests.train.harness import make_recipe, train_in_world
from turbolm.data.prepare.build import prepare
from turbolm.data.prepare.tokenizer import save_tokenizer, train_tokenizer
from turbolm.errors import UserError
from turbolm.plan.summary import Summary, collect_summary
from turbolm.recipe.gpus import GPUS
from turbolm.recipe.load import load_recipe
from turbolm.recipe.schema import Recipe
from turbolm.train.run_directory import run_directory

SMALL = {
    "model_type": "olmo2",
    "architectures": ["Olmo2ForCausalLM"],
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": 512,
    "torch_dtype": "bfloat16",
}


def planned(file: str | Path) -> tuple[Recipe, Summary]:
    recipe = load_recipe(file)
    return recipe, collect_summary(recipe, str(file), (), lambda *_: {})


def write_model(folder: Path, **changes: Any) -> Path:
    """A published model without its weights: config.json and a tokenizer of 300 tokens."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SMALL | changes))
    make_recipe(folder)  # for its corpus
    save_tokenizer(train_tokenizer([(folder / "corpus.jsonl").read_text()], 300), folder)
    return folder


@pytest.mark.parametrize("model_type", ["olmo2", "mixtral", "mamba"])
def test_a_model_type_becomes_a_recipe_that_plans(model_type: str, adapt: Adapt) -> None:
    said = adapt(model_type)
    recipe, summary = planned(f"{model_type}-pretrain.yaml")
    size, plan = summary.size, summary.plan
    assert size is not None
    inner = size.total - size.embedding - size.head
    assert 10_000 < inner < 10_000_000, "small, for a CPU"
    assert recipe.train.budget == pytest.approx(20 * (size.total - size.idle), rel=0.05)
    assert plan.num_steps >= 50 and recipe.train.global_batch >= plan.world_size * recipe.data.seq_len
    packs = model_type != "mamba"
    assert recipe.data.packing == ("best_fit" if packs else "single")
    assert ("documents share sequences" in said) == packs
    assert ("recurrent state" in said) == (not packs)
    assert ("router loss of each packed sequence" in said) == (model_type == "mixtral")
    text = Path(f"{model_type}-pretrain.yaml").read_text()
    assert "arXiv 2203.15556" in text and "Step Law" in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_type_for_a_cluster_has_its_own_sizes_and_fits(adapt: Adapt) -> None:
    adapt("olmo2", cluster="8xA100-80GB", out=Path("node.yaml"))
    recipe, summary = planned("node.yaml")
    assert summary.size is not None and summary.memory is not None
    assert summary.size.total == pytest.approx(7e9, rel=0.06), "OLMo 2 7B, but for the vocabulary"
    assert recipe.train.budget == pytest.approx(20 * summary.size.total, rel=0.05)
    assert summary.memory.device_bytes <= 0.6 * GPUS["A100-80GB"].memory_bytes
    with pytest.raises(UserError, match="at ZeRO stage 3, and there are 24 GiB; name a larger --cluster"):
        adapt("olmo2", cluster="8xL4-24GB")
    assert not Path("olmo2-pretrain.yaml").exists()
    adapt("olmo2", cluster="h100x8_multinode", budget="20B", seq_len="1Ki", out=Path("many.yaml"))
    recipe, _ = planned("many.yaml")
    assert recipe.cluster.num_nodes == 2 and recipe.cluster.slurm is not None
    assert (recipe.train.budget, recipe.data.seq_len) == (20 * 10**9, 1024)


def test_a_published_configuration_is_kept_as_it_is(adapt: Adapt) -> None:
    folder = write_model(Path("published"))
    said = adapt("published")
    recipe, summary = planned("published-pretrain.yaml")
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        own = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert summary.size is not None and summary.size.total == own.num_parameters()
    assert (recipe.data.seq_len, recipe.tokenizer.path) == (256, "./published")
    assert "its own, 300 tokens" in said
    adapt("published/config.json", seq_len="64", out=Path("recipes/again.yaml"))
    assert load_recipe("recipes/again.yaml").model.full_config == recipe.model.full_config
    with pytest.raises(UserError, match="the model has positions for 256 tokens, fewer than 512"):
        adapt("published", seq_len="512", out=Path("long.yaml"))


def test_a_hub_name_is_pinned_and_no_weights_are_downloaded(
    adapt: Adapt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "files")
    with serve_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        commit = hub.create("some/Model-1B").commit_folder(folder, **{"model.safetensors": b"not asked for"})
        adapt("some/Model-1B")
        adapt("some/Model-1B", "continue")
        assert not [path for _, path, _ in hub.requests if "safetensors" in path]
    new, _ = planned("model-1b-pretrain.yaml")
    assert json.loads(Path("model-1b-pretrain.config.json").read_text()) == SMALL
    assert (new.tokenizer.path, new.tokenizer.revision) == ("some/Model-1B", commit)
    on, _ = planned("model-1b-continue.yaml")
    assert (on.model.pretrained, on.model.revision, on.tokenizer.revision) == ("some/Model-1B", commit, commit)
    assert on.optimizer.lr < new.optimizer.lr and on.train.budget < new.train.budget


@pytest.mark.slow
def test_three_architectures_that_no_recipe_uses_train_from_nothing(adapt: Adapt) -> None:
    """Each with one `adapt` and one `train`: a dense model, one with sliding windows, a mixture of experts."""
    for model_type in ("stablelm", "gemma3_text", "granitemoe"):
        adapt(model_type, budget="3k", seq_len="128")
        recipe = load_recipe(f"{model_type}-pretrain.yaml", ["evaluation.tokens=2k", "logging.sample_tokens=0"])
        prepare(recipe)
        assert train_in_world(recipe) == 0
        steps = [json.loads(line) for line in run_directory(recipe).metrics.read_text().splitlines()]
        losses = [step["train/loss"] for step in steps if "train/loss" in step]
        assert losses[0] == pytest.approx(math.log(4096), rel=0.2), "near a guess among all tokens"
        assert losses[-1] < losses[0]


def test_every_refusal_is_a_line_and_writes_nothing(adapt: Adapt) -> None:
    write_model(Path("published"))
    Path("notes.txt").write_text("x")
    Path("taken.yaml").write_text("mine")
    Path("empty").mkdir()

    def refused(*arguments: Any, **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            adapt(*arguments, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "did you mean the type 'olmo2'?" in refused("olmo-2")
    assert "taken.yaml exists and is not overwritten" in refused("olmo2", out=Path("taken.yaml"))
    assert Path("taken.yaml").read_text() == "mine"
    assert "empty has no config.json" in refused("empty")
    assert "notes.txt is no config.json" in refused("notes.txt")
    assert "--task continue starts from weights" in refused("olmo2", "continue")
    assert "--cluster: 'h100' is none of a100x8" in refused("olmo2", cluster="h100")
    assert "--budget: expected a count" in refused("olmo2", budget="many")
    assert "--budget: 100 tokens are less than one step" in refused("published", budget="100")
    assert "cannot be trained: " in refused(str(write_model(Path("odd"), hidden_size=47)))
    assert not list(Path().glob("*-pretrain.yaml"))
