"""A recipe from files: extends, overrides, the YAML dialect, and writing it back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from turbolm.recipe.load import RecipeError, dump_recipe, load_recipe
from turbolm.units import Span

MINIMAL = """\
name: tiny
model:
  config: {model_type: llama, hidden_size: 64}
tokenizer:
  train: {vocab_size: 512}
data:
  seq_len: 128
train:
  budget: 2M
  global_batch: 4096
"""


def write(folder: Path, **files: str) -> Path:
    """Files by name without suffix; returns the path of the first."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


def test_minimal_recipe_gets_every_default(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, a=MINIMAL))
    assert recipe.train.budget == 2_000_000
    assert recipe.optimizer.betas == (0.9, 0.95)
    assert recipe.schedule.warmup == Span(0.02, "share")
    assert recipe.data.sources[0].type == "stdlib"


def test_extends_merges_left_to_right_with_the_file_itself_last(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text(MINIMAL + "optimizer: {lr: 1e-3, eps: 1e-9}\n")
    (tmp_path / "sub" / "trick.yaml").write_text(
        "optimizer: {lr: 2e-3, betas: [0.8, 0.9]}\nlogging: {every_steps: 5}\n"
    )
    path = write(tmp_path / "sub", a="extends: [../base.yaml, trick.yaml]\noptimizer: {betas: [0.7, 0.9]}\n")
    recipe = load_recipe(path)
    assert recipe.optimizer.lr == 2e-3
    assert recipe.optimizer.eps == 1e-9
    assert recipe.optimizer.betas == (0.7, 0.9)
    assert recipe.logging.every_steps == 5


def test_null_in_the_child_unsets_what_the_base_chose(tmp_path: Path) -> None:
    path = write(tmp_path, a="extends: b.yaml\nmodel: {config: null, pretrained: some/folder}\n", b=MINIMAL)
    assert load_recipe(path).model.pretrained == "some/folder"


def test_a_base_may_itself_extend_and_be_reached_twice(tmp_path: Path) -> None:
    path = write(tmp_path, a="extends: [b.yaml, c.yaml]\n", b="extends: c.yaml\n", c=MINIMAL)
    assert load_recipe(path).name == "tiny"


def test_overrides_come_last_and_are_read_as_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, a=MINIMAL + "optimizer: {lr: 1}\n")
    recipe = load_recipe(
        path,
        ["optimizer.lr=3e-4", "train.budget=1B", "schedule.warmup=200 steps", "optimizer.betas=[0.8, 0.9]"]
        + ["data.sources=[{type: text, path: a}]", "data.sources.0.path=[x, y]", "train.max_grad_norm=off"]
        + ["model.config.rope_theta=5e5", "execution.cache_dir=a=b"],
    )
    assert recipe.optimizer.lr == 3e-4
    assert recipe.train.budget == 10**9
    assert recipe.schedule.warmup == Span(200, "steps")
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.data.sources[0].model_dump(exclude_none=True) == {"type": "text", "path": ("x", "y")}
    assert recipe.train.max_grad_norm is None
    assert recipe.model.config == {"model_type": "llama", "hidden_size": 64, "rope_theta": 500000.0}
    assert recipe.execution.cache_dir == "a=b"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"), ("on", "on"), ("yes", "yes"), ("no", "no"), ("y", "y"),
        ("true", True), ("false", False), ("null", None), ("~", None),
        ("1e-5", 1e-5), ("1E5", 1e5), ("1.", 1.0), (".5", 0.5), ("010", 10), ("0x1F", 31), ("0o17", 15), ("+3", 3),
        ("1_000", "1_000"), ("01:30:00", "01:30:00"), ("2020-01-01", "2020-01-01"), ("'1'", "1"), ("=", "="),
        ("!!str 12", "12"), ("!!float 3", 3.0),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(tmp_path: Path, text: str, value: object) -> None:
    recipe = load_recipe(write(tmp_path, a=MINIMAL), [f"model.config.x={text}"])
    assert recipe.model.config is not None
    assert recipe.model.config["x"] == value
    assert type(recipe.model.config["x"]) is type(value)


def test_another_schedule_takes_no_settings_of_the_one_before(tmp_path: Path) -> None:
    """From a file or from the command line; what the command line itself asks for is never dropped."""
    wsd = write(tmp_path, base=MINIMAL + "schedule: {name: wsd, warmup: 1%, decay: 30%, min_lr_ratio: 0}\n")
    cosine = write(tmp_path, a="extends: base.yaml\nschedule: {name: cosine}\n")
    assert load_recipe(cosine).schedule == load_recipe(wsd, ["schedule.name=cosine"]).schedule
    assert load_recipe(wsd, ["schedule={name: cosine}"]).schedule == load_recipe(cosine).schedule
    assert (str(load_recipe(cosine).schedule.warmup), load_recipe(cosine).schedule.min_lr_ratio) == ("1%", 0)
    assert str(load_recipe(cosine, ["schedule.name=wsd"]).schedule.decay) == "20%"
    assert str(load_recipe(cosine, ["schedule.decay=5%", "schedule.name=wsd"]).schedule.decay) == "5%"
    for overrides in (["schedule.decay=5%"], ["schedule.decay=5%", "schedule.name=linear"]):
        with pytest.raises(RecipeError, match=r"schedule\.decay: not a setting of (cosine|linear), but of wsd"):
            load_recipe(cosine, overrides)


def test_small_aliases_are_allowed(tmp_path: Path) -> None:
    text = MINIMAL + "schedule: {name: wsd, warmup: &w 5%, decay: *w}\n"
    assert load_recipe(write(tmp_path, a=text)).schedule.decay == Span(0.05, "share")


def test_dump_loads_back_to_an_equal_recipe(tmp_path: Path) -> None:
    overrides = [
        "schedule={name: wsd, warmup: 12.3456789%, decay: 100 steps}",
        "evaluation.every=1.5M",
        "train.max_grad_norm=off",
        "optimizer.lr=1e-07",
        "model.config.odd=['1e-5', 'off', 'true', '01:30:00', '', ' x ', 'null', '0o7', 1e-05, 3, null, \"a\\nb\"]",
        "data.sources=[{type: jsonl, path: [a, b]}, {type: stdlib}]",
    ]
    recipe = load_recipe(write(tmp_path, a=MINIMAL), overrides)
    text = dump_recipe(recipe)
    assert load_recipe(write(tmp_path, b=text)) == recipe
    assert yaml.safe_load(text)["schedule"]["warmup"] == "12.3456789%"
    assert dump_recipe(load_recipe(write(tmp_path, b=text))) == text


def test_str_of_the_error_has_one_line_a_problem(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, a='name: tiny\n"a\\nb": 1\n'))
    assert len(str(caught.value).splitlines()) == len(caught.value.problems) == 5  # four missing sections
    assert caught.value.problems[-1].line == 2
    assert caught.value.problems[-1].key == "'a\\nb'"


def test_loading_needs_no_torch() -> None:
    modules = (
        "turbolm.recipe.load, turbolm.recipe.contract, turbolm.plan.batch, turbolm.plan.flops, turbolm.recipe.schedules"
    )
    heavy = "{'torch', 'transformers', 'deepspeed', 'accelerate'}"
    code = f"import sys, {modules}; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
