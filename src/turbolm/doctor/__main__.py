"""Examine this node: fork its ranks, wait for them, print the report. Started by `turbolm.doctor.examine`."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from typing import Any

from turbolm.doctor.task import Task
from turbolm.errors import EXIT_FAILED, EXIT_OK
from turbolm.reliability.orphans import end_with_parent


def main() -> int:
    """Run the task in the first argument; its report goes to standard output as one line of JSON."""
    task = Task.parse(sys.argv[1])
    import turbolm.doctor.rank  # noqa: F401  # torch is imported once for all ranks: nothing has started threads yet

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    ranks = [context.Process(target=_rank, args=(task, k, os.getpid(), sender)) for k in range(task.num_ranks)]
    for rank in ranks:
        rank.start()
    sender.close()
    deadline = time.monotonic() + task.meet_sec + task.measure_sec + 30
    report = None
    while ranks[0].is_alive() and time.monotonic() < deadline and report is None:
        if receiver.poll(0.2):
            try:
                report = receiver.recv()
            except EOFError:
                break
    ranks[0].join(15 if report else 0)  # the first one of all keeps the store for the others
    for rank in ranks:
        rank.kill()
    if report is None:
        return EXIT_FAILED
    print(json.dumps(report))
    return EXIT_OK


def _rank(task: Task, local: int, parent: int, sender: Any) -> None:
    from turbolm.doctor.rank import run_rank

    end_with_parent(parent)
    try:
        report = run_rank(task, local)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        print(f"doctor: {task.hosts[task.node]}: {reason}", file=sys.stderr, flush=True)
        os._exit(EXIT_FAILED)
    if report is not None:
        sender.send(report)
    sys.stderr.flush()
    os._exit(EXIT_OK)  # process groups whose peers are gone would wait


if __name__ == "__main__":
    sys.exit(main())
