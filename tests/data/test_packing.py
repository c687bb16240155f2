"""Packing loses nothing, repeats nothing, cuts only where it must, and is as tight as plain best fit decreasing."""

from __future__ import annotations

import time
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbolm.data.native import argsort_random
from turbolm.data.order import packing
from turbolm.data.order.packing import (
    Sequences,
    concatenate,
    pack_best_fit,
    pack_concat,
    pack_single,
)

corpora = st.tuples(st.lists(st.integers(0, 100), max_size=120), st.integers(1, 40))


def naive_best_fit(lengths: list[int], seq_len: int) -> int:
    """Number of sequences of best fit decreasing, one slice at a time."""
    rooms: list[int] = []
    slices = [seq_len] * sum(length // seq_len for length in lengths) + [length % seq_len for length in lengths]
    for part in sorted(filter(None, slices), reverse=True):
        fitting = [room for room in rooms if room >= part]
        if fitting:
            rooms[rooms.index(min(fitting))] -= part
        else:
            rooms.append(seq_len - part)
    return len(rooms)


def assert_covers(sequences: Sequences, lengths: np.ndarray, *, whole: bool = True) -> None:
    """Each position of each document is in exactly one slice, and documents that fit in a sequence are `whole`."""
    assert sequences.offsets[0] == 0
    assert sequences.offsets[-1] == len(sequences.document) == len(sequences.start) == len(sequences.length)
    assert (np.diff(sequences.offsets) > 0).all()
    assert (sequences.length > 0).all()
    assert (sequences.used <= sequences.seq_len).all()
    order = np.lexsort((sequences.start, sequences.document))
    expected_start = 0
    document = -1
    for part in order:
        if sequences.document[part] != document:
            document, expected_start = sequences.document[part], 0
        assert sequences.start[part] == expected_start
        expected_start += sequences.length[part]
    covered = np.bincount(sequences.document, weights=sequences.length, minlength=len(lengths)).astype(int)
    np.testing.assert_array_equal(covered, lengths)
    if whole:
        slices = np.bincount(sequences.document, minlength=len(lengths))
        np.testing.assert_array_equal(slices, -(-lengths // sequences.seq_len))


@given(corpora)
def test_best_fit_covers_every_position_once(corpus: tuple[list[int], int]) -> None:
    lengths, seq_len = np.array(corpus[0], dtype=np.int64), corpus[1]
    sequences = pack_best_fit(lengths, seq_len)
    assert_covers(sequences, lengths)
    assert len(sequences) == naive_best_fit(corpus[0], seq_len)


@given(corpora)
def test_single_covers_every_position_once(corpus: tuple[list[int], int]) -> None:
    lengths, seq_len = np.array(corpus[0], dtype=np.int64), corpus[1]
    sequences = pack_single(lengths, seq_len)
    assert_covers(sequences, lengths)
    assert (np.diff(sequences.offsets) == 1).all()
    assert len(sequences) == sum(-(-length // seq_len) for length in corpus[0])


def slices_of(sequences: Sequences) -> list[list[tuple[int, int, int]]]:
    """(document, start, length) of the slices of each sequence."""
    slices = list(zip(sequences.document.tolist(), sequences.start.tolist(), sequences.length.tolist(), strict=True))
    return [slices[first:last] for first, last in zip(sequences.offsets[:-1], sequences.offsets[1:], strict=True)]


def by_hand(lengths: list[int], seq_len: int) -> list[list[tuple[int, int, int]]]:
    """Sequences of `pack_concat`, one position at a time."""
    stream = [(document, start) for document, length in enumerate(lengths) for start in range(length)]
    found = []
    for first in range(0, len(stream), seq_len):
        sequence: list[tuple[int, int, int]] = []
        for document, start in stream[first : first + seq_len]:
            if sequence and sequence[-1][0] == document:
                sequence[-1] = (document, sequence[-1][1], sequence[-1][2] + 1)
            else:
                sequence.append((document, start, 1))
        found.append(sequence)
    return found


@given(corpora)
def test_concat_is_the_documents_end_to_end_cut_where_a_sequence_is_full(corpus: tuple[list[int], int]) -> None:
    lengths, seq_len = np.array(corpus[0], dtype=np.int64), corpus[1]
    sequences = pack_concat(lengths, seq_len)
    assert slices_of(sequences) == by_hand(corpus[0], seq_len)
    assert_covers(sequences, lengths, whole=False)
    assert (sequences.used[:-1] == seq_len).all()
    assert len(sequences) == -(-sum(corpus[0]) // seq_len)
    assert (
        sequences.offsets.dtype
        == sequences.document.dtype
        == sequences.start.dtype
        == sequences.length.dtype
        == np.int64
    )


def test_best_fit_by_hand() -> None:
    sequences = pack_best_fit(np.array([3, 21, 7, 10]), 10)
    found = sorted(sorted(sequence) for sequence in slices_of(sequences))
    assert found == [[(0, 0, 3), (2, 0, 7)], [(1, 0, 10)], [(1, 10, 10)], [(1, 20, 1)], [(3, 0, 10)]]
    assert sorted(sequences.attention_cost.tolist()) == [1, 58, 100, 100, 100]


def test_concat_by_hand() -> None:
    sequences = pack_concat(np.array([3, 0, 21, 7]), 10)
    assert slices_of(sequences) == [[(0, 0, 3), (2, 0, 7)], [(2, 7, 10)], [(2, 17, 4), (3, 0, 6)], [(3, 6, 1)]]


@given(corpora)
def test_documents_of_one_sequence_lie_longest_first(corpus: tuple[list[int], int]) -> None:
    for sequence in slices_of(pack_best_fit(np.array(corpus[0], dtype=np.int64), corpus[1])):
        assert sequence == sorted(sequence, key=lambda part: (-part[2], part[0]))


@settings(max_examples=30)
@given(corpora, st.data())
def test_select_slice_and_concatenate(corpus: tuple[list[int], int], data: st.DataObject) -> None:
    sequences = pack_best_fit(np.array(corpus[0], dtype=np.int64), corpus[1])
    cut = data.draw(st.integers(0, len(sequences)))
    selected = [sequences.select(np.arange(cut)), sequences.select(np.arange(cut, len(sequences)))]
    sliced = [sequences.slice(0, cut), sequences.slice(cut, len(sequences))]
    for whole, name in product(map(concatenate, (selected, sliced)), ("offsets", "document", "start", "length")):
        np.testing.assert_array_equal(getattr(whole, name), getattr(sequences, name))


@pytest.mark.parametrize("seq_len", [2048, 8192])
def test_is_tight_and_fast_on_long_tailed_lengths(seq_len: int) -> None:
    lengths = np.maximum(2, np.random.default_rng(0).lognormal(6, 1.3, 65536)).astype(np.int64)
    began = time.perf_counter()
    sequences = pack_best_fit(lengths, seq_len)
    elapsed_sec = time.perf_counter() - began
    assert sequences.num_positions / (len(sequences) * seq_len) > 0.999
    assert elapsed_sec < 1  # 0.02 s on an idle core; a loop over documents and sequences would take minutes


def test_more_bins_than_16_bits_sort_right() -> None:
    lengths = np.full(70_000, 6)
    sequences = pack_best_fit(lengths, 10)
    assert len(sequences) == 70_000
    np.testing.assert_array_equal(sequences.document, np.arange(70_000))


@settings(max_examples=30)
@given(st.sampled_from([3, 2048, 70_000, 2**17]), st.integers(0, 400), st.integers(0, 99))
def test_sorting_in_blocks(bound: int, count: int, seed: int) -> None:
    keys = np.random.default_rng(seed).integers(0, bound + 1, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_SORT_BLOCK", 64)
        np.testing.assert_array_equal(packing._stable_argsort(keys, bound), np.argsort(keys, kind="stable"))


@given(st.lists(st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**16, 2**16 + 1, 2**63]), max_size=60))
def test_random_numbers_sort_right_when_some_are_alike(numbers: list[int]) -> None:
    raw = np.array(numbers, np.uint64)
    np.testing.assert_array_equal(argsort_random(raw), np.argsort(raw, kind="stable"))
