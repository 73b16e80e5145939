"""How far a verb is that counts something, images or trials, and how fast.

What enters: counts as they come, what actors say of themselves (notes.py), what is waited for. What
leaves: `View`s for the display, and the rate that run.json keeps.

**images_per_s** is what went through in this start of the command, divided by the time from the
moment at which the first actor had its models to the arrival of the last image. So it holds neither
the start of Ray nor the loading, which say nothing of the next thousand images (run.json's
`seconds` has all), but everything else: reading, waiting, other actors that load. It is never taken
from a first arrival on: images come in blocks, and a single block would seem to take no time.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TypeVar

from zsplg_ray.display import Display, View
from zsplg_ray.pace import WINDOW_S, Pace
from zsplg_ray.summary import counted

STARTING = "starting actors and loading the models"

P = TypeVar("P", bound="Shown")


class Shown:
    """What is shown of a verb from `with` to its end; a `with` within it changes nothing.

    Args:
        verb: Its name.
        show: Whether anything is.
        clock: Seconds; `time.monotonic`, but for tests.
    """

    def __init__(
        self, verb: str, show: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.verb, self.show, self.clock = verb, show, clock
        self.began = clock()
        self.waiting: str | None = None
        self.over = False
        self._depth = 0
        self.pace = Pace(clock)
        self.lock = threading.RLock()
        self.display = Display(self.view, show)

    def __enter__(self: P) -> P:
        self._depth += 1
        if self._depth == 1:
            self.display.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.over = True
            self.display.__exit__(kind, error, trace)

    def waits(self, what: str | None) -> None:
        """What is waited for now; None: the work gets on."""
        self.waiting = what

    def view(self) -> View:
        """How things are."""
        return View(self.verb, self.clock() - self.began, self.waiting)


class Progress(Shown):
    """Counts images, or whatever `unit` says, and tells how far the job is.

    Args:
        verb: Its name.
        show: Whether anything is shown.
        clock: Seconds; `time.monotonic`, but for tests.
    """

    def __init__(
        self, verb: str, show: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(verb, show, clock)
        self.total = self.skipped = 0
        self.unit = "images"
        self.labelled = self.failed = 0
        self.last = self.began
        """When something came in last."""
        self.actors: Actors | None = None
        self.more: tuple[str, ...] = ()
        """Further facts."""
        self._shown = 0

    def plan(self, total: int, skipped: int = 0, unit: str = "images") -> None:
        """So much there is to do, of which `skipped` was done before; counting starts anew."""
        with self.lock:
            self.total, self.skipped, self.unit = total, skipped, unit
            self.labelled = self.failed = self._shown = 0
            self.pace = Pace(self.clock)

    def start(self) -> None:
        """The work begins now; with actors it does so when the first one is ready."""
        self.waits(None)
        self.pace.start()

    def add(self, labelled: int, failed: int = 0, said: Mapping[str, Any] | None = None) -> None:
        """Some more are through.

        Args:
            labelled: Well.
            failed: Badly.
            said: What the actor that did them says of itself: `actor` and `Busy.read`.
        """
        with self.lock:
            self.labelled += labelled
            self.failed += failed
            self.last = self.clock()
            self.waits(None)
            if self.actors is not None and said is not None:
                self.actors.brought(said["actor"], said)
                self.pace.start(self.last - said["alive_s"])
            self._count()

    def hear(self, notes: Mapping[str, Mapping[str, Any]]) -> None:
        """What the actors that are alive say of themselves."""
        if self.actors is None or not (notes or self.actors.up):
            return
        with self.lock:
            self.actors.hear_all(notes)
            if not notes:  # all have died; at the end that is no news
                if self.skipped + self.labelled + self.failed < self.total and not self.over:
                    self.waits(STARTING)
                return
            self.pace.start(self.clock() - max(note["alive_s"] for note in notes.values()))
            self._count()

    def rate(self) -> float:
        """Images a second; what it means is told at the top."""
        seconds = self.last - self.pace.began if self.pace.began is not None else 0.0
        return (self.labelled + self.failed) / seconds if seconds > 0 else 0.0

    def view(self) -> View:
        """How things are."""
        with self.lock:
            left = self.total - self.skipped - self._shown
            facts = list(self.more)
            if self.skipped:
                facts.append(f"{self.skipped:,} done before")
            if self.failed:
                facts.append(counted(self.failed, "error"))
            if self.actors is not None:
                facts = self.actors.facts() + facts
            lately = (None if self.over else self.pace.rate()) or self.rate()
            if lately and self.unit == "images":
                facts.insert(0, f"{lately:,.{1 if lately >= 1 else 2}f} images/s")
            waits = None if self.over else self.waiting
            if not self.over and waits is None and self._shown == 0 and left:
                waits = "the first images are under way" if self.unit == "images" else None
            return View(
                self.verb,
                self.clock() - self.began,
                waits,
                # What was never handed over will have to be done again.
                self.skipped + (self.labelled + self.failed if self.over else self._shown),
                self.total or None,
                self.unit,
                tuple(facts),
                None if self.over else self.pace.left_s(left),
            )

    def _count(self) -> None:
        """What is through by now: what has come in, or what actors say is under way beyond it."""
        come = self.labelled + self.failed
        heard = self.actors.through() if self.actors is not None else 0
        shown = min(max(come, heard, self._shown), self.total - self.skipped)
        if self.actors is not None and self.waiting is not None and self.actors.up:
            self.waits(None)
        self._shown = shown
        self.pace.seen(shown)


class Actors:
    """What is known of a pool of actors from what they say.

    Args:
        most: So many there will be at most.
        gpus: Whether they have GPUs.
        clock: Seconds; `time.monotonic`, but for tests.
    """

    def __init__(self, most: int, gpus: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.most, self.gpus, self.clock = most, gpus, clock
        self.up = 0
        """Actors that were heard of at the last look."""
        self._said: dict[str, Mapping[str, Any]] = {}
        self._brought: dict[str, int] = {}
        self._alive: set[str] = set()
        self._sums: deque[tuple[float, float, float]] = deque()

    def hear(self, actor: str, said: Mapping[str, Any]) -> None:
        """An actor says something of itself; older words than those known are void."""
        before = self._said.get(actor)
        if before is None or said["alive_s"] >= before["alive_s"]:
            self._said[actor] = said

    def brought(self, actor: str, said: Mapping[str, Any]) -> None:
        """What an actor said when it handed over images: all that it had done until then."""
        self._brought[actor] = max(int(said["through"]), self._brought.get(actor, 0))
        self.hear(actor, said)
        self._sum_up()

    def hear_all(self, notes: Mapping[str, Mapping[str, Any]]) -> None:
        """What all that are alive say; what others had under way will be done again."""
        for actor, said in notes.items():
            self.hear(actor, said)
        self._alive = set(notes)
        self.up = len(notes)
        self._sum_up()

    def _sum_up(self) -> None:
        """What all have said so far, for the share of their time."""
        now = self.clock()
        busy_s, alive_s = (sum(s[k] for s in self._said.values()) for k in ("busy_s", "alive_s"))
        self._sums.append((now, busy_s, alive_s))
        while len(self._sums) > 2 and self._sums[1][0] < now - WINDOW_S:
            self._sums.popleft()

    def through(self) -> int:
        """Images that have gone through their models, by their own words; what an actor had not
        handed over when it died is not among them."""
        last = ((a, said["through"] if a in self._alive else 0) for a, said in self._said.items())
        return int(sum(max(through, self._brought.get(actor, 0)) for actor, through in last))

    def busy(self) -> float | None:
        """Share of the time of all actors, [0, 1], that they have lately spent in their models."""
        if not self._sums:
            return None
        _, busy_s, alive_s = self._sums[-1]
        if len(self._sums) > 2:
            busy_s, alive_s = busy_s - self._sums[0][1], alive_s - self._sums[0][2]
        return min(1.0, max(0.0, busy_s / alive_s)) if alive_s > 0 else None

    def facts(self) -> list[str]:
        """In words."""
        told = []
        if (busy := self.busy()) is not None:
            told.append(f"{'GPUs' if self.gpus else 'actors'} busy {busy:.0%}")
        if self.up:
            of = f"/{self.most}" if self.most > self.up else ""
            told.append(f"{self.up}{of} actor{'s' if self.up > 1 or of else ''} up")
        return told
