"""Signals that end a process: finish the step and save, or stop at once."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class Stopped(SystemExit, KeyboardInterrupt):
    """A signal other than Ctrl-C stopped the process, which exits with status 128 + signal."""

    def __init__(self, signum: int, note: str = ""):
        super().__init__(note)
        self.signum, self.note = signum, note
        self.code = 128 + signum

    def __str__(self) -> str:
        return self.note


def stop(signum: int, note: str = "") -> KeyboardInterrupt:
    """The exception that a signal raises."""
    return KeyboardInterrupt(note) if signum == signal.SIGINT else Stopped(signum, note)


def stop_at_once(signum, frame) -> None:
    """A handler that raises."""
    raise stop(signum)


@contextlib.contextmanager
def handled(handler: Callable) -> Iterator[None]:
    """Inside, `handler` gets Ctrl-C, SIGTERM and SIGHUP.

    It works in the main thread only. Signals that the caller handles or ignores stay as they are.
    """
    replaceable, before = (signal.SIG_DFL, signal.default_int_handler, stop_at_once), {}
    try:
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                if signal.getsignal(signum) in replaceable:
                    before[signum] = signal.signal(signum, handler)
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


class DelayedStop:
    """The first signal is only noted in `signum`; a second one, or a deadline, stops at once.

    The deadline is $RLHF_CORE_GRACE seconds after the first signal, 30 by default.
    """

    def __init__(self):
        self.signum: int | None = None
        self._timer = None
        text = os.environ.get("RLHF_CORE_GRACE", "30")
        try:
            self.grace = float(text)
            if not 0 <= self.grace <= threading.TIMEOUT_MAX:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"RLHF_CORE_GRACE must be a number of seconds, at least 0, got {text!r}"
            ) from None

    def __call__(self, signum, frame) -> None:
        if self.signum is not None:
            self.cancel()
            raise stop(self.signum)
        self.signum = signum
        again = "press Ctrl-C again to stop at once"
        _say(f"stopping after this step, or after {self.grace:g} s; {again}")
        main = threading.main_thread().ident
        self._timer = threading.Timer(self.grace, signal.pthread_kill, (main, signum))
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        """Forget the deadline."""
        if self._timer is not None:
            self._timer.cancel()


@contextlib.contextmanager
def delayed(active: bool = True) -> Iterator[DelayedStop]:
    """Inside, signals are as for `DelayedStop`; while not active, they are left alone."""
    delay = DelayedStop()
    try:
        with handled(delay) if active else contextlib.nullcontext():
            yield delay
    finally:
        delay.cancel()


def _say(text: str) -> None:
    """Print to stderr. After SIGHUP the terminal may be gone: then nothing is printed any more."""
    try:
        print(text, file=sys.stderr, flush=True)
    except RuntimeError:  # the signal came in the middle of another print
        pass
    except (OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):
                if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                    os.dup2(null, descriptor)
        os.close(null)
