"""Labelers that misbehave on purpose.

SAM, CLIP and torch are imported by those that use them: an actor without them starts much sooner.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from zsplg_ray.cluster.label import load_labeler
from zsplg_ray.config import LabelConfig
from zsplg_ray.label.segments import Segments
from zsplg_ray.settings import from_mapping

if TYPE_CHECKING:
    from zsplg_ray.label.labeler import Labeler


def config(images, out, **changes) -> LabelConfig:
    """The tiny models with few points: quick, and still the real thing."""
    values = {"images": str(images), "out": str(out), "classes": "shapes", "quiet": True}
    sam = {"sam.model": "shapes", "clip.model": "shapes", "sam.points_per_side": 4}
    return from_mapping(LabelConfig, {**values, **sam, **changes})


class OneByOne:
    """A labeler of one image at a time."""

    images_at_once = 1

    def label_many(self, images):
        results = []
        for image_HWC in images:
            try:
                results.append(self.label(image_HWC))
            except Exception as e:
                from zsplg_ray.label.failures import is_broken_device

                if is_broken_device(e):
                    raise
                results.append(e)
        return results

    def label(self, image_HWC: np.ndarray):
        raise NotImplementedError


class Killing(OneByOne):
    """Kills its own process on images that are one pure red, and fails on pure green ones."""

    def __init__(self, inner: Labeler) -> None:
        self.inner = inner

    def label(self, image_HWC: np.ndarray):
        if (image_HWC == (255, 0, 0)).all():
            os.kill(os.getpid(), signal.SIGKILL)
        if (image_HWC == (0, 255, 0)).all():
            raise ArithmeticError("green\nand more")
        return self.inner.label(image_HWC)


def load_killing(config, naming, device):
    return Killing(load_labeler(config, naming, device))


class Blind:
    """Finds nothing."""

    images_at_once = 2

    def propose_many(self, images, points_per_batch=None) -> list[Segments]:
        return [Segments.measured(image_HWC.shape[:2], [], [], []) for image_HWC in images]


def load_blind(config, naming, device):
    from zsplg_ray.label.labeler import Labeler

    return Labeler(Blind(), load_labeler(config, naming, device).embedder, naming)


class Strange(Killing):
    """Gives labels that cannot be written: class indices beyond the list."""

    def label(self, image_HWC: np.ndarray):
        segments, composed = self.inner.label(image_HWC)
        composed.label_HW[:] = 200
        return segments, composed


def load_strange(config, naming, device):
    return Strange(load_labeler(config, naming, device))


class BrokenDevice(Killing):
    """From a pure red image on, everything fails, as on a GPU after an illegal access."""

    broken = False

    def label(self, image_HWC: np.ndarray):
        self.broken |= bool((image_HWC == (255, 0, 0)).all())
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return self.inner.label(image_HWC)


def load_broken_device(config, naming, device):
    return BrokenDevice(load_labeler(config, naming, device))


def load_others(config, naming, device):
    labeler = load_labeler(config, naming, device)
    labeler.weights = {"sam": "another file", "clip": "another file"}
    return labeler


class Counting(OneByOne):
    """Notes every image that it labels, and its process, in a file."""

    def __init__(self, inner: Labeler, path: str) -> None:
        self.inner, self.path = inner, path

    def label(self, image_HWC: np.ndarray):
        with Path(self.path).open("a") as notes:
            notes.write(json.dumps({"pid": os.getpid(), "image": hash(image_HWC.tobytes())}) + "\n")
        return self.inner.label(image_HWC)


class LoadCounting:
    def __init__(self, path) -> None:
        self.path = str(path)

    def __call__(self, config, naming, device):
        return Counting(load_labeler(config, naming, device), self.path)
