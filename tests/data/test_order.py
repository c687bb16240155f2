"""The stream of bins is a pure function of its arguments and holds every position once an epoch."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbolm.data.order import BatchOrder, Packing
from turbolm.data.packing import Bins, concatenate
from turbolm.errors import UserError

from .test_packing import assert_covers


def pieces(bins: Bins) -> list[tuple[int, ...]]:
    return [tuple(row) for row in np.stack([bins.document, bins.start, bins.length], axis=1).tolist()]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60),
    seq_len=st.integers(1, 40),
    bins_per_batch=st.integers(1, 9),
    window=st.integers(1, 70),
    packing=st.sampled_from(get_args(Packing)),
)
def test_every_position_once_an_epoch(
    lengths: list[int], seq_len: int, bins_per_batch: int, window: int, packing: Packing
) -> None:
    positions = np.array(lengths)
    order = BatchOrder(positions, seq_len, bins_per_batch, 1, packing, window)
    per_epoch = [order.num_bins_per_epoch(epoch) for epoch in range(3)]
    num_batches = -(-sum(per_epoch) // bins_per_batch)
    stream = concatenate([order.batch(index) for index in range(num_batches)])
    assert len(stream) == num_batches * bins_per_batch
    first = 0
    for num_bins in per_epoch:
        assert_covers(stream.select(np.arange(first, first + num_bins)), positions, whole=packing != "concat")
        first += num_bins


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.sampled_from(get_args(Packing)))
def test_same_batch_whatever_was_asked_for_before(asked: list[int], packing: Packing) -> None:
    lengths = np.random.default_rng(3).integers(1, 50, 100)
    used = BatchOrder(lengths, 32, 7, 5, packing, window_documents=16)
    for index in asked:
        fresh = BatchOrder(lengths, 32, 7, 5, packing, window_documents=16)
        assert pieces(used.batch(index)) == pieces(fresh.batch(index))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(1, 40), st.integers(1, 70))
def test_concat_fills_every_bin_but_the_last_of_a_window(lengths: list[int], seq_len: int, window: int) -> None:
    order = BatchOrder(np.array(lengths), seq_len, 1, 1, "concat", window)
    per_epoch = order.num_bins_per_epoch(0)
    used = [int(order.batch(index).used[0]) for index in range(per_epoch)]
    assert sum(used) == sum(lengths)
    assert sum(count < seq_len for count in used) <= order.windows_per_epoch


def test_epochs_and_seeds_differ_in_order() -> None:
    lengths = np.random.default_rng(3).integers(1, 50, 100)
    order = BatchOrder(lengths, 64, 1, seed=0)
    num_bins = order.num_bins_per_epoch(0)
    assert num_bins == order.num_bins_per_epoch(1)  # one window: the same documents are packed
    first = [pieces(order.batch(i)) for i in range(num_bins)]
    second = [pieces(order.batch(num_bins + i)) for i in range(num_bins)]
    other_seed = BatchOrder(lengths, 64, 1, seed=1)
    assert first != second
    assert first != [pieces(other_seed.batch(i)) for i in range(num_bins)]


def test_the_order_never_changes() -> None:
    """Pinned: a change here means that runs no longer continue with the batches they would have had."""
    order = BatchOrder(np.arange(1, 9), 8, 2, seed=7, window_documents=5)
    assert [pieces(order.batch(index)) for index in range(3)] == PINNED
    assert order.fingerprint == PINNED_FINGERPRINT
    concat = BatchOrder(np.arange(1, 9), 8, 2, seed=7, packing="concat", window_documents=5)
    assert [pieces(concat.batch(index)) for index in range(2)] == PINNED_CONCAT


def test_fingerprint_covers_every_argument() -> None:
    lengths = np.arange(1, 9)
    variants = [
        BatchOrder(lengths, 8, 2, 7),
        BatchOrder(lengths[::-1], 8, 2, 7),
        BatchOrder(lengths, 9, 2, 7),
        BatchOrder(lengths, 8, 3, 7),
        BatchOrder(lengths, 8, 2, 8),
        BatchOrder(lengths, 8, 2, 7, "concat"),
        BatchOrder(lengths, 8, 2, 7, "single"),
        BatchOrder(lengths, 8, 2, 7, window_documents=5),
    ]
    assert len({order.fingerprint for order in variants}) == len(variants)


def test_no_documents() -> None:
    with pytest.raises(UserError, match="no training documents"):
        BatchOrder(np.zeros(0, np.int64), 8, 2, 7)


PINNED: list[list[tuple[int, ...]]] = [
    [(3, 0, 4), (1, 0, 2), (4, 0, 5), (2, 0, 3)],
    [(6, 0, 7), (5, 0, 6), (0, 0, 1)],
    [(7, 0, 8), (3, 0, 4), (2, 0, 3)],
]
PINNED_CONCAT: list[list[tuple[int, ...]]] = [
    [(3, 2, 2), (2, 0, 3), (6, 1, 6), (3, 0, 2)],
    [(4, 0, 5), (1, 0, 2), (6, 0, 1), (5, 0, 6), (0, 0, 1)],
]
PINNED_FINGERPRINT = "7a708a7d5a2df82245da7c73569d05ebf21373919be0f31913584880284346a8"
