"""Compare the planned collectives with those of real steps over the whole grid, and print a table.

    python -m tests.plan.traffic_grid [RANKS ...]        # 2 and 4 ranks: about 5 minutes on 2 cores

Exits with 1 if a step did something that was not planned. The messages of stage 3, which its prefetcher groups, are
counted in the last columns; elsewhere the two are equal, or the cell differs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.plan.traffic_cells import grid, record


def main(world_sizes: list[int]) -> int:
    num_different = 0
    print("| ranks | cell | as planned | bytes | messages done | planned |\n|---|---|---|---|---|---|")
    for world_size in world_sizes:
        with tempfile.TemporaryDirectory() as folder:
            recorded = record(Path(folder), world_size, grid(world_size))
        for name, one in recorded.items():
            differences = one.differences()
            num_different += bool(differences)
            seen, expected = one.seen(), one.expected()
            num_bytes = sum(key[1] * number for key, number in seen.items())
            verdict = f"DIFFERS: {differences}".replace("\n", "; ") if differences else "yes"
            print(f"| {world_size} | {name} | {verdict} | {num_bytes:,} | {seen.total()} | {expected.total()} |")
    print(f"\n{num_different} cells differ")
    return int(num_different > 0)


if __name__ == "__main__":
    sys.exit(main([int(word) for word in sys.argv[1:]] or [2, 4]))
