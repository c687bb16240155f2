"""What the compiled loops of the data engine should give, in plain Python."""

from __future__ import annotations

import numpy as np

from turbolm.data.native import IntArray
from turbolm.data.order.packing import Sequences
from turbolm.data.store.token_store import Split, TokenStore


def best_fit(lengths: IntArray, counts: IntArray, seq_len: int) -> IntArray:
    """The actions of `native.best_fit`, int64 [num_actions, 4], for `counts` slices of these lengths, longest first."""
    actions: list[tuple[int, int, int, int]] = []
    # By room: (first sequence, number of sequences, slices in each).
    runs: list[list[tuple[int, int, int]]] = [[] for _ in range(seq_len + 1)]
    with_room = 0  # bit r is set where runs[r] is not empty
    next_sequence = 0
    for length, count in zip(lengths.tolist(), counts.tolist(), strict=True):
        while count:
            fitting = with_room >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                first, available, before = runs[room].pop()
                if not runs[room]:
                    with_room ^= 1 << room
            else:
                room, first, before = seq_len, next_sequence, 0
                available = -(-count // (seq_len // length))
                next_sequence += available
            each = room // length
            used = min(available, count // each)
            if not used:  # fewer slices left than one sequence takes
                each, used = count, 1
            actions.append((first, used, each, before))
            count -= used * each
            left = room - each * length
            untouched, filled = (first + used, available - used, before), (first, used, before + each)
            for room_now, run in ((room, untouched), (left, filled)):
                if room_now and run[1]:
                    runs[room_now].append(run)
                    with_room |= 1 << room_now
    return np.array(actions, dtype=np.int64).reshape(-1, 4)


def fill(
    block: IntArray, sequences: Sequences, indices: IntArray, store: TokenStore, split: Split, ignored: int
) -> list[int]:
    """Write inputs, positions and targets to `block`, int64 [3, len(indices), seq_len]; where the slices end."""
    inputs, positions, targets = block
    ends = []
    for slot, index in enumerate(indices.tolist()):
        at = 0
        for part in range(*sequences.offsets[index : index + 2]) if index >= 0 else ():
            document, start, length = (int(c[part]) for c in (sequences.document, sequences.start, sequences.length))
            tokens = store.read(split, document, start, length)
            inputs[slot, at : at + length], targets[slot, at : at + length] = tokens[:-1], tokens[1:]
            positions[slot, at : at + length] = np.arange(length)
            at += length
            ends.append(slot * sequences.seq_len + at)
        if at < sequences.seq_len:
            inputs[slot, at:], targets[slot, at:] = 0, ignored
            positions[slot, at:] = np.arange(sequences.seq_len - at)
            ends.append((slot + 1) * sequences.seq_len)
    return ends
