"""Models that misbehave on purpose, and a driver to kill:
`python -m tests.cluster.predicting IMAGES OUT NOTES MODEL`."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from zsplg_ray.cluster.predict import ModelWorker, PredictTask, load_model, predict
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


class LoadCounting:
    """Loads a model that notes every image, and its process, in a file."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __call__(self, task: PredictTask, device: str):
        worker, path = load_model(task, device), self.path
        label = worker.label

        def noting(image, image_HWC: np.ndarray):
            with Path(path).open("a") as notes:
                notes.write(json.dumps({"pid": os.getpid(), "image": image["image_id"]}) + "\n")
            return label(image, image_HWC)

        worker.label = noting
        return worker


if __name__ == "__main__":
    images, out, notes, model_file = sys.argv[1:5]
    settings = {"actors.in_flight": 4, "ray.num_cpus": 2}
    predict(config(model_file, images, out, **settings), load=LoadCounting(notes))
