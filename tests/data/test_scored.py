"""Questions and sets: what is read from their files, what is refused, and how it becomes documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tests.train.harness import make_recipe
from turbolm.data.batch.scored import ScoredTask
from turbolm.errors import UserError
from turbolm.launch.store import prepare_store
from turbolm.recipe.evaluation import ClozeTask, Evaluation, source_names
from turbolm.recipe.questions import Question, check_files, read_questions
from turbolm.recipe.schema import Recipe

GOOD = {"context": "a", "choices": ["b", "c"], "answer": 1}


def task(path: Path) -> ClozeTask:
    return ClozeTask(name="t", path=str(path))


def test_questions_are_read_in_both_layouts(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    other = {"question": "", "choices": ["x", "ü"], "answer": "ü", "id": 7}
    file.write_text("\n".join([json.dumps(GOOD), "", json.dumps(other, ensure_ascii=False)]))
    assert read_questions(task(file)) == [
        Question(f"{file}:1", "a", ("b", "c"), 1),
        Question(f"{file}:3", "", ("x", "ü"), 1),
    ]


BAD: dict[str, tuple[Any, str]] = {
    "text": ("word", "expected a JSON object, got str"),
    "no context": ({"text": "a"}, "expected one of `context` and `question`, the keys are 'text'"),
    "two contexts": (GOOD | {"question": "b"}, "expected one of `context` and `question`, the keys are 'context', "),
    "number": (GOOD | {"context": 1}, "field 'context' is int, not text"),
    "no choices": ({"context": "a", "answer": 0}, "choices: expected a list of texts, got nothing"),
    "choices": (GOOD | {"choices": "ab"}, "choices: expected a list of texts, got 'ab'"),
    "blank": (GOOD | {"choices": ["a", " "]}, "choices.1: expected some text, got ' '"),
    "choice": (GOOD | {"choices": ["a", 2]}, "field 'choices.1' is int, not text"),
    "beyond": (GOOD | {"answer": 2}, "answer: expected the number of the right choice, 0 to 1, or its text, got 2"),
    "true": (GOOD | {"answer": True}, "or its text, got true"),
    "other": (GOOD | {"answer": "d"}, "or its text, got 'd'"),
    "twice": (GOOD | {"choices": ["b", "b"], "answer": "b"}, "or its text, got 'b'"),
}


@pytest.mark.parametrize(("value", "message"), BAD.values(), ids=BAD)
def test_a_bad_line_is_named_with_its_key(value: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n{json.dumps(value)}\n")
    with pytest.raises(UserError) as refused:
        read_questions(task(file))
    assert str(refused.value).startswith(f"{file}:2: ") and message in str(refused.value)


def test_all_bad_files_are_named_before_anything_is_prepared(tmp_path: Path) -> None:
    bad, empty = tmp_path / "bad.jsonl", tmp_path / "empty.jsonl"
    bad.write_text("{\n" * 7)
    empty.write_text("\n")
    tasks = [{"name": name, "path": str(tmp_path / f"{name}.jsonl")} for name in ("bad", "empty", "absent")]
    sets = [{"type": "jsonl", "label": "own", "path": str(tmp_path / "none.jsonl")}]
    recipe = make_recipe(tmp_path, evaluation={"tasks": tasks, "sets": sets})
    with pytest.raises(UserError) as refused:
        prepare_store(recipe)
    lines = str(refused.value).splitlines()
    assert [line.partition(": ")[0] for line in lines[:6]] == [*(f"{bad}:{n}" for n in range(1, 6)), str(bad)]
    assert "not valid JSON" in lines[0] and lines[5].endswith("and 2 more lines")
    assert lines[6:8] == [
        f"evaluation.tasks.1.path: {empty} holds no questions",
        f"evaluation.tasks.2.path: there is no file {tmp_path / 'absent.jsonl'}",
    ]
    assert lines[8].startswith("evaluation.sets.0: no file matches") and len(lines) == 9
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UserError, match=r"empty\.jsonl holds no questions$"):  # a plan may be for another machine
        check_files(recipe.evaluation, must_exist=False)


def evaluation(**values: Any) -> Evaluation:
    return Evaluation.model_validate(values)


def test_names_are_unique(tmp_path: Path) -> None:
    twice = [{"name": "t", "path": "a"}, {"name": "t", "path": "b"}]
    with pytest.raises(ValidationError, match=r"another name for each of `tasks`, got 't' twice"):
        evaluation(tasks=twice)
    own = {"type": "text", "path": "a"}
    with pytest.raises(ValidationError, match=r"a `label` for each of `sets`"):
        evaluation(sets=[own])
    with pytest.raises(ValidationError, match=r"neither `weight` nor `min_tokens` for 'x'"):
        evaluation(sets=[{**own, "label": "x", "weight": 1}])
    sources = Recipe.model_validate(make_recipe(tmp_path).model_dump(mode="json")).data.sources
    assert source_names([sources[0], sources[0].model_copy(update={"label": "web"})]) == ["jsonl-0", "web"]
    alike = [sources[0], sources[0].model_copy(update={"label": "jsonl-0"})]
    assert source_names(alike) == ["0-jsonl-0", "1-jsonl-0"]


def test_scores_by_hand() -> None:
    """Two questions: the first is answered wrongly, since 8 bits over 4 bytes are fewer than 3 bits over 1."""
    bits = np.array([99, 3, 8, 4, 2], float)
    task = ScoredTask("t", 1, np.array([2, 2]), np.array([0, 1]), np.array([1, 4, 2, 2]))
    score = task.score(bits * np.log(2))
    assert (score.bits_per_byte, score.accuracy, score.questions) == (pytest.approx((3 + 1) / 2), 0.5, 2)


@pytest.mark.parametrize("lost", [np.nan, np.inf])
def test_a_question_with_a_loss_that_is_not_finite_is_answered_wrongly(lost: float) -> None:
    """A model that diverged has no answer; numpy's argmin would take the first choice, often the right one."""
    task = ScoredTask("t", 0, np.array([2, 2]), np.array([0, 0]), np.array([1, 1, 1, 1]))
    assert task.score(np.full(4, lost)).accuracy == 0
    assert task.score(np.array([1, lost, 1, 2])).accuracy == 0.5
