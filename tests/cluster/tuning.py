"""Small studies of training settings, and a driver to kill: `python -m tests.cluster.tuning`."""

import json
import sys
from pathlib import Path

import yaml

from tests.cluster.training import SMALL
from zsplg_ray import cli
from zsplg_ray.config import TuneTrainConfig
from zsplg_ray.settings import flatten, from_mapping

STUDY = {
    **SMALL,
    "student.backbone": "test_resnet",
    "student.init": "shapes",
    "optim.lr": 0.02,
    "search.over": ["optim.lr"],
    "search.concurrent": 1,
}


def config(world, out, **changes) -> TuneTrainConfig:
    """A study whose trials are told apart by their learning rate; for `world` see training.py."""
    given = {"labeled": f"{world}/labelled", "unlabeled": f"{world}/pool", "out": str(out)}
    return from_mapping(TuneTrainConfig, {**STUDY, **given, **changes})


if __name__ == "__main__":
    world, out, changes = sys.argv[1:]
    flat = flatten(config(world, out, **json.loads(changes)))
    recipe = Path(f"{out}.yaml")
    recipe.write_text(yaml.safe_dump({k: v for k, v in flat.items() if v is not None}))
    sys.exit(cli.main(["tune", "train", "--config", str(recipe)]))
