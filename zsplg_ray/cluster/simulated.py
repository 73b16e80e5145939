"""A labeller without a model, for measuring everything else.

What enters: how long an image takes. What leaves: rows as those of a photograph of 500 x 375, the
same for every image, after that time. It runs in the real pipeline, on nodes whose GPUs are only
pretended, and notes when it was at work, so that the idle time of actors can be told.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from zsplg_ray.cluster.actor import Row
from zsplg_ray.cluster.parts import labels_row, segments_row
from zsplg_ray.label.compose import Composed
from zsplg_ray.label.segments import Segments, encode_mask
from zsplg_ray.records import LABELS, segments_schema
from zsplg_ray.rundir import Kind, RunFolder, Verb

SIZE_HW = (375, 500)
DIM = 512
"""Of an embedding, as of CLIP ViT-B-16."""


def plausible(segments: int) -> tuple[Segments, Composed]:
    """As many discs as that, and the label map that they make."""
    height, width = SIZE_HW
    rng = np.random.default_rng(0)
    y, x = np.ogrid[:height, :width]
    centres = rng.uniform((0, 0), (height, width), (segments, 2))
    masks = [(y - cy) ** 2 + (x - cx) ** 2 < rng.uniform(20, 90) ** 2 for cy, cx in centres]
    found = Segments.measured(
        SIZE_HW,
        [encode_mask(mask) for mask in masks],
        rng.uniform(0.88, 1, segments),
        rng.uniform(0.95, 1, segments),
    )
    embedding_RD = rng.normal(size=(segments, DIM)) / DIM**0.5
    label_HW, score_HW = np.zeros(SIZE_HW, np.uint8), np.zeros(SIZE_HW, np.float32)
    for index, mask in enumerate(masks):
        label_HW[mask], score_HW[mask] = 1 + index % 20, rng.uniform(0.2, 0.4)
    return found.with_embedding(embedding_RD.astype(np.float16)), Composed(
        label_HW, score_HW, label_HW > 0
    )


@dataclass(frozen=True)
class SimulatedTask:
    """What `zsplg label` does, with a wait in place of SAM and CLIP."""

    latency_s: float
    notes: str
    """Folder for the notes of when each process was at work."""
    segments: int = 4
    """Segments of an image. SAM finds some 60 in a photograph; their rows cost CPU to write."""
    verb: Verb = "label"

    @property
    def schemas(self) -> dict[Kind, pa.Schema]:
        """Labels, then segments, as of `label`."""
        return {"labels": LABELS, "segments": segments_schema(DIM)}

    def load(self, device: str) -> SimulatedWorker:
        """Make the result."""
        return SimulatedWorker(self)

    def rows(self, image: Row, result: dict[Kind, Row]) -> dict[Kind, Row]:
        """The one result, under the image's own id."""
        own = {k: image[k] for k in ("image_id", "uri")}
        return {kind: row | own for kind, row in result.items()}

    def mend(self, folder: RunFolder, name: str, meta: Mapping[str, Any]) -> None:
        """Never called: nobody is killed here."""
        raise AssertionError(name)


class SimulatedWorker:
    """Waits, and says the same of every image."""

    images_at_once = 1
    weights = None

    def __init__(self, task: SimulatedTask) -> None:
        self.task = task
        found, composed = plausible(task.segments)
        image = {"image_id": "", "uri": "", "image_sha256": "0" * 64}
        self.result: dict[Kind, Row] = {
            "labels": labels_row(image, composed, 21),
            "segments": segments_row(image, found),
        }
        Path(task.notes).mkdir(exist_ok=True)
        self.notes = Path(task.notes, str(os.getpid()))

    def process(self, images: Sequence[Row], pixels: Sequence[np.ndarray]) -> list[dict[Kind, Row]]:
        """The result, after the time that the images take."""
        began = time.time()
        time.sleep(self.task.latency_s * len(images))
        with self.notes.open("a") as notes:
            notes.write(f"{began} {time.time()}\n")
        return [self.result] * len(images)


@dataclass(frozen=True)
class Work:
    """What the notes of a run's actors say, seconds by the clock."""

    first: float
    """When the first image was begun."""
    last: float
    """When the last one was done."""
    steady: tuple[float, float]
    """While all actors were at work: from the last one's first image to the first one's last."""
    images_per_s: float
    """In that time; nan where there was none."""
    actors: int

    @classmethod
    def read(cls, notes: Path) -> Work:
        """The notes of a folder, a file for each process."""
        spans = [np.loadtxt(path, ndmin=2) for path in notes.iterdir() if path.stat().st_size]
        since = max(float(span[0, 0]) for span in spans)
        until = min(float(span[-1, 1]) for span in spans)
        done = sum(int(((span[:, 1] > since) & (span[:, 1] <= until)).sum()) for span in spans)
        return cls(
            min(float(span[0, 0]) for span in spans),
            max(float(span[-1, 1]) for span in spans),
            (since, until),
            done / (until - since) if until > since else float("nan"),
            len(spans),
        )
