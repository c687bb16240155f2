"""Packing loses nothing, repeats nothing, cuts only where it must, and is as tight as plain best fit decreasing."""

from __future__ import annotations

import time
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbolm.data import sorting
from turbolm.data.order.packing import (
    Bins,
    concatenate,
    count_best_fit,
    count_concat,
    count_single,
    pack_best_fit,
    pack_concat,
    pack_single,
)

corpora = st.tuples(st.lists(st.integers(0, 100), max_size=120), st.integers(1, 40))


def naive_best_fit(lengths: list[int], seq_len: int) -> int:
    """Number of bins of best fit decreasing, one piece at a time."""
    rooms: list[int] = []
    pieces = [seq_len] * sum(length // seq_len for length in lengths) + [length % seq_len for length in lengths]
    for piece in sorted(filter(None, pieces), reverse=True):
        fitting = [room for room in rooms if room >= piece]
        if fitting:
            rooms[rooms.index(min(fitting))] -= piece
        else:
            rooms.append(seq_len - piece)
    return len(rooms)


def assert_covers(bins: Bins, lengths: np.ndarray, *, whole: bool = True) -> None:
    """Each position of each document is in exactly one piece, and documents that fit in a bin are `whole`."""
    assert bins.offsets[0] == 0
    assert bins.offsets[-1] == len(bins.document) == len(bins.start) == len(bins.length)
    assert (np.diff(bins.offsets) > 0).all()
    assert (bins.length > 0).all()
    assert (bins.used <= bins.seq_len).all()
    order = np.lexsort((bins.start, bins.document))
    expected_start = 0
    document = -1
    for piece in order:
        if bins.document[piece] != document:
            document, expected_start = bins.document[piece], 0
        assert bins.start[piece] == expected_start
        expected_start += bins.length[piece]
    covered = np.bincount(bins.document, weights=bins.length, minlength=len(lengths)).astype(int)
    np.testing.assert_array_equal(covered, lengths)
    if whole:
        pieces = np.bincount(bins.document, minlength=len(lengths))
        np.testing.assert_array_equal(pieces, -(-lengths // bins.seq_len))


@given(corpora)
def test_best_fit_covers_every_position_once(corpus: tuple[list[int], int]) -> None:
    lengths, seq_len = np.array(corpus[0], dtype=np.int64), corpus[1]
    bins = pack_best_fit(lengths, seq_len)
    assert_covers(bins, lengths)
    assert len(bins) == count_best_fit(lengths, seq_len) == naive_best_fit(corpus[0], seq_len)


@given(corpora)
def test_single_covers_every_position_once(corpus: tuple[list[int], int]) -> None:
    lengths, seq_len = np.array(corpus[0], dtype=np.int64), corpus[1]
    bins = pack_single(lengths, seq_len)
    assert_covers(bins, lengths)
    assert (np.diff(bins.offsets) == 1).all()
    assert len(bins) == count_single(lengths, seq_len)


def rows(bins: Bins) -> list[list[tuple[int, int, int]]]:
    """(document, start, length) of the pieces of each bin."""
    pieces = list(zip(bins.document.tolist(), bins.start.tolist(), bins.length.tolist(), strict=True))
    return [pieces[first:last] for first, last in zip(bins.offsets[:-1], bins.offsets[1:], strict=True)]


def by_hand(lengths: list[int], seq_len: int) -> list[list[tuple[int, int, int]]]:
    """Rows of `pack_concat`, one position at a time."""
    stream = [(document, start) for document, length in enumerate(lengths) for start in range(length)]
    found = []
    for first in range(0, len(stream), seq_len):
        row: list[tuple[int, int, int]] = []
        for document, start in stream[first : first + seq_len]:
            if row and row[-1][0] == document:
                row[-1] = (document, row[-1][1], row[-1][2] + 1)
            else:
                row.append((document, start, 1))
        found.append(row)
    return found


@given(corpora)
def test_concat_is_the_documents_end_to_end_cut_where_a_bin_is_full(corpus: tuple[list[int], int]) -> None:
    lengths, seq_len = np.array(corpus[0], dtype=np.int64), corpus[1]
    bins = pack_concat(lengths, seq_len)
    assert rows(bins) == by_hand(corpus[0], seq_len)
    assert_covers(bins, lengths, whole=False)
    assert (bins.used[:-1] == seq_len).all()
    assert len(bins) == count_concat(lengths, seq_len) == -(-sum(corpus[0]) // seq_len)
    assert bins.offsets.dtype == bins.document.dtype == bins.start.dtype == bins.length.dtype == np.int64


def test_best_fit_by_hand() -> None:
    bins = pack_best_fit(np.array([3, 21, 7, 10]), 10)
    found = sorted(sorted(row) for row in rows(bins))
    assert found == [[(0, 0, 3), (2, 0, 7)], [(1, 0, 10)], [(1, 10, 10)], [(1, 20, 1)], [(3, 0, 10)]]
    assert sorted(bins.attention_cost.tolist()) == [1, 58, 100, 100, 100]


def test_concat_by_hand() -> None:
    bins = pack_concat(np.array([3, 0, 21, 7]), 10)
    assert rows(bins) == [[(0, 0, 3), (2, 0, 7)], [(2, 7, 10)], [(2, 17, 4), (3, 0, 6)], [(3, 6, 1)]]


@given(corpora)
def test_documents_of_one_bin_lie_longest_first(corpus: tuple[list[int], int]) -> None:
    for row in rows(pack_best_fit(np.array(corpus[0], dtype=np.int64), corpus[1])):
        assert row == sorted(row, key=lambda piece: (-piece[2], piece[0]))


@settings(max_examples=30)
@given(corpora, st.data())
def test_select_slice_and_concatenate(corpus: tuple[list[int], int], data: st.DataObject) -> None:
    bins = pack_best_fit(np.array(corpus[0], dtype=np.int64), corpus[1])
    cut = data.draw(st.integers(0, len(bins)))
    selected = [bins.select(np.arange(cut)), bins.select(np.arange(cut, len(bins)))]
    sliced = [bins.slice(0, cut), bins.slice(cut, len(bins))]
    for whole, name in product(map(concatenate, (selected, sliced)), ("offsets", "document", "start", "length")):
        np.testing.assert_array_equal(getattr(whole, name), getattr(bins, name))


@pytest.mark.parametrize("seq_len", [2048, 8192])
def test_is_tight_and_fast_on_long_tailed_lengths(seq_len: int) -> None:
    lengths = np.maximum(2, np.random.default_rng(0).lognormal(6, 1.3, 65536)).astype(np.int64)
    began = time.perf_counter()
    bins = pack_best_fit(lengths, seq_len)
    elapsed_sec = time.perf_counter() - began
    assert bins.num_positions / (len(bins) * seq_len) > 0.999
    assert elapsed_sec < 1  # 0.02 s on an idle core; a loop over documents and bins would take minutes


def test_more_bins_than_16_bits_sort_right() -> None:
    lengths = np.full(70_000, 6)
    bins = pack_best_fit(lengths, 10)
    assert len(bins) == 70_000
    np.testing.assert_array_equal(bins.document, np.arange(70_000))


@settings(max_examples=30)
@given(st.sampled_from([3, 2048, 70_000, 2**17]), st.integers(0, 400), st.integers(0, 99))
def test_sorting_in_blocks(bound: int, count: int, seed: int) -> None:
    keys = np.random.default_rng(seed).integers(0, bound + 1, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorting, "_BLOCK", 64)
        np.testing.assert_array_equal(sorting.stable_argsort(keys, bound), np.argsort(keys, kind="stable"))


@given(st.lists(st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**16, 2**16 + 1, 2**63]), max_size=60))
def test_random_numbers_sort_right_when_some_are_alike(numbers: list[int]) -> None:
    raw = np.array(numbers, np.uint64)
    np.testing.assert_array_equal(sorting.argsort_random(raw), np.argsort(raw, kind="stable"))
