"""Settings of what people look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from zsplg_ray.settings import Section


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Section):
    """Labels, or a model's predictions, against ground truth: IoU by class, mIoU, pixel accuracy,
    coverage, confusion."""

    labels: Positional[str]
    """A run's folder, a Parquet folder of labels, or a folder of PNG masks; or a model, as `predict
    --model` takes it."""
    truth: str
    """Masks: a folder of PNGs, VOC root, split file, COCO json."""
    images: str | None = None
    """For a model: SRC of the images. None: those of --truth, where it lists images too (VOC root,
    split file, COCO json)."""
    root: str | None = None
    """Folder that the paths of a split file or COCO json start from."""
    classes: str | None = None
    """Class names (SPEC). None: those that the labels or the model carry, else those of the
    truth."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """For a model: auto (a GPU if there is one), cpu, cuda."""
    json: bool = False
    """One JSON object on stdout instead of a table."""
