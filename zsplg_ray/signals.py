"""SIGTERM ends a verb as Ctrl-C does: what is finished is written down, and the exit code is 130.

What enters and leaves: nothing; these are contexts. Ray, Slurm and Kubernetes stop a job by
SIGTERM, whose own way is to end a process on the spot; and `ray.init` puts in a handler that only
exits.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from typing import NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM came: like Ctrl-C, but nobody is there to be asked anything."""


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM raises Terminated; in another thread than the main one nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def interrupt(number: int, frame: object) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def sigterm_kept() -> Iterator[None]:
    """A handler of SIGTERM that the program has set outlives what is called in here."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def interrupts_are_told() -> Iterator[None]:
    """KeyboardInterrupt, whatever is raised in here, if Ctrl-C or SIGTERM came meanwhile.

    For Ctrl-C Ray puts a handler of its own in the place of Python's, and leaves it there: it stops
    the workers of a training. After either, what is raised differs from time to time. The signal's
    number comes through the wake-up socket whoever handles it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, wake = socket.socketpair()
    ours.setblocking(False)
    wake.setblocking(False)
    handler = signal.getsignal(signal.SIGINT)
    before = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    try:
        yield
    except BaseException as e:
        with contextlib.suppress(BlockingIOError):
            if {signal.SIGINT, signal.SIGTERM} & set(ours.recv(4096)):
                raise KeyboardInterrupt from e
        raise
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGINT, handler)
        ours.close()
        wake.close()
