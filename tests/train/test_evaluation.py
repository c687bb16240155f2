"""Losses by source and set, and answers to questions: as plain Transformers computes them, one document at a time."""

from __future__ import annotations

import gc
import json
import math
import os
import sys
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from tests.train.harness import BINS_PER_BATCH, MODELS, SEQ_LEN, make_recipe
from tests.world import run_world
from turbolm.data.batch.loader import recipe_evaluation_set
from turbolm.data.batch.scored import TaskScore, read_scored
from turbolm.data.prepare.build import find_store, prepare
from turbolm.data.store.token_store import TokenStore, open_store
from turbolm.errors import UserError
from turbolm.models.build import build_model
from turbolm.recipe.schema import Recipe
from turbolm.train.evaluation import EvaluationResult, SetLoss, left_out_note
from turbolm.train.finish import _card_rows, _figures, summary
from turbolm.train.metrics import MetricsLog
from turbolm.train.run_directory import RunDirectory, run_directory

# Three, which two ranks cannot share evenly. Letters that are rare in the corpus are a token each, so a choice made of
# them is the worst one of a new model: the second answer is right, the third is wrong.
QUESTIONS = [
    {"context": "alpha beta gamma", "choices": ["delta", "epsilon zeta = x + y", "käppa ü"], "answer": 0},
    {"question": "1 alpha beta: ", "choices": ["qzxjq", "eta"], "answer": "eta"},
    {"context": "eta theta iota kappa " * 8 + "alpha", "choices": ["beta", "theta", "\nqzxjq"], "answer": 2},
]
ALONE = [{"context": "", "choices": ["alpha beta"], "answer": 0}]  # nothing to choose from


def write_lines(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def mixed_recipe(folder: Path, name: str, **sections: dict[str, Any]) -> Recipe:
    """A recipe of two sources, a set and two tasks."""
    make_recipe(folder)  # writes the corpus
    sources = [
        {"type": "jsonl", "path": str(folder / "corpus.jsonl")},
        {
            "type": "jsonl", "label": "second",
            "path": write_lines(folder / "second.jsonl", [{"text": f"{n} zeta" * (1 + n % 7)} for n in range(60)]),
        },
    ]  # fmt: skip
    own = [{"text": ""}, {"text": "alpha " * 50}, {"text": "= x + y"}]  # an empty one, and one that is cut
    evaluation = {
        "sets": [{"type": "jsonl", "label": "own", "path": write_lines(folder / "own.jsonl", own)}],
        "tasks": [
            {"name": "greek", "path": write_lines(folder / "greek.jsonl", QUESTIONS)},
            {"name": "alone", "path": write_lines(folder / "alone.jsonl", ALONE)},
        ],
    }
    sections["data"] = {"sources": sources, "validation": "20%", **sections.get("data", {})}
    sections["evaluation"] = {**evaluation, **sections.get("evaluation", {})}
    recipe = make_recipe(folder, **sections)
    return recipe.model_copy(update={"name": name})


def _evaluate(recipes: list[Recipe]) -> list[dict[str, Any]]:
    """What every recipe's new model gives, and its loss over the same batches without parts."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from tests.train.cells import build_plan_of_large_matrices, compiled_by
    from turbolm.engine.start import build_accelerator, control_group
    from turbolm.plan.machine import detect_machine
    from turbolm.reliability.stop import StopRequest, look
    from turbolm.train.build import build_engine
    from turbolm.train.context import Context
    from turbolm.train.evaluation import _Sums, evaluate, read_scored_together

    found = []
    for recipe in recipes:
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        machine, run = detect_machine(), run_directory(recipe)
        plan = build_plan_of_large_matrices(recipe, machine, int(os.environ["WORLD_SIZE"]))
        store = open_store(find_store(recipe) or "missing")
        accelerator = build_accelerator(plan.ds_config, device=plan.device, precision=plan.precision, timeout_sec=120)
        with compiled_by("aot_eager"):
            engine, attention = build_engine(accelerator, plan, store, RunDirectory(run.path))
        stop = StopRequest(run.stop_file, look(run.stop_file))
        context = Context(plan, run, store, machine, control_group(), stop, sys.stdout)
        result = evaluate(engine, context, attention, read_scored_together(context))
        assert result is not None and engine.training
        held_out = recipe_evaluation_set(recipe, store)
        engine.eval()
        with torch.no_grad():
            undivided = _Sums(engine, context, attention).over(held_out, store, None)[0] / held_out.num_targets
        found.append({**asdict(result), "undivided": undivided})
        engine.deepspeed_engine.destroy()
        gc.collect()
    return found


class Plain:
    """Plain Transformers with the recipe's first weights, one text at a time."""

    def __init__(self, recipe: Recipe, store: TokenStore):
        mapping = {**(recipe.model.config or {}), "vocab_size": store.vocab_size, "bos_token_id": 0, "eos_token_id": 0}
        config = AutoConfig.for_model(mapping.pop("model_type"), **mapping)
        self.model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        initial = build_model(recipe.model, config, seed=recipe.train.seed, attention="eager")
        self.model.load_state_dict(initial.state_dict())
        self.model.eval()
        self.tokenizer = Tokenizer.from_file(str(store.tokenizer_dir / "tokenizer.json"))
        self.store, self.recipe = store, recipe

    @torch.no_grad()
    def nats(self, tokens: list[int], num_context: int = 0) -> float:
        logits = self.model(torch.tensor([tokens[:-1]])).logits[0].double().log_softmax(-1)
        return float(-logits.gather(1, torch.tensor(tokens[1:])[:, None])[num_context:].sum())

    def nats_of_document(self, tokens: list[int]) -> tuple[float, int]:
        parts = [tokens[start : start + SEQ_LEN + 1] for start in range(0, len(tokens) - 1, SEQ_LEN)]
        return sum(map(self.nats, parts)), len(tokens) - 1

    def source(self, number: int) -> tuple[float, int]:
        first, end = self.store.source_documents("validation")[number]
        lengths = self.store.lengths("validation")
        documents = [self.store.read("validation", n, 0, int(lengths[n])).tolist() for n in range(first, end)]
        sums = np.array([self.nats_of_document(document) for document in documents])
        return float(sums[:, 0].sum() / sums[:, 1].sum()), int(sums[:, 1].sum())

    def questions(self, questions: list[dict[str, Any]]) -> tuple[float, float]:
        """Bits per byte of the right answers, and accuracy."""
        bits_per_byte, is_right = [], []
        for one in questions:
            context = self.tokenizer.encode(one.get("context", one.get("question")).rstrip(" ")).ids
            bits = []
            for choice in one["choices"]:
                blank = " " if context and not choice.startswith("\n") else ""
                tokens = self.tokenizer.encode(blank + choice).ids
                kept = context[len(context) + len(tokens) - SEQ_LEN :] if len(context + tokens) > SEQ_LEN else context
                bits.append(self.nats([0, *kept, *tokens], len(kept)) / math.log(2) / len(choice.encode()))
            answer = one["answer"] if isinstance(one["answer"], int) else one["choices"].index(one["answer"])
            bits_per_byte.append(bits[answer])
            is_right.append(bits.index(min(bits)) == answer)
        return float(np.mean(bits_per_byte)), float(np.mean(is_right))


def cell(folder: Path, model: str, stage: int, **execution: Any) -> Recipe:
    data = {"packing": "single"} if model == "mamba" else {}
    return mixed_recipe(
        folder,
        f"{model}-{stage}",
        model={"config": MODELS[model]},
        data=data,
        execution={"zero_stage": stage, "micro_batch": SEQ_LEN, **execution},
    )


def check(recipe: Recipe, found: dict[str, Any]) -> None:
    plain = Plain(recipe, open_store(find_store(recipe) or "missing"))
    sources = {"jsonl-0": plain.source(0), "second": plain.source(1)}
    own = ["alpha " * 50, "= x + y"]
    sums = np.array([plain.nats_of_document([0, *plain.tokenizer.encode(text).ids, 0]) for text in own])
    expected = {**sources, "own": (float(sums[:, 0].sum() / sums[:, 1].sum()), int(sums[:, 1].sum()))}
    assert {name: part["targets"] for name, part in found["losses"].items()} == {n: t for n, (_, t) in expected.items()}
    for name, (loss, _) in expected.items():
        assert found["losses"][name]["loss"] == pytest.approx(loss, rel=1e-5), (recipe.name, name)

    parts = [found["losses"][name] for name in sources]
    assert sum(part["targets"] for part in parts) == found["num_targets"]
    whole = sum(part["loss"] * part["targets"] for part in parts) / found["num_targets"]
    assert whole == pytest.approx(found["loss"], rel=1e-6)  # the whole is summed in fp32 within a micro-batch
    assert found["loss"] == found["undivided"], "to the bit"

    bits_per_byte, accuracy = plain.questions(QUESTIONS)
    assert 0 < accuracy < 1, "or equality means little"
    task = found["tasks"]["greek"]
    assert task == {"bits_per_byte": pytest.approx(bits_per_byte, rel=1e-5), "accuracy": accuracy, "questions": 3}
    alone = {"bits_per_byte": pytest.approx(plain.questions(ALONE)[0], rel=1e-5), "accuracy": None, "questions": 1}
    assert found["tasks"]["alone"] == alone


@pytest.mark.parametrize(
    ("world_size", "cells"),
    [
        (1, [("llama", 0), ("mamba", 0)]),
        (2, [("llama", 3)]),
        pytest.param(1, [("llama", stage) for stage in (1, 2, 3)], marks=pytest.mark.slow),
        pytest.param(2, [("gpt2", stage) for stage in (0, 1, 2, 3)] + [("mamba", 3)], marks=pytest.mark.slow),
    ],
)
def test_losses_and_answers_equal_plain_transformers(
    world_size: int, cells: list[tuple[str, int]], tmp_path: Path
) -> None:
    recipes = [cell(tmp_path, model, stage) for model, stage in cells]
    prepare(recipes[0])
    answers = run_world(world_size, _evaluate, recipes)
    assert all(answer == answers[0] for answer in answers), "all ranks agree"
    for recipe, found in zip(recipes, answers[0], strict=True):
        check(recipe, found)


@pytest.mark.slow
def test_ranks_that_share_sequences_and_compiled_models_score_alike(tmp_path: Path) -> None:
    recipes = [
        cell(tmp_path, "llama", 2, sequence_parallel=2),
        cell(tmp_path, "llama", 1, loss="chunked", compile="layers"),
    ]
    prepare(recipes[0])
    for recipe, found in zip(recipes, run_world(2, _evaluate, recipes)[0], strict=True):
        check(recipe, found)


def _train(recipes: list[Recipe]) -> list[int]:
    from tests.train.test_finish import _starts

    return _starts([(recipe, []) for recipe in recipes])


def test_a_run_reports_its_sets_and_tasks(tmp_path: Path) -> None:
    """Also one that holds nothing out, and one whose limit leaves questions out."""
    train = {"budget": 2 * BINS_PER_BATCH * SEQ_LEN}
    whole = mixed_recipe(tmp_path, "whole", train=train, logging={"sample_tokens": 0})
    limit = whole.evaluation.model_copy(update={"tokens": 20})
    only = whole.model_copy(
        update={"name": "only", "data": whole.data.model_copy(update={"validation": 0}), "evaluation": limit}
    )
    for recipe in (whole, only):
        prepare(recipe)
    assert run_world(1, _train, [whole, only])[0] == [0, 0]

    run = run_directory(whole).path
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((run / "results.json").read_text())
    last = lines[-1]
    assert {key: value for key, value in last.items() if key.startswith("eval/")} == {
        "eval/loss": results["eval_loss"],
        "eval/bits_per_byte": results["bits_per_byte"],
        **{f"eval/loss/{name}": part["loss"] for name, part in results["eval_losses"].items()},
        "eval/greek/bits_per_byte": results["eval_tasks"]["greek"]["bits_per_byte"],
        "eval/greek/accuracy": results["eval_tasks"]["greek"]["accuracy"],
        "eval/alone/bits_per_byte": results["eval_tasks"]["alone"]["bits_per_byte"],
    }
    assert list(results["eval_losses"]) == ["jsonl-0", "second", "own"]
    said, card = (run / "attempts/1/log.rank0.txt").read_text(), (run / "export/README.md").read_text()
    for name in ("loss of second", "loss of own", "task greek"):
        assert f"\n  {name:<16} " in said and f"| {name} | " in card
    assert "greek: the beginning of 1 contexts is cut, to fit data.seq_len" in said

    results = json.loads((run_directory(only).path / "results.json").read_text())
    assert "eval_loss" not in results and list(results["eval_losses"]) == ["own"]
    assert results["eval_tasks"]["greek"]["questions"] < 3
    said = (run_directory(only).path / "attempts/1/log.rank0.txt").read_text()
    assert "greek: 1 of 3 questions, by evaluation.tokens (20)" in said
    assert "own: its first 1 documents, by evaluation.tokens (20)" in said
    assert "own: its first" not in (run / "attempts/1/log.rank0.txt").read_text()


def test_a_set_tells_the_bad_documents_that_it_skips(tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    recipe = mixed_recipe(tmp_path, "bad", data={"on_bad_document": "skip"})
    store = open_store(prepare(recipe))
    whole = read_scored(recipe, store)
    own.write_text(own.read_text() + "{\n" + json.dumps({"other": "alpha"}) + "\n")
    scored = read_scored(recipe, store)
    assert whole is not None and scored is not None and scored.sets == whole.sets
    (note,) = [note for note in scored.notes if note not in whole.notes]
    assert note.startswith(f"own: skipped 2 bad documents, such as {own}:4: ")
    refusing = recipe.model_copy(update={"data": recipe.data.model_copy(update={"on_bad_document": "refuse"})})
    with pytest.raises(UserError, match=f"{own}:4: "):
        read_scored(refusing, store)


def test_the_mean_of_the_weights_is_told_where_nothing_is_held_out(tmp_path: Path) -> None:
    average = EvaluationResult(None, None, 0, {"own": SetLoss(2.5, 10)}, {"greek": TaskScore(1.25, 0.5, 4)})
    result = EvaluationResult(None, None, 0, {"own": SetLoss(2.0, 10)}, {"greek": TaskScore(1.0, 0.25, 4)}, average)
    assert result.metrics == {
        "eval/loss/own": 2.0, "eval/greek/bits_per_byte": 1.0, "eval/greek/accuracy": 0.25,
        "eval/average_loss/own": 2.5, "eval/average/greek/bits_per_byte": 1.25, "eval/average/greek/accuracy": 0.5,
    }  # fmt: skip
    log = MetricsLog(
        tmp_path / "metrics.jsonl", 1, Mock(**{"tokens_seen.return_value": 9}), None, None, StringIO(), Mock()
    )
    with patch("torch.distributed.get_rank", return_value=0):
        log.add_evaluation(8, result)
    assert log.terminal.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "step 8  own 2.0000",
        "step 8  greek: 1.0000 bits per byte of the right answers, accuracy 25.0%, 4 questions",
        "step 8  averaged weights  own 2.5000",
        "step 8  averaged weights  greek: 1.2500 bits per byte of the right answers, accuracy 50.0%, 4 questions",
    ]
    mean = {"first_step": 3, "count": 6, **_figures(average)}
    results = {"parameters": 1, "tokens_seen": 9, "steps": 8, "checkpoint": "c", "export": "e", **_figures(result)}
    shown = summary({**results, "weight_average": mean})
    for row in (
        "loss of own      2.0000 nats",
        "averaged weights the mean of 6 from",
        "loss of own, averaged 2.5000 nats",
    ):
        assert f"\n  {row}" in shown
    rows = _card_rows({**results, "weight_average": mean}, averaged=True)
    assert list(rows) == ["weights", "loss of own", "task greek"]
    assert rows["loss of own"].startswith("2.5000 nats/token") and rows["task greek"].startswith("1.2500 bits per byte")


def test_held_out_tokens_of_each_source(tmp_path: Path) -> None:
    """The first of all sources, which may leave the last ones out, or the first of each, to the same number."""
    first_of_all = mixed_recipe(tmp_path, "first-of-all", evaluation={"tokens": 60})
    of_each = mixed_recipe(tmp_path, "of-each", evaluation={"tokens": 60, "from_each_source": True})
    store = open_store(prepare(of_each))
    (_, middle), (_, end) = store.source_documents("validation")
    lengths = store.lengths("validation").tolist()
    assert recipe_evaluation_set(first_of_all, store).documents[0][1] < middle
    assert left_out_note(of_each, store) is None
    note = left_out_note(first_of_all, store)
    assert note is not None and note.startswith("no held-out loss of second: their documents come after the first 60 ")

    held_out = recipe_evaluation_set(of_each, store)
    for (first, stop), (begin, last) in zip(held_out.documents, [(0, middle), (middle, end)], strict=True):
        assert first == begin and sum(lengths[first:stop]) <= 30 < sum(lengths[first : stop + 1]) and stop < last
    documents = [number for one in held_out.documents for number in range(*one)]
    assert np.unique(held_out.sequences.document).tolist() == documents
    assert held_out.num_targets == sum(lengths[number] for number in documents)
    assert held_out.text_bytes == store.text_bytes("validation")[documents].sum()
