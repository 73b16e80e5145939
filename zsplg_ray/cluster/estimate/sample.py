"""The sampled images through the very code that an actor of `label` runs, with a clock beside it.

What enters: rows of the manifest, a `LabelTask`. What leaves: `Measured`, numbers and texts only,
so that it may come from a node of the cluster. Nothing is written: parts are encoded in memory.

Images go in the groups in which an actor does them, blocks of `actors.in_flight` and of those as
many at a time as SAM takes, so that memory is that of an actor and a GPU is as full as it will be.
The first group is labelled once before the clock starts: compilers and caches warm up on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from zsplg_ray.cluster.actor import Row, pick_device, pixels
from zsplg_ray.cluster.decode import decode_row
from zsplg_ray.cluster.estimate.watch import Watch, clock_of
from zsplg_ray.cluster.label import LabelTask
from zsplg_ray.cluster.progress import Progress
from zsplg_ray.label.labeler import Labeler
from zsplg_ray.rundir import Kind, encode_part
from zsplg_ray.safe_text import MAX_CHARS, masked, one_line, shortened
from zsplg_ray.settings import WorkError

STAGES = ("read_decode", "sam", "clip", "compose_encode")
"""What an image goes through. The first is done by tasks on CPUs, the others by the actor."""
KINDS: tuple[Kind, ...] = ("labels", "segments")


@dataclass
class Measured:
    """What the sample took. A list has one entry an image of the sample, in its order; an image
    that failed has what it took until then, and no bytes.
    """

    device: str
    threads: int
    images_at_once: int
    start_s: float
    """Seconds for the models to load and warm up: what every actor takes once."""
    wall_s: dict[str, list[float]]
    """By stage."""
    cpu_s: dict[str, list[float]]
    """By stage, of all threads."""
    size_hw: list[tuple[int, int]] = field(default_factory=list)
    """Of the images that could be decoded."""
    segments: list[int] = field(default_factory=list)
    """Of the images that were labelled."""
    row_bytes: dict[str, list[float | None]] = field(default_factory=dict)
    """By kind of part: what an image adds to a part; None: it failed."""
    part_bytes: dict[str, float] = field(default_factory=dict)
    """By kind of part: what a part has beside its images."""
    embedding_share: float = 0.0
    """Of the bytes of segments/."""
    failed: list[dict[str, str]] = field(default_factory=list)
    """image_id, stage, error."""


def spread(total: int, most: int) -> np.ndarray:
    """Positions of at most `most` of `total` images: the middles of as many equal stretches."""
    count = min(total, most)
    return ((2 * np.arange(count, dtype=np.int64) + 1) * total) // (2 * max(count, 1))


def measure(
    task: LabelTask,
    rows: Sequence[Row],
    meta: Mapping[str, Any],
    *,
    has_gpu: bool,
    threads: int,
    progress: Progress | None = None,
) -> Measured:
    """Label the sample.

    Args:
        task: What `label` does, its config resolved.
        rows: image_id and uri of each image.
        meta: What parts carry in their metadata.
        has_gpu: Whether an actor gets one.
        threads: Threads of torch on a CPU.
        progress: What shows how far it is; None: nobody looks, as on another node.

    Raises: WorkError if the device is broken.
    """
    device = pick_device(task.config.device, has_gpu)
    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(threads)
    try:
        with progress or Progress("estimate", show=False) as progress:
            progress.waits("loading the models")
            began = time.perf_counter()
            labeler = task.load(device).labeler
            load_s = time.perf_counter() - began
            assert isinstance(labeler, Labeler), "whose parts a clock can be put on"
            progress.plan(len(rows))
            progress.waits("warming up")
            run = _Run(task, labeler, meta, clock_of(device), progress)
            for start in range(0, len(rows), task.config.actors.in_flight):
                run.block(rows[start : start + task.config.actors.in_flight])
    finally:
        torch.set_num_threads(before)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return run.measured(
        device=name,
        threads=threads,
        start_s=load_s + (run.warm_s or 0.0),
    )


class _Run:
    """The sample on its way."""

    def __init__(
        self,
        task: LabelTask,
        labeler: Labeler,
        meta: Mapping[str, Any],
        clock: Callable[[], np.ndarray],
        progress: Progress,
    ) -> None:
        self.task, self.labeler, self.meta = task, labeler, meta
        self.clock, self.progress = clock, progress
        self.at_once = labeler.images_at_once
        self.warm_s: float | None = None
        """Seconds of the first group, before the clock counts."""
        self.spent: list[dict[str, np.ndarray]] = []
        """An image's (wall, CPU) seconds by stage."""
        self.size_hw: list[tuple[int, int]] = []
        self.segments: list[int] = []
        self.failed: list[dict[str, str]] = []
        self.row_bytes: dict[str, list[float | None]] = {kind: [] for kind in KINDS}
        self.parts: dict[str, list[tuple[int, float]]] = {kind: [] for kind in KINDS}
        """Of each part its images, and the bytes that it has beside them."""
        self.bare, self.whole = 0.0, 0.0
        """Bytes of segments without embeddings, and with them."""

    def block(self, rows: Sequence[Row]) -> None:
        """What an actor takes at a time."""
        done: dict[Kind, list[Row]] = {kind: [] for kind in KINDS}
        first = len(self.spent)
        good: list[tuple[int, pa.Table]] = []
        for at, row in enumerate(rows, first):
            self.spent.append({stage: np.zeros(2) for stage in STAGES})
            for kind in KINDS:
                self.row_bytes[kind].append(None)
            began = self.clock()
            table = decode_row(dict(row), self.task.config.max_pixels)
            self.spent[at]["read_decode"] += self.clock() - began
            image = table.drop_columns(["rgb"]).to_pylist()[0]
            if image["error"] is not None:
                self._fail(image, image["stage"], image["error"])
                continue
            self.size_hw.append((image["height"], image["width"]))
            good.append((at, table))
            if len(good) == self.at_once:
                self._group(good, done)
                good = []
        if good:
            self._group(good, done)
        self._weigh(done, first)

    def _group(self, images: list[tuple[int, pa.Table]], done: dict[Kind, list[Row]]) -> None:
        """Label images together; rows of what became of them go to `done`."""
        about = [{**t.drop_columns(["rgb"]).to_pylist()[0], "index": 0} for _, t in images]
        arrays = [pixels(t, row) for (_, t), row in zip(images, about, strict=True)]
        if self.warm_s is None:
            began_s = time.perf_counter()
            self._label(arrays)
            self.warm_s = time.perf_counter() - began_s
            self.progress.start()  # so that its pace is the warm one
        watch = Watch(self.clock, arrays)
        began = self.clock()
        with watch.on(self.labeler):
            results = self._label(arrays)
        rest = (self.clock() - began - watch.total) / len(images)
        for i, ((at, _), image, result) in enumerate(zip(images, about, results, strict=True)):
            spent = self.spent[at]
            for stage, seconds in watch.seconds.items():
                spent[stage] += seconds[i]
            began = self.clock()
            try:
                if isinstance(result, Exception):
                    raise result
                rows = self.task.rows(image, result)
                took = self.clock() - began
                raw = {kind: self._table(kind, [rows[kind]]).nbytes for kind in KINDS}
            except Exception as e:  # one bad image never stops the rest
                spent["compose_encode"] += rest + self.clock() - began
                self._fail(image, "label", f"{type(e).__name__}: {e}")
                continue
            spent["compose_encode"] += rest + took
            self.segments.append(len(result[0]))
            for kind in KINDS:
                done[kind].append(rows[kind])
                self.row_bytes[kind][at] = raw[kind]  # a weight, until the part is encoded
            self.progress.add(1, 0)

    def _label(self, arrays: Sequence[np.ndarray]) -> list[Any]:
        try:
            return self.labeler.label_many(arrays)
        except Exception as e:
            why = (str(e).splitlines() or [""])[0][:200]
            raise WorkError(f"the device is broken: {type(e).__name__}: {why}") from e

    def _fail(self, image: Row, stage: str, error: str) -> None:
        why = one_line(masked(" ".join(error.split())))[:500]
        name = shortened(image["image_id"], MAX_CHARS // 4)
        self.failed.append({"image_id": name, "stage": stage, "error": why})
        self.progress.add(0, 1)

    def _table(self, kind: Kind, rows: list[Row]) -> pa.Table:
        return pa.Table.from_pylist(rows, schema=self.task.schemas[kind])

    def _size(self, table: pa.Table) -> int:
        """Bytes of a part of these rows."""
        return encode_part(table, self.meta).size

    def _weigh(self, done: dict[Kind, list[Row]], first: int) -> None:
        """Encode what a block has made as the parts that it would be.

        Two halves of a part have twice what it has beside its images (the file's frame, the least
        and greatest of each column), so the difference tells that. The rest belongs to the images,
        by what they are before they are packed.
        """
        count = len(done["labels"])
        if not count:
            return
        for kind in KINDS:
            began = self.clock()
            table = self._table(kind, done[kind])
            whole = self._size(table)
            each = (self.clock() - began) / (len(self.spent) - first)
            for spent in self.spent[first:]:
                spent["compose_encode"] += each
            halves = table.slice(0, count // 2), table.slice(count // 2)
            beside = min(whole, sum(map(self._size, halves)) - whole)
            self.parts[kind].append((count, beside))
            sizes = self.row_bytes[kind]
            share = (whole - beside) / sum(size or 0 for size in sizes[first:])
            sizes[first:] = [None if size is None else size * share for size in sizes[first:]]
            if kind == "segments":
                self.whole += whole
        self.bare += self._size(self._without_embeddings(done["segments"]))

    def _without_embeddings(self, rows: list[Row]) -> pa.Table:
        schema = self.task.schemas["segments"]
        segments: Any = schema.field("segments").type
        plain = pa.struct([f for f in segments.value_type if f.name != "embedding"])
        at = schema.get_field_index("segments")
        return pa.Table.from_pylist(
            rows, schema=schema.set(at, pa.field("segments", pa.list_(plain)))
        )

    def measured(self, **about: Any) -> Measured:
        """All of it."""
        beside: dict[str, float] = {}
        for kind, parts in self.parts.items():
            images = sum(count for count, _ in parts)
            beside[kind] = sum(count * size for count, size in parts) / max(images, 1)
        per_stage = {s: np.array([image[s] for image in self.spent]) for s in STAGES}
        return Measured(
            **about,
            images_at_once=self.labeler.images_at_once,
            wall_s={stage: seconds[:, 0].tolist() for stage, seconds in per_stage.items()},
            cpu_s={stage: seconds[:, 1].tolist() for stage, seconds in per_stage.items()},
            size_hw=self.size_hw,
            segments=self.segments,
            row_bytes=self.row_bytes,
            part_bytes=beside,
            embedding_share=1 - self.bare / self.whole if self.whole else 0.0,
            failed=self.failed,
        )
