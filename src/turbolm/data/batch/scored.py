"""Documents that are only evaluated: the questions of `evaluation.tasks`, and the documents of `evaluation.sets`.

They are few, so they are tokenized when a run starts and stay in memory. A question becomes a document for each of its
choices, of which only the choice's own tokens are scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from turbolm.data.batch.kept_sets import Documents, kept_documents
from turbolm.data.native import IntArray
from turbolm.data.order.packing import Sequences, evaluation_packing, pack
from turbolm.data.prepare.reader import Reader
from turbolm.data.prepare.special_tokens import load_text_tokenizer
from turbolm.data.store.token_store import TokenStore
from turbolm.errors import UserError
from turbolm.recipe.questions import Question, read_questions
from turbolm.recipe.schema import Recipe

_SHORTEST = 32  # tokens of a sequence that holds one question


class MemoryStore(TokenStore):
    """A token store of validation documents in memory; `ends` as in a shard's index."""

    def __init__(self, tokens: np.ndarray, ends: IntArray):
        files = {"tokens": {"file": "tokens"}, "index": {"file": "index"}}
        counts = {"train": {"documents": 0}, "validation": {"documents": len(ends)}}
        manifest = {"dtype": "<u4", "sources": [{}], "shards": [{"source": 0, **files, **counts}]}
        super().__init__(Path("memory"), manifest)
        index = np.stack([ends, np.zeros_like(ends)], axis=1)
        self._arrays = {"tokens": tokens.astype("<u4"), "index": np.ascontiguousarray(index, "<i8").ravel()}

    def _map(self, shard: int, part: str, dtype: str) -> np.ndarray:
        return self._arrays[part]


@dataclass(frozen=True)
class TaskScore:
    """`bits_per_byte` of the right answers, the mean over questions; `accuracy` is None if no question has a choice.

    The answer of the model is the choice with the fewest bits per byte; a question with a choice whose bits are not
    finite counts as wrong.
    """

    bits_per_byte: float
    accuracy: float | None
    questions: int

    def __str__(self) -> str:
        accuracy = "" if self.accuracy is None else f"accuracy {self.accuracy:.1%}, "
        return f"{self.bits_per_byte:.4f} bits per byte of the right answers, {accuracy}{self.questions:,} questions"


@dataclass(frozen=True)
class ScoredTask:
    """The questions of a task: `num_choices` and `answers`, int64 [num_questions]; `choice_bytes`, int64 [choices].

    Its choices are the labels from `first_label` on.
    """

    name: str
    first_label: int
    num_choices: IntArray
    answers: IntArray
    choice_bytes: IntArray

    def score(self, nats: np.ndarray) -> TaskScore:
        """Return the score for the summed loss of every label."""
        bits = nats[self.first_label : self.first_label + len(self.choice_bytes)] / math.log(2) / self.choice_bytes
        ends = np.cumsum(self.num_choices)
        starts = ends - self.num_choices
        given = [int(np.argmin(bits[start:end])) for start, end in zip(starts, ends, strict=True)]
        is_known = [bool(np.isfinite(bits[start:end]).all()) for start, end in zip(starts, ends, strict=True)]
        is_right = ((np.array(given) == self.answers) & is_known)[self.num_choices > 1]
        accuracy = float(is_right.mean()) if len(is_right) else None
        return TaskScore(float(bits[starts + self.answers].mean()), accuracy, len(self.answers))


@dataclass(frozen=True)
class ScoredSet:
    """A validation set: the documents with its label have `num_targets` positions."""

    name: str
    label: int
    num_targets: int


@dataclass(frozen=True)
class ScoredDocuments:
    """Packed documents of every set and task. `label` and `num_context`, int64 [num_documents]: what each counts for,
    and how many of its first positions are not scored."""

    tokens: np.ndarray
    ends: IntArray
    label: IntArray
    num_context: IntArray
    sequences: Sequences
    sets: tuple[ScoredSet, ...]
    tasks: tuple[ScoredTask, ...]
    notes: tuple[str, ...]

    @property
    def num_labels(self) -> int:
        """Return how many labels there are."""
        return int(self.label.max()) + 1

    @cached_property
    def store(self) -> MemoryStore:
        """Return the documents as a store."""
        return MemoryStore(self.tokens, self.ends)


def read_scored(recipe: Recipe, store: TokenStore, beat: Callable[[], None] = lambda: None) -> ScoredDocuments | None:
    """Return the documents of the recipe's sets and tasks, tokenized as those of `store`; None if it has none.

    `evaluation.tokens` limits the positions of each. `beat` is called from time to time. Raises UserError.
    """
    evaluation = recipe.evaluation
    if not (evaluation.sets or evaluation.tasks):
        return None
    collected = _Collected(recipe, store, beat)
    sets = [collected.add_set(number) for number in range(len(evaluation.sets))]
    tasks = [collected.add_task(number) for number in range(len(evaluation.tasks))]
    lengths = np.array([len(tokens) - 1 for tokens in collected.documents])
    return ScoredDocuments(
        tokens=np.concatenate(collected.documents),
        ends=np.cumsum(lengths + 1),
        label=np.array(collected.labels),
        num_context=np.array(collected.num_context),
        sequences=pack(lengths, _seq_len(recipe, int(lengths.max())), evaluation_packing(recipe.data.packing)),
        sets=tuple(sets),
        tasks=tuple(tasks),
        notes=tuple(collected.notes),
    )


def keep_sets(recipe: Recipe, store: TokenStore, listings: Mapping[int, list[Any]]) -> None:
    """Keep the documents of the sets behind URLs in the cache, by what `list_sets` found. Raises UserError."""
    collected = _Collected(recipe, store, lambda: None)
    for number, listing in listings.items():
        collected.documents_of(number, listing)


def _seq_len(recipe: Recipe, longest: int) -> int:
    """Return the length of the sequences: where each holds one document, no longer than the longest needs."""
    seq_len = recipe.data.seq_len
    if evaluation_packing(recipe.data.packing) == "best_fit" or recipe.execution.sequence_parallel > 1:
        return seq_len
    return min(seq_len, max(_SHORTEST, 1 << (longest - 1).bit_length()))


class _Collected:
    """Documents as they are added, with what each counts for."""

    def __init__(self, recipe: Recipe, store: TokenStore, beat: Callable[[], None]):
        self.documents: list[np.ndarray] = []
        self.labels: list[int] = []
        self.num_context: list[int] = []
        self.notes: list[str] = []
        self._recipe, self._store, self._beat = recipe, store, beat
        self._bos, self._eos = int(store.manifest["bos_id"]), int(store.manifest["eos_id"])
        self._tokenizer = load_text_tokenizer(store.tokenizer_dir, recipe.tokenizer.special_tokens_in_text)

    @property
    def _next_label(self) -> int:
        return self.labels[-1] + 1 if self.labels else 0

    def _add(self, tokens: list[int] | np.ndarray, label: int, num_context: int) -> None:
        self.documents.append(np.array(tokens, np.uint32))
        self.labels.append(label)
        self.num_context.append(num_context)
        self._beat()

    def add_set(self, number: int) -> ScoredSet:
        """Add the first documents of a set; at least one."""
        label = self._next_label
        documents = self.documents_of(number)
        for tokens in documents:
            self._add(tokens, label, 0)
        name = str(self._recipe.evaluation.sets[number].label)
        return ScoredSet(name, label, sum(len(tokens) - 1 for tokens in documents))

    def documents_of(self, number: int, listing: list[Any] | None = None) -> list[np.ndarray]:
        """Return the first documents of a set; at least one. Those behind URLs are kept (`kept_sets`)."""
        source = self._recipe.evaluation.sets[number]
        if source.has_urls:
            found = kept_documents(self._recipe, self._store, number, lambda: self._read_set(number), listing)
        else:
            found = self._read_set(number)
        documents, notes = found
        self.notes += [f"{source.label}: {note}" for note in notes]
        return documents

    def _read_set(self, number: int) -> Documents:
        source = self._recipe.evaluation.sets[number].under(f"evaluation.sets.{number}")
        documents, notes, left = list[np.ndarray](), list[str](), self._recipe.evaluation.tokens
        reader = Reader(source, on_bad=self._recipe.data.on_bad_document)
        for text in reader:
            if not text:
                continue
            tokens = [self._bos, *self._tokenizer.encode(text, add_special_tokens=False).ids, self._eos]
            if documents and len(tokens) - 1 > left:
                limit = f"by evaluation.tokens ({self._recipe.evaluation.tokens})"
                notes.append(f"its first {len(documents)} documents, {limit}")
                break
            left -= len(tokens) - 1
            documents.append(np.array(tokens, np.uint32))
            self._beat()
        if not documents:
            raise UserError(f"{source.key}: the set {source.label!r} holds no documents")
        if left_out := reader.left_out:
            notes.append(f"skipped {left_out.count} bad documents, such as {left_out.first[0]}")
        return documents, notes

    def add_task(self, number: int) -> ScoredTask:
        """Add the first questions of a task; at least one."""
        task, most = self._recipe.evaluation.tasks[number], self._recipe.evaluation.tokens
        key = f"evaluation.tasks.{number}"
        questions, first_label = read_questions(task, f"{key}.path"), self._next_label
        total, num_cut, taken = 0, 0, list[Question]()
        for question in questions:
            documents, is_cut = self._documents(question)
            size = sum(len(tokens) - 1 for tokens, _ in documents)
            if taken and total + size > most:
                break
            total, num_cut = total + size, num_cut + is_cut
            taken.append(question)
            for tokens, num_context in documents:
                self._add(tokens, self._next_label, num_context)
        if num_cut:
            self.notes.append(f"{task.name}: the beginning of {num_cut} contexts is cut, to fit data.seq_len")
        if len(taken) < len(questions):
            told = f"{len(taken)} of {len(questions)} questions, by evaluation.tokens ({most})"
            self.notes.append(f"{task.name}: {told}")
        return ScoredTask(
            name=task.name,
            first_label=first_label,
            num_choices=np.array([len(question.choices) for question in taken]),
            answers=np.array([question.answer for question in taken]),
            choice_bytes=np.array(
                [len(choice.lstrip(" ").encode()) for question in taken for choice in question.choices]
            ),
        )

    def _documents(self, question: Question) -> tuple[list[tuple[list[int], int]], bool]:
        """Return tokens and context length of each choice, and whether the context had to be cut at its start.

        Then all choices get the same context. Raises UserError for a choice longer than a sequence.
        """
        seq_len = self._recipe.data.seq_len
        encoded = [self._encode(question.context, choice) for choice in question.choices]
        longest = max(len(choice) for _, choice in encoded)
        if not all(choice for _, choice in encoded):
            raise UserError(f"{question.where}: a choice has no tokens of its own")
        if longest > seq_len:
            raise UserError(f"{question.where}: a choice has {longest} tokens, more than data.seq_len ({seq_len})")
        is_cut = any(len(context) + len(choice) > seq_len for context, choice in encoded)
        found = []
        for context, choice in encoded:
            kept = context[max(0, len(context) - (seq_len - longest)) :] if is_cut else context
            found.append(([self._bos, *kept, *choice], len(kept)))
        return found, is_cut

    def _encode(self, context: str, choice: str) -> tuple[list[int], list[int]]:
        """Return the tokens of context and choice, with a blank between them unless there is white space.

        They are tokenized together, as in a document; a token with characters of both belongs to the choice.
        """
        has_blank = not context or context[-1].isspace() or choice[0].isspace()
        text = context + choice if has_blank else f"{context} {choice}"
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        split = next((n for n, (_, end) in enumerate(encoding.offsets) if end > len(context)), len(encoding.ids))
        return encoding.ids[:split], encoding.ids[split:]
