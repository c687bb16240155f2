"""Open files: raised to the hard limit, counted before any group is made, refused in one line."""

from __future__ import annotations

import re
import subprocess
import sys

from turbolm.reliability.open_files import files_needed, gloo_sharing

# Eight ranks under limits given as (soft, hard); each makes one gloo group, and agrees by messages from a second thread
# while the main one uses the group's collective operations. Pairs of them share sequences.
RANKS = """
import os, resource, sys, threading
import torch.distributed as dist
from turbolm.checkpoint.agreement import gather_by_messages, gather_over
from turbolm.errors import UserError
from turbolm.reliability.open_files import check_open_files, raise_open_files

WORLD, port, hard = 8, sys.argv[1], int(sys.argv[2])

def run(rank):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(WORLD))
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, hard))
    raise_open_files()
    try:
        check_open_files(WORLD, 1, 2)
    except UserError as error:
        print(error, flush=True)
        return 2
    before = len(os.listdir("/proc/self/fd"))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    pairs = [dist.new_group([first, first + 1]) for first in range(0, WORLD, 2)]
    dist.barrier(pairs[rank // 2])
    told = []
    thread = threading.Thread(target=lambda: told.extend(gather_by_messages(None)([rank, i]) for i in range(20)))
    thread.start()
    for i in range(20):
        assert gather_over(None)((rank, i)) == [(other, i) for other in range(WORLD)]
    thread.join()
    assert told == [[[other, i] for other in range(WORLD)] for i in range(20)]
    used = len(os.listdir("/proc/self/fd")) - before
    need = (WORLD + 3) + (2 + 3)
    assert need <= used <= need + 96 + (WORLD if rank == 0 else 0), used
    dist.barrier()
    return 0

children = []
for rank in range(WORLD):
    pid = os.fork()
    if not pid:
        os._exit(run(rank))
    children.append(pid)
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])
"""


def start(hard: int, port: int) -> list[str]:
    command = [sys.executable, "-c", RANKS, str(port), str(hard)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.splitlines()


def test_eight_ranks_start_where_its_groups_fit_and_else_are_told_the_need() -> None:
    refused = start(64, 29711)
    assert refused[-1] == str([2] * 8)
    needs = [re.search(r"a rank of 8 needs (\d+) open files, and the limit is 64 ", line) for line in refused[:-1]]
    assert len(needs) == 8
    need = max(int(found[1]) for found in needs if found)
    assert start(need, 29712) == [str([0] * 8)]


def test_groups_that_share_sequences_are_gloo_s_on_a_cpu_alone() -> None:
    assert [gloo_sharing("cpu", 1), gloo_sharing("cpu", 4), gloo_sharing("cuda", 4)] == [0, 4, 0]
    assert files_needed(8, 1, 4) - files_needed(8, 1) == 4 + 3
