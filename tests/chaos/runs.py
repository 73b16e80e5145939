"""Runs to be disturbed: the real `zsplg label` in a process of its own, with a model that costs
nothing and notes every image that it starts on.

What enters: how many images, and flags. What leaves: drivers to kill, and at the end the `Fault`
that tells what it has cost. Everything but the model is what a user runs: the command line, the
driver, Ray, the actors, the folder.

Drivers are forked from a process that has imported what they need; else the suite would spend most
of its time importing torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tests.chaos.figures import Fault, settle
from tests.cluster.rigged import OneByOne
from zsplg_ray.cluster import decode
from zsplg_ray.label.segments import Segments
from zsplg_ray.rundir import COMMITS, RunFolder, made_by

PATIENCE_S = 240.0
"""A run that does not get on for as long hangs; machines that test are busy."""
GOOD, KILLS, EXITS, CRASHES = range(4)
"""What an image does to the process that labels it: nothing, kill -9, an exit, a segmentation
fault. It stands in the blue of its pixels, its number in the red and green."""

_FORK = multiprocessing.get_context("forkserver")
_DRIVERS = ("cli", "cluster.label", "cluster.predict", "cluster.relabel", "label.labeler")
_FORK.set_forkserver_preload(["tests.chaos.runs", *(f"zsplg_ray.{name}" for name in _DRIVERS)])


def write_images(folder: Path, kinds: Sequence[int]) -> list[str]:
    """One-colour images, one of each kind in `kinds`; returns their ids."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number:06d}.png" for number in range(len(kinds))]
    for number, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        Image.new("RGB", (24, 16), (number >> 8, number & 255, kind)).save(folder / name)
    return names


class Note(NamedTuple):
    """An actor has started on an image."""

    at: float
    """time.time()."""
    pid: int
    number: int


def read_notes(path: str) -> list[Note]:
    """Every image that an actor has started on, in order."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    return [Note(*json.loads(line)) for line in lines]


def note(path: str, number: int) -> None:
    """Write down that this process starts on an image."""
    line = json.dumps(Note(time.time(), os.getpid(), number)) + "\n"
    with Path(path).open("ab", buffering=0) as notes:
        notes.write(line.encode())  # in one write: lines of two actors never mix


class Cheap(OneByOne):
    """A labeller without a model: it waits, and finds one segment, of the first class."""

    def __init__(self, naming, load: LoadCheap) -> None:
        self.naming, self.load, self.waited = naming, load, False
        self.images_at_once = load.together

    def label(self, image_HWC: np.ndarray):
        red, green, kind = (int(v) for v in image_HWC[0, 0])
        note(self.load.notes, red << 8 | green)
        self.wait_for_the_crew()
        time.sleep(self.load.seconds)
        if kind == KILLS:
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == EXITS:
            os._exit(3)
        if kind == CRASHES:
            ctypes.string_at(0)
        mask_HW = np.zeros(image_HWC.shape[:2], bool)
        mask_HW[2:9, 3:12] = True
        segments = Segments.from_masks(mask_HW[None], [0.9], [0.9])
        segments = segments.with_embedding(self.naming.bank.embedding_AD[:1])
        return segments, self.naming.compose(segments)

    def wait_for_the_crew(self) -> None:
        """At the first image, until as many actors are at work as the test wants."""
        while not self.waited:
            at_work = {note.pid for note in read_notes(self.load.notes)}
            self.waited = len(at_work) >= self.load.crew
            time.sleep(0.02)


@dataclass(frozen=True)
class LoadCheap:
    """Loads a `Cheap`, as an actor loads SAM and CLIP."""

    notes: str
    seconds: float
    together: int
    crew: int

    def __call__(self, config, naming, device):
        return Cheap(naming, self)

    def put_in(self) -> None:
        """Let `zsplg label` load this."""
        import zsplg_ray.cluster.label as room

        room.label = functools.partial(room.label, load=self)


@dataclass(frozen=True)
class LoadStudent:
    """Loads a real student, which notes every image."""

    notes: str

    def __call__(self, task, device):
        from zsplg_ray.cluster.predict import load_model

        worker = load_model(task, device)
        honest = worker.label

        def noting(image, image_HWC):
            note(self.notes, int(image["image_id"].partition(".")[0]))
            return honest(image, image_HWC)

        worker.label = noting  # type: ignore[method-assign]
        return worker

    def put_in(self) -> None:
        """Let `zsplg predict` load this."""
        import zsplg_ray.cluster.predict as room

        room.predict = functools.partial(room.predict, load=self)


def _drive(argv: list[str], load: LoadCheap | LoadStudent, reading: DeadlyReading, log: str):
    """The body of a driver's process: the command line, with another model and another reader."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    from zsplg_ray import cli
    from zsplg_ray.cluster import pipeline

    load.put_in()
    if reading.deadly:
        pipeline.decode_block = reading
    code = cli.main(argv)
    sys.stderr.flush()
    sys.exit(code)


class Driver:
    """`zsplg label` at work."""

    def __init__(self, run: Run, argv: list[str]) -> None:
        self.run, self.began = run, time.time()
        self.log = run.root / f"driver{len(run.drivers)}.log"
        self.process: BaseProcess = _FORK.Process(
            target=_drive, args=(argv, run.load, run.reading, str(self.log))
        )
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def told(self) -> str:
        """What it has written to stdout and stderr."""
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, more: int) -> int:
        """Until that many more images were started on; the process that did the last."""
        goal = len(self.run.notes()) + more
        self.until(lambda: len(self.run.notes()) >= goal)
        return self.run.notes()[-1].pid

    def until(self, there: Callable[[], object]) -> None:
        """Wait for something to happen while the run is at work."""
        deadline = time.monotonic() + PATIENCE_S
        while not there():
            assert self.process.is_alive(), f"it has ended: {self.told()[-2000:]}"
            assert time.monotonic() < deadline, f"the run does not get on: {self.told()[-2000:]}"
            time.sleep(0.01)

    def kill(self) -> float:
        """kill -9; returns when."""
        at = time.time()
        self.process.kill()
        self.process.join()
        return at

    def end(self, code: int = 0, patience_s: float = PATIENCE_S) -> str:
        """Wait for its end with that exit code; returns what it told."""
        self.process.join(patience_s)
        if self.process.is_alive():
            self.kill()
            raise AssertionError(f"it hangs: {self.told()[-2000:]}")
        assert self.process.exitcode == code, f"{self.process.exitcode}: {self.told()[-2000:]}"
        return self.told()


class Run:
    """A run's folder, its images, and the drivers that have worked on it one after the other.

    Args:
        root: A folder of its own.
        kinds: Of its images.
        flags: For `zsplg label`, beyond what it needs.
        seconds: That an image takes.
        together: Images that an actor notes together.
        crew: Actors that must be there before any image is done.
        out: The run's folder, if it is not to be below `root`.
    """

    def __init__(
        self,
        root: Path,
        kinds: Sequence[int],
        *flags: str,
        seconds: float = 0.01,
        together: int = 1,
        crew: int = 1,
        out: str | None = None,
    ) -> None:
        self.root = root
        self.ids = write_images(root / "images", kinds)
        self.images = root / "images"
        self.folder = RunFolder(out or str(root / "run"))
        self.load: LoadCheap | LoadStudent = LoadCheap(str(root / "notes"), seconds, together, crew)
        self.reading = DeadlyReading({}, str(root / "deaths"))
        self.flags = flags
        self.drivers: list[Driver] = []

    def start(self) -> Driver:
        """The same command, again if it was started before."""
        argv = ["--images", str(self.images), "--out", self.folder.uri, "--quiet", *self.flags]
        if isinstance(self.load, LoadCheap):
            argv += ["--classes", "shapes", "--sam", "shapes", "--clip", "shapes"]
            return self.other("label", *argv)
        return self.other("predict", *argv)

    def other(self, *argv: str) -> Driver:
        """Another command on the same folder."""
        driver = Driver(self, list(argv))
        self.drivers.append(driver)
        return driver

    def notes(self) -> list[Note]:
        """Every image that an actor has started on, in order."""
        return read_notes(self.load.notes)

    def recover_s(self, fault_at: float) -> float | None:
        """Seconds from a fault to the first part that was committed after it.

        What counts is the work of those that have come since, if there are any: who was at work
        may write a part before he hears of the fault.
        """
        old = {note.pid for note in self.notes() if note.at <= fault_at}
        new = [note.at for note in self.notes() if note.at > fault_at and note.pid not in old]
        since = min(new, default=fault_at)
        run = self.folder.read_run()
        assert run is not None
        commits = Path(self.folder.path, COMMITS[made_by(run)]).glob("part-*")
        later = [
            at for at in (part.stat().st_mtime for part in commits) if at > (since or fault_at)
        ]
        return min(later) - fault_at if later else None

    def settle(self, fault: str, times: int, fault_at: float | None, note: str = "") -> Fault:
        """Judge the folder, tell the figures, and see that nothing is lost and nothing twice."""
        recover_s = None if fault_at is None else self.recover_s(fault_at)
        told = settle(self.folder, self.ids, len(self.notes()), fault, times, recover_s, note)
        assert not unfinished(self.folder), "files that no run has finished are in the way"
        return told

    def close(self) -> None:
        """End what a failed test has left at work."""
        for driver in self.drivers:
            if driver.process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(driver.pid, signal.SIGCONT)
                driver.kill()


def unfinished(folder: RunFolder) -> list[str]:
    """Files under a hidden name that a writer has left."""
    return [str(p) for p in Path(folder.path).rglob("_*.*") if p.is_file() and p.suffix != ".json"]


@dataclass(frozen=True)
class DeadlyReading:
    """Stands for `decode_block`: images whose reading kills the process that does it.

    Args:
        deadly: Name of an image's file -> how many times it kills.
        notes: A file that counts the deaths.
    """

    deadly: dict[str, int]
    notes: str

    def __call__(self, block, **options):
        honest = decode.read_bytes
        decode.read_bytes = lambda uri: self.die(uri) or honest(uri)
        try:
            yield from decode.decode_block(block, **options)
        finally:
            decode.read_bytes = honest

    def die(self, uri: str) -> None:
        """Kill this process, if it is not the image's last time."""
        name = Path(uri).name
        if self.deaths(name) < self.deadly.get(name, 0):
            with Path(self.notes).open("a") as notes:
                notes.write(f"{name}\n")
            os.kill(os.getpid(), signal.SIGKILL)

    def deaths(self, name: str) -> int:
        """How many processes an image has killed."""
        notes = Path(self.notes)
        return notes.read_text().split().count(name) if notes.exists() else 0
