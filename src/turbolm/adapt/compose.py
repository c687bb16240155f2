"""Choose the values of an adapted recipe, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from turbolm.adapt.render import Entries, Entry, plain
from turbolm.adapt.settings import choose_batch, choose_budget, choose_execution, choose_lr, choose_seq_len
from turbolm.adapt.subject import Subject, Task, as_path
from turbolm.adapt.target import Target, machine_of
from turbolm.errors import UserError
from turbolm.plan.count import ModelSize, examine_model
from turbolm.plan.plan import build_plan
from turbolm.recipe.schema import Recipe
from turbolm.units import format_count, parse_count

_VOCABULARY = {"cpu": 4096, "cuda": 32768}  # of a tokenizer that is trained
_DRAFT_ROWS = 2**20  # a batch that is large enough for any number of processes


@dataclass(frozen=True)
class Case:
    """The model, what to do with it and where, and what is known about it."""

    subject: Subject
    task: Task
    target: Target
    found: dict[str, Any]  # what `turbolm.models.preflight.examine` returned
    tokenizer: int | str  # how many tokens the model's own tokenizer has, or why it cannot be used


def compose(case: Case, seq_len: int | None, budget: int | None) -> Entries:
    """Return the recipe; `seq_len` and `budget` are the user's. Raises UserError where they do not fit."""
    task, target, found = case.task, case.target, case.found
    seq_len, seq_len_why = choose_seq_len(seq_len, found["num_positions"], target.device)
    head: Entries = {
        "name": Entry(f"{case.subject.name}-{task}"),
        "model": _model(case),
        "tokenizer": _tokenizer(case),
        "data": _data(found["packing"], seq_len, seq_len_why),
    }
    draft = _draft(head, target, seq_len)
    size = examine_model(draft, "").size
    assert size is not None, "its config.json was read before"
    execution, target, fits = choose_execution(draft, target, size)
    world_size = build_plan(_draft(head, target, seq_len), machine_of(draft)).world_size
    budget, budget_why = choose_budget(budget, task, size.total - size.idle)
    batch, batch_why = choose_batch(size, budget, seq_len, world_size)
    lr, lr_why = choose_lr(task, size, budget)
    if found["one_sequence"]:
        execution["micro_batch"] = seq_len
    reasons = {"zero_stage": fits, "micro_batch": "one sequence: those of a micro-batch affect each other"}
    small_run = {"evaluation": {"tokens": Entry("100k", "of held-out text, at most")}} if target.device == "cpu" else {}
    return {
        **head,
        "train": {
            "budget": Entry(_count(budget), f"{_parameters(size)}: {budget_why}"),
            "global_batch": Entry(batch, f"{batch // seq_len} sequences: {batch_why}"),
        },
        "optimizer": {
            "name": Entry("adamw"),
            "lr": Entry(lr, lr_why),
            "betas": Entry([0.9, 0.95], "as weight decay and clipping at 1.0: GPT-3 (arXiv 2005.14165, appendix B)"),
            "weight_decay": Entry(0.1),
        },
        "schedule": {
            "name": Entry("cosine"),
            "warmup": Entry("2%" if task == "pretrain" else "1%"),
            "min_lr_ratio": Entry(0.1, "to a tenth of the peak (arXiv 2203.15556, section 3)"),
        },
        **({"cluster": Entry(target.cluster)} if target.cluster else {}),
        "execution": {name: Entry(value, reasons.get(name, "")) for name, value in execution.items()},
        **small_run,
    }


def _model(case: Case) -> Entries:
    subject, found, rope_factors = case.subject, case.found, case.found["rope_factors"]
    entries: dict[str, Any] = {}
    has_rows = not isinstance(case.tokenizer, int) or case.tokenizer <= found["vocab_size"]
    if case.task == "continue":
        entries["pretrained"] = Entry(subject.pretrained)
        if subject.revision:
            entries["revision"] = Entry(subject.revision, "as it is on the hub today")
        if not has_rows:
            entries["resize_embeddings"] = Entry(True, "the tokenizer has more tokens than the model")
    elif subject.config_file is not None:
        entries["config_file"] = Entry(str(subject.config_file), "names under `config` are laid over it")
        if not has_rows:
            rows = Entry(case.tokenizer, "the tokenizer has more tokens than the file has rows")
            entries["config"] = {"vocab_size": rows}
    else:
        sizes, why = found["sizes"], "the sizes that the type has by default; every other setting is left to it"
        if case.target.device == "cpu":
            sizes, why = found["small"], "with small sizes, for a CPU; adapt it to a --cluster for the type's own"
        if (found["pad_token_id"] or 0) >= _VOCABULARY[case.target.device] and "pad_token_id" not in sizes:
            sizes = sizes | {"pad_token_id": None}  # the type's default lies outside of the vocabulary
        entries["config"] = {n: Entry(size, why if n == "model_type" else "") for n, size in sizes.items()}
    if rope_factors != "by_length":
        entries["rope_factors"] = Entry(rope_factors, "the same for every length, so that documents can be packed")
    return entries


def _tokenizer(case: Case) -> Entries:
    subject = case.subject
    if isinstance(case.tokenizer, int):
        if subject.revision is not None:
            return {"path": Entry(subject.given), "revision": Entry(subject.revision)}
        assert subject.tokenizer is not None
        return {"path": Entry(as_path(subject.tokenizer), "the model's own")}
    if case.task == "continue":
        raise UserError(f"{subject.given}: --task continue needs the model's own tokenizer: {case.tokenizer}")
    num_rows, why = case.found["vocab_size"], "trained on the sources; or `path:`, a ready one's folder"
    if subject.config_file is not None:
        why += f"; the model has {num_rows} rows"
    return {"train": {"vocab_size": Entry(min(_VOCABULARY[case.target.device], num_rows), why)}}


def _data(packing: str, seq_len: int, why: str) -> Entries:
    sources = Entry(
        [{"type": "stdlib"}],
        "A stand-in that is always there: Python's own standard library. Your own text goes here, such as\n"
        "- {type: jsonl, path: data/*.jsonl.zst, field: text}   # or text, parquet, datasets",
    )
    single = {"packing": Entry("single", "documents cannot share a sequence, see above")} if packing == "single" else {}
    held_out = {"validation": Entry("1%", "of the documents, held out by the hash of their text")}
    return {"sources": sources, "seq_len": Entry(seq_len, why), **single, **held_out}


def _draft(head: Entries, target: Target, seq_len: int) -> Recipe:
    """Return a recipe that is valid for its model and its cluster."""
    tokens = seq_len * _DRAFT_ROWS
    train = {"budget": tokens, "global_batch": tokens}
    return Recipe.model_validate({**plain(head), "train": train, "cluster": target.cluster})


def _parameters(size: ModelSize) -> str:
    active = f", {format_count(size.total - size.idle)} of them for a token" if size.idle else ""
    return f"{format_count(size.total)} parameters{active}"


def _count(tokens: int) -> str | int:
    """Return a count as people write it, such as 4.2M, where that is exact."""
    text = format_count(tokens)
    return text if tokens >= 1000 and parse_count(text) == tokens else tokens
