"""Models that misbehave on purpose."""

import os
import signal

import torch

from zsplg_ray.cluster.predict import ModelWorker, PredictTask, load_model
from zsplg_ray.config import PredictConfig
from zsplg_ray.settings import from_mapping


def config(model, images, out, **changes) -> PredictConfig:
    values = {"model": str(model), "images": str(images), "out": str(out), "quiet": True}
    return from_mapping(PredictConfig, {**values, **changes})


class Rigged(ModelWorker):
    """Kills its own process on images that are one pure red, fails on pure green ones, and is out
    of memory on pure blue ones unless they are seen at half their size."""

    def label(self, image, image_HWC):
        if (image_HWC == (255, 0, 0)).all():
            os.kill(os.getpid(), signal.SIGKILL)
        if (image_HWC == (0, 255, 0)).all():
            raise ArithmeticError("green\nand more")
        if (image_HWC == (0, 0, 255)).all() and self.predictor.max_side_px > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().label(image, image_HWC)


def load_rigged(task: PredictTask, device: str):
    worker = load_model(task, device)
    worker.__class__ = Rigged
    return worker
