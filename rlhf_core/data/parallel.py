"""Batches of rows through processes, in order. Only what takes long is shared out.

The first second's batches are done in this process, so a small file starts no other. The rest goes
to forked processes, as many as there are cores. They hold what this process holds, so that nothing
has to be loaded twice or pickled, and they end when this process ends. Left out: systems other than
Linux, where a fork of a process with threads is not safe. There this process does everything.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")
SECONDS = 1.0  # before other processes start
MOST = 8  # processes: this one reads the file, and cannot feed many more


class Parallel(Generic[T, R]):
    """An `encode` of the readers that several processes may run.

    `read_texts(path, encode=Parallel(encode))` returns what `read_texts(path, encode=encode)` does.

    Args:
        encode: Its result is its only effect, except on `notes`. It must not use a GPU.
        notes: Lists that it appends to, and dicts that it adds to. The other processes' additions
            arrive in the order of the rows.
    """

    def __init__(self, encode: Callable[[T], R], notes: Sequence[list | dict] = ()):
        self.encode, self.notes = encode, notes

    def __call__(self, row: T) -> R:
        return self.encode(row)


def in_order(
    batches: Iterator[T], work: Callable[[T], R], notes: Sequence[list | dict], alone: bool
) -> Generator[R, None, None]:
    """Yield work(batch) for every batch.

    A batch that fails in another process is done again in this one, whose error it then is.

    notes: As for `Parallel`.
    alone: This process does everything.
    """
    started, count = time.monotonic(), 1 if alone else processes()
    for batch in batches:
        yield work(batch)
        if count > 1 and time.monotonic() - started > SECONDS:
            break
    else:
        return
    free: deque[Connection] = deque()
    busy: deque[tuple[Connection, T]] = deque()
    workers = []
    try:
        for _ in range(count):
            pipe, worker = _start(work, notes)
            free.append(pipe)
            workers.append(worker)
        for batch in batches:
            while busy and not free:
                yield _result(work, notes, free, *busy.popleft())
            if not free:  # all have died
                yield work(batch)
                continue
            pipe = free.popleft()
            busy.append((pipe, batch))
            with contextlib.suppress(OSError):  # it has died, which `_result` finds
                pipe.send(batch)
        while busy:
            yield _result(work, notes, free, *busy.popleft())
    finally:
        for worker in workers:
            worker.kill()  # it holds nothing that has to be written
        for worker in workers:
            worker.join()


def processes() -> int:
    """How many processes may share this one's work; 1 where it cannot start any."""
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 1
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")  # of torchrun, on this machine
    return min(len(os.sched_getaffinity(0)) // max(int(ranks), 1), MOST)


def _start(work: Callable, notes: Sequence) -> tuple[Connection, Any]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=_serve, args=(ours, theirs, work, notes), daemon=True)
    with warnings.catch_warnings():
        # Python 3.12 warns of threads, whose locks a fork may copy. `_serve` takes none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        worker.start()
    theirs.close()
    return ours, worker


def _serve(theirs: Connection, pipe: Connection, work: Callable, notes: Sequence) -> None:
    """What another process does until the first one closes the pipe, or ends."""
    theirs.close()  # a copy, which would keep the pipe open
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process answers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # what the first process holds is not for this one to free
    while True:
        try:
            batch = pipe.recv()
        except EOFError:
            return
        for note in notes:
            note.clear()
        try:
            pipe.send((work(batch), notes))
        except OSError:
            return
        except Exception:  # of the work, or of a result that cannot be sent
            pipe.send(None)


def _result(work: Callable[[T], R], notes: Sequence, free: deque, pipe: Connection, batch: T) -> R:
    """The result of a batch that another process has, and that process among the free ones."""
    try:
        reply = pipe.recv()
        free.append(pipe)
    except (EOFError, OSError):  # it has died, perhaps for want of memory
        reply = None
    if reply is None:
        return work(batch)
    result, added = reply
    for note, new in zip(notes, added):
        note.extend(new) if isinstance(note, list) else note.update(new)
    return result
