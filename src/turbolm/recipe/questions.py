"""Read and check the questions of `evaluation.tasks`. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from turbolm.errors import UserError
from turbolm.recipe.evaluation import ClozeTask, Evaluation
from turbolm.recipe.messages import describe
from turbolm.recipe.paths import use_path
from turbolm.recipe.sources.base import Gauge, Unusable, text_of
from turbolm.recipe.sources.files import read_utf8, split_lines
from turbolm.recipe.sources.jsonl import parse_line

_MAX_TOLD = 5  # bad lines of one file
_CONTEXTS = ("context", "question")


@dataclass(frozen=True)
class Question:
    """A question with its possible answers, of which the one at `answer` is right."""

    where: str  # file and line
    context: str
    choices: tuple[str, ...]
    answer: int


def check_files(evaluation: Evaluation, *, must_exist: bool) -> None:
    """Check all files of questions, and that those of the sets are there. Raises UserError with all problems.

    Without `must_exist`, files that are missing may be on another machine. Of sets behind URLs, the cache knows more.
    """
    problems = []
    for number, task in enumerate(evaluation.tasks):
        key = f"evaluation.tasks.{number}.path"
        try:
            path = use_path(task.path, key)
            if must_exist or path.is_file():
                read_questions(task, key)
        except UserError as error:
            problems.append(str(error))
    for number, source in enumerate(evaluation.sets if must_exist else ()):
        try:
            if not source.has_urls:
                source.under(f"evaluation.sets.{number}").files()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def read_questions(task: ClozeTask, key: str = "evaluation.tasks") -> list[Question]:
    """Return the questions of a task. Raises UserError with the lines that hold none, one in a line."""
    path = use_path(task.path, key)
    questions, problems = [], []
    if not path.is_file():
        raise UserError(f"{key}: there is no file {path}")
    try:
        for number, line in enumerate(split_lines(read_utf8(path, "JSON lines", Gauge())), start=1):
            if line and not line.isspace():
                try:
                    questions.append(_question(parse_line(line), f"{path}:{number}"))
                except Unusable as reason:
                    problems.append(f"{path}:{number}: {reason}")
    except UserError as error:
        problems.append(f"{key}: {error}")
    if len(problems) > _MAX_TOLD:
        problems = [*problems[:_MAX_TOLD], f"{path}: and {len(problems) - _MAX_TOLD} more lines"]
    if not questions and not problems:
        problems.append(f"{key}: {path} holds no questions")
    if problems:
        raise UserError("\n".join(problems))
    return questions


def _question(value: object, where: str) -> Question:
    """Return the question that one line holds. Raises Unusable, naming its key."""
    if not isinstance(value, Mapping):
        raise Unusable(f"expected a JSON object, got {type(value).__name__}")
    named = [key for key in _CONTEXTS if key in value]
    if len(named) != 1:
        raise Unusable(f"expected one of `context` and `question`, the keys are {', '.join(map(repr, value))}")
    context, choices = text_of(value[named[0]], named[0]), value.get("choices")
    if not isinstance(choices, list) or not choices:
        raise Unusable(f"choices: expected a list of texts, got {describe(choices)}")
    for number, choice in enumerate(choices):
        if not text_of(choice, f"choices.{number}").strip():
            raise Unusable(f"choices.{number}: expected some text, got {describe(choice)}")
    return Question(where, context, tuple(choices), _answer(value.get("answer"), choices))


def _answer(answer: Any, choices: list[str]) -> int:
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str) and choices.count(answer) == 1:
        return choices.index(answer)
    raise Unusable(
        f"answer: expected the number of the right choice, 0 to {len(choices) - 1}, or its text, got {describe(answer)}"
    )
