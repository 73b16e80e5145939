"""How fast work gets on, and how long the rest will take.

What enters: when the work could begin, and how much of it is done, whenever that is known. What
leaves: a rate for the whole work, one for what was done lately, and the time that is left.

Work arrives in lumps (a block of images at once, a process that was slow to start), so a rate is
never taken between two arrivals alone: it counts from the moment at which the work could begin, or
over a window that holds several arrivals. Where a rate would mean nothing yet, there is none.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

WINDOW_S = 60.0
"""Least time over which what was done lately is counted."""
ARRIVALS = 5
"""Least arrivals in a window, where the work is slow."""
KNOWN_S = 10.0
"""For so long nothing is said about the time that is left."""
SMOOTH_S = 10.0
"""The time at which the work will be done follows what is seen with this time constant."""


class Pace:
    """Follows a count that grows.

    Args:
        clock: Seconds; `time.monotonic`, but for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.began: float | None = None
        self._seen: deque[tuple[float, float]] = deque()
        self._end: tuple[float, float] | None = None
        self._paused: float | None = None
        self._pauses_s = self._share = 0.0

    def start(self, at: float | None = None, done: float = 0.0) -> None:
        """The work can begin, or could at the time `at`, with so much done before; the earliest
        counts."""
        at = self.clock() if at is None else at
        if self.began is None:
            self._seen.append((at, done))
        elif at < self.began and self._seen[0][0] == self.began:
            self._seen[0] = at, self._seen[0][1]
        self.began = at if self.began is None else min(at, self.began)

    def seen(self, done: float) -> None:
        """So much is done by now; less than before means that some of it has to be done again."""
        now = self._now()
        if self.began is None:
            self.start(now, 0.0)
        last = self._seen[-1][1]
        if done < last:
            self._seen = deque((at, min(value, done)) for at, value in self._seen)
        elif done > last:
            self._seen.append((now, done))
        while len(self._seen) > ARRIVALS + 1 and self._seen[1][0] < now - WINDOW_S:
            self._seen.popleft()

    def pause(self) -> None:
        """Until `resume` the work stands still, for something else that belongs to it."""
        if self._paused is None and self.began is not None:
            self._paused = self.clock()

    def resume(self, new: float = 0.0) -> None:
        """It gets on again, and `new` of it, which `seen` has not told yet, is already done."""
        if self._paused is None or self.began is None:
            return
        rate = self.rate()
        gap_s = max(0.0, self.clock() - self._paused - (new / rate if rate else 0.0))
        worked_s = self._paused - self.began - self._pauses_s
        self._pauses_s += gap_s
        self._share = self._pauses_s / worked_s if worked_s > 0 else 0.0
        self._paused = None
        self._seen = deque((at + gap_s, done) for at, done in self._seen)
        if self._end is not None:
            self._end = self._end[0] + gap_s, self._end[1] + gap_s

    def _now(self) -> float:
        return self.clock() if self._paused is None else self._paused

    def rate(self) -> float | None:
        """Of what was done lately, a second; None as long as it would mean nothing."""
        if self.began is None or len(self._seen) < 3 or self._now() - self.began < KNOWN_S:
            return None
        now, newest = self._now(), self._seen[-1]
        at, done = self._seen[0]
        # While nothing is late, what was done is divided by the time that it took; in between the
        # rate would else sink, to jump up again with the next arrival.
        gap = (newest[0] - at) / (len(self._seen) - 1)
        until = max(newest[0], now - 2 * gap)
        return (newest[1] - done) / (until - at) if until > at else None

    def left_s(self, todo: float) -> float | None:
        """Seconds until `todo` more are done, smoothed, with pauses as there were so far; None as
        long as nobody can know."""
        rate = self.rate()
        if not rate or todo <= 0:
            return None
        now = self._now()
        end = now + todo / rate * (1 + self._share)
        if self._end is not None:
            at, before = self._end
            weight = 1 - math.exp(-(now - at) / SMOOTH_S)
            end = before + weight * (end - before)
        self._end = now, end
        return max(end - now, 1.0)
