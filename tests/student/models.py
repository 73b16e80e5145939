"""Tiny random students in files, for tests."""

from pathlib import Path

import torch

from zsplg_ray.config import StudentConfig
from zsplg_ray.student.checkpoint import build, pack
from zsplg_ray.vocab import class_list

TINY = StudentConfig(backbone="test_byobnet", decoder_channels=16, low_level_channels=8)


def write_model(path: Path, classes: str = "shapes", seed: int = 0) -> str:
    """A random model whose confidences are all over the place."""
    names = class_list(classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(TINY, len(names))
        torch.nn.init.normal_(model.classifier.weight, 0, 30.0)
    path.write_bytes(pack(model.state_dict(), TINY, names, {"conf_thresh": 0.6}))
    return str(path)
