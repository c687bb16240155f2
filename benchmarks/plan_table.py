"""Time and memory of planning the order of many documents, worked out from measured parts of the table.

    python benchmarks/plan_table.py [--documents 15e9] [--parts 2]

Windows cost the same wherever they are in the table, so a few parts of one of `--sample` documents are planned and
scaled by the number of windows; the blocks of an epoch (16 bytes for 1,024 documents, two epochs) are added.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from turbolm.data.order.batch_order import BatchOrder, constant_order
from turbolm.data.order.plan_table import PART_WINDOWS
from turbolm.data.order.stream import BLOCK_DOCUMENTS, WINDOW_DOCUMENTS

SEQ_LEN, SEQUENCES_PER_BATCH = 4096, 1024  # 4M tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=float, default=15e9)
    parser.add_argument("--sample", type=float, default=20e6)
    parser.add_argument("--parts", type=int, default=1)
    arguments = parser.parse_args()
    lengths = np.random.default_rng(0).lognormal(6.3, 1.0, int(arguments.sample)).astype(np.int64) + 1
    with tempfile.TemporaryDirectory() as name:
        like = constant_order(lengths, SEQ_LEN, SEQUENCES_PER_BATCH)
        order = BatchOrder(like.sources, like.settings, "", Path(name))
        began = time.perf_counter()
        while len(order.table) < arguments.parts * PART_WINDOWS:
            order.table.extend()
        order.table.save()
        part_sec = (time.perf_counter() - began) / arguments.parts
        part_bytes = sum(path.stat().st_size for path in Path(name).glob("part-*")) / arguments.parts
    num_parts = arguments.documents / WINDOW_DOCUMENTS / PART_WINDOWS
    result = {
        "measured": {"part_s": part_sec, "part_bytes": part_bytes, "windows_per_part": PART_WINDOWS},
        "worked_out": {
            "documents": arguments.documents,
            "parts": num_parts,
            "build_s": num_parts * part_sec,
            "file_bytes": num_parts * part_bytes,
            "memory_bytes": 3 * part_bytes + 2 * 16 * arguments.documents / BLOCK_DOCUMENTS,
            "lost_by_a_kill_s": part_sec,
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
