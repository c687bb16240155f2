"""How even the work of the ranks is, how full the sequences, and whether neighbouring batches are alike.

    python benchmarks/balance.py --corpus corpus.parquet --column text

Counts only, no times: the figures are the same on every machine. The last line of the output is a JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from packing import BYTES_PER_TOKEN, corpus_lengths

from turbolm.data.batch.collate import deal_sequences
from turbolm.data.order.batch_order import order_of_lengths
from turbolm.data.order.packing import Sequences
from turbolm.plan.curriculum import Segment

TARGETS = {"imbalance": 1.05, "neighbour_correlation": 0.15, "padding": 0.001}


def imbalance(sequences: Sequences, world_size: int, micro_batch_size: int) -> float:
    """Attention cost of the most expensive rank over the mean of all ranks, summed over the micro-batches of a step."""
    cost = np.append(sequences.attention_cost, 0)[
        deal_sequences(sequences.attention_cost, world_size, micro_batch_size)
    ].sum(axis=2)
    return float(cost.max(axis=1).sum() / cost.mean(axis=1).sum())


def as_drawn(sequences: Sequences, world_size: int, micro_batch_size: int) -> float:
    """The same without dealing by cost: sequences go to ranks as they come."""
    cost = sequences.attention_cost.reshape(-1, world_size, micro_batch_size).sum(axis=2)
    return float(cost.max(axis=1).sum() / cost.mean(axis=1).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--column", default="text")
    parser.add_argument("--lengths", type=Path, help=f"tokens of each document (.npy); else bytes / {BYTES_PER_TOKEN}")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--world-size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    lengths, name = corpus_lengths(arguments)
    print(f"{len(lengths):,} documents, {lengths.sum():,} tokens ({name}), sequences of {arguments.seq_len}")
    print("grouping  sequences per rank  micro-batch  imbalance (dealt as drawn)  neighbours  padding")
    figures = {}
    for per_rank, micro_batch_size in ((8, 1), (8, 4), (32, 8), (2, 1), (1, 1)):
        for grouping in ("batch", "window"):
            sequences_per_batch = per_rank * arguments.world_size
            segment = Segment(0, 0, (arguments.seq_len,), arguments.seq_len * sequences_per_batch)
            order = order_of_lengths(lengths, [segment], grouping=grouping)
            num_steps = int(lengths.sum() * arguments.epochs / segment.global_batch_tokens)
            batches = [order.batch(step) for step in range(num_steps)]
            uneven = np.median([imbalance(b, arguments.world_size, micro_batch_size) for b in batches])
            drawn = np.median([as_drawn(b, arguments.world_size, micro_batch_size) for b in batches])
            mean_lengths = np.array([b.num_positions / len(b.length) for b in batches])
            neighbours = float(np.corrcoef(mean_lengths[1:], mean_lengths[:-1])[0, 1])
            padding = 1 - sum(b.num_positions for b in batches) / (num_steps * segment.global_batch_tokens)
            print(
                f"{grouping:<9} {per_rank:>18}  {micro_batch_size:>11}  {uneven:>9.4f}  {drawn:>15.4f}  "
                f"{neighbours:>10.3f}  {padding:.5%}"
            )
            figures[f"{grouping}-{per_rank}x{micro_batch_size}"] = {
                "imbalance": float(uneven),
                "imbalance_as_drawn": float(drawn),
                "neighbour_correlation": neighbours,
                "padding": padding,
            }
    usual = figures["batch-8x4"]
    met = {key: abs(usual[key]) <= most for key, most in TARGETS.items()}
    print(json.dumps({"bench": "balance", "figures": figures, "rivals": {}, "targets": TARGETS, "met": met}))


if __name__ == "__main__":
    main()
