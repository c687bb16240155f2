"""The weights a run starts with: each rank of ZeRO-3 takes its own part of what plain Transformers loads or the seed
draws, and a start that has a checkpoint neither draws nor reads any."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from benchmarks import start_memory
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.models.small import small_config
from tests.train.harness import BINS_PER_BATCH, MODELS, SEQ_LEN, Cell, cell_recipe, make_recipe
from tests.train.test_exports import tied_but_with_a_head
from tests.world import run_world
from turbolm.checkpoint.manifest import list_checkpoints, remove_folder
from turbolm.data.prepare.build import prepare
from turbolm.errors import UserError
from turbolm.models.build import build_config, build_model
from turbolm.recipe.schema import Model, Recipe
from turbolm.report.metrics import read_lines
from turbolm.train.run_directory import run_directory

VOCAB = 131  # divides by no world size: the last rank's part of the embedding is padded
GROWN = 150
FRESH = ("llama", "gpt2", "gpt_oss")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders: in bf16, tied, of experts that are saved one by one, and with a head against its configuration."""
    made = {name: tmp_path_factory.mktemp("folders") / name for name in ("llama", "gpt2", "mixtral", "own-head")}
    for name in ("llama", "gpt2", "mixtral"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(small_config(name, vocab_size=VOCAB))
        model.to(torch.bfloat16 if name == "llama" else torch.float32).save_pretrained(made[name])
    tied_but_with_a_head(made["own-head"])
    file = made["own-head"] / "model.safetensors"  # plain Transformers reads no names of torch.compile
    save_file({name.removeprefix("_orig_mod."): value for name, value in load_file(file).items()}, file)
    return made


def _build(section: Model, num_tokens: int, stage: int, precision: str) -> Any:
    config = build_config(section, seq_len=16, vocab_size=num_tokens, bos_token_id=0, eos_token_id=0)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3},
                "bf16": {"enabled": precision == "bf16"}}  # fmt: skip
    return build_model(section, config, seed=3, attention="eager", sharded_by=settings if stage == 3 else None)


CELLS = [(0, "fp32"), (3, "fp32"), (3, "bf16")]


def _wrong_parts(folders: dict[str, Path], cells: list[tuple[int, str]]) -> list[str]:
    """Every tensor that differs from Transformers' on this rank."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    wrong, rank = [], dist.get_rank()

    def compare(what: str, model: Any, expected: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor]) -> None:
        ours = dict(model.named_parameters())
        if ours.keys() != expected.keys():
            wrong.append(f"{what}: {sorted(ours.keys() ^ expected.keys())}")
        for name, value in expected.items():
            part, flat = ours[name].detach(), value.reshape(-1)
            if hasattr(ours[name], "ds_tensor"):
                size = -(-flat.numel() // dist.get_world_size())
                flat = flat[rank * size : (rank + 1) * size]
                part = ours[name].ds_tensor[: flat.numel()]
            if not torch.equal(part.reshape(-1), flat.to(part.dtype)) or not ours[name].requires_grad:
                wrong.append(f"{what}: {name}")
        wrong.extend(f"{what}: buffer {n}" for n, b in model.named_buffers() if not torch.equal(b, buffers[n]))

    for stage, precision in cells:
        for name, folder in folders.items():
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            num_tokens = theirs.config.vocab_size
            expected = dict(theirs.named_parameters())
            ours = _build(Model(pretrained=str(folder)), num_tokens, stage, precision)
            compare(f"{name} {stage} {precision}", ours, expected, dict(theirs.named_buffers()))
            for tensor in ("model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight"):
                if tensor in expected:
                    rows = expected[tensor].detach()
                    more = (
                        rows.double().mean(0).float().expand(GROWN - num_tokens, -1) if num_tokens < GROWN else rows[:0]
                    )
                    expected[tensor] = torch.cat([rows, more])
            grown = _build(Model(pretrained=str(folder), resize_embeddings=True), GROWN, stage, precision)
            compare(f"grown {name} {stage} {precision}", grown, expected, dict(theirs.named_buffers()))
    for name in FRESH:
        section = Model(config={"model_type": name, **small_config(name, vocab_size=VOCAB).to_diff_dict()})
        whole = _build(section, VOCAB, 0, "fp32")
        for precision in ("fp32", "bf16"):
            sharded = _build(section, VOCAB, 3, precision)
            compare(f"fresh {name} {precision}", sharded, dict(whole.named_parameters()), dict(whole.named_buffers()))
    return wrong


@pytest.mark.parametrize(
    ("world_size", "cells"),
    [(2, CELLS[2:]), *(pytest.param(size, CELLS, marks=pytest.mark.slow) for size in (1, 2, 4))],
)
def test_every_rank_gets_its_part_of_what_transformers_loads(
    world_size: int, cells: list[tuple[int, str]], folders: dict[str, Path]
) -> None:
    """Of folders, with more rows too, and of fresh weights, which are drawn whole for comparison."""
    assert run_world(world_size, _wrong_parts, folders, cells) == [[]] * world_size


def _wrong_in_engines(folder: Path, models: dict[str, dict[str, Any]]) -> list[str]:
    """What the optimizer of each stage holds that is not the weights drawn whole, or read, rounded to bf16."""
    from tests.train.cells import build_cell

    wrong = []
    for name, model in models.items():
        for stage in (1, 2, 3):
            cell = Cell(name, zero_stage=stage, precision="bf16")
            recipe = cell_recipe(folder, cell).model_copy(update={"model": Model.model_validate(model)})
            with patch("tests.train.cells.cell_recipe", lambda *_, recipe=recipe: recipe):
                _, store, engine, _ = build_cell(folder, cell)
            keys = {"bos_token_id": store.manifest["bos_id"], "eos_token_id": store.manifest["eos_id"]}
            config = build_config(recipe.model, seq_len=SEQ_LEN, vocab_size=store.vocab_size, **keys)
            whole = build_model(recipe.model, config, seed=recipe.train.seed, attention="eager")
            expected, seen = dict(whole.named_parameters()), 0
            for fragment in engine.fragments():
                flat = expected[fragment.name].detach().reshape(-1)[fragment.start : fragment.start + fragment.numel]
                seen += flat.numel()
                if not torch.equal(fragment.view(fragment.flat), flat.bfloat16().float()):
                    wrong.append(f"{name} {stage}: {fragment.name}")
            for buffer, value in engine.module.named_buffers():
                if not torch.equal(value, whole.get_buffer(buffer)):
                    wrong.append(f"{name} {stage}: {buffer}")
            wrong += [f"{name} {stage}: nothing"] * (seen == 0)
            engine.deepspeed_engine.destroy()
    return wrong


def test_engines_of_every_stage_start_with_these_weights(tmp_path: Path) -> None:
    published = {"config": None, "pretrained": str(tied_but_with_a_head(tmp_path / "published"))}
    prepare(cell_recipe(tmp_path, Cell("any")))
    models = {"fresh": {"config": MODELS["llama"]}, "folder": published}
    assert run_world(2, _wrong_in_engines, tmp_path, models) == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("kind", start_memory.KINDS)
def test_no_rank_holds_the_whole_model(kind: str, tmp_path: Path) -> None:
    """`benchmarks/start_memory.py` at one size; before, the rise was 103% of the weights from a folder, 146% fresh."""
    start_memory.save_folders(tmp_path, [100])
    answers = run_world(4, start_memory.measure, kind, 100, tmp_path)
    limit = start_memory.limit(answers[0], processes=4)
    assert limit < 0.8 * answers[0]["weights"]
    assert [answer["rise"] for answer in answers if answer["rise"] > limit] == []
    assert min(answer["rise"] for answer in answers) > answers[0]["weights"] / 8, "something was measured"


def _refusal(folder: Path) -> str:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        _build(Model(pretrained=str(folder)), VOCAB, 3, "bf16")
    except UserError as error:
        return str(error)
    return ""


def test_what_one_rank_finds_in_its_part_every_rank_refuses(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((folders["llama"] / file).read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"][-1, -1] = torch.inf  # in the last rank's part
    save_file(weights, tmp_path / "model.safetensors")
    refusals = run_world(2, _refusal, tmp_path)
    assert refusals[0] == refusals[1]
    assert "has NaN or infinite values in 1 weights: lm_head.weight" in refusals[0]


def _train(recipes: list[Recipe], without_weights: bool) -> list[int]:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from turbolm.models import build
    from turbolm.train.worker import run_worker

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a checkpoint replaces these weights")

    codes = []
    for recipe in recipes:
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        gc.collect()
        if without_weights:
            with patch.object(build, "initialise_weights", fail), patch.object(build, "open_folder", fail):
                codes.append(run_worker(recipe))
        else:
            codes.append(run_worker(recipe))
    return codes


def _losses(recipe: Recipe) -> dict[int, float]:
    """The newest loss of every step."""
    lines = read_lines(run_directory(recipe).metrics)
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def test_a_resume_draws_and_reads_no_weights_and_trains_as_before(folders: dict[str, Path], tmp_path: Path) -> None:
    """Also where the folder's weights are gone, and its head is not the embedding that its configuration ties."""
    published = tied_but_with_a_head(tmp_path / "published")
    models: dict[str, tuple[dict[str, Any], int, str]] = {
        "fresh-1": ({"config": MODELS["llama"]}, 1, "bf16"),
        "folder-3": ({"config": None, "pretrained": str(published)}, 3, "fp32"),
    }
    recipes = [
        make_recipe(
            tmp_path,
            model=model,
            train={"budget": 4 * BINS_PER_BATCH * SEQ_LEN, "precision": precision},
            logging={"sample_tokens": 0, "every_steps": 1},
            checkpoint={"every": "1 steps", "keep_last": 9},
            execution={"zero_stage": stage},
        ).model_copy(update={"name": name})
        for name, (model, stage, precision) in models.items()
    ]
    prepare(recipes[0])
    assert run_world(2, _train, recipes, False)[0] == [0] * 2
    first = {recipe.name: _losses(recipe) for recipe in recipes}
    for recipe in recipes:
        run = run_directory(recipe)
        for step, checkpoint in list_checkpoints(run.checkpoints):
            if step > 2:
                remove_folder(checkpoint)
        run.results.unlink()
        run.metrics.unlink()
    (published / "model.safetensors").unlink()
    assert run_world(2, _train, recipes, True)[0] == [0] * 2
    for recipe in recipes:
        again = _losses(recipe)
        assert sorted(again) == [3, 4]
        assert again == {step: first[recipe.name][step] for step in again}, recipe.name
