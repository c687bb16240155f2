"""The values of an adapted recipe, each with its reason."""

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
from turbolm.units import format_count

_VOCABULARY = {"cpu": 4096, "cuda": 32768}  # of a tokenizer that is trained
_DRAFT_ROWS = 2**20  # a batch that is large enough for any number of processes


@dataclass(frozen=True)
class Wishes:
    """Numbers that the user chose, or None."""

    seq_len: int | None = None
    budget: int | None = None


def compose(
    subject: Subject, task: Task, wishes: Wishes, target: Target, found: dict[str, Any], tokenizer: int | str
) -> Entries:
    """The recipe. `found` are the findings of a small copy, `tokenizer` the size of the model's own or why there is
    none. Raises UserError where the model or what the user wishes does not fit."""
    seq_len, seq_len_why = choose_seq_len(wishes.seq_len, found["num_positions"], target.device)
    head: Entries = {
        "name": Entry(f"{subject.name}-{task}"),
        "model": _model(subject, task, target, found, tokenizer),
        "tokenizer": _tokenizer(subject, task, target, found, tokenizer),
        "data": _data(found, seq_len, seq_len_why),
    }
    draft = _draft(head, target, seq_len)
    size = _size(draft)
    execution, target, fits = choose_execution(draft, target, size)
    world_size = build_plan(_draft(head, target, seq_len), machine_of(draft)).world_size
    budget, budget_why = choose_budget(wishes.budget, task, size.total - size.idle)
    batch, batch_why = choose_batch(size, budget, seq_len, world_size)
    lr, lr_why = choose_lr(task, size, budget)
    if found["way"]["one_row"]:
        execution["micro_batch"] = seq_len
    small_run = {"evaluation": {"tokens": Entry("100k", "of held-out text, at most")}} if target.device == "cpu" else {}
    return {
        **head,
        "train": {
            "budget": Entry(_count(budget), f"{_parameters(size)}: {budget_why}"),
            "global_batch": Entry(batch, f"{batch // seq_len} rows: {batch_why}"),
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
        **({"cluster": Entry(target.cluster, "")} if target.cluster else {}),
        "execution": {
            name: Entry(value, {"zero_stage": fits, "micro_batch": "one row: rows follow each other"}.get(name, ""))
            for name, value in execution.items()
        },
        **small_run,
    }


def _model(subject: Subject, task: Task, target: Target, found: dict[str, Any], tokenizer: int | str) -> Entries:
    rope_factors = found["way"]["rope_factors"]
    fixed = {"rope_factors": Entry(rope_factors, "the same for every length, so that documents can share rows")}
    return {
        **_origin(subject, task, target, found, tokenizer),
        **(fixed if rope_factors != "by_length" else {}),
    }


def _origin(subject: Subject, task: Task, target: Target, found: dict[str, Any], tokenizer: int | str) -> Entries:
    has_rows = not isinstance(tokenizer, int) or tokenizer <= found["vocab_size"]
    if task == "continue":
        revision = {"revision": Entry(subject.revision, "as it is on the hub today")} if subject.revision else {}
        rows = {} if has_rows else {"resize_embeddings": Entry(True, "the tokenizer has more tokens than the model")}
        return {"pretrained": Entry(subject.pretrained), **revision, **rows}
    if subject.config_file is not None:
        over = {"config": {"vocab_size": Entry(tokenizer, "the tokenizer has more tokens than the file has rows")}}
        file = Entry(str(subject.config_file), "names under `config` are laid over it")
        return {"config_file": file, **({} if has_rows else over)}
    sizes, why = found["sizes"], "the sizes that the type has by default; every other setting is left to it"
    if target.device == "cpu":
        sizes, why = found["small"], "with small sizes, for a CPU; adapt it to a --cluster for the type's own"
    if (found["pad_token_id"] or 0) >= _VOCABULARY[target.device] and "pad_token_id" not in sizes:
        sizes = sizes | {"pad_token_id": None}  # the type's default lies outside of the vocabulary
    return {"config": {name: Entry(value, why if name == "model_type" else "") for name, value in sizes.items()}}


def _tokenizer(subject: Subject, task: Task, target: Target, found: dict[str, Any], tokenizer: int | str) -> Entries:
    if isinstance(tokenizer, int):
        if subject.revision is not None:
            return {"path": Entry(subject.given), "revision": Entry(subject.revision)}
        assert subject.tokenizer is not None
        return {"path": Entry(as_path(subject.tokenizer), "the model's own")}
    if task == "continue":
        raise UserError(f"{subject.given}: --task continue needs the model's own tokenizer: {tokenizer}")
    vocab_size, why = _VOCABULARY[target.device], "trained on the sources; or `path:`, a ready one's folder"
    if subject.config_file is not None:
        why += f"; the model has {found['vocab_size']} rows"
    return {"train": {"vocab_size": Entry(min(vocab_size, found["vocab_size"]), why)}}


def _data(found: dict[str, Any], seq_len: int, why: str) -> Entries:
    sources = Entry(
        [{"type": "stdlib"}],
        "A stand-in that is always there: Python's own standard library. Your own text goes here, such as\n"
        "- {type: jsonl, path: data/*.jsonl.zst, field: text}   # or text, parquet, datasets",
    )
    is_single = found["way"]["packing"] == "single"
    single = {"packing": Entry("single", "documents cannot share a row, see above")} if is_single else {}
    held_out = {"validation": Entry("1%", "of the documents, held out by the hash of their text")}
    return {"sources": sources, "seq_len": Entry(seq_len, why), **single, **held_out}


def _draft(head: Entries, target: Target, seq_len: int) -> Recipe:
    """A recipe that is good for its model and its cluster."""
    tokens = seq_len * _DRAFT_ROWS
    train = {"budget": tokens, "global_batch": tokens}
    return Recipe.model_validate({**plain(head), "train": train, "cluster": target.cluster})


def _size(draft: Recipe) -> ModelSize:
    size = examine_model(draft, "").size
    assert size is not None, "its config.json was read before"
    return size


def _parameters(size: ModelSize) -> str:
    active = f", {format_count(size.total - size.idle)} of them for a token" if size.idle else ""
    return f"{format_count(size.total)} parameters{active}"


def _count(tokens: int) -> str | int:
    """As people write it, where that is exact: 4.2M."""
    text = format_count(tokens)
    scale = {"k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}.get(text[-1])
    return text if scale and round(float(text[:-1]) * scale) == tokens else tokens
