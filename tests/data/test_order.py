"""The order of the data is a pure function of its arguments, trains on every position once an epoch, and cuts nothing
that fits."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, get_args

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from turbolm.data.order.batch_order import BatchOrder, constant_order, order_of_lengths
from turbolm.data.order.packing import Packing, Sequences, pack_buckets
from turbolm.data.order.stream import DocumentStream
from turbolm.data.order.window import Grouping, Slices, cycle_order
from turbolm.plan.curriculum import Segment

Slice = tuple[int, int, int]


def slices(sequences: Sequences | Slices) -> list[Slice]:
    fields = (sequences.document, sequences.start, sequences.length)
    return list(zip(*(field.tolist() for field in fields), strict=True))


def segments_of(*parts: tuple[int, tuple[int, ...], int]) -> list[Segment]:
    """Segments from (steps, sequence lengths, longest sequences in a batch); the last one is open-ended."""
    found, step, token = [], 0, 0
    for steps, seq_lens, sequences in parts:
        batch = seq_lens[-1] * sequences
        found.append(Segment(step, token, seq_lens, batch, None, len(seq_lens) > 1))
        step, token = step + steps, token + steps * batch
    return found


LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=60)
SEQ_LENS = st.sampled_from([(8,), (12,), (32,), (40,), (4, 8, 16, 32), (8, 16)])
PARTS = st.lists(st.tuples(st.integers(1, 7), SEQ_LENS, st.integers(1, 6)), min_size=1, max_size=4)
ORDER: dict[str, Any] = {
    "seed": st.integers(0, 3),
    "packing": st.sampled_from(get_args(Packing)),
    "grouping": st.sampled_from(get_args(Grouping)),
    "window_documents": st.integers(1, 70),
}


@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS, parts=PARTS, **ORDER)
def test_every_position_once_an_epoch(
    lengths: list[int], parts: list[tuple[int, tuple[int, ...], int]], packing: Packing, **options: Any
) -> None:
    """What was trained on and what is carried on are exactly the documents drawn, each whole; boundaries are steps."""
    if any(len(seq_lens) > 1 for _, seq_lens, _ in parts):
        packing = "best_fit"
    positions, segments = np.array(lengths), segments_of(*parts)
    order = order_of_lengths(positions, segments, packing=packing, **options)
    order.build(sum(steps for steps, _, _ in parts) + 3)
    has_one_length = len({segment.seq_lens for segment in segments}) == 1 == len(segments[0].seq_lens)
    trained = Counter[tuple[int, int]]()  # (document, position)
    for step in range(order.num_steps):
        segment = [segment for segment in segments if segment.first_step <= step][-1]
        sequences = order.batch(step)
        assert sequences.seq_len in segment.seq_lens
        assert len(sequences) * sequences.seq_len == segment.global_batch_tokens
        assert (sequences.used <= sequences.seq_len).all() and (sequences.used > 0).all()
        for document, start, length in slices(sequences):
            trained.update((document, position) for position in range(start, start + length))
            if packing == "best_fit" and start + length < lengths[document] and has_one_length:
                assert length == sequences.seq_len, "a document that fits was cut"
    for document, start, length in slices(order.table[-1].carried_on):
        trained.update((document, position) for position in range(start, start + length))
    drawn = Counter[int](order.sources.streams[0].read(0, order.table[-1].ranges[0][1])[0].tolist())
    assert trained == Counter({(d, p): times for d, times in drawn.items() for p in range(lengths[d])})
    assert set(drawn.values()) <= {min(drawn.values()), max(drawn.values())}
    assert max(drawn.values()) - min(drawn.get(d, 0) for d in range(len(lengths))) <= 1, "epochs come one by one"


@settings(max_examples=30, deadline=None)
@given(asked=st.lists(st.integers(0, 30), min_size=1, max_size=8), parts=PARTS, **ORDER)
def test_same_batch_whatever_was_asked_for_before(
    asked: list[int], parts: list[tuple[int, tuple[int, ...], int]], packing: Packing, **options: Any
) -> None:
    if any(len(seq_lens) > 1 for _, seq_lens, _ in parts):
        packing = "best_fit"
    lengths = np.random.default_rng(3).integers(1, 50, 60)
    used = order_of_lengths(lengths, segments_of(*parts), packing=packing, **options)
    for index in asked:
        fresh = order_of_lengths(lengths, segments_of(*parts), packing=packing, **options)
        assert slices(used.batch(index)) == slices(fresh.batch(index))
        assert used.digest(index + 1) == fresh.digest(index + 1)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 300), window=st.integers(1, 80), seed=st.integers(0, 9), data=st.data())
def test_a_stream_holds_every_document_once_an_epoch(count: int, window: int, seed: int, data: st.DataObject) -> None:
    lengths = np.arange(1000, 1000 + count)
    stream = DocumentStream(lambda documents: lengths[documents - 7], 7, 7 + count, seed=seed, window_documents=window)
    for epoch in range(2):
        documents, found = stream.read(epoch * count, (epoch + 1) * count)
        assert sorted(documents.tolist()) == list(range(7, 7 + count))
        np.testing.assert_array_equal(found, documents + 993)
    begin, end = sorted((data.draw(st.integers(0, 3 * count)), data.draw(st.integers(0, 3 * count))))
    whole = stream.read(0, 3 * count + 1)[0]  # one more: `advance` may take the document at the limit
    fresh = DocumentStream(lambda documents: lengths[documents - 7], 7, 7 + count, seed=seed, window_documents=window)
    np.testing.assert_array_equal(fresh.read(begin, end)[0], whole[begin:end])
    wanted = data.draw(st.integers(0, 5000))
    place, drawn = fresh.advance(begin, wanted, limit=end + 1)
    total = np.cumsum(lengths[whole[begin : end + 1] - 7])
    assert place == min(begin + int(np.searchsorted(total, wanted)) + (wanted > 0), begin + len(total))
    assert drawn == (total[place - begin - 1] if place > begin else 0)


def test_a_large_source_is_read_in_blocks() -> None:
    """A window touches few stretches of the store: that is what a cold disk wants."""
    count = 70_000_000
    stream = DocumentStream(np.ones_like, 0, count, seed=0)
    documents = np.sort(stream.read(0, stream.window_documents)[0])
    assert np.count_nonzero(np.diff(documents) > 1) <= 66
    assert len(documents) == len(set(documents.tolist()))
    first, second = stream.read(0, 100)[0], stream.read(count, count + 100)[0]
    assert (first != second).any()


def test_epochs_and_seeds_differ_in_order() -> None:
    lengths = np.full(100, 32)
    order, other = constant_order(lengths, 32, 10, seed=0), constant_order(lengths, 32, 10, seed=1)
    first, second = ([slices(order.batch(i)) for i in range(start, start + 10)] for start in (0, 10))
    assert sorted(sum(first, [])) == sorted(sum(second, []))
    assert first != second
    assert first != [slices(other.batch(i)) for i in range(10)]


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=9, max_size=60), weights=st.lists(st.integers(0, 5), min_size=3))
def test_sources_get_their_shares(lengths: list[int], weights: list[int]) -> None:
    """At every window's end each source has had its share of the tokens, to within a document of it."""
    weights = [*weights[:2], weights[2] + 1]
    third = len(lengths) // 3
    sources = [(0, third), (third, 2 * third), (2 * third, len(lengths))]
    shares = tuple(weight / sum(weights) for weight in weights)
    segments = [Segment(0, 0, (16,), 64, shares)]
    positions = np.array(lengths)
    order = order_of_lengths(positions, segments, sources=sources, window_documents=20)
    order.build(30)
    for planned in order.table:
        drawn = np.array(
            [
                stream.read(0, end)[1].sum()
                for stream, (_, end) in zip(order.sources.streams, planned.ranges, strict=True)
            ]
        )
        assert (np.abs(drawn - drawn.sum() * np.array(shares)) <= 2 * max(lengths) + len(order.table)).all()
    owners = {document: n for n, place in enumerate(sources) for document in range(*place)}
    read = {owners[document] for step in range(30) for document, _, _ in slices(order.batch(step))}
    assert read == {n for n, weight in enumerate(weights) if weight}


def test_a_share_of_less_than_a_token_of_a_batch_is_drawn_over_time() -> None:
    """The pace is that of the source whose epoch lasts longest: here one whose share of 32 tokens is 0.0064."""
    shares = (0.9998, 0.0002)
    segments = [Segment(0, 0, (16,), 32, shares), Segment(4, 128, (16,), 32, (0.5, 0.5))]
    order = order_of_lengths(np.full(20, 8), segments, sources=[(0, 10), (10, 20)])
    order.build(6)
    drawn = [8 * end for _, end in order.table[0].ranges]
    assert drawn[1] == 8 and abs(drawn[0] - 8 * 0.9998 / 0.0002) <= 8


def test_weights_that_change_take_effect_on_the_step() -> None:
    lengths = np.full(400, 16)
    segments = [Segment(0, 0, (16,), 160, (1.0, 0.0)), Segment(7, 1120, (16,), 160, (0.0, 1.0))]
    order = order_of_lengths(lengths, segments, sources=[(0, 200), (200, 400)])
    for step in range(14):
        assert all((document >= 200) == (step >= 7) for document, _, _ in slices(order.batch(step)))


def test_a_larger_budget_appends_windows() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 200)
    order = constant_order(lengths, 32, 4, seed=2)
    order.build(30)
    before = list(order.table)
    order.build(200)
    assert [planned.digest for planned in list(order.table)[: len(before)]] == [planned.digest for planned in before]
    one, two = Segment(0, 0, (32,), 128), Segment(50, 6400, (16,), 128)
    extended = order_of_lengths(lengths, [one, two], seed=2, window_documents=20)
    alone = order_of_lengths(lengths, [one], seed=2, window_documents=20)
    assert extended.digest(1) == alone.digest(1)
    assert slices(extended.batch(10)) == slices(alone.batch(10))


def test_the_most_slices_of_a_sequence() -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 300)
    order = order_of_lengths(lengths, segments_of((10, (32,), 4), (10, (16,), 8)), window_documents=50)
    seen: dict[int, int] = {}
    for step in range(20):
        sequences = order.batch(step)
        seen[sequences.seq_len] = max(seen.get(sequences.seq_len, 0), int(np.diff(sequences.offsets).max()))
    most = order.max_slices(20)
    assert set(most) == set(seen)
    assert all(seen[seq_len] <= most[seq_len] for seq_len in seen)


def test_batches_of_a_window_are_alike_with_window_grouping() -> None:
    lengths = np.random.default_rng(0).lognormal(4, 1, 5000).astype(np.int64) + 1
    spread: dict[str, float] = {}
    for grouping in get_args(Grouping):
        order = order_of_lengths(lengths, [Segment(0, 0, (256,), 256 * 8)], grouping=grouping)
        batches = [order.batch(i).attention_cost for i in range(100)]
        spread[grouping] = float(np.mean([cost.std() / cost.mean() for cost in batches]))
        means = np.array([cost.mean() for cost in batches])
        assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.25, "neighbours must not be alike"
    assert spread["window"] < spread["batch"] / 5


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, smallest=st.sampled_from([3, 4, 8]), count=st.integers(2, 4))
def test_buckets_hold_powers_of_two_from_the_beginning(lengths: list[int], smallest: int, count: int) -> None:
    seq_lens = [smallest << k for k in range(count)]
    packed = pack_buckets(np.array(lengths), seq_lens)
    assert [sequences.seq_len for sequences in packed] == seq_lens
    for document, length in enumerate(lengths):
        mine = sorted((start, n) for sequences in packed for d, start, n in slices(sequences) if d == document)
        wanted = [seq_lens[-1]] * (
            length // seq_lens[-1]
        )  # as one would by hand: the longest that fits, again and again
        rest = length % seq_lens[-1]
        for seq_len in reversed(seq_lens[:-1]):
            wanted, rest = (wanted + [seq_len], rest - seq_len) if rest >= seq_len else (wanted, rest)
        wanted += [rest] if rest else []
        assert [n for _, n in mine] == wanted
        assert [start for start, _ in mine] == np.cumsum([0, *wanted])[:-1].tolist()
    for sequences in packed[1:]:
        assert (np.diff(sequences.offsets) == 1).all() and (sequences.used == sequences.seq_len).all()


def test_a_cycle_grows_from_short_to_long() -> None:
    raw = np.random.default_rng(0).integers(0, 2**63, 400).astype(np.uint64)
    counts = np.array([100, 100, 100, 100])
    grown, mixed = (cycle_order(counts, raw, grow=grow) for grow in (True, False))
    assert np.bincount(grown).tolist() == np.bincount(mixed).tolist() == counts.tolist()
    assert np.bincount(grown[:100], minlength=4)[0] > 40  # 8 of 15
    assert np.bincount(grown[:100], minlength=4)[3] < 20  # 1 of 15
    assert (grown[-50:] == 3).mean() > 0.8
    assert np.bincount(mixed[:100], minlength=4).min() > 10


def test_digests_cover_every_setting() -> None:
    lengths = np.arange(1, 30)
    one = Segment(0, 0, (8,), 16)
    variants = [
        constant_order(lengths, 8, 2, 7),
        constant_order(lengths[::-1], 8, 2, 7),
        constant_order(lengths, 9, 2, 7),
        constant_order(lengths, 8, 3, 7),
        constant_order(lengths, 8, 2, 8),
        constant_order(lengths, 8, 2, 7, "concat"),
        constant_order(lengths, 8, 2, 7, "single"),
        order_of_lengths(lengths, [one], seed=7, window_documents=5),
        order_of_lengths(lengths, [one], seed=7, grouping="window"),
        order_of_lengths(lengths, [replace(one, weights=(1.0,))], seed=7),
        order_of_lengths(lengths, [replace(one, seq_lens=(4, 8), grow=True)], seed=7),
    ]
    assert len({order.digest(3) for order in variants}) == len(variants)
    documents = [BatchOrder(variants[0].sources, variants[0].settings, documents=name).digest(3) for name in "ab"]
    assert documents[0] != documents[1]


def test_the_order_never_changes() -> None:
    """Pinned: a change here means that runs no longer continue with the batches they would have had."""
    order = order_of_lengths(np.arange(1, 9), [Segment(0, 0, (8,), 16)], seed=7, window_documents=5)
    assert [slices(order.batch(index)) for index in range(3)] == PINNED
    buckets = order_of_lengths(np.arange(1, 9), [Segment(0, 0, (4, 8), 8, None, True)], seed=7)
    assert [slices(buckets.batch(index)) for index in range(3)] == PINNED_BUCKETS
    assert order.digest(3) == PINNED_DIGEST
    parts = ((0, 0, (0.9, 0.1)), (1, 32, (0.5, 0.5)), (3, 96, (0.2, 0.8)))  # what is carried over fills the short ones
    stages = [Segment(step, token, (16,), 32, weights) for step, token, weights in parts]
    mixed = order_of_lengths(np.arange(1, 61) % 37 + 1, stages, sources=[(0, 30), (30, 60)], window_documents=20)
    assert mixed.digest(12).startswith("487ee1faa01cb2e7")


PINNED: list[list[Slice]] = [
    [(6, 0, 7), (4, 0, 5), (1, 0, 2)],
    [(7, 0, 8), (3, 0, 4), (2, 0, 3), (0, 0, 1)],
    [(6, 0, 7), (5, 0, 6), (1, 0, 2)],
]
PINNED_BUCKETS: list[list[Slice]] = [
    [(2, 0, 3), (4, 4, 1), (5, 0, 4)],
    [(6, 0, 4), (4, 0, 4)],
    [(7, 0, 8)],
]
PINNED_DIGEST = "c4deb245dee7137882f887530d7d8fd919c26ef7d4ec9967e9796dd1e01a9b9e"
