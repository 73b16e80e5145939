"""How far a job is that counts something: one line on stderr, written anew as it grows."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class Count:
    """A context that is called with how many more are done.

    Args:
        what: Is counted, such as "settings tried".
        total: How many there are.
        show: Whether anything is printed.
    """

    def __init__(self, what: str, total: int, show: bool = True) -> None:
        self.what, self.total, self.show = what, total, show
        self.done = 0
        self.began = time.monotonic()
        self._told = self.began
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> Count:
        return self

    def __call__(self, more: int) -> None:
        """Some more are done."""
        self.done += more
        now = time.monotonic()
        if now - self._told >= (0.2 if self._terminal else 10.0):
            self._told = now
            self._print(end="\r" if self._terminal else "\n")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._print(end="\n")

    def _print(self, end: str) -> None:
        if not self.show:
            return
        seconds = time.monotonic() - self.began
        rate = self.done / seconds if seconds > 0 else 0.0
        left = f", {(self.total - self.done) / rate:,.0f} s left" if rate else ""
        left = left if self.done < self.total else f", {seconds:.1f} s"
        blank = "    " if end == "\r" else ""
        sys.stderr.write(f"{self.done:,}/{self.total:,} {self.what}{left}{blank}{end}")
        sys.stderr.flush()
