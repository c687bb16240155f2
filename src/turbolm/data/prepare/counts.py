"""What the documents of a finished build say: refuse a store without documents, count those that are left out."""

from __future__ import annotations

from collections import Counter
from typing import Any

from turbolm.data.prepare.cut import Dropped
from turbolm.data.prepare.reader import no_documents
from turbolm.data.prepare.special_tokens import SpecialTokens
from turbolm.data.store.token_store import SPLITS
from turbolm.errors import UserError
from turbolm.recipe.schema import Recipe


def short_documents(recipe: Recipe, shards: list[dict[str, Any]]) -> list[int]:
    """Return how many documents of each source had fewer than its `min_tokens`. Raises UserError if all of one had."""
    counts = []
    for number, source in enumerate(recipe.data.sources):
        own = [shard for shard in shards if shard["source"] == number]
        counts.append(sum(shard.get("short", 0) for shard in own))
        if counts[-1] and not any(shard[split]["documents"] for shard in own for split in SPLITS):
            raise UserError(
                f"data.sources[{number}].min_tokens: none of its {counts[-1]} documents has {source.min_tokens} "
                "tokens; lower it"
            )
    return counts


def spelled_out(documents: Counter[str], special_tokens: SpecialTokens) -> str:
    """Return the warning about documents that spell tokens out."""
    most, meaning = documents.most_common(1)[0][0], "ordinary text" if special_tokens == "split" else "that token"
    return (
        f"{documents.total()} documents spell out a special or added token of the tokenizer (most often {most!r}); it "
        f"counts as {meaning} there (tokenizer.special_tokens_in_text: {special_tokens})"
    )


def check_counts(recipe: Recipe, num_train: int, num_validation: int, dropped: Dropped) -> None:
    """Raise UserError unless there are training documents."""
    if not num_train + num_validation + dropped.empty:
        raise no_documents()
    if not num_train + num_validation:
        raise UserError(f"None of the {dropped.empty} documents of data.sources holds any text")
    if not num_train:
        raise UserError(
            f"There are no training documents: all {num_validation} are held out. Lower data.validation "
            f"(it is {recipe.data.validation:g}) or add documents to data.sources."
        )
