"""The actor that holds a model: decoded images in, parts of the run's folder and counts out.

The actor itself writes the parts: a part is on disk before Ray hears of it, so a crash costs at
most the images that were with an actor (`actors.in_flight` of them). What stands in valid parts is
not done again; what stands there twice after a crash is mended (exactly_once).

Which model it is, and which rows it makes, is a `Task`: the verbs differ in nothing else. Torch is
loaded where a model needs it and not with this module: it takes hundreds of MiB.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray

from zsplg_ray.cluster.ledger import MAX_KILLS, Ledger
from zsplg_ray.cluster.notes import Busy, interval_s, keep_telling
from zsplg_ray.cluster.parts import PartWriter
from zsplg_ray.cluster.session import Plan
from zsplg_ray.config import LabelConfig, PredictConfig
from zsplg_ray.part_index import Written
from zsplg_ray.rundir import Kind, RunFolder, Verb
from zsplg_ray.settings import complain

log = logging.getLogger(__name__)

Row = dict[str, Any]
"""One row of a table. That of an image has `decode.DECODED` without its pixels."""


_WRITTEN = [
    ("kind", pa.string()),
    ("name", pa.string()),
    ("size", pa.int64()),
    ("image_ids", pa.list_(pa.string())),
]
COUNTS = pa.schema(
    [
        ("labelled", pa.int64()),
        ("failed", pa.int64()),
        ("actor", pa.string()),
        ("through", pa.int64()),
        ("busy_s", pa.float64()),
        ("alive_s", pa.float64()),
        ("written", pa.list_(pa.struct(_WRITTEN))),
    ]
)
"""What the driver hears of a block: images, what the actor says of itself (`notes.Busy.read`), and
the parts that were written of them."""


class Worker(Protocol):
    """A model that is loaded and at work on images."""

    @property
    def images_at_once(self) -> int:
        """How many images to give to `process`."""
        ...

    @property
    def weights(self) -> dict[str, str] | None:
        """SHA-256 of the weights by model; None if they are no files."""
        ...

    def process(self, images: Sequence[Row], pixels: Sequence[np.ndarray]) -> list[Any]:
        """What `Task.rows` understands for each image (uint8 RGB), or the Exception it met.

        Raises: Exception if the device is broken and will not do the others.
        """
        ...


class Task(Protocol):
    """What a verb does to images; it travels to every actor."""

    @property
    def verb(self) -> Verb:
        """Its name; also the stage that errors are told of."""
        ...

    @property
    def schemas(self) -> Mapping[Kind, pa.Schema]:
        """Kinds of rows that it makes of each image; the last one is the commit."""
        ...

    def load(self, device: str) -> Worker:
        """Load the model."""
        ...

    def rows(self, image: Row, result: Any) -> dict[Kind, Row]:
        """A row of each kind from what the worker found."""
        ...

    def mend(self, folder: RunFolder, name: str, meta: Mapping[str, Any]) -> None:
        """Make the labels part that a crash has cost anew."""
        ...


@dataclass(frozen=True)
class Job:
    """Everything an actor needs, in one picklable piece. `config` is resolved."""

    config: LabelConfig | PredictConfig
    task: Task
    folder: RunFolder
    meta: dict[str, Any]
    weights: dict[str, str]


class ImageActor:
    """One process with a model: decoded images in, written parts and counts out."""

    def __init__(self, job: Job, plan: Plan, ledger: Ledger) -> None:
        self.job, self.ledger, self.stage = job, ledger, job.task.verb
        if job.folder.read_run() is None:  # the driver has written it before there are actors
            raise ValueError(unseen(job.folder))
        device = pick_device(job.config.device, bool(ray.get_gpu_ids()))
        if device == "cpu":
            use_threads(plan.threads)
        self.worker = retrying(lambda: job.task.load(device))
        if device == "cpu":
            use_threads(plan.threads)
        found = self.worker.weights
        if found not in (None, job.weights):
            rule = f"those of the driver, {job.weights}"
            raise ValueError(complain("weights", rule, found, "give every node the same files"))
        self._come_to_work(interval_s(plan.max_actors))

    def _come_to_work(self, every_s: float | None = None) -> None:
        """From here on its time counts; it says now and then how it gets on, if `every_s`."""
        self.name, self.busy = uuid.uuid4().hex, Busy()
        if every_s is not None:
            keep_telling(lambda: self.ledger.note(self.name, self.busy.read()), every_s)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Do a block of `decode.DECODED` rows; returns one row of `COUNTS`."""
        writer = PartWriter(self.job.folder, self.job.meta, self.job.task.schemas)
        labelled = failed = 0
        written: list[Written] = []
        for images in self._pending(block):
            if images[0]["deaths"] and writer.ids:
                written += self._commit(writer)  # the others are safe before a suspect's next try
            done_before = len(writer.done)
            self._process(block, images, writer)
            labelled += len(writer.done) - done_before
            failed += len(images) - (len(writer.done) - done_before)
            self.busy.through += len(images)
            if time.monotonic() - writer.since >= self.job.config.actors.flush_s:
                written += self._commit(writer)
        if writer.ids:
            written += self._commit(writer)
        parts = [part._asdict() for part in written]
        said = {"actor": self.name, **self.busy.read()}
        counts = {"labelled": labelled, "failed": failed, **said, "written": parts}
        return pa.Table.from_pylist([counts], schema=COUNTS)

    def _pending(self, block: pa.Table) -> Iterator[list[Row]]:
        """Rows (without pixels) that are not written yet, in groups to do together.

        Each has its `deaths`. Suspects come last, each alone, so that no other is blamed again.
        """
        rows = block.drop_columns(["rgb"]).to_pylist()
        deaths = self.ledger.open(self.stage, [row["image_id"] for row in rows])
        todo = [
            {**row, "index": i, "deaths": deaths[row["image_id"]]}
            for i, row in enumerate(rows)
            if row["image_id"] in deaths
        ]
        innocent = [row for row in todo if not row["deaths"]]
        most = self.worker.images_at_once
        for start in range(0, len(innocent), most):
            yield innocent[start : start + most]
        for row in sorted(todo, key=lambda row: row["deaths"]):
            if row["deaths"]:
                yield [row]

    def _process(self, block: pa.Table, images: list[Row], to: PartWriter) -> None:
        """Do a group of images; what fails goes to `to` with its reason."""
        good = [image for image in images if not self._hopeless(image, to)]
        if not good:
            return
        ids = [image["image_id"] for image in good]
        self.ledger.begin(self.stage, ids)  # until they are committed: a death may come late
        try:
            seen = [pixels(block, image) for image in good]
            with self.busy.at_work():
                results = self.worker.process(good, seen)
        except Exception as e:
            from zsplg_ray.label.failures import is_broken_device

            if is_broken_device(e):
                self._leave(to)
            results = [e] * len(good)
        for image, result in zip(good, results, strict=True):
            try:
                if isinstance(result, Exception):
                    raise result
                to.add(self.job.task.rows(image, result))
            except Exception as e:  # one bad image never stops the rest
                to.fail(image, self.stage, f"{type(e).__name__}: {e}", traceback.format_exc())

    def _hopeless(self, image: Row, to: PartWriter) -> bool:
        """Whether an image need not be tried; then it is written as failed."""
        if image["error"] is not None:
            to.fail(image, image["stage"], image["error"])
        elif image["deaths"] >= MAX_KILLS:
            error = (
                f"killed its process {image['deaths']} times; see whether memory or a library fails"
            )
            to.fail(image, self.stage, error)
        else:
            return False
        return True

    def _leave(self, writer: PartWriter) -> None:
        """A GPU that has failed once fails for good in this process; a new one may try again."""
        if writer.ids:
            self._commit(writer)
        os._exit(1)  # the ledger counts this as a death of the images under way

    def _commit(self, writer: PartWriter) -> list[Written]:
        ids = writer.ids
        self.ledger.open(self.stage, ids)  # fails if the driver is gone: its heir may be at work
        written = writer.write()
        self.ledger.commit(self.stage, ids)
        return written


def unseen(folder: RunFolder) -> str:
    """What to say of a run's folder that is not the same one on every node."""
    fix = "use a shared disk, or an s3://, gs:// address"
    return complain("out", "a folder that every node sees", folder.uri, fix)


def pixels(block: pa.Table, image: Row) -> np.ndarray:
    """The uint8 RGB pixels [H, W, 3] of one row of a decoded block."""
    flat = np.frombuffer(block["rgb"][image["index"]].as_buffer(), np.uint8)
    return flat.reshape(image["height"], image["width"], 3).copy()


def pick_device(asked: str, has_gpu: bool) -> str:
    """auto -> cuda where this process was given a GPU that works, else cpu."""
    if asked != "auto":
        return asked
    if not has_gpu:
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def use_threads(n: int) -> None:
    """Let torch use so many; it is not imported for that, as not every model has it."""
    os.environ["OMP_NUM_THREADS"] = str(n)  # what it starts with
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(n)


def retrying(make: Callable[[], Worker], times: int = 3) -> Worker:
    """Loading may fail for a moment (a busy disk, a download); Ray would give up at once."""
    for left in reversed(range(times)):
        try:
            return make()
        except Exception:
            if left == 0:
                raise
            log.warning("loading the models failed, trying again", exc_info=True)
            time.sleep(1)
    raise AssertionError("unreachable")
