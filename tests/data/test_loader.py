"""Global batches: the same for every layout of processes, with right targets, and dealt evenly."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbolm.data.batch.collate import deal_sequences
from turbolm.data.batch.loader import BatchLoader, GlobalBatch, evaluation_batches, evaluation_set
from turbolm.data.order.batch_order import BatchOrder, order_of_lengths
from turbolm.data.order.packing import Packing, Sequences, pack_best_fit
from turbolm.data.store.token_store import TokenStore
from turbolm.errors import UserError
from turbolm.plan.batch import IGNORED_TARGET
from turbolm.plan.curriculum import Segment

from .samples import sample_ids

SEQ_LEN, SEQUENCES_PER_BATCH = 64, 10


@pytest.fixture(scope="module", params=get_args(Packing))
def order(store: TokenStore, request: pytest.FixtureRequest) -> BatchOrder:
    return order_of(store, SEQUENCES_PER_BATCH, request.param)


def order_of(store: TokenStore, sequences_per_batch: int, packing: Packing) -> BatchOrder:
    segment = Segment(0, 0, (SEQ_LEN,), SEQ_LEN * sequences_per_batch)
    return order_of_lengths(store.lengths("train"), [segment], packing=packing, window_documents=100)


def sequences_of(batches: list[GlobalBatch]) -> Counter[bytes]:
    """The sequences of all ranks that have any target, as a multiset."""
    found: Counter[bytes] = Counter()
    for micro in (micro for batch in batches for micro in batch.micro_batches):
        for sequence in np.stack([micro["input_ids"], micro["position_ids"], micro["targets"]], axis=1):
            if (sequence[2] != IGNORED_TARGET).any():
                found[sequence.tobytes()] += 1
    return found


def test_batches_are_the_same_for_every_layout(store: TokenStore, order: BatchOrder) -> None:
    expected = sequences_of([BatchLoader(order, store, "train", 1, 0, SEQ_LEN).global_batch(3)])
    assert expected.total() == SEQUENCES_PER_BATCH
    for world_size, micro_batch_size in product((1, 2, 3, 4, 8), (1, 2, 3)):
        batches = [
            BatchLoader(order, store, "train", world_size, rank, micro_batch_size * SEQ_LEN).global_batch(3)
            for rank in range(world_size)
        ]
        assert sequences_of(batches) == expected
        assert len({len(batch.micro_batches) for batch in batches}) == 1
        shape = (min(micro_batch_size, -(-SEQUENCES_PER_BATCH // world_size)), SEQ_LEN)
        assert all(micro["input_ids"].shape == shape for batch in batches for micro in batch.micro_batches)
        targets = sum(int((m["targets"] != IGNORED_TARGET).sum()) for batch in batches for m in batch.micro_batches)
        assert {batch.num_targets for batch in batches} == {targets}


def test_rows_of_scheduled_lengths_are_the_same_for_every_layout(store: TokenStore) -> None:
    """Lengths, batches and mixtures that change; read ahead by the thread and one by one."""
    half = store.num_documents("train") // 2
    segments = [
        Segment(0, 0, (16,), 320, (1.0, 0.0)),
        Segment(4, 1280, (8, 16, 32), 640, (0.5, 0.5), True),
        Segment(9, 4480, (64,), 960, (0.1, 0.9)),
    ]
    sources = [(0, half), (half, store.num_documents("train"))]
    order = order_of_lengths(store.lengths("train"), segments, sources=sources, window_documents=60)
    for world_size, micro_batch in product((1, 2, 3, 8), ("auto", 64, 256)):
        loaders = [BatchLoader(order, store, "train", world_size, rank, micro_batch) for rank in range(world_size)]
        read_ahead = zip(*(loader.iterate(2, 11) for loader in loaders), strict=True)
        for index, batches in enumerate(read_ahead, start=2):
            again = BatchLoader(order, store, "train", 1, 0, 320).global_batch(index)
            assert sequences_of(list(batches)) == sequences_of([again])
            assert sequences_of(list(batches)).total() == len(again.sequences)
            shapes = {micro["input_ids"].shape for batch in batches for micro in batch.micro_batches}
            assert len(shapes) == 1
            if micro_batch != "auto":
                assert np.prod(shapes.pop()) <= max(micro_batch, again.sequences.seq_len)


@pytest.mark.parametrize(("world_size", "shared_by"), [(2, 2), (4, 2), (8, 4), (6, 2)])
def test_ranks_of_a_group_have_slices_of_the_same_sequences(
    store: TokenStore, order: BatchOrder, world_size: int, shared_by: int
) -> None:
    """Put together they are the batch of as many ranks as there are groups; every rank knows the whole positions."""
    num_groups, boundaries = world_size // shared_by, order.max_slices(4)
    for group in range(num_groups):
        whole = BatchLoader(order, store, "train", num_groups, group, 2 * SEQ_LEN, boundaries).global_batch(3)
        ranks = range(shared_by * group, shared_by * (group + 1))
        loaders = [
            BatchLoader(order, store, "train", world_size, rank, 2 * SEQ_LEN, boundaries, shared_by=shared_by)
            for rank in ranks
        ]
        batches = [loader.global_batch(3) for loader in loaders]
        for number, micro in enumerate(whole.micro_batches):
            parts = [batch.micro_batches[number] for batch in batches]
            for name in ("input_ids", "position_ids", "targets"):
                np.testing.assert_array_equal(np.concatenate([part[name] for part in parts], axis=1), micro[name])
            for part in parts:
                np.testing.assert_array_equal(part["whole_position_ids"], micro["position_ids"])
                np.testing.assert_array_equal(part["cu_seqlens"], micro["cu_seqlens"])
        assert {batch.samples_digest for batch in batches} == {whole.samples_digest}


def test_imbalance_by_hand(store: TokenStore) -> None:
    sequences = Sequences(8, np.arange(4), np.arange(3), np.zeros(3, np.int64), np.array([8, 4, 4]))  # costs 64, 16, 16
    dealt = np.array([[[0], [1]], [[-1], [2]]])  # of two ranks: 64 and 16, then nothing and 16
    batch = GlobalBatch(0, sequences, dealt, dealt[:, 0], [])
    assert batch.imbalance == pytest.approx((64 + 16) / (40 + 8))


def test_sequences_hold_their_slices_one_after_the_other(store: TokenStore, order: BatchOrder) -> None:
    batch = BatchLoader(order, store, "train", 1, 0, SEQUENCES_PER_BATCH * SEQ_LEN).global_batch(0)
    arrays, sequences = batch.micro_batches[0], batch.sequences
    assert {name: array.dtype.name for name, array in arrays.items()} == dict.fromkeys(arrays, "int64")
    for sequence, index in enumerate(batch.indices[0]):
        used = 0
        for part in range(sequences.offsets[index], sequences.offsets[index + 1]):
            document, start, length = (int(x[part]) for x in (sequences.document, sequences.start, sequences.length))
            whole = store.read("train", document, 0, int(store.lengths("train")[document]))
            where = slice(used, used + length)
            np.testing.assert_array_equal(arrays["input_ids"][sequence, where], whole[start : start + length])
            np.testing.assert_array_equal(arrays["targets"][sequence, where], whole[start + 1 : start + length + 1])
            np.testing.assert_array_equal(arrays["position_ids"][sequence, where], np.arange(length))
            used += length
        assert (arrays["input_ids"][sequence, used:] == 0).all()
        assert (arrays["targets"][sequence, used:] == IGNORED_TARGET).all()
        np.testing.assert_array_equal(arrays["position_ids"][sequence, used:], np.arange(SEQ_LEN - used))
    eos = store.manifest["eos_id"]
    inside = arrays["position_ids"] > 0
    assert not ((arrays["input_ids"] == eos) & inside & (arrays["targets"] != IGNORED_TARGET)).any()


@pytest.mark.parametrize("packing", get_args(Packing))
def test_an_epoch_trains_on_every_target_once(store: TokenStore, packing: Packing) -> None:
    order = order_of(store, 1, packing)
    order.build(10_000)
    epoch = next(planned for planned in order.table if planned.ranges[0][1] == store.num_documents("train"))
    assert not len(epoch.carried_on.length), "a batch is one sequence, so nothing is left over"
    loader = BatchLoader(order, store, "train", 1, 0, SEQ_LEN)
    counts = np.zeros(store.vocab_size, np.int64)
    for batch in loader.iterate(0, epoch.end_step):
        targets = batch.micro_batches[0]["targets"]
        counts += np.bincount(targets[targets != IGNORED_TARGET], minlength=store.vocab_size)
    np.testing.assert_array_equal(counts, store.token_counts("train"))


def test_numbers_of_a_batch(store: TokenStore, order: BatchOrder) -> None:
    batch = BatchLoader(order, store, "train", 3, 1, 2 * SEQ_LEN).global_batch(2)
    slices = sample_ids(batch)
    assert batch.num_targets == sum(length for _, _, length in slices)
    assert batch.num_documents == len({document for document, _, _ in slices})
    assert batch.padding_fraction == pytest.approx(1 - batch.num_targets / (SEQUENCES_PER_BATCH * SEQ_LEN))


def test_cu_seqlens_have_few_sizes(store: TokenStore, order: BatchOrder) -> None:
    loader = BatchLoader(order, store, "train", 3, 0, 2 * SEQ_LEN, max_slices=order.max_slices(4))
    sizes = set()
    for index in range(4):  # 10 sequences in 12 places
        for arrays in loader.global_batch(index).micro_batches:
            flat = arrays["position_ids"].ravel()
            expected = [*np.flatnonzero(flat == 0), flat.size]
            boundaries = arrays["cu_seqlens"]
            assert boundaries[: len(expected)].tolist() == expected
            assert (boundaries[len(expected) :] == flat.size).all()
            sizes.add(len(boundaries))
    most = 2 * (order.max_slices(4)[SEQ_LEN] + 1)
    assert len(sizes) <= 3 and max(sizes) <= most + 1
    assert all(size == most + 1 or (size - 1).bit_count() == 1 for size in sizes)


@given(
    cost=st.lists(st.integers(1, 1000), min_size=1, max_size=60),
    world_size=st.integers(1, 8),
    micro_batch_size=st.integers(1, 5),
)
def test_every_sequence_is_dealt_once(cost: list[int], world_size: int, micro_batch_size: int) -> None:
    dealt = deal_sequences(np.array(cost), world_size, micro_batch_size)
    per_micro = world_size * micro_batch_size
    assert dealt.shape == (-(-len(cost) // per_micro), world_size, micro_batch_size)
    assert sorted(dealt[dealt >= 0].tolist()) == list(range(len(cost)))
    assert (dealt[:-1] >= 0).all()  # empty places are in the last micro step
    empty = (dealt[-1] < 0).sum(axis=1)
    assert empty.max() - empty.min() <= 1  # and spread over the ranks


def test_a_rank_alone_gets_the_bins_from_dear_to_cheap() -> None:
    assert deal_sequences(np.array([3, 9, 5, 9, 1]), 1, 2).tolist() == [[[1, 3]], [[2, 0]], [[4, -1]]]


def test_ranks_get_nearly_the_same_work() -> None:
    lengths = np.random.default_rng(0).lognormal(6, 1.3, 3000).astype(np.int64)
    cost = pack_best_fit(lengths, 2048).attention_cost[:512]
    dealt = deal_sequences(cost, 8, 4)
    by_rank = cost[dealt].sum(axis=(0, 2))
    assert by_rank.max() / by_rank.min() < 1.1
    by_micro = cost[dealt].sum(axis=2)
    assert np.median(by_micro.max(axis=1) / by_micro.min(axis=1)) < 1.05


def test_iterate_equals_random_access_and_ends(store: TokenStore, order: BatchOrder) -> None:
    loader = BatchLoader(order, store, "train", 2, 1, 2 * SEQ_LEN)
    batches = list(loader.iterate(4, 9))
    assert [batch.index for batch in batches] == [4, 5, 6, 7, 8]
    for batch in reversed(batches):
        again = loader.global_batch(batch.index)
        assert sample_ids(again) == sample_ids(batch)
        for one, two in zip(again.micro_batches, batch.micro_batches, strict=True):
            assert all(np.array_equal(one[name], two[name]) for name in one)
    assert list(loader.iterate(3, 3)) == []
    assert no_reader_left()


def test_a_batch_stays_as_it_was_while_others_are_drawn(store: TokenStore, order: BatchOrder) -> None:
    """No memory is used again while somebody holds a batch of it (a copy to a GPU may still be under way)."""
    loader = BatchLoader(order, store, "train", 1, 0, 2 * SEQ_LEN)
    held, copies = [], []
    for batch in loader.iterate(0, 6):
        held.append(batch)
        copies.append([{name: array.copy() for name, array in micro.items()} for micro in batch.micro_batches])
        loader.global_batch(batch.index + 20)
    for batch, expected in zip(held, copies, strict=True):
        for micro, copied in zip(batch.micro_batches, expected, strict=True):
            assert all(np.array_equal(micro[name], copied[name]) for name in copied)


def test_closing_stops_the_reader(store: TokenStore, order: BatchOrder) -> None:
    batches = BatchLoader(order, store, "train", 1, 0, 2 * SEQ_LEN).iterate(0, 10**9)
    assert next(batches).index == 0
    batches.close()
    assert no_reader_left()


def test_errors_of_the_reader_arrive(order: BatchOrder, store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Callable[[int], Sequences] = order.batch

    def fail(index: int) -> Sequences:
        if index == 2:
            raise UserError("shard gone")
        return read(index)

    monkeypatch.setattr(order, "batch", fail)
    batches = BatchLoader(order, store, "train", 1, 0, 2 * SEQ_LEN).iterate(0, 10)
    assert [next(batches).index, next(batches).index] == [0, 1]
    with pytest.raises(UserError, match="shard gone"):
        next(batches)
    assert no_reader_left()


def no_reader_left() -> bool:
    return not any(thread.name == "turbolm-prefetch" for thread in threading.enumerate())


def test_evaluation_set_takes_whole_documents(store: TokenStore) -> None:
    lengths, text_bytes = store.lengths("validation").tolist(), store.text_bytes("validation").tolist()
    whole = evaluation_set(store, SEQ_LEN, 10**9)
    assert (whole.num_targets, whole.text_bytes) == (sum(lengths), sum(text_bytes))
    for limit, count in ((sum(lengths[:4]), 4), (sum(lengths[:4]) + lengths[4] - 1, 4), (1, 1)):
        part = evaluation_set(store, SEQ_LEN, limit, "single")
        assert (part.num_targets, part.text_bytes) == (sum(lengths[:count]), sum(text_bytes[:count]))


def test_held_out_documents_are_cut_alike_however_training_packs(store: TokenStore) -> None:
    best_fit, concat = (evaluation_set(store, SEQ_LEN, 10**9, packing).sequences for packing in ("best_fit", "concat"))
    assert np.array_equal(best_fit.length, concat.length) and np.array_equal(best_fit.offsets, concat.offsets)


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_batches_hold_every_target_once(store: TokenStore, world_size: int) -> None:
    held_out = evaluation_set(store, SEQ_LEN, 10**9)
    ranks = [
        list(evaluation_batches(held_out, store, world_size=world_size, rank=rank, micro_batch_size=2))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(batch.micro_batches) == 1 for batches in ranks for batch in batches)
    targets = np.concatenate([b.micro_batches[0]["targets"].ravel() for batches in ranks for b in batches])
    counts = np.bincount(targets[targets != IGNORED_TARGET], minlength=store.vocab_size)
    np.testing.assert_array_equal(counts, store.token_counts("validation"))
    assert sum(batch.num_targets for batch in ranks[0]) == counts.sum()


def test_no_validation_documents(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenStore, "num_documents", lambda self, split: 0)
    with pytest.raises(UserError, match=r"Raise data.validation \(it is now 0.1\)"):
        evaluation_set(store, SEQ_LEN, 100)
