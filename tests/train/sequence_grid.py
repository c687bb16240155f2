"""Train the whole grid of sequence parallelism against plain PyTorch, and print a line for each cell.

    python -m tests.train.sequence_grid [RANKS ...]        # 12 minutes on 2 busy cores

{processes that share sequences 1, 2, 4} x ZeRO {0, 1, 2, 3} x accumulation {1, 3} x data parallel {1, 2} x {llama,
qwen3, gpt2}: packed documents, masked targets, 10 steps in fp32, loss and gradient norm of each against those of one
process that computes document by document. Exits with 1 if one differs by more than 1e-5.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.train.harness import Cell, cell_recipe, run_cells
from tests.train.reference import train_reference
from tests.train.test_equivalence import learning_rates
from tests.train.test_sequence_parallel import MODELS, cell
from turbolm.data.prepare.build import prepare
from turbolm.data.store.token_store import open_store

TOLERANCE = 1e-5


def grid() -> list[tuple[int, Cell]]:
    """Every cell with the ranks of its world."""
    axes = itertools.product((1, 2, 4), (1, 2), (0, 1, 2, 3), (1, 3), MODELS)
    return [(shared_by * groups, cell(shared_by, groups, *rest)) for shared_by, groups, *rest in axes]


def main(world_sizes: list[int]) -> int:
    """Train the cells of worlds of these sizes."""
    cells, worst, num_different, num_cells, start = grid(), 0.0, 0, 0, time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder, expected = Path(name), {}
        for model in MODELS:
            recipe = cell_recipe(folder, Cell(name="reference", model=model))
            expected[model] = np.array(train_reference(recipe, open_store(prepare(recipe)), learning_rates()))
        for world_size in world_sizes:
            its = [one for size, one in cells if size == world_size]
            for name, values in run_cells(folder, world_size, its, timeout_sec=1800).items():
                model = name.partition("-")[0]
                error = float(np.max(np.abs(np.array(values) / expected[model] - 1)))
                is_equal = error <= TOLERANCE and len(values) == len(expected[model])
                worst, num_different, num_cells = max(worst, error), num_different + (not is_equal), num_cells + 1
                print(f"{'equal' if is_equal else 'DIFFERS'} {error:.1e} {name}", flush=True)
    took = time.monotonic() - start
    print(f"{num_cells} cells, {num_different} differ; the largest difference is {worst:.1e}; {took:.0f} s")
    return int(num_different > 0)


if __name__ == "__main__":
    sys.exit(main([int(word) for word in sys.argv[1:]] or [1, 2, 4, 8]))
