"""Every trick of recipes/_tricks says what it is, and the quickstart recipe plans with it or says why it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from turbolm.errors import UserError
from turbolm.plan.machine import Machine, check_machine
from turbolm.plan.plan import Plan, build_plan
from turbolm.plan.recipe_table import read_header, trick_files
from turbolm.recipe.contract import changed_keys, contract_of
from turbolm.recipe.load import load_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
QUICKSTART = FOLDER / "quickstart" / "config.yaml"
TRICKS = trick_files()
CPUS = Machine(0, None, None, num_cpus=2, cpu_has_bf16=True, memory_bytes=2**34)
GPUS = Machine(8, "NVIDIA H100 80GB HBM3", (9, 0), num_cpus=64, cpu_has_bf16=False, memory_bytes=2**40)

PROMISED = """muon lion ademamix soap adafactor cautious_adamw adamw_8bit wsd wsd_sqrt cosine inverse_sqrt restarts
    weight_decay_ramp strong_weight_decay momentum_ramp best_fit concat growth stages remix buckets batch_ramp bf16 fp8
    compile_layers compile_model chunked_loss recompute_full recompute_selective z_loss depth_scaled_init padded_vocab
    random_restarts no_clip clip_by_value zero0 zero2 zero3 offload_optimizer overlap""".split()
# On two CPUs: where it cannot work, and what is said then.
REFUSED = {"fp16": "fp16 needs a GPU", "zeropp": "need CUDA", "fp8": "needs a GPU", "liger_loss": "liger needs"}
# What it changes of the quickstart's contract: the first of the keys is enough. Nothing where it is missing.
LEARNED = {
    **dict.fromkeys("muon lion ademamix soap adafactor cautious_adamw adamw_8bit speedrun".split(), "optimizer.name"),
    **dict.fromkeys("normuon polar_express soap_muon hyperball speedrun-gpu".split(), "optimizer.name"),
    "cautious_weight_decay": "optimizer.cautious_weight_decay",
    "ema_nesterov": "optimizer.ema_nesterov",
    "split_cooldown": "schedule.decays.matrices",
    "wsd": "schedule.decay",
    "wsd_sqrt": "schedule.decay_shape",
    **dict.fromkeys("cosine linear_to_zero inverse_sqrt restarts".split(), "schedule.name"),
    "weight_decay_ramp": "schedule.weight_decay",
    "momentum_ramp": "schedule.momentum",
    "strong_weight_decay": "optimizer.weight_decay",
    "concat": "data.packing",
    **dict.fromkeys("growth remix stages buckets".split(), "data.length_schedule"),
    "batch_ramp": "train.batch_ramp",
    "z_loss": "train.z_loss",
    **dict.fromkeys(["depth_scaled_init", "zero_outputs"], "model.init"),
    "grouped_heads": "model.config.num_key_value_heads",
    "untied_embeddings": "model.config.tie_word_embeddings",
    "momentum_ramp_muon": "optimizer.name",
    "random_restarts": "train.random_restarts",
    "padded_vocab": "model.pad_vocab_to_multiple",
    **dict.fromkeys("no_clip clip_by_value".split(), "train.max_grad_norm"),
    "zero0": "train.precision",  # fp32 only
}


def plan_with(trick: Path, machine: Machine) -> Plan:
    recipe = load_recipe(QUICKSTART, [trick])
    check_machine(recipe, machine)
    return build_plan(recipe, machine)


def test_every_promised_trick_is_there() -> None:
    assert {path.stem for path in TRICKS} >= set(PROMISED)


@pytest.mark.parametrize("path", TRICKS, ids=lambda path: path.stem)
def test_the_header_says_what_it_is(path: Path) -> None:
    header = read_header(path)
    assert set(header) >= {"family", "changes", "source", "works", "claimed"}
    assert header["changes"] in ("what is learned", "same result, bitwise", "same result, to rounding")
    assert path.read_text().splitlines()[0].endswith(".")


@pytest.mark.parametrize("path", TRICKS, ids=lambda path: path.stem)
def test_the_quickstart_plans_with_it_on_cpus_or_says_why_not(path: Path) -> None:
    if path.stem in REFUSED:
        with pytest.raises(UserError, match=REFUSED[path.stem]):
            plan_with(path, CPUS)
        return
    plan, plain = plan_with(path, CPUS), build_plan(load_recipe(QUICKSTART), CPUS)
    changed = [key for key, *_ in changed_keys(contract_of(plain.recipe), contract_of(plan.recipe))]
    if path.stem in LEARNED:
        assert LEARNED[path.stem] in changed
    else:
        assert changed == []
    if read_header(path)["changes"].startswith("same result"):
        assert set(changed) <= {"train.precision"}
        ours, theirs = ((one.recipe.execution, one.recipe.evaluation) for one in (plan, plain))
        assert ours != theirs or path.stem == "zero2"


@pytest.mark.parametrize("path", TRICKS, ids=lambda path: path.stem)
def test_it_plans_on_a_node_of_gpus(path: Path) -> None:
    """With a batch that eight processes can share; the quickstart's first batches of a ramp are too small for them."""
    recipe = load_recipe(QUICKSTART, ["train.global_batch=16384", path])
    assert build_plan(recipe, GPUS).world_size == 8


@pytest.mark.parametrize("name", ["momentum_ramp_muon", "normuon", "polar_express", "soap_muon"])
def test_it_adds_to_muon_at_muons_learning_rates(name: str) -> None:
    muon, more = (load_recipe(QUICKSTART, [FOLDER / "_tricks" / f"{one}.yaml"]) for one in ("muon", name))
    assert (more.optimizer.lr, more.optimizer.lr_scales) == (muon.optimizer.lr, muon.optimizer.lr_scales)
    assert muon.optimizer.lr_scales.embeddings > 1, "and not the recipe's"


def test_a_recipe_takes_tricks_by_extending_them(tmp_path: Path) -> None:
    """The optimizer's own settings do not stay where a trick chooses another one; its learning rate does."""
    text = f"""
extends: [{QUICKSTART}, base.yaml, {FOLDER}/_tricks/ademamix.yaml, {FOLDER}/_tricks/growth.yaml]
name: fast
"""
    (tmp_path / "base.yaml").write_text("optimizer: {lr: 5e-3, eps: 1e-6, betas: [0.8, 0.9], weight_decay: 0.2}\n")
    (tmp_path / "fast.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "fast.yaml")
    assert recipe.optimizer.name == "ademamix"
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay, recipe.optimizer.eps) == (5e-3, 0.2, 1e-8)
    assert recipe.optimizer.betas == (0.9, 0.95, 0.999)
    assert recipe.data.length_schedule is not None and recipe.data.length_schedule.name == "growth"
    staged = load_recipe(tmp_path / "fast.yaml", [FOLDER / "_tricks" / "buckets.yaml", "optimizer.lr=1e-3"])
    assert staged.data.length_schedule is not None and staged.data.length_schedule.name == "buckets"
    assert staged.optimizer.lr == 1e-3
