"""What a person sees while a job runs: one line, on stderr."""

from __future__ import annotations

import sys
import time


class Progress:
    """Counts images and tells how far the job is.

    Args:
        total: Images of the source.
        skipped: Those that were done before.
        show: Whether anything is printed.
    """

    def __init__(self, total: int, skipped: int = 0, show: bool = True) -> None:
        self.total, self.skipped, self.show = total, skipped, show
        self.labelled = self.failed = 0
        self.began = self.last = time.monotonic()
        self.first: tuple[float, int] | None = None
        self._told = 0.0
        self._terminal = sys.stderr.isatty()

    def add(self, labelled: int, failed: int) -> None:
        """Some more images are through."""
        self.labelled += labelled
        self.failed += failed
        now = self.last = time.monotonic()
        if self.first is None:
            self.first = (now, self.labelled + self.failed)
        if now - self._told >= (0.2 if self._terminal else 10.0):
            self._told = now
            self._print(end="\r" if self._terminal else "\n")

    def rate(self) -> float:
        """Images a second since the first ones came in, so without the loading of models."""
        if self.first is None:
            return 0.0
        seconds = self.last - self.first[0]
        count = self.labelled + self.failed - self.first[1]
        if count <= 0 or seconds <= 0:
            seconds, count = self.last - self.began, self.labelled + self.failed
        return count / seconds if seconds > 0 else 0.0

    def close(self) -> None:
        """The last line."""
        self._print(end="\n")

    def _print(self, end: str) -> None:
        if not self.show:
            return
        done = self.skipped + self.labelled + self.failed
        rate = self.rate()
        left = f", {(self.total - done) / rate:,.0f} s left" if rate and done < self.total else ""
        told = f"{done:,}/{self.total:,} images, {rate:.2f} images/s, {self.failed} failed"
        if self.skipped:
            told += f", {self.skipped:,} done before"
        sys.stderr.write(f"{told}{left}{'    ' if end == chr(13) else ''}{end}")
        sys.stderr.flush()
