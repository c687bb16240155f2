"""500 recipes broken at random: each loads and plans, or is refused soon, and every line says which key or line.

The seeds are fixed. A failure names its number: `mutate(number, folder)` makes the same one again.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.recipe.mutations import byte_mutation, grammar_mutation, override_mutation

from turbolm.errors import UserError
from turbolm.launch.local import accelerate_config
from turbolm.plan.count import Answer
from turbolm.plan.overview import render_overview
from turbolm.plan.summary import collect_summary
from turbolm.plan.text import render_summary
from turbolm.recipe.load import dump_recipe, load_recipe
from turbolm.recipe.schema import Recipe
from turbolm.shipped import shipped

# A recipe with every schedule and section, which those of the repository do not have all.
EVERYTHING = """\
name: everything
model: {config: {model_type: gpt2, n_embd: 64, n_layer: 2, n_head: 2, n_positions: 512}, dropout: 0.1}
tokenizer: {train: {vocab_size: 512, sample_bytes: 1MB}}
data:
  sources:
    - {type: stdlib, label: code, weight: {0%: 3, 80%: 1}}
    - {type: jsonl, path: [a.jsonl, b/*.jsonl], field: body, weight: 1}
  seq_len: 512
  length_schedule: {name: growth, start: 64, over: 50%, num_lengths: 4, remix: 20%, remix_every: 5%}
  validation: 1%
train:
  budget: 4M
  global_batch: 8192
  batch_ramp: {start: 2048, over: 10%, num_levels: 4}
  z_loss: 1e-4
optimizer: {name: muon, lr: 2e-3, momentum: 0.95, lr_multipliers: {embeddings: 2}}
schedule:
  name: warm_restarts
  warmup: 2%
  cycle: 20%
  cycle_growth: 1.5
  weight_decay: {start: 1, end: 0.1, over: 50%, shape: cosine}
  momentum: {start: 0.85, end: 0.95, over: 300 steps}
cluster:
  num_nodes: 2
  gpu: A100-40GB
  gpus_per_node: 2
  slurm: {partition: gpu, time: 4h, seeds: [1, 2], setup: [ulimit -n 4096], environment: {NCCL_DEBUG: WARN}}
execution: {zero_stage: 1, micro_batch: 1024, process_group_timeout: 30m}
evaluation: {every: 10%, tokens: 100k}
checkpoint: {every: 300 steps, keep_last: 2, keep_every: 1M, keep_best: true}
"""
TEXTS = ("schedule: {name: wsd}\n", "name: x\nmodel: {config: {model_type: llama}}\n")
BESIDE = ("fifo.yaml", "folder.yaml", "loop.yaml", "link.yaml", "bytes.yaml")
KEY = re.compile(rf"\b({'|'.join(Recipe.model_fields)})(\.[a-z0-9_]+)+\b")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's recipes and what hostile `extends:` may find beside them."""
    folder = tmp_path_factory.mktemp("recipes")
    shutil.copytree(shipped("recipes"), folder, dirs_exist_ok=True)
    (folder / "everything").mkdir()
    (folder / "everything/config.yaml").write_text(EVERYTHING)
    for beside in [path.parent for path in sorted(folder.rglob("*.yaml"))]:
        if not (beside / "fifo.yaml").exists():
            os.mkfifo(beside / "fifo.yaml")
            (beside / "folder.yaml").mkdir()
            (beside / "loop.yaml").write_text("extends: [loop.yaml, config.yaml]\n")
            (beside / "link.yaml").symlink_to("link.yaml")
            (beside / "bytes.yaml").write_bytes(bytes(range(256)) * 600)
    return folder


def mutate(number: int, folder: Path) -> tuple[Path, Path, bytes, list[str]]:
    """Broken recipe `number`: the recipe to load, which file of it is other than it was, its content, overrides."""
    rng = random.Random(number)
    recipes = sorted(folder.glob("**/config.yaml"))
    recipe = rng.choice([*recipes, *[folder / "everything/config.yaml"] * 4, folder / "quickstart/config.yaml"])
    changed = recipe
    if recipe.parent.parent.name != folder.name and rng.random() < 0.2:
        changed = rng.choice(sorted(path for path in folder.glob("_*/*.yaml") if path.name not in BESIDE))
    text = changed.read_text()
    kind = rng.random()
    if kind < 0.55:
        return recipe, changed, grammar_mutation(rng, text).encode("utf-8", "surrogatepass"), []
    if kind < 0.8:
        return recipe, changed, byte_mutation(rng, text.encode()), []
    return recipe, changed, text.encode(), [override_mutation(rng, text) for _ in range(rng.choice([1, 1, 2, 3]))]


def plan(recipe: Path, overrides: Sequence[str]) -> None:
    """As `turbolm plan` does; what loads must also survive being written down."""
    loaded = load_recipe(recipe, overrides)
    summary = collect_summary(loaded, str(recipe), overrides, accelerate_config)
    render_summary(summary)
    render_overview(summary)
    written = recipe.parent / "written.yaml"
    written.write_text(dump_recipe(loaded), encoding="utf-8")
    assert load_recipe(written) == loaded


def names_a_place(line: str) -> bool:
    """A line of the file, a key, or an override of the command line."""
    return bool(
        re.match(r"\S+:\d+: ", line)
        or re.search(rf": (?:{'|'.join([*Recipe.model_fields, 'extends'])}): ", line)
        or KEY.search(line)
        or line.startswith("command line: ")
    )


class ExamineHere:
    """Ask Transformers in this process, and count the seconds that it takes."""

    def __init__(self) -> None:
        from turbolm.models.count import examine

        self.examine, self.seconds = examine, 0.0

    def __call__(self, request: str) -> Answer:
        start_sec = time.process_time()
        try:
            return self.examine(**json.loads(request))
        finally:
            self.seconds += time.process_time() - start_sec


@pytest.fixture
def examiner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ExamineHere:
    monkeypatch.chdir(tmp_path)  # where the answers are kept
    here = ExamineHere()
    monkeypatch.setattr("turbolm.plan.count._run_examiner", here)
    return here


def check(numbers: range, folder: Path, examiner: ExamineHere) -> None:
    refused = 0
    for number in numbers:
        recipe, changed, content, overrides = mutate(number, folder)
        before = changed.read_bytes()
        changed.write_bytes(content)
        start_sec, wall_sec = time.process_time() - examiner.seconds, time.monotonic()
        try:
            plan(recipe, overrides)
        except UserError as error:
            refused += 1
            lines = str(error).splitlines()
            vague = [line for line in lines if not names_a_place(line)]
            assert lines and not vague, f"number {number}: names no key and no line: {vague}"
        except Exception as error:
            raise AssertionError(f"number {number} ({recipe}, {changed}, {overrides}): {error!r}") from error
        finally:
            changed.write_bytes(before)
        # not how fast it is, but that nothing grows without bound: loaded machines are many times slower
        assert time.process_time() - examiner.seconds - start_sec < 20, f"number {number} took too long"
        assert time.monotonic() - wall_sec < 120, f"number {number} hung"
    assert refused > len(numbers) / 2


def test_what_is_not_broken_is_planned(folder: Path) -> None:
    for recipe in sorted(folder.glob("**/config.yaml")):
        plan(recipe, [])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.length_schedule.remix_every=1"], "may come back at most 1000 times in train.budget, as with 0.1%"),
        (["data.length_schedule.num_lengths=1000000000"], "num_lengths: must be at most 100"),
        (["train.batch_ramp.num_levels=1000000000"], "num_levels: must be at most 1000"),
        (["data.seq_len=999999999989", "train.global_batch=999999999989"], "data.seq_len: must be at most 16777216"),
        (["data.seq_len=8388593", "train.global_batch=8388593"], "too few for 4 processes; use at most 1 processes"),
        (["data.sources.0.weight={0%: 0, 80%: 0}", "data.sources.1.weight=0"], "every weight is 0 from 0 tokens on"),
        (["model.config.model_type=lama"], "knows no causal language model 'lama'; did you mean 'llama'?"),
        (["execution.process_group_timeout=99999999999d"], "process_group_timeout: must be at most 31536000"),
        (["extends=/etc/shadow"], "extends: can only be set in a file"),
    ],
)
def test_what_would_take_forever_or_divide_by_nothing(overrides: list[str], message: str, folder: Path) -> None:
    start_sec, wall_sec = time.process_time(), time.monotonic()
    with pytest.raises(UserError) as caught:
        plan(folder / "everything/config.yaml", overrides)
    assert message in str(caught.value)
    assert time.process_time() - start_sec < 20
    assert time.monotonic() - wall_sec < 120


def test_of_very_many_unknown_keys_the_first_are_told(folder: Path) -> None:
    recipe = folder / "everything/config.yaml"
    before = recipe.read_text()
    recipe.write_text(before + "".join(f"k{number}: 1\n" for number in range(3000)))
    try:
        with pytest.raises(UserError) as caught:
            load_recipe(recipe)
    finally:
        recipe.write_text(before)
    lines = str(caught.value).splitlines()
    assert len(lines) == 101
    assert lines[-1].endswith("k100: refused as well, and so are 2899 more keys")


def test_only_recipes_are_extended(tmp_path: Path) -> None:
    """A message may quote what it finds, so no other kind of file is read; a pipe would never answer."""
    (tmp_path / "secret").write_text("hunter2: 1\n")
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "a.yaml").write_text("extends: [secret, pipe.yaml]\n")
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "a.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("a.yaml:1: extends: expected a file whose name ends with .yaml or .yml, got 'secret'")
    assert "a.yaml:1: extends: not a regular file: " in lines[1]
    assert "hunter2" not in str(caught.value)


def test_broken_recipes(folder: Path, examiner: ExamineHere) -> None:
    check(range(100), folder, examiner)


@pytest.mark.slow
def test_broken_recipes_all(folder: Path, examiner: ExamineHere) -> None:
    check(range(100, 500), folder, examiner)
