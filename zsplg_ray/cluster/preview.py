"""What the best model of a training run sees: a contact sheet of some of its images.

What enters: a finished run's folder and its data. What leaves: a PNG. From left to right the image,
its zero-shot label where there are any, the model's prediction, and the truth where there is one.
"""

from __future__ import annotations

import logging

import numpy as np

from zsplg_ray.images import decode_image
from zsplg_ray.rundir import RunFolder
from zsplg_ray.storage import read_bytes
from zsplg_ray.student.checkpoint import load_student
from zsplg_ray.student.data import TrainingData
from zsplg_ray.student.predict import Predictor
from zsplg_ray.student.zeroshot import ZeroShot, find_labels, read_label
from zsplg_ray.views.pictures import Shot, contact_sheet

log = logging.getLogger(__name__)

IMAGES = 8
_MOST_SIDE_PX = 512


def preview(folder: RunFolder, data: TrainingData, zeroshot: str | None) -> bytes | None:
    """The sheet for best.pt, of validation images, else of unlabelled ones; None if it fails.

    Args:
        folder: With best.pt.
        data: What was trained on.
        zeroshot: Folder of the zero-shot labels.
    """
    try:
        return _sheet(folder, data, zeroshot)
    except Exception as e:  # the model is there all the same
        log.warning("no preview: %s", e)
        return None


def _sheet(folder: RunFolder, data: TrainingData, zeroshot: str | None) -> bytes | None:
    validated = len(data.validation) > 0
    images = (data.validation if validated else data.unlabelled).slice(0, IMAGES)
    ids, uris = (images[name].to_pylist() for name in ("image_id", "uri"))
    if not ids:
        return None
    predictor = Predictor(load_student(folder.uri))
    labels = _labels(zeroshot, ids, uris)
    shots = []
    for i, (image_id, uri) in enumerate(zip(ids, uris, strict=True)):
        try:
            image_HWC = decode_image(read_bytes(uri))
            maps = [predictor.predict(image_HWC)[0]]
            if labels is not None:
                maps.insert(0, _label(labels, i, image_HWC.shape[:2]))
            if validated:
                maps.append(data.validation_truth.read(image_id))
        except (OSError, ValueError):
            continue
        if all(label_HW.shape == image_HWC.shape[:2] for label_HW in maps):
            shots.append(_small(image_HWC, maps))
    return contact_sheet(shots, data.classes) if shots else None


def _labels(zeroshot: str | None, ids: list[str], uris: list[str]) -> ZeroShot | None:
    """Zero-shot labels of these images; None if there are none."""
    try:
        return find_labels(zeroshot, ids, uris) if zeroshot is not None else None
    except ValueError:
        return None  # they are of other images


def _label(labels: ZeroShot, i: int, size_hw: tuple[int, ...]) -> np.ndarray:
    label_uri, score_uri = labels.label_uris[i], labels.score_uris[i]
    if label_uri is None or score_uri is None:
        return np.zeros(size_hw, np.uint8)
    return read_label(label_uri, score_uri)[0]


def _small(image_HWC: np.ndarray, maps: list[np.ndarray]) -> Shot:
    """Thinned out where it is large: a sheet shows it small."""
    step = max(1, -(-max(image_HWC.shape[:2]) // _MOST_SIDE_PX))
    return Shot(image_HWC[::step, ::step], tuple(label_HW[::step, ::step] for label_HW in maps))
