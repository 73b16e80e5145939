"""stderr as the display needs it: a copy of its own, and a stand-in that writes above the block.

What enters: `sys.stderr` as it is, which may be None (closed), a notebook's, or a test's. What
leaves: a stream for the display and a `Screen` on it, and `Above` for everybody else.

Handlers of other packages keep the stderr that they find when they are imported, and write to it
for as long as the process lives. So the stand-in outlives the block: afterwards it passes all on.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, TextIO, cast

from rich.console import Console, ConsoleDimensions

STDERR = 2


def is_the_systems() -> bool:
    """Whether sys.stderr is file descriptor 2: not None, no notebook's, nobody's stand-in."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return sys.stderr is sys.__stderr__ and sys.stderr.fileno() == STDERR
    return False


def own_stderr() -> IO[str] | None:
    """A copy of stderr, or sys.stderr itself where it is none of the system's; None: there is none.

    A notebook's stderr names the file descriptor of its server, where nobody would look.
    """
    if sys.stderr is None or not is_the_systems():
        return sys.stderr
    try:
        copied = os.dup(STDERR)
    except OSError:
        return sys.stderr
    return os.fdopen(copied, "w", encoding=sys.stderr.encoding, errors="backslashreplace")


def is_terminal(stream: IO[str] | None) -> bool:
    """Whether it says so; a closed one, or none, is not."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def is_live(stream: IO[str]) -> bool:
    """Whether a block can be drawn there."""
    return is_terminal(stream) and os.environ.get("TERM", "") not in ("dumb", "unknown")


class Screen(Console):
    """A terminal that is asked for its size anew each time it is drawn on."""

    def __init__(self, stream: IO[str]) -> None:
        self._on = stream
        super().__init__(
            file=stream, highlight=False, emoji=False, markup=False, force_jupyter=False
        )

    @property
    def size(self) -> ConsoleDimensions:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Columns and rows; 80 x 24 if it does not tell."""
        try:
            columns, rows = os.get_terminal_size(self._on.fileno())
        except (OSError, ValueError):
            columns, rows = 80, 24
        return ConsoleDimensions(columns or 80, rows or 24)

    def on_broken_pipe(self) -> None:
        """Nobody looks any more, which ends no work."""
        self.quiet = True

    def show_cursor(self, show: bool = True) -> bool:
        """The cursor stays: whoever is killed could not bring it back."""
        return False


@contextlib.contextmanager
def unheard(console: Console) -> Iterator[None]:
    """A terminal that has gone is written to no more, and that is all: work goes on."""
    try:
        yield
    except (OSError, ValueError):
        console.quiet = True  # else it would keep, and try again, all that it could not write


class Above:
    """Stands in sys.stderr's place: whole lines go above the block while there is one, and to the
    stderr that was there before as soon as there is none.

    Args:
        real: The stderr that was there before; None: nobody listens.
        show: Writes some lines above the block.
    """

    def __init__(self, real: IO[str] | None, show: Callable[[str], object]) -> None:
        self.real = real
        self._show: Callable[[str], object] | None = show
        self._begun = ""
        """A line that has no end yet."""
        self._lock = threading.Lock()

    @classmethod
    def put(cls, show: Callable[[str], object]) -> Above:
        """Put one in sys.stderr's place, until its `end`."""
        above = cls(sys.stderr, show)
        sys.stderr = cast(TextIO, above)
        return above

    def write(self, text: str) -> int:
        """Show the lines that are whole now. Returns: the characters taken."""
        with self._lock:  # not while they are shown: that waits for locks of the display
            show, whole, end = self._show, "", ""
            if show is not None:
                whole, end, self._begun = (self._begun + text).rpartition("\n")
        if show is not None:
            if end:
                show(whole)
        elif self.real is not None:
            self.real.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """See `write`."""
        self.write("".join(lines))

    def flush(self) -> None:
        """A line that has no end waits for it, or for the block's."""
        if self._show is None and self.real is not None:
            self.real.flush()

    def end(self) -> None:
        """The block has gone: all goes to the real stderr from here on."""
        with self._lock:
            self._show, begun, self._begun = None, self._begun, ""
        if sys.stderr is self:
            sys.stderr = cast(TextIO, self.real)
        with contextlib.suppress(OSError, ValueError):
            if begun and self.real is not None:
                self.real.write(begun)

    def __getattr__(self, name: str) -> Any:
        """fileno, encoding, isatty, ...: those of the real one."""
        return getattr(self.real, name)
