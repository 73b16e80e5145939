"""What a person sees on stderr while a verb works: one block in a terminal, else a line now and
then.

What enters: a function that says how things are at the moment (`View`). What leaves:

    a terminal           a live block below all log lines, redrawn four times a second
    a file, a pipe,      plain lines: after 10 s, then rarer, in the end one a minute; a last one
    or TERM=dumb
    nothing              where it is not to be shown

All verbs use this one, so what they have in common (width, colours, when to speak) is here. It
writes to a copy of stderr: what Ray's start says there can be held back meanwhile.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import IO

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from zsplg_ray.safe_text import masked, one_line, shortened
from zsplg_ray.stderr import Above, Screen, is_live, is_terminal, own_stderr, unheard
from zsplg_ray.summary import duration

WIDEST = 78
"""Columns that the block takes at most: a terminal that is made a little narrower wraps nothing."""
MOST_LINES = 6
_TURNS = "|/-\\"
"""What turns while nothing can be counted yet."""
_SPEAK_S = ((60.0, 10.0), (300.0, 30.0))
"""Up to a time, how often a plain line comes; afterwards one a minute."""


@dataclass(frozen=True)
class View:
    """How things are at a moment."""

    verb: str
    elapsed_s: float
    waits: str | None = None
    """What is waited for; None while the work gets on."""
    done: float = 0
    total: float | None = None
    """None as long as it is not known."""
    unit: str = "images"
    facts: tuple[str, ...] = ()
    """What else there is to say, in order of weight."""
    left_s: float | None = None
    """Seconds that it will take; None where nobody can know."""

    @property
    def count(self) -> str:
        """How much is done, in words."""
        return f"{self.done:,.0f}/{self.total:,.0f} {self.unit}" if self.total else ""

    @property
    def all_facts(self) -> list[str]:
        """Facts, what is waited for, and times."""
        told = [self.waits] if self.waits else []
        told += self.facts
        if self.left_s is None:
            return [*told, duration(self.elapsed_s)]
        left = f"{duration(_rounded(self.left_s))} left"
        return [*told, left, f"{duration(self.elapsed_s)} so far"]


def plain_line(view: View) -> str:
    """The view on one line."""
    return f"{view.verb}: {', '.join([*filter(None, [view.count]), *view.all_facts])}"


def wrapped(facts: Iterable[str], width: int) -> list[str]:
    """Facts on lines of at most `width` columns, none broken unless it is wider by itself."""
    lines: list[str] = []
    for fact in facts:
        if lines and cell_len(lines[-1]) + 2 + cell_len(fact) <= width:
            lines[-1] += f", {fact}"
        else:
            lines.append(fact)
    return [line if cell_len(line) <= width else _cut(line, width) for line in lines]


class Block:
    """The view as rich draws it: a bar, and lines of facts below."""

    def __init__(self, look: Callable[[], View]) -> None:
        self.look = look

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        view = self.look()
        width = min(options.max_width - 1, WIDEST)
        head, count = _cut(view.verb, width), view.count
        if count and not (room := width - cell_len(f"{head}  {count}") - 1) < 8:
            bar = ProgressBar(view.total, min(view.done, view.total or 0), width=min(room, 40))
            drawn = list(console.render(bar, options))
            yield Text(f"{head} ", style="bold", end="")
            yield from drawn
            yield Text(f" {count}", no_wrap=True)
        elif count:
            yield Text(_cut(f"{head} {count}", width), no_wrap=True)
        else:
            turn = _TURNS[int(time.monotonic() * 4) % len(_TURNS)]
            yield Text.assemble((head, "bold"), f" {turn}", no_wrap=True)
        for line in wrapped(view.all_facts, width - 2)[: MOST_LINES - 1]:
            yield Text(f"  {line}", no_wrap=True)


class _Live(Live):
    """Live, which also clears what a terminal that became narrower has wrapped, and takes no harm
    from one that has gone."""

    def refresh(self) -> None:
        """Draw it anew."""
        with unheard(self.console):
            super().refresh()

    def process_renderables(self, renderables: list) -> list:
        with contextlib.suppress(AttributeError):  # rich does not promise that it is there
            shape = self._live_render._shape
            width = self.console.size.width
            if shape is not None and shape[0] > width:
                self._live_render._shape = width, shape[1] * -(-shape[0] // width)
        return super().process_renderables(renderables)


class Display:
    """Shows views from `with` to its end.

    Args:
        look: Says how things are; called from another thread.
        show: Whether anything is shown.
        stream: Where to; None: stderr, through a copy of its own.
        clock: Seconds; `time.monotonic`, but for tests.
    """

    def __init__(
        self,
        look: Callable[[], View],
        show: bool = True,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.look, self.show, self.clock = look, show, clock
        self._given = stream
        self._stream: IO[str] | None = None
        self._live: Live | None = None
        self._above: Above | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._spoken = 0

    def __enter__(self) -> Display:
        if not self.show:
            return self
        self._stream = self._given if self._given is not None else own_stderr()
        if self._stream is None:  # closed
            return self
        ours = self._given is not None or self._stream is not sys.stderr
        if ours and is_live(self._stream):
            self._start_live(self._stream)
        else:
            self._began = self.clock()
            self._thread = threading.Thread(target=self._speak, name="progress", daemon=True)
            self._thread.start()
        return self

    def _start_live(self, stream: IO[str]) -> None:
        live = _Live(
            Block(self.look),
            console=Screen(stream),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,  # by Above, which outlives the block
            refresh_per_second=4,
            vertical_overflow="crop",
        )
        with unheard(live.console):
            live.start(refresh=True)
        self._live, self._above = live, Above.put(self._print)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._stream is None:
            return
        self._over.set()
        try:
            if self._live is not None:
                with unheard(self._live.console):
                    self._live.stop()
            if self._above is not None:
                self._above.end()
            if self._thread is not None:
                self._thread.join()
            self._last(kind is None)
        finally:
            if self._given is None and self._stream is not sys.stderr:
                with contextlib.suppress(OSError):
                    self._stream.close()
            self._stream = self._live = self._above = self._thread = None

    def say(self, text: str) -> None:
        """One line, above the block or among the others."""
        text = one_line(masked(shortened(text)))
        if self._live is not None:
            self._print(text)
        elif self._stream is not None:
            self._write(text)

    def _print(self, lines: str) -> None:
        assert self._live is not None
        with unheard(self._live.console):
            self._live.console.print(Text(lines), soft_wrap=True)

    def _last(self, well: bool) -> None:
        """The last line. After good work in a terminal the summary says all that it would."""
        view = self.look()
        if not view.total:
            return
        if self._live is not None and (not view.done or (well and is_terminal(sys.stdout))):
            return
        self._write(plain_line(view))

    def _speak(self) -> None:
        while not self._over.wait(0.5):
            if self.clock() - self._began >= speaks_at(self._spoken):
                self._spoken += 1
                self._write(plain_line(self.look()))

    def _write(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody listens any more: work goes on
            assert self._stream is not None
            self._stream.write(one_line(masked(line)) + "\n")
            self._stream.flush()


def speaks_at(spoken: int) -> float:
    """Seconds after the start at which the next plain line comes, after so many."""
    at = 0.0
    for _ in range(spoken + 1):
        at += next((every for until, every in _SPEAK_S if at < until), 60.0)
    return at


def _rounded(seconds: float) -> float:
    """As exact as a guess may be."""
    step = 1 if seconds < 60 else 10 if seconds < 3600 else 60
    return round(seconds / step) * step


def _cut(text: str, width: int) -> str:
    made = Text(text)
    made.truncate(max(1, width), overflow="ellipsis")
    return made.plain
