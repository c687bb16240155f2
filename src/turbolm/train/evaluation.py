"""Losses and bits per byte on documents that are not trained on, and the scores of questions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from turbolm.checkpoint.agreement import gather_over
from turbolm.checkpoint.ranks import in_step
from turbolm.data.batch.collate import documents_at
from turbolm.data.batch.loader import EvaluationSet, GlobalBatch, evaluation_batches, recipe_evaluation_set
from turbolm.data.batch.scored import ScoredDocuments, TaskScore, read_scored
from turbolm.data.native import IntArray
from turbolm.data.store.token_store import TokenStore
from turbolm.engine.engine import Engine
from turbolm.errors import UserError
from turbolm.plan.batch import IGNORED_TARGET, slice_of_sequence
from turbolm.recipe.evaluation import source_names
from turbolm.recipe.schema import Recipe
from turbolm.reliability import heartbeat
from turbolm.train.context import Context
from turbolm.train.pinned import pinned_memory
from turbolm.train.step import micro_batch_loss


@dataclass(frozen=True)
class SetLoss:
    """The loss of a validation set, in nats per target token."""

    loss: float
    targets: int


@dataclass(frozen=True)
class EvaluationResult:
    """`loss` is in nats per target token; `bits_per_byte` counts every byte of the text and each document's end.

    Bits per byte is omitted if the tokenizer does not reproduce its text: some bytes have no token. Both are omitted if
    nothing is held out. `losses` are those of the parts of the held-out documents, by source where there are several,
    and of `evaluation.sets`; `tasks` are the scores of `evaluation.tasks`. `average`: of the mean of the weights.
    """

    loss: float | None
    bits_per_byte: float | None
    num_targets: int
    losses: Mapping[str, SetLoss] = field(default_factory=dict)
    tasks: Mapping[str, TaskScore] = field(default_factory=dict)
    average: EvaluationResult | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """Return everything by its name in metrics.jsonl."""
        found = self._named("eval/", "eval/")
        if self.average is not None:
            found |= self.average._named("eval/average_", "eval/average/")
        return {key: value for key, value in found.items() if value is not None}

    def _named(self, before_loss: str, before_task: str) -> dict[str, float | None]:
        found = {f"{before_loss}loss": self.loss, f"{before_loss}bits_per_byte": self.bits_per_byte}
        found |= {f"{before_loss}loss/{name}": one.loss for name, one in self.losses.items()}
        for name, score in self.tasks.items():
            found[f"{before_task}{name}/bits_per_byte"] = score.bits_per_byte
            found[f"{before_task}{name}/accuracy"] = score.accuracy
        return found


@dataclass(frozen=True)
class Labels:
    """Which of several sums each document counts for: `of_document`, int64 [num_documents], 0 to `count` - 1.

    The first `num_context` positions of a document, int64 [num_documents], are not scored.
    """

    of_document: IntArray
    count: int
    num_context: IntArray | None = None


def read_scored_together(context: Context) -> ScoredDocuments | None:
    """Return `read_scored` of rank 0, which alone needs the files, on every rank. Collective; raises UserError."""
    agree, recipe = gather_over(context.group), context.recipe
    if not (recipe.evaluation.sets or recipe.evaluation.tasks):
        return None
    read = (lambda: read_scored(recipe, context.store, heartbeat.advance)) if agree.rank == 0 else None
    found = [in_step(agree, read, UserError)]
    dist.broadcast_object_list(found, src=0, group=context.group)
    documents: ScoredDocuments | None = found[0]
    return documents


def left_out_note(recipe: Recipe, store: TokenStore) -> str | None:
    """Return a line about sources of which documents are held out, but none is evaluated."""
    if not recipe.data.validation or len(recipe.data.sources) == 1:
        return None
    held_out = recipe_evaluation_set(recipe, store).documents
    parts = zip(source_names(recipe.data.sources), store.source_documents("validation"), strict=True)
    left_out = [
        name for name, (first, end) in parts if first < end and not any(a < end and first < b for a, b in held_out)
    ]
    if not left_out:
        return None
    return (
        f"no held-out loss of {', '.join(left_out)}: their documents come after the first {recipe.evaluation.tokens} "
        "tokens (evaluation.tokens); set evaluation.from_each_source: true"
    )


@torch.no_grad()
def evaluate(
    engine: Engine, context: Context, attention: str, scored: ScoredDocuments | None = None
) -> EvaluationResult | None:
    """Evaluate the model in its current state. Collective; returns the same on every rank.

    Returns None if a rank was asked to stop meanwhile.
    """
    store, recipe = context.store, context.recipe
    sums = _Sums(engine, context, attention)
    held_out: EvaluationSet | None = None
    losses: dict[str, SetLoss] = {}
    tasks: dict[str, TaskScore] = {}
    engine.eval()
    try:
        if recipe.data.validation:
            held_out = recipe_evaluation_set(recipe, store)
            names, labels = _by_source(recipe, store, held_out)
            total, by_source = sums.over(held_out, store, labels)
            losses = _losses(names, by_source, _targets(held_out, labels))
        if scored is not None:
            labels = Labels(scored.label, scored.num_labels, scored.num_context)
            documents = EvaluationSet(scored.sequences, scored.sequences.num_positions, 0)
            _, nats = sums.over(documents, scored.store, labels)
            losses |= {
                one.name: SetLoss(float(nats[one.label]) / one.num_targets, one.num_targets) for one in scored.sets
            }
            tasks = {task.name: task.score(nats) for task in scored.tasks}
    except _Stopped:
        return None
    finally:
        engine.train()
    if held_out is None:
        return EvaluationResult(None, None, 0, losses, tasks)
    bits_per_byte = None if store.text_loss else total / math.log(2) / held_out.text_bytes
    return EvaluationResult(total / held_out.num_targets, bits_per_byte, held_out.num_targets, losses, tasks)


def _by_source(recipe: Recipe, store: TokenStore, held_out: EvaluationSet) -> tuple[list[str], Labels | None]:
    """Return the names of the sources, and which held-out document is from which; None if there is only one."""
    names = source_names(recipe.data.sources)
    if len(names) == 1:
        return names, None
    ends = np.array([end for _, end in store.source_documents("validation")])
    documents = np.arange(int(held_out.sequences.document.max()) + 1)
    return names, Labels(np.searchsorted(ends, documents, side="right"), len(names))


def _targets(documents: EvaluationSet, labels: Labels | None) -> IntArray:
    """Return how many targets count for each label, int64 [labels.count]."""
    if labels is None:
        return np.zeros(0, np.int64)
    slices = documents.sequences
    counts = np.zeros(labels.count, np.int64)
    np.add.at(counts, labels.of_document[slices.document], slices.length)
    return counts


def _losses(names: list[str], nats: np.ndarray, targets: IntArray) -> dict[str, SetLoss]:
    """Return the loss of each part that has targets."""
    parts = zip(names, nats, targets, strict=False)  # there are no parts with one source
    return {name: SetLoss(float(of_part) / int(count), int(count)) for name, of_part, count in parts if count}


class _Stopped(Exception):
    """A rank was asked to stop, and all of them know it."""


@dataclass(frozen=True)
class _Sums:
    """Sums losses over documents and ranks."""

    engine: Engine
    context: Context
    attention: str

    def over(self, documents: EvaluationSet, store: TokenStore, labels: Labels | None) -> tuple[float, np.ndarray]:
        """Return the summed loss in nats, and that of each label: float64 [labels.count], empty without labels.

        Without labels, and with them, the model gets the same batches, and the first sum is the same. Collective;
        raises _Stopped on every rank.
        """
        engine, plan, group = self.engine, self.context.plan, self.context.group
        device_sum = torch.zeros((), dtype=torch.float64, device=engine.device)  # read once, at the end
        by_label = torch.zeros(labels.count + 1 if labels else 1, dtype=torch.float64, device=engine.device)
        seq_len, size = documents.sequences.seq_len, plan.batch.micro_batch_bins
        for batch in evaluation_batches(
            documents,
            store,
            micro_batch_size=size * max(1, plan.batch.seq_len // seq_len),
            fixed_cu_seqlens=plan.recipe.execution.compile != "none",
            world_size=dist.get_world_size(),
            rank=dist.get_rank(),
            shared_by=plan.batch.sequence_parallel,
            memory=pinned_memory(engine.device),
        ):
            heartbeat.advance()
            if self._any_rank_asked_to_stop():
                raise _Stopped
            for number, micro_batch in enumerate(batch.micro_batches):
                if labels is None:
                    device_sum += micro_batch_loss(engine, micro_batch, self.attention)[1].double()
                    continue
                at = torch.from_numpy(self._label(batch, number, labels)).to(engine.device)
                _, nll, each = micro_batch_loss(engine, micro_batch, self.attention, per_token=True)
                device_sum += nll.double()
                by_label.index_add_(0, at, each.double())
            heartbeat.advance()
        loss_sum, label_sums = device_sum.cpu(), by_label.cpu()
        dist.all_reduce(loss_sum, group=group)
        if labels is not None:
            dist.all_reduce(label_sums, group=group)
        return float(loss_sum), label_sums.numpy()[:-1]

    def _label(self, batch: GlobalBatch, number: int, labels: Labels) -> IntArray:
        """Return the label of each position of a micro-batch, int64 [positions]; `labels.count` for padding.

        The targets of contexts are ignored from here on.
        """
        micro_batch, shared_by = batch.micro_batches[number], self.context.plan.batch.sequence_parallel
        documents = documents_at(batch.sequences, batch.indices[number])
        if shared_by > 1:
            documents = documents[:, slice_of_sequence(documents.shape[1], shared_by, dist.get_rank() % shared_by)]
        if labels.num_context is not None:  # such documents are not cut, so positions are those of the document
            is_context = micro_batch["position_ids"] < np.append(labels.num_context, 0)[documents]
            micro_batch["targets"][is_context] = IGNORED_TARGET
        return np.append(labels.of_document, labels.count)[documents].ravel()

    def _any_rank_asked_to_stop(self) -> bool:
        """Agree on the answer over all ranks. Collective, on the host."""
        asked = torch.tensor([self.context.stop.reason is not None], dtype=torch.int64)
        dist.all_reduce(asked, group=self.context.group)
        return bool(asked[0])
