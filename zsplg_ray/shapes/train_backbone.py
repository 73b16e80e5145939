"""Pretrains the student's backbone of the embedded world, as ImageNet does for photographs.

Enters: scenes from `TRAIN_SEED` up. Leaves: float16 safetensors, keys as in the student's state
dict (`backbone.` before those of timm's feature extractor).

Why this way: nobody trains a segmentation model from nothing. What ImageNet gives is a backbone
that tells single, centred things apart, learned from one word an image. So here: windows around
single objects, one of eight words each, never a mask. The class is read off the features at the
window's centre alone, not off their mean, so that the features say what stands where.
Channels are permuted in most windows: colour would be the easy way out.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zsplg_ray.shapes.recipe import BACKBONE, BACKBONE_WEIGHTS
from zsplg_ray.shapes.scenes import CLASSES, TRAIN_SEED, make_scene

log = logging.getLogger(__name__)

FIRST_SEED = TRAIN_SEED + 5_000_000
"""Scenes of this training; those of SAM and CLIP lie elsewhere."""

SCENES = 5_000
WINDOW_PX = 64
BATCH = 64
LEARNING_RATE = 4e-3
MARGIN_PX = 64
"""Scenes are mirrored this far beyond their edges, so that every window fits."""

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class Namer(nn.Module):
    """Windows float32 [B, 3, 64, 64] -> logits [B, 8] of what is at their centre."""

    def __init__(self) -> None:
        super().__init__()
        wanted: dict[str, Any] = {"features_only": True, "output_stride": 16}
        strides = timm.create_model(BACKBONE, **wanted).feature_info.reduction()  # type: ignore[union-attr, operator]
        at = (strides.index(4), len(strides) - 1)  # as the student takes them
        self.backbone: Any = timm.create_model(BACKBONE, out_indices=at, **wanted)
        self.name = nn.Linear(self.backbone.feature_info.channels()[-1], len(CLASSES))

    def forward(self, window_BCHW: Tensor) -> Tensor:
        """Logits of each window."""
        high = self.backbone(window_BCHW)[-1]
        middle = high.shape[-1] // 2
        centre = high[..., middle - 1 : middle + 1, middle - 1 : middle + 1]
        return self.name(centre.mean((2, 3)))


class Objects:
    """Scenes in memory and where their objects are.

    Args:
        scenes: How many.
        first_seed: Of the first; the others follow.
    """

    def __init__(self, scenes: int, first_seed: int) -> None:
        images, rows = [], []
        for i in range(scenes):
            scene = make_scene(first_seed + i)
            images.append(scene.image_HWC)
            for thing in scene.objects:
                y, x = np.nonzero(thing.mask_HW)
                middle = ((y.min() + y.max()) / 2, (x.min() + x.max()) / 2)
                size = max(np.ptp(y), np.ptp(x)) + 1
                rows.append((i, thing.class_index - 1, *middle, size))
        scenes_BCHW = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        self.scenes = F.pad(scenes_BCHW, (MARGIN_PX,) * 4, mode="reflect")
        self.rows = np.array(rows, np.float32)
        self.mean, self.std = (torch.tensor(v)[:, None, None] for v in (_MEAN, _STD))

    def batch(self, rows: np.ndarray, rng: np.random.Generator | None) -> tuple[Tensor, Tensor]:
        """Windows and classes of some rows; with `rng` shaken, turned and recoloured."""
        windows = torch.cat([self._window(row, rng) for row in rows])
        windows = windows.contiguous(memory_format=torch.channels_last)
        return windows, torch.from_numpy(rows[:, 1].astype(np.int64))

    def _window(self, row: np.ndarray, rng: np.random.Generator | None) -> Tensor:
        scene, _, y, x, size = row
        side, shift = WINDOW_PX, np.zeros(2)
        if rng is not None:
            side = int(WINDOW_PX * rng.uniform(0.6, 1.5))
            shift = size * 0.15 * rng.uniform(-1, 1, 2)
        last = self.scenes.shape[-1] - side
        top, left = (
            int(np.clip(round(at + by - side / 2) + MARGIN_PX, 0, last))
            for at, by in zip((y, x), shift, strict=True)
        )
        window = self.scenes[int(scene), :, top : top + side, left : left + side][None] / 255
        if side != WINDOW_PX:
            window = F.interpolate(window, size=(WINDOW_PX, WINDOW_PX), mode="bilinear")
        if rng is not None:
            for flip in (-1, -2):
                window = window.flip(flip) if rng.random() < 0.5 else window
            window = window.mT if rng.random() < 0.5 else window
            window = window[:, rng.permutation(3).copy()] if rng.random() < 0.7 else window
        return (window - self.mean) / self.std


def train(
    minutes: float = 5.0,
    out: Path = BACKBONE_WEIGHTS.parent,
    seed: int = 0,
    start: Path | None = None,
    scenes: int = SCENES,
) -> Path:
    """Train for some CPU minutes (making the scenes comes on top) and write the weights."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net = Namer()
    if start is not None:
        weights = load_file(start).items()
        net.backbone.load_state_dict({k.removeprefix("backbone."): v for k, v in weights})
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    objects = Objects(scenes, FIRST_SEED)
    began, done, step = time.process_time(), 0.0, 0
    while done < 1:
        rate = LEARNING_RATE * min(1, (step + 1) / 50) * 0.5 * (1 + np.cos(np.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = objects.rows[rng.integers(0, len(objects.rows), BATCH)]
        windows, names = objects.batch(chosen, rng)
        loss = F.cross_entropy(net(windows), names)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done = (time.process_time() - began) / (minutes * 60)
        step += 1
        if step % 200 == 0:
            log.info("step %d, %.0f %% of the time, loss %.3f", step, 100 * done, loss.item())
    path = out / BACKBONE_WEIGHTS.name
    out.mkdir(parents=True, exist_ok=True)
    state = {f"backbone.{k}": v for k, v in net.backbone.state_dict().items()}
    halves = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    save_file({k: v.contiguous() for k, v in halves.items()}, path)
    log.info("%s: %.3f of the objects of other scenes named rightly", path, measure(net))
    return path


@torch.no_grad()
def measure(net: Namer, scenes: int = 200) -> float:
    """Share of the objects of held-out scenes that are named rightly, [0, 1]."""
    objects = Objects(scenes, 500_000)
    net.eval()
    windows, names = objects.batch(objects.rows, None)
    return (net(windows).argmax(1) == names).double().mean().item()
