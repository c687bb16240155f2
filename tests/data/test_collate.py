"""Micro-batches against a reference that copies one slice at a time."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbolm.data.batch.collate import collate, documents_at, fill_cu_seqlens
from turbolm.data.order.packing import Packing, Sequences, pack
from turbolm.data.store.token_store import Split, TokenStore
from turbolm.plan.batch import IGNORED_TARGET


def store_in_memory(shards: list[tuple[list[int], list[int]]], dtype: str) -> TokenStore:
    """Shards of training and validation documents of these positions; every token is a different number."""
    entries, maps, first = [], {}, 1
    for number, (train, validation) in enumerate(shards):
        counts = np.array([*train, *validation], np.int64) + 1
        ends = np.cumsum(counts)
        maps[number, "tokens"] = np.arange(first, first + counts.sum()).astype(dtype)
        maps[number, "index"] = np.stack([ends, counts], axis=1).astype("<i8").ravel()
        entries.append({"train": {"documents": len(train)}, "validation": {"documents": len(validation)}, "source": 0})
        first += int(counts.sum())
    store = TokenStore(Path("nowhere"), {"dtype": dtype, "vocab_size": first, "shards": entries, "sources": [{}]})
    store._maps = maps
    return store


def reference(
    sequences: Sequences, index: int, store: TokenStore, split: Split
) -> tuple[list[int], list[int], list[int]]:
    inputs: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    if index >= 0:
        for part in range(sequences.offsets[index], sequences.offsets[index + 1]):
            tokens = store.read(
                split, int(sequences.document[part]), int(sequences.start[part]), int(sequences.length[part])
            )
            inputs += tokens[:-1].tolist()
            targets += tokens[1:].tolist()
            positions += range(len(tokens) - 1)
    padding = sequences.seq_len - len(inputs)
    return inputs + [0] * padding, positions + list(range(padding)), targets + [IGNORED_TARGET] * padding


documents = st.lists(st.integers(0, 40), max_size=12)


@given(
    shards=st.lists(st.tuples(documents, documents).filter(lambda parts: any(parts)), min_size=1, max_size=5),
    split=st.sampled_from(["train", "validation"]),
    packing=st.sampled_from(get_args(Packing)),
    seq_len=st.integers(1, 24),
    micro_batch_size=st.integers(1, 4),
    dtype=st.sampled_from(["<u2", "<u4"]),
    data=st.data(),
)
def test_micro_batches_hold_what_the_bins_say(
    shards: list[tuple[list[int], list[int]]],
    split: Split,
    packing: Packing,
    seq_len: int,
    micro_batch_size: int,
    dtype: str,
    data: st.DataObject,
) -> None:
    store = store_in_memory(shards, dtype)
    sequences = pack(store.lengths(split), seq_len, packing)
    num_micro = data.draw(st.integers(1, 3))
    chosen = st.lists(st.integers(-1, len(sequences) - 1), min_size=micro_batch_size, max_size=micro_batch_size)
    indices = np.array(data.draw(st.lists(chosen, min_size=num_micro, max_size=num_micro)), np.int64)
    max_slices = micro_batch_size * seq_len
    micro_batches = collate(sequences, indices, store, split, max_slices)
    assert len(micro_batches) == num_micro
    for micro_batch, its_indices in zip(micro_batches, indices.tolist(), strict=True):
        columns = zip(*(reference(sequences, index, store, split) for index in its_indices), strict=True)
        for name, expected in zip(("input_ids", "position_ids", "targets"), columns, strict=True):
            assert micro_batch[name].dtype == np.int64
            assert micro_batch[name].tolist() == list(expected)
        for index, found in zip(its_indices, documents_at(sequences, np.array(its_indices)).tolist(), strict=True):
            slices = slice(sequences.offsets[index], sequences.offsets[index + 1]) if index >= 0 else slice(0)
            expected_documents = np.repeat(sequences.document[slices], sequences.length[slices]).tolist()
            assert found == expected_documents + [-1] * (seq_len - len(expected_documents))
        begins = np.flatnonzero(micro_batch["position_ids"].ravel() == 0).tolist()
        assert micro_batch["cu_seqlens"].dtype == np.int32
        boundaries = micro_batch["cu_seqlens"].tolist()
        assert boundaries == begins + [max_slices] * (len(boundaries) - len(begins))


def test_cu_seqlens_by_hand() -> None:
    ends = np.array([3, 7, 8, 16, 24])
    assert fill_cu_seqlens(ends, 7).tolist() == [0, 3, 7, 8, 16, 24, 24, 24]  # room for 7 slices at most
    assert fill_cu_seqlens(ends, 100).tolist() == [0, 3, 7, 8, 16, *[24] * 28]  # 32: the power of two above 100 / 4
    assert fill_cu_seqlens(ends, 5).tolist() == [0, 3, 7, 8, 16, 24]
    with pytest.raises(AssertionError, match="5 slices"):
        fill_cu_seqlens(np.array([3, 7, 8, 16, 24]), 4)


def test_without_a_bound_there_are_no_cu_seqlens() -> None:
    store = store_in_memory([([3, 5], [])], "<u2")
    (micro_batch,) = collate(pack(store.lengths("train"), 8, "best_fit"), np.array([[0]]), store, "train")
    assert list(micro_batch) == ["input_ids", "position_ids", "targets"]
    assert micro_batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 2, 3]]
    assert micro_batch["targets"].tolist() == [[6, 7, 8, 9, 10, 2, 3, 4]]
