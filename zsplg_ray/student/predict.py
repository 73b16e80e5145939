"""A trained model over one image at a time: label map and confidence at the image's own size.

What enters: uint8 RGB images of any size. What leaves: uint8 class indices and float32 confidences,
made by the model alone or together with a zero-shot label; and confusion counts against a truth.
Bulk prediction, evaluation, validation during training and the served model all go through here, so
at one precision they agree to the bit.

The decoder's logits are small. They are brought to full size a strip of rows at a time, and only
the best class is kept of each strip: 20 megapixels in 81 classes would be 6.5 GB otherwise.

Shapes: B batch (1 here), C channels, H W pixels of the image, h w places of the small logits,
K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from zsplg_ray.config import FusionConfig
from zsplg_ray.metrics import confusion
from zsplg_ray.records import IGNORE
from zsplg_ray.settings import WorkError
from zsplg_ray.student.augment import normalise
from zsplg_ray.student.checkpoint import Student
from zsplg_ray.student.fusion import fuse, needs_probability, predict
from zsplg_ray.student.model import DeepLabV3Plus

CPU_STRIP_VALUES = 2**19
GPU_STRIP_VALUES = 2**26
"""Logits of a strip, float32: 2 MiB stay in a CPU's cache, which halves the time; a GPU wants many
at a time."""

OFFLINE_PROGRESS = 0.5
"""Where `mix` stands when there is no training: its two weights' mean."""


class Predictor:
    """A model ready to be used.

    Args:
        student: As loaded; or a bare model, which is used as it is and where it is.
        max_side_px: Longer images are seen smaller; what leaves has their full size all the same.
        precision: float32, or bfloat16 where autocast allows it.
        device: Where the model of a `Student` is put.
    """

    def __init__(
        self,
        student: Student | nn.Module,
        *,
        max_side_px: int = 2048,
        precision: str = "float32",
        device: str | torch.device = "cpu",
    ) -> None:
        if isinstance(student, Student):
            model = student.model.to(device).requires_grad_(False)
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        else:
            model = cast("DeepLabV3Plus", student)
        self.model = model.eval()
        self.max_side_px = max_side_px
        self.bfloat16 = precision == "bfloat16"
        self.device = next(self.model.parameters()).device

    @torch.no_grad()
    def probabilities(self, image_HWC: np.ndarray) -> np.ndarray:
        """Probability of each class, float32 [K, H, W]; all of it in memory at once."""
        strips = self._strips(image_HWC)
        return np.concatenate(
            [logits.softmax(dim=1)[0].cpu().numpy() for _, logits in strips], axis=1
        )

    @torch.no_grad()
    def predict(self, image_HWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The most probable class of each pixel, uint8 [H, W], and its probability, float32.

        Args:
            image_HWC: uint8 RGB.

        Raises:
            WorkError: The model gives no numbers.
        """
        label_HW, confidence_HW = _blank(image_HWC)
        for rows, logits in self._strips(image_HWC):
            best = predict(logits)
            label_HW[rows] = best.class_BHW[0].cpu().numpy()
            confidence_HW[rows] = best.confidence_BHW[0].cpu().numpy()
        return label_HW, confidence_HW

    @torch.no_grad()
    def enhance(
        self,
        image_HWC: np.ndarray,
        zeroshot_HW: np.ndarray,
        score_HW: np.ndarray,
        config: FusionConfig,
        conf_thresh: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The label that `config.rule` makes of the model's prediction and a zero-shot label.

        There is no training here, so there is no warm-up either, and `mix` takes the mean of its
        weights at the start and at the end.

        Args:
            image_HWC: uint8 RGB.
            zeroshot_HW: uint8 [H, W], class indices, 255 where there is no zero-shot label.
            score_HW: uint8 [H, W], their scores * 255.
            config: The rule.
            conf_thresh: Least confidence at which the model is believed, [0, 1].

        Returns:
            Classes uint8 [H, W], 255 where the rule leaves the pixel open; and confidences
            float32 [H, W]: the model's probability or the zero-shot score, whichever speaks for
            the class, the higher if both do; 0 where the pixel is open.

        Raises:
            ValueError: The zero-shot label is not of the image's size.
            WorkError: The model gives no numbers.
        """
        size_hw = image_HWC.shape[:2]
        if zeroshot_HW.shape != size_hw or score_HW.shape != size_hw:
            told = f"zero-shot label of {zeroshot_HW.shape}, image of {size_hw} (height, width)"
            raise ValueError(f"{told}: it is that of another image")
        config = replace(config, warmup=0.0)
        out_HW, confidence_HW = _blank(image_HWC)
        for rows, logits in self._strips(image_HWC):
            label, score = (self._sent(m[rows]) for m in (zeroshot_HW, score_HW))
            best = predict(logits, probability=needs_probability(config))
            nowhere = torch.zeros_like(label, dtype=torch.bool)
            made = fuse(config, best, label, score, nowhere, conf_thresh, OFFLINE_PROGRESS)
            of_model = best.confidence_BHW * (made.class_BHW == best.class_BHW)
            of_label = score / 255 * (made.class_BHW == label)
            confidence = torch.maximum(of_model, of_label) * made.keep_BHW
            out_HW[rows] = made.class_BHW.where(made.keep_BHW, IGNORE)[0].cpu().numpy()
            confidence_HW[rows] = confidence[0].cpu().numpy()
        return out_HW, confidence_HW

    def _strips(self, image_HWC: np.ndarray) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the image, and their logits float32 [1, K, rows, W] at full size."""
        height, width = image_HWC.shape[:2]
        logits = self._logits(image_HWC)
        values = CPU_STRIP_VALUES if self.device.type == "cpu" else GPU_STRIP_VALUES
        step = max(1, values // (logits.shape[1] * width))
        for top in range(0, height, step):
            rows = slice(top, min(top + step, height))
            yield rows, enlarged(logits, rows, (height, width))

    def _logits(self, image_HWC: np.ndarray) -> Tensor:
        """The decoder's logits, float32 [1, K, h, w], of the image as the model sees it."""
        image_BCHW = self._sent(_smaller(image_HWC, self.max_side_px)).permute(0, 3, 1, 2)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            logits = self.model.small_logits(normalise(image_BCHW)).float()
        if not torch.isfinite(logits).all():
            raise WorkError("the model gives no numbers (inf or nan): its weights are broken")
        return logits.contiguous()

    def _sent(self, array: np.ndarray) -> Tensor:
        """An array on the model's device, with a batch dimension."""
        return torch.from_numpy(np.require(array, requirements=["C", "W"]))[None].to(self.device)


def enlarged(logits_BKhw: Tensor, rows: slice, size_hw: tuple[int, int]) -> Tensor:
    """Some rows of the logits at a larger size, as `F.interpolate` would give them.

    Args:
        logits_BKhw: Small logits.
        rows: Which rows of the large ones, with start and stop.
        size_hw: The large size; bilinear, corners aligned.
    """
    height, width = size_hw
    last = logits_BKhw.shape[2] - 1
    at_row = torch.arange(rows.start, rows.stop, dtype=torch.float64)
    at_row *= last / max(height - 1, 1)
    above = at_row.floor().clamp(max=last)
    share = (at_row - above).float().to(logits_BKhw.device)[:, None]
    above = above.long().to(logits_BKhw.device)
    below = (above + 1).clamp(max=last)
    rows_BKsw = torch.lerp(logits_BKhw[:, :, above], logits_BKhw[:, :, below], share)
    size = (len(above), width)
    return F.interpolate(rows_BKsw, size=size, mode="bilinear", align_corners=True)


def evaluate_model(
    predictor: Predictor, examples: Iterable[tuple[np.ndarray, np.ndarray]], n_classes: int
) -> np.ndarray:
    """Confusion counts of a model's predictions, int64 [K, K + 1] (see `metrics.confusion`).

    Args:
        predictor: The model.
        examples: Images uint8 RGB, and their label maps uint8 [H, W] of the same size.
        n_classes: K.

    Raises:
        ValueError: A label map does not fit its image, or holds other numbers.
    """
    counts = np.zeros((n_classes, n_classes + 1), np.int64)
    for image_HWC, truth_HW in examples:
        counts += confusion(truth_HW, predictor.predict(image_HWC)[0], n_classes)
    return counts


def _blank(image_HWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    size_hw = image_HWC.shape[:2]
    return np.empty(size_hw, np.uint8), np.empty(size_hw, np.float32)


def _smaller(image_HWC: np.ndarray, max_side_px: int) -> np.ndarray:
    """The image with its longer side at most `max_side_px`."""
    height, width = image_HWC.shape[:2]
    scale = max_side_px / max(height, width)
    if scale >= 1:
        return image_HWC
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(image_HWC).resize(size, Image.Resampling.BILINEAR))
