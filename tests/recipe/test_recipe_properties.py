"""Whatever the text, loading gives a recipe or a RecipeError, soon."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turbolm.recipe.document import MAX_FILE_BYTES
from turbolm.recipe.load import RecipeError, dump_recipe, load_recipe

BASE = """\
name: tiny
model:
  config: {model_type: llama, vocab_size: 512, rope_parameters: {rope_theta: 1e4}}
tokenizer: {train: {vocab_size: 512}}
data:
  seq_len: 128
  sources: [{type: stdlib}, {type: text, path: [a, b]}]
train: {budget: 2M, global_batch: 4096}
optimizer: {lr: 3e-4, betas: [0.9, 0.95]}
schedule: {name: wsd, warmup: 2%, decay: 100 steps}
execution: {zero_stage: 1, micro_batch: auto}
"""
PIECES = [
    ":",
    ": ",
    "- ",
    "{",
    "}",
    "[",
    "]",
    "&a ",
    "*a",
    "<<: *a\n",
    "!!int ",
    "!x ",
    "\n",
    "  ",
    "\t",
    "#",
    "'",
    '"',
    "|",
]
PIECES += [
    "---\n",
    "null",
    "~",
    "true",
    "off",
    "1e999",
    ".nan",
    "0x",
    "extends: a.yaml\n",
    "9" * 50,
    "-",
    "%",
    "?",
    "\ufeff",
    "\x85",
]
PIECES += [
    '"\\ud800"',
    "model: 3\n",
    "name: tiny\n",
    "é",
    "\U0001f600",
    "\x00",
    "seq_len: 100\n",
    "1_0k",
    "2Ki",
    "5 steps",
]

mutations = st.lists(
    st.tuples(st.integers(0, len(BASE)), st.integers(0, 20), st.sampled_from(PIECES) | st.text(max_size=8)), max_size=6
)
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def load_or_refuse(content: bytes, overrides: tuple[str, ...] = ()) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.yaml"
        path.write_bytes(content)
        start_sec = time.process_time()
        refusal = None
        try:
            recipe = load_recipe(path, overrides)
        except RecipeError as error:
            refusal = error
        if refusal is None:
            path.write_text(dump_recipe(recipe), encoding="utf-8")
            assert load_recipe(path) == recipe
        else:
            assert len(str(refusal).splitlines()) == len(refusal.problems) > 0
        assert time.process_time() - start_sec < 20


@quick
@given(mutations)
def test_mutated_recipes(changes: list[tuple[int, int, str]]) -> None:
    text = BASE
    for position, num_removed, piece in changes:
        text = text[:position] + piece + text[position + num_removed :]
    load_or_refuse(text.encode("utf-8", "surrogatepass"))


@quick
@given(st.binary(max_size=200))
def test_any_bytes(content: bytes) -> None:
    load_or_refuse(content)


@quick
@given(st.text(max_size=40), st.sampled_from(["", "optimizer.lr=", "model.config=", "data.sources.0.path=", "name="]))
def test_any_override(text: str, key: str) -> None:
    load_or_refuse(BASE.encode(), (key + text,))


UNITS = [
    "[",
    "{",
    "{a: ",
    "- ",
    "- a\n",
    "? ",
    "a: b\n",
    "x",
    "'",
    "&a ",
    "a,",
    "[a, ",
    "!",
    "%",
    "#",
    "\n",
    "- &a x\n",
]
UNITS += ["|\n ", '"\\', "*a ", "a: *a\n", "[[]],", "- - - -\n", "! ", "- !!x y\n", "\t", "é"]


@pytest.mark.parametrize("unit", UNITS)
def test_long_repetitions_end_soon(unit: str) -> None:
    size = MAX_FILE_BYTES // len(unit.encode())
    load_or_refuse((unit * size).encode())


@pytest.mark.parametrize("override", [".".join(["a"] * 5000) + "=1", "a=" + "[" * 5000, "a=" + "9" * 5000, "=", "a.=1"])
def test_long_overrides_end_soon(override: str) -> None:
    load_or_refuse(BASE.encode(), (override,))
