"""What processes say of themselves while they work, and who listens to it.

What enters: an actor's count and how long it was in its model, a worker's step. What leaves: on the
driver, the latest word of each that is alive. Nothing rests on it but what a person sees: whoever
cannot be heard works on, and words that are lost are followed by others.

    actor: keep_telling, a thread -> NoteBook, on the driver's node <- listening, on the driver
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

log = logging.getLogger(__name__)

EVERY_S = 1.0
"""Seconds between two words of a process, and between two looks."""
MOST_A_SECOND = 100
"""Words a second of all processes together: of many each speaks more rarely."""
GONE_S = 15.0
"""After so long without a word a process counts as gone, or five of its own intervals."""
WAIT_S = 5.0
"""How long a look may take."""

Note = Mapping[str, Any]


class NoteBook:
    """The latest word of each process, plain Python; `Notes.start` makes it an actor."""

    def __init__(self) -> None:
        self.said: dict[str, tuple[float, Note]] = {}

    def note(self, who: str, what: Note) -> None:
        """A process says something of itself."""
        self.said[who] = time.monotonic(), what

    def notes(self, gone_s: float = GONE_S) -> dict[str, Note]:
        """What those said last who have said something in the last `gone_s` seconds."""
        now = time.monotonic()
        return {who: what for who, (at, what) in self.said.items() if now - at < gone_s}


class Notes:
    """A handle on a `NoteBook` that is an actor; it may be sent to other processes."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    @classmethod
    def start(cls) -> Notes:
        """A new book on the driver's node; to be called by the driver."""
        return cls(beside_the_driver(NoteBook))

    def note(self, who: str, what: Note) -> None:
        """See NoteBook.note; does not wait."""
        self._handle.note.remote(who, dict(what))

    def notes(self, gone_s: float = GONE_S) -> dict[str, Note]:
        """See NoteBook.notes. Raises: RayError if the book does not answer."""
        return ray.get(self._handle.notes.remote(gone_s), timeout=WAIT_S)

    def close(self) -> None:
        """End the book."""
        ray.kill(self._handle)


def beside_the_driver(book: type) -> Any:
    """Start a book as an actor that takes nothing, on the driver's node: it dies with the driver
    and not before."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(book).options(num_cpus=0, scheduling_strategy=here).remote()


def interval_s(processes: int) -> float:
    """Seconds between two words of each of so many processes."""
    return max(EVERY_S, processes / MOST_A_SECOND)


class Busy:
    """How much of its time a process is at its work, measured by itself.

    Args:
        clock: Seconds; `time.monotonic`, but for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.through = 0
        """Images that have gone through, well or badly."""
        self._born = clock()
        self._busy_s = 0.0
        self._since: float | None = None
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """The time in here is spent on the work itself."""
        with self._lock:
            self._since = self.clock()
        try:
            yield
        finally:
            with self._lock:
                self._busy_s += self.clock() - self._since
                self._since = None

    def read(self) -> dict[str, float]:
        """`through`; `busy_s`, what is under way included; `alive_s`, all its time so far."""
        with self._lock:
            now = self.clock()
            under_way = now - self._since if self._since is not None else 0.0
            busy_s = self._busy_s + under_way
        return {"through": self.through, "busy_s": busy_s, "alive_s": now - self._born}


def keep_telling(tell: Callable[[], object], every_s: float = EVERY_S) -> None:
    """Call `tell` now and then, on a thread, until it fails or the process ends."""

    def loop() -> None:
        try:
            while True:
                tell()
                time.sleep(every_s)
        except Exception:  # whoever listens is gone
            log.debug("nobody listens any more", exc_info=True)

    threading.Thread(target=loop, name="notes", daemon=True).start()


@contextlib.contextmanager
def listening(
    book: Any, hear: Callable[[dict[str, Note]], object], gone_s: float = GONE_S
) -> Iterator[None]:
    """Meanwhile `hear` is told, once a second and on a thread, what processes say.

    Args:
        book: `Notes`, or whatever has its `notes`.
        hear: Called with process -> its last word.
        gone_s: See NoteBook.notes.
    """
    over = threading.Event()

    def loop() -> None:
        while not over.wait(EVERY_S):
            try:
                hear(book.notes(gone_s))
            except Exception:  # Ray's own, of every kind; the next look may be luckier
                log.debug("what processes say cannot be heard", exc_info=True)

    thread = threading.Thread(target=loop, name="listening", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(WAIT_S)


@contextlib.contextmanager
def noting(
    hear: Callable[[dict[str, Note]], object], gone_s: float, show: bool
) -> Iterator[Notes | None]:
    """A book that is listened to meanwhile; None if nobody wants to know (`show`)."""
    if not show:
        yield None
        return
    book = Notes.start()
    try:
        with listening(book, hear, gone_s):
            yield book
    finally:
        with contextlib.suppress(RayError):
            book.close()
