"""A clock on the SAM and the CLIP of a labeler, image by image.

What enters: a `Labeler`, images that it is about to label. What leaves: seconds of each image in
either model, by the wall's clock and of the CPUs. The labeler stays as it is, and does all that it
does when memory runs out; only its two parts are wrapped for the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from zsplg_ray.label.labeler import Embedder, Labeler, Proposer
from zsplg_ray.label.segments import Segments

Clock = Callable[[], np.ndarray]
"""Tells (wall, CPU) seconds, float64 [2]."""


def clock_of(device: str) -> Clock:
    """A clock that waits for the GPU, if that is the device, before it tells."""

    def now() -> np.ndarray:
        if device == "cuda":
            torch.cuda.synchronize()
        return np.array([time.perf_counter(), time.process_time()])

    return now


class Watch:
    """Seconds of some images in SAM and CLIP."""

    def __init__(self, clock: Clock, images: Sequence[np.ndarray]) -> None:
        self.clock = clock
        self.seconds = {stage: np.zeros((len(images), 2)) for stage in ("sam", "clip")}
        """By stage float64 [images, 2], wall and CPU."""
        self._place = {id(image): i for i, image in enumerate(images)}

    @contextmanager
    def on(self, labeler: Labeler) -> Iterator[None]:
        """While this lasts, what the labeler does is noted."""
        parts = labeler.proposer, labeler.embedder
        watched: Any = _Proposer(labeler.proposer, self)
        labeler.proposer = watched
        labeler.embedder = _Embedder(labeler.embedder, self)
        try:
            yield
        finally:
            labeler.proposer, labeler.embedder = parts

    @property
    def total(self) -> np.ndarray:
        """Of all images in both, float64 [2]."""
        return self.seconds["sam"].sum(axis=0) + self.seconds["clip"].sum(axis=0)

    def note(self, stage: str, images: Sequence[np.ndarray], began: np.ndarray) -> None:
        """Images were in a stage together until now; each has an equal part of it."""
        # One that was made smaller for want of memory is none of ours: then all share.
        known = [self._place[id(image)] for image in images if id(image) in self._place]
        places = known or list(self._place.values())
        self.seconds[stage][places] += (self.clock() - began) / len(places)


class _Proposer:
    """SAM, watched."""

    def __init__(self, inner: Proposer, watch: Watch) -> None:
        self.inner, self.watch = inner, watch

    @property
    def images_at_once(self) -> int:
        return self.inner.images_at_once

    @images_at_once.setter
    def images_at_once(self, most: int) -> None:
        self.inner.images_at_once = most

    def propose_many(
        self, images: Sequence[np.ndarray], points_per_batch: int | None = None
    ) -> list[Segments]:
        began = self.watch.clock()
        try:
            return self.inner.propose_many(images, points_per_batch)
        finally:
            self.watch.note("sam", images, began)


class _Embedder:
    """CLIP, watched."""

    def __init__(self, inner: Embedder, watch: Watch) -> None:
        self.inner, self.watch = inner, watch

    def embed(self, image_HWC: np.ndarray, segments: Segments) -> np.ndarray:
        began = self.watch.clock()
        try:
            return self.inner.embed(image_HWC, segments)
        finally:
            self.watch.note("clip", [image_HWC], began)
