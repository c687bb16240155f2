"""A rank without torch: it gives signs of life as training does, keeps step with its peers through files, and hangs.

RANK=1 WORLD_SIZE=2 ... python -m tests.chaos.fake_rank FOLDER WHERE RANK_THAT_HANGS HANG_SEC STARTUP_SEC
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from pathlib import Path

from turbolm.reliability import heartbeat
from turbolm.reliability.watchdog import watch_over

STEP_SEC = 0.05
HANG_AFTER = 10


def hold_the_interpreter() -> None:
    libc = ctypes.PyDLL(None)  # unlike CDLL it does not let other threads run meanwhile
    while True:
        libc.sleep(600)


def sleep_for_ever() -> None:
    while True:
        time.sleep(600)


def evaluate_for_ever() -> None:
    sleep_for_ever()


def write_to_a_dead_disk() -> None:
    sleep_for_ever()


def import_for_ever() -> None:
    sleep_for_ever()


def train_on(folder: Path, rank: int, world_size: int, where: str, hangs: bool) -> None:
    """Steps, with an evaluation and a save after each of them."""
    for step in range(1, 10_000):
        time.sleep(STEP_SEC)
        hang_now = hangs and step == HANG_AFTER
        if hang_now:
            (folder / "hanging").touch()
        if hang_now and where == "interpreter":
            hold_the_interpreter()
        heartbeat.advance()
        wait_for_all(folder, rank, world_size, step)
        heartbeat.advance(heartbeat.STEP, step)
        with heartbeat.phase(heartbeat.EVALUATION):
            if hang_now and where == "evaluation":
                evaluate_for_ever()
            heartbeat.advance()
        with heartbeat.phase(heartbeat.SAVING):
            writer = threading.Thread(
                target=save, args=(folder, rank, world_size, step, hang_now and where == "saving"), daemon=True
            )
            writer.start()
            heartbeat.join(writer)


def save(folder: Path, rank: int, world_size: int, step: int, hangs: bool) -> None:
    if hangs:
        write_to_a_dead_disk()
    heartbeat.note()
    with heartbeat.awaiting_others():
        wait_for_all(folder, rank, world_size, step + 0.5)


def wait_for_all(folder: Path, rank: int, world_size: int, place: float) -> None:
    """Return when all ranks are there."""
    (folder / f"{rank}.part").write_text(str(place))
    (folder / f"{rank}.part").replace(folder / f"{rank}.place")
    for other in range(world_size):
        path = folder / f"{other}.place"
        while not path.exists() or float(path.read_text()) < place:
            time.sleep(0.005)


def main() -> None:
    folder, where, hanging_rank, hang_sec, startup_sec = sys.argv[1:]
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    watch_over(Path(folder) / "run", int(hang_sec), int(startup_sec), attempt=1)
    hangs = rank == int(hanging_rank)
    if hangs and where == "start-up":
        (Path(folder) / "hanging").touch()
        import_for_ever()
    heartbeat.advance()
    train_on(Path(folder), rank, world_size, where, hangs)


if __name__ == "__main__":
    main()
