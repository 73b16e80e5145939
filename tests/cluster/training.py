"""Small training runs, data that misbehaves on purpose, and a driver to kill:
`python -m tests.cluster.training`."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import yaml

from zsplg_ray import cli
from zsplg_ray.cluster import train as train_module
from zsplg_ray.config import TrainConfig
from zsplg_ray.masks import Truth
from zsplg_ray.settings import flatten, from_mapping
from zsplg_ray.student.data import TrainingData, WrongClass

SMALL = {
    "student.backbone": "test_byobnet",
    "student.pretrained": False,
    "student.decoder_channels": 16,
    "student.low_level_channels": 8,
    "student.frozen_bn": True,
    "augment.crop_px": 64,
    "train.batch_labeled": 2,
    "train.batch_unlabeled": 2,
    "workers.num": 1,
    "workers.cpus": 1.0,
    "classes": "shapes",
    "mlflow.uri": "off",
    "quiet": True,
}


def config(world, out, **changes) -> TrainConfig:
    """The smallest student; `world` is a folder with labelled/ and pool/."""
    given = {"labeled": f"{world}/labelled", "unlabeled": f"{world}/pool", "out": str(out)}
    return from_mapping(TrainConfig, {**SMALL, **given, **changes})


class Once:
    """Reads masks, and at the n-th one of all processes does something, once.

    Args:
        truth: What is read.
        notes: A file that counts.
        n: When.
        what: "kill" this process, or "fail".
    """

    def __init__(self, truth: Truth, notes: str, n: int, what: str) -> None:
        self.truth, self.notes, self.n, self.what = truth, Path(notes), n, what

    def __call__(self, key: str):
        with self.notes.open("a") as notes:
            notes.write(f"{os.getpid()}\n")
        if len(self.notes.read_text().splitlines()) == self.n:
            if self.what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise WrongClass("masks must be of class indices 0 to 8, got 77; check --classes")
        return self.truth.read(key)


def rig(monkeypatch, notes, n: int, what: str) -> None:
    """Let the labelled masks of the next run be read through `Once`."""
    honest = TrainingData.open

    def rigged(config: TrainConfig) -> TrainingData:
        data = honest(config)
        once = Once(data.truth, str(notes), n, what)
        return replace(data, truth=Truth(data.truth.ids, once, data.truth.classes))

    monkeypatch.setattr(train_module.TrainingData, "open", rigged)


if __name__ == "__main__":
    world, out, changes = sys.argv[1:]
    flat = flatten(config(world, out, **json.loads(changes)))
    recipe = Path(f"{out}.yaml")
    recipe.write_text(yaml.safe_dump({k: v for k, v in flat.items() if v is not None}))
    sys.exit(cli.main(["train", "--config", str(recipe)]))
