"""The settings by which a student is trained on the embedded world, for `jobs/shapes.yaml`, the
demo and the ablation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zsplg_ray.config import TrainConfig
from zsplg_ray.settings import override

BACKBONE = "test_resnet"
"""The student's backbone: a ResNet of four blocks, 0.37 M parameters."""

BACKBONE_WEIGHTS = Path(__file__).parent / "weights" / "backbone_shapes.safetensors"
"""Its weights, pretrained by `train_backbone`: float16 safetensors."""

TRAIN_SETTINGS: dict[str, Any] = {
    "student.backbone": BACKBONE,
    "student.init": "shapes",
    "student.pretrained": False,
    "student.aspp_channels": 32,
    "student.decoder_channels": 48,
    "augment.crop_px": 80,
    "augment.min_scale": 0.75,
    "augment.max_scale": 1.5,
    "optim.lr": 0.02,
    "optim.head_lr": 10.0,
}
"""Dotted settings of `train`."""


def with_weights(config: TrainConfig) -> TrainConfig:
    """The same, with the path of the pretrained backbone where `student.init` is "shapes"."""
    if config.student.init != "shapes":
        return config
    return override(config, {"student.init": str(BACKBONE_WEIGHTS)})
