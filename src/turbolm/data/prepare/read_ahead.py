"""Read the sources with several processes, ahead of the one that decides about documents.

A task is consecutive documents. Readers leave blocks (`blocks.py`), and these are given out in the order of the
documents, so it makes no difference how many read. The blocks that a reader may leave before they are taken are
limited: those that wait for a slow file stop there.
"""

from __future__ import annotations

import os
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING

from turbolm.data.prepare.blocks import (
    ANY_DIGEST,
    Block,
    Offset,
    Task,
    append_block,
    files_from,
    load_block,
    plan_tasks,
    read_blocks,
)
from turbolm.data.prepare.shards import start_worker
from turbolm.data.prepare.texts import SUFFIX
from turbolm.errors import UserError
from turbolm.recipe.sources import Source

if TYPE_CHECKING:
    from multiprocessing.synchronize import Semaphore  # cannot be imported where there are none

_BLOCK_BYTES = 8 * 10**6  # of text
# Of each reader: half a gigabyte on disk. Files that hold more, and have no parts, are read in parallel only so far.
_BLOCKS_AHEAD = 64
_TASKS_AHEAD = 2  # of each reader, so that it has the next one when one is done
_PARALLEL_BYTES = 64 * 10**6  # smaller sources are read before more processes would have started

Answer = tuple[Path, int] | Exception | None  # a file, and where in it a block begins; or why, or that, a task ends


class BlockReader:
    """Reads the blocks of a recipe's sources; their files are in `folder`."""

    def __init__(self, sources: Sequence[Source], folder: Path, num_readers: int, num_bytes: int):
        """`num_bytes`: of all sources."""
        self._sources, self._folder, self._paths = sources, folder, _paths(folder)
        self._num_readers = num_readers if num_bytes >= _PARALLEL_BYTES else 1
        self._readers: _Readers | None = None
        self._next_source: int | None = None  # that the readers are at the beginning of
        self.wanted_bytes = 0  # of text in the next block, unless it was read ahead
        self.max_digest = ANY_DIGEST  # the texts of documents with a larger one are not wanted any more

    def read(self, source: int, start: Offset, *, ahead: bool) -> Iterator[Block]:
        """Yield the blocks of a source from an offset on; `ahead`: what follows it in the sources will be read too.

        The caller drops the blocks' files. Raises UserError for a file that cannot be read, and BrokenProcessPool if a
        reader was killed.
        """
        if not (ahead and self._start(source, start)):
            self.close()
            settings, size, bound = self._sources[source], lambda: self.wanted_bytes, lambda: self.max_digest
            yield from read_blocks(settings, files_from(settings, start), self._paths, size, bound)
            return
        readers = self._readers
        assert readers is not None
        self._next_source = None
        while (task := readers.next_task()) is not None:
            while isinstance(answer := readers.answer(), tuple):
                yield load_block(*answer)
            if answer is not None:
                raise answer
            if task.is_last:
                self._next_source = source + 1
                return

    def _start(self, source: int, start: Offset) -> bool:
        """Have processes read from an offset on, if there are to be several; return whether they do."""
        if self._readers is not None and (source, start) == (self._next_source, (0, 0)):
            return True
        self.close()
        if self._num_readers > 1:
            tasks = plan_tasks(self._sources, source, start)
            try:
                self._readers = _Readers(self._sources, self._folder, tasks, self._num_readers, lambda: self.max_digest)
            except (OSError, ImportError):  # there are no semaphores, as `shards._pool` says
                self._num_readers = 1
        return self._readers is not None

    def close(self) -> None:
        """End the readers."""
        if self._readers is not None:
            self._readers.close()
            self._readers = None


def _paths(folder: Path) -> Iterator[Path]:
    return (folder / f"{os.getpid()}-{number}{SUFFIX}" for number in count())


class _Reader:
    """A process that reads."""

    def __init__(self, sources: Sequence[Source], folder: Path):
        context = get_context("spawn")
        self.connection, other_end = context.Pipe()
        self.room = context.Semaphore(_BLOCKS_AHEAD)  # for so many blocks more
        self.num_tasks = 0
        self._process = context.Process(target=_serve, args=(other_end, self.room, sources, folder, _BLOCK_BYTES))
        self._process.start()
        other_end.close()

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


class _Readers:
    """Gives tasks to processes and gathers their answers."""

    def __init__(
        self,
        sources: Sequence[Source],
        folder: Path,
        tasks: Iterator[Task],
        num_readers: int,
        max_digest: Callable[[], int],
    ):
        self._tasks, self._max_digest = enumerate(tasks), max_digest
        self._given: deque[tuple[int, Task, _Reader]] = deque()  # in order
        self._answers: dict[int, deque[Answer]] = defaultdict(deque)  # by number of the task
        self._readers: list[_Reader] = []
        self._front: tuple[int, _Reader] | None = None  # the task whose answers are asked for
        try:
            for _ in range(num_readers):
                self._readers.append(_Reader(sources, folder))
        except BaseException:
            self.close()
            raise

    def next_task(self) -> Task | None:
        """Return the next task in order, whose answers come next, or None after the last."""
        self._give()
        if not self._given:
            return None
        number, task, reader = self._given.popleft()
        self._front = number, reader
        return task

    def answer(self) -> Answer:
        """Return the next answer to the task. Raises BrokenProcessPool if a reader was killed."""
        assert self._front is not None
        number, reader = self._front
        while not self._answers[number]:
            self._gather()
        answer = self._answers[number].popleft()
        if isinstance(answer, tuple):
            reader.room.release()
        else:
            del self._answers[number]
        return answer

    def _gather(self) -> None:
        """Wait for answers, take all that are there, and give out more tasks."""
        ready = wait([reader.connection for reader in self._readers])
        try:
            for reader in self._readers:
                while reader.connection in ready and reader.connection.poll():
                    number, answer = reader.connection.recv()
                    self._answers[number].append(answer)
                    reader.num_tasks -= not isinstance(answer, tuple)
        except (EOFError, ConnectionError):
            raise BrokenProcessPool("a reader ended") from None
        self._give()

    def _give(self) -> None:
        while (reader := min(self._readers, key=lambda reader: reader.num_tasks)).num_tasks < _TASKS_AHEAD:
            if (numbered := next(self._tasks, None)) is None:
                return
            try:
                reader.connection.send((*numbered, self._max_digest()))
            except ConnectionError:
                raise BrokenProcessPool("a reader ended") from None
            reader.num_tasks += 1
            self._given.append((*numbered, reader))

    def close(self) -> None:
        for reader in self._readers:
            reader.close()


def _serve(connection: Connection, room: Semaphore, sources: Sequence[Source], folder: Path, block_bytes: int) -> None:
    """Read tasks until this process is killed."""
    start_worker()
    paths = _paths(folder)
    while True:
        number, task, max_digest = connection.recv()
        answer: Answer = None
        try:
            settings, size, bound = sources[task.source], lambda: block_bytes, partial(int, max_digest)
            for block in read_blocks(settings, task.spans, paths, size, bound):
                room.acquire()
                connection.send((number, (block.file.path, append_block(block))))
        except (UserError, OSError) as error:
            answer = error
        except Exception:
            answer = RuntimeError(f"reading the sources failed:\n{traceback.format_exc()}")
        connection.send((number, answer))
