"""`zsplg predict` on Ray: a model over images -> labels/, errors/, each image exactly once.

What enters: a `PredictConfig`. What leaves: a run's folder whose labels are the model's, or with
`--fuse` the model's and a zero-shot run's together. It is read like any other run's folder, by
`evaluate` and as `train --zeroshot`, but has no segments. Spreading, resuming and quarantine are
those of every verb: see pipeline.

Shapes: H W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from zsplg_ray.cluster.actor import Row, Worker
from zsplg_ray.cluster.fused import ZeroShotRun
from zsplg_ray.cluster.lock import only_run
from zsplg_ray.cluster.parts import labels_row
from zsplg_ray.cluster.pipeline import run_images
from zsplg_ray.cluster.progress import Progress
from zsplg_ray.config import PredictConfig, UnimatchConfig
from zsplg_ray.label.compose import Composed
from zsplg_ray.label.failures import free_memory, is_broken_device, is_out_of_memory
from zsplg_ray.records import IGNORE, LABELS
from zsplg_ray.rundir import Kind, RunFolder, Verb
from zsplg_ray.runinfo import describe_prediction, refuse_other_run
from zsplg_ray.settings import complain, override
from zsplg_ray.sources import list_images
from zsplg_ray.storage import Place
from zsplg_ray.student.checkpoint import Student, load_student
from zsplg_ray.student.predict import Predictor
from zsplg_ray.vocab import ClassList

log = logging.getLogger(__name__)

SHRINKS = (1, 2, 4)
"""When memory runs out an image is seen smaller: its side divided by these, one after the other."""


@dataclass(frozen=True)
class Labelled:
    """What a worker makes of an image."""

    label_HW: np.ndarray
    confidence_HW: np.ndarray
    source: str
    """Of labels/: "model" or "enhanced"."""


def predict(
    config: PredictConfig, *, load: Load | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Label every image of the source with a model, as far as it is not done yet.

    Args:
        config: As the user gave it.
        load: What each actor loads; the default is the model as `config` names it.
        progress: What shows how far it is; None: one of its own.

    Returns:
        The content of run.json.

    Raises:
        ValueError: Bad input; nothing has been written.
        WorkError: The work failed; what is finished is kept.
    """
    with progress or Progress("predict", show=not config.quiet) as progress:
        return _predict(config, load, progress)


def _predict(config: PredictConfig, load: Load | None, progress: Progress) -> dict[str, Any]:
    """`predict`, under way."""
    folder = RunFolder(config.out)
    progress.waits("listing the images")
    if Place.parse(config.out).child("train.json").kind() is not None:
        fix = "give a folder of its own"
        raise ValueError(complain("out", "no training run's folder", config.out, fix))
    manifest = list_images(config.images, root=config.root)
    progress.waits("reading the model")
    student = load_student(config.model, classes=config.classes, backbone=config.backbone)
    zeroshot = ZeroShotRun.open(config.fuse, student.classes) if config.fuse else None
    resolved = resolve(config, student)
    source = zeroshot and {"uri": config.fuse or "", "labels_fingerprint": zeroshot.fingerprint}
    weights = {"model": student.sha256}
    run = describe_prediction(config, resolved, student.classes, weights, source)
    refuse_other_run(folder, run)
    if zeroshot is not None:
        manifest = zeroshot.joined(manifest)
        without = manifest["zeroshot"].null_count
        run["counts"] = {"without_zeroshot": without}
        if without:
            told = "%d of %d images have no zero-shot label in %s: the model alone labels them"
            log.warning(told, without, len(manifest), config.fuse)
    with only_run(folder):
        task = PredictTask(resolved, student.classes, zeroshot, load or load_model)
        run_images(resolved, task, folder, manifest, run, progress)
    return run


def resolve(config: PredictConfig, student: Student) -> PredictConfig:
    """`config` with what depends on the model filled in, and addresses that hold everywhere."""
    values: dict[str, Any] = {"model": Place.parse(config.model).uri}
    values["backbone"] = student.config.backbone
    if config.fuse is not None:
        values["fuse"] = Place.parse(config.fuse).uri
        own = student.conf_thresh
        values["conf_thresh"] = config.conf_thresh or (
            UnimatchConfig.conf_thresh if own is None else own
        )
    return override(config, values)


@dataclass(frozen=True)
class PredictTask:
    """A model's labels of images."""

    config: PredictConfig
    classes: ClassList
    zeroshot: ZeroShotRun | None
    loader: Load
    verb: Verb = "predict"

    @property
    def schemas(self) -> dict[Kind, pa.Schema]:
        """Labels only: they say that an image is done."""
        return {"labels": LABELS}

    def load(self, device: str) -> Worker:
        """Load the model."""
        return self.loader(self, device)

    def rows(self, image: Row, result: Labelled) -> dict[Kind, Row]:
        """A row of labels/."""
        labelled_HW = result.label_HW != IGNORE
        composed = Composed(result.label_HW, result.confidence_HW, labelled_HW)
        return {"labels": labels_row(image, composed, len(self.classes), result.source)}

    def mend(self, folder: RunFolder, name: str, meta: Mapping[str, Any]) -> None:
        """Never called: no part follows from another."""
        raise AssertionError(name)


Load = Callable[[PredictTask, str], Worker]
"""What an actor loads: (task, device) -> something that predicts."""


class ModelWorker:
    """A model at work in an actor."""

    images_at_once = 1

    def __init__(self, task: PredictTask, student: Student, device: str) -> None:
        config = task.config
        self.task, self.max_side_px = task, config.max_side_px
        self.weights = {"model": student.sha256}
        self.predictor = Predictor(student, precision=config.precision, device=device)

    def process(
        self, images: Sequence[Row], pixels: Sequence[np.ndarray]
    ) -> list[Labelled | Exception]:
        """The labels of each image, or what went wrong with it."""
        results: list[Labelled | Exception] = []
        for image, image_HWC in zip(images, pixels, strict=True):
            try:
                results.append(self._fitting(image, image_HWC))
            except Exception as e:
                if is_broken_device(e):
                    raise
                results.append(e)
        return results

    def _fitting(self, image: Row, image_HWC: np.ndarray) -> Labelled:
        """The labels of an image, seen as large as memory allows."""
        side = min(self.max_side_px, max(image_HWC.shape[:2]))
        for shrink in SHRINKS:
            self.predictor.max_side_px = max(1, side // shrink)
            try:
                return self.label(image, image_HWC)
            except Exception as e:
                if shrink == SHRINKS[-1] or not is_out_of_memory(e):
                    raise
                log.warning("out of memory at a side of %d px: %s", side // shrink, e)
            free_memory()
        raise AssertionError("unreachable")

    def label(self, image: Row, image_HWC: np.ndarray) -> Labelled:
        """The labels of an image at the predictor's size."""
        config, zeroshot = self.task.config, self.task.zeroshot
        if zeroshot is None:
            label_HW, confidence_HW = self.predictor.predict(image_HWC)
            unsure_HW = confidence_HW < config.conf_thresh
            label_HW[unsure_HW], confidence_HW[unsure_HW] = IGNORE, 0
            return Labelled(label_HW, confidence_HW, "model")
        place = image["zeroshot"]
        if place is None:  # no label anywhere: every rule is then the model alone
            own_HW = np.full(image_HWC.shape[:2], IGNORE, np.uint8)
            score_HW = np.zeros_like(own_HW)
        else:
            own_HW, score_HW = zeroshot.read(place)
        made = self.predictor.enhance(
            image_HWC, own_HW, score_HW, config.fusion, config.conf_thresh
        )
        return Labelled(*made, "model" if place is None else "enhanced")


def load_model(task: PredictTask, device: str) -> ModelWorker:
    """The model that the task's config names."""
    config = task.config
    student = load_student(config.model, classes=task.classes, backbone=config.backbone)
    return ModelWorker(task, student, device)
