"""Compiled loops against plain Python, and what happens where they cannot be compiled."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbolm.data import native
from turbolm.data.batch import collate
from turbolm.data.order import stream, window
from turbolm.data.order.batch_order import order_of_lengths
from turbolm.data.order.packing import Sequences, pack_best_fit
from turbolm.data.store import token_store as store
from turbolm.data.store.token_store import TokenStore
from turbolm.errors import UserError
from turbolm.plan.batch import IGNORED_TARGET
from turbolm.plan.curriculum import Segment

from . import reference
from .test_collate import store_in_memory

DOCUMENTS = [([5, 0, 9], [2]), ([], []), ([30, 1], []), ([], [4, 4])]


@pytest.fixture
def fresh() -> Iterator[None]:
    """Compiled code is looked for anew, in the test and after it."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=70),
    seq_len=st.integers(1, 70),
)
def test_slices_go_where_python_puts_them(counts: list[int], seq_len: int) -> None:
    histogram = np.zeros(seq_len, np.int64)
    histogram[1 : len(counts) + 1] = counts[: seq_len - 1]
    lengths = np.ascontiguousarray(np.flatnonzero(histogram)[::-1])
    arguments = lengths, histogram[lengths], seq_len
    np.testing.assert_array_equal(native.best_fit(*arguments), reference.best_fit(*arguments))


def test_a_long_row_has_room_in_its_last_word() -> None:
    lengths, counts = np.array([4097, 4095, 63, 1]), np.array([3, 5, 700, 9000])
    np.testing.assert_array_equal(native.best_fit(lengths, counts, 8192), reference.best_fit(lengths, counts, 8192))


@given(numbers=st.lists(st.integers(0, 2**64 - 1) | st.sampled_from([0, 1 << 63, 2**64 - 1]), max_size=300))
def test_random_numbers_are_sorted_stably(numbers: list[int]) -> None:
    array = np.array(numbers, np.uint64)
    np.testing.assert_array_equal(native.argsort_random(array), np.argsort(array, kind="stable"))


def test_the_order_of_a_run_is_that_of_plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(0).geometric(1 / 150, 4000) + 1

    def batches() -> list[object]:
        segments = [Segment(0, 0, (256,), 4096), Segment(20, 0, (512,), 4096), Segment(60, 0, (128, 256, 512), 2048)]
        order = order_of_lengths(lengths, segments, seed=3, window_documents=900)
        sequences = [order.batch(index) for index in range(100)]
        columns = [(b.seq_len, b.offsets, b.document, b.start, b.length) for b in sequences]
        return [[np.asarray(column).tolist() for column in batch] for batch in columns] + [order.digest(100)]

    compiled = batches()
    monkeypatch.setattr(native, "best_fit", reference.best_fit)
    for module in (stream, window):
        monkeypatch.setattr(module, "argsort_random", lambda numbers: np.argsort(numbers, kind="stable"))
    assert compiled == batches()


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("seq_len", [1, 7, 64])
def test_sequences_are_filled_as_in_plain_python(seq_len: int, dtype: str) -> None:
    tokens = store_in_memory(DOCUMENTS, dtype)
    sequences = pack_best_fit(tokens.lengths("train"), seq_len)
    chosen = np.array([-1, *range(len(sequences)), -1])
    compiled, plain = np.full((2, 3, len(chosen), seq_len), 77)
    ends = collate.fill(compiled, sequences, chosen, tokens, "train")
    assert ends.tolist() == reference.fill(plain, sequences, chosen, tokens, "train", IGNORED_TARGET)
    np.testing.assert_array_equal(compiled, plain)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_lengths_of_some_documents(split: store.Split) -> None:
    tokens = store_in_memory(DOCUMENTS, "<u2")
    some = np.array([2, 0, 1, 2])
    assert tokens.lengths_of(split, some).tolist() == tokens.lengths(split)[some].tolist()


@pytest.mark.parametrize(("row", "end"), [(0, -3), (1, 2**40), (4, 1000)])
def test_an_index_that_points_outside_its_shard_is_refused(row: int, end: int) -> None:
    """Its file is as the manifest says, but what it says is wrong: compiled code would read any memory."""
    tokens = store_in_memory([([3, 5, 4, 6, 2, 7], [])], "<u2")
    tokens.manifest["shards"][0]["index"] = {"file": "shard-00000.index"}
    tokens._maps[0, "index"][2 * row] = end
    sequences = Sequences(8, np.arange(7), np.arange(6), np.zeros(6, np.int64), np.full(6, 2))
    block = np.empty((3, 6, 8), np.int64)
    with pytest.raises(UserError, match=r"shard-00000\.index has documents beyond .*turbolm verify"):
        collate.fill(block, sequences, np.arange(6), tokens, "train")


def test_a_slice_without_room_in_its_sequence_is_refused() -> None:
    tokens = store_in_memory([([30, 30], [])], "<u2")
    sequences = Sequences(32, np.array([0, 2]), np.array([0, 1]), np.zeros(2, np.int64), np.array([20, 20]))
    block = np.empty((3, 1, 32), np.int64)
    shards = tokens.shards("train", sequences.document)
    assert native.fill(block, shards, "<u2", sequences, np.array([0]), -100)[1] == 1


@pytest.mark.parametrize("document", [-1, 3])
def test_documents_that_do_not_exist_are_refused(document: int) -> None:
    tokens = store_in_memory([([3, 5, 4], [])], "<u2")
    with pytest.raises(IndexError, match="3 documents for train"):
        tokens.lengths_of("train", np.array([0, document]))


def test_files_in_use_stay_mapped_when_others_are_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_MAX_OPEN_FILES", 4)
    tokens = store_in_memory([([n + 1, 9], []) for n in range(5)], "<u2")
    maps = tokens._maps
    monkeypatch.setattr(TokenStore, "_map", lambda self, shard, part, dtype: maps[shard, part].view(dtype))
    held = tokens.shards("train", np.array([0, 2]))
    assert np.flatnonzero(held.memory["tokens"]).tolist() == [0, 1]
    later = tokens.shards("train", np.array([5, 8]))  # more files than may be open: those of before are let go
    assert np.flatnonzero(later.memory["tokens"]).tolist() == [2, 4]
    assert np.flatnonzero(held.memory["tokens"]).tolist() == [0, 1]
    assert [len(shards.files) for shards in (held, later)] == [4, 4]
    assert tokens.lengths_of("train", np.arange(10)).tolist() == tokens.lengths("train").tolist()  # all five at once


def test_a_store_that_is_sent_to_another_process_opens_its_files_anew() -> None:
    tokens = store_in_memory(DOCUMENTS, "<u2")
    tokens.lengths_of("train", np.arange(3))
    sent = pickle.loads(pickle.dumps(tokens))  # noqa: S301
    assert not sent._maps and not sent.shards("train", np.arange(0)).memory["tokens"].any()


def test_it_is_compiled_once_by_many(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    threads = [threading.Thread(target=native._compiled, args=[native._folder()]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (made,) = (tmp_path / "extensions").iterdir()  # and nothing else is left
    written = made.stat().st_mtime_ns
    assert native.library() is not None
    assert made.stat().st_mtime_ns == written


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "sh -c 'sleep 60'"])
def test_without_a_compiler_a_user_is_told(
    compiler: str, fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(native, "_COMPILE_SEC", 0.5)
    with pytest.raises(UserError, match="(?s)could not be compiled: .*Install a C compiler"):
        native.library()


@pytest.mark.parametrize("obstacle", ["no folder", "a damaged file", "no home"])
def test_without_a_place_for_it_each_process_compiles_its_own(
    obstacle: str, fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    if obstacle == "no folder":
        (tmp_path / "extensions").write_text("a file")
    elif obstacle == "a damaged file":
        native._compiled(native._folder()).write_bytes(b"\x7fELF but nothing more")
    else:
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR")

        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", no_home)
    numbers = np.random.default_rng(0).integers(0, 2**64, 1000, np.uint64)
    np.testing.assert_array_equal(native.argsort_random(numbers), np.argsort(numbers, kind="stable"))
