"""One micro batch of training: what a loader gives and a training step takes.

What enters: weak views, put together by data.py. What leaves: the same tensors on another device.
All is kept as bytes (images are 8-bit) until the device has it, where strong views are made and
colours normalised: a quarter of the traffic of floats, and no second copy of an image for each of
its views.

Shapes: B images (Bx labelled, Bu unlabelled), C = 3 channels (RGB), H W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Labelled and unlabelled weak views, H = W = augment.crop_px. 255 in a label is "none"."""

    x_image_BCHW: Tensor
    """uint8, labelled images; padding is 0."""
    x_label_BHW: Tensor
    """uint8 class indices, 255 where there is no truth and on padding."""
    u_image_BCHW: Tensor
    """uint8, unlabelled images; Bu is 0 where training is on labelled ones only."""
    u_padding_BHW: Tensor
    """bool, True where the view is padding."""
    u_label_BHW: Tensor
    """uint8, the zero-shot label, moved along with the view; 255 also on padding."""
    u_score_BHW: Tensor
    """uint8, 255 * the score of the zero-shot label; 0 where there is none."""
    u_seed_B: Tensor
    """int64, a seed an image: its strong views, CutMix boxes and feature dropout follow from it."""
    mix_image_BCHW: Tensor | None = None
    """With unimatch.same_image: another weak view of each unlabelled image, what CutMix pastes.
    The other `mix_` fields are of that view, as the `u_` fields of the first; else all None."""
    mix_padding_BHW: Tensor | None = None
    mix_label_BHW: Tensor | None = None
    mix_score_BHW: Tensor | None = None
    mix_seed_B: Tensor | None = None
    x_seed_B: Tensor | None = None
    """int64, with unimatch.same_image: seeds of the labelled images' feature dropout."""
    bad: int = 0
    """How many images could not be read and were replaced by others."""

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device; from pinned memory without waiting for the copy.

        Seeds stay on the CPU, where everything is drawn: asking a GPU for
        them would make the CPU wait for it.
        """
        return self._each(
            lambda name, tensor: (
                tensor if name.endswith("seed_B") else tensor.to(device, non_blocking=True)
            )
        )

    def pin_memory(self) -> Batch:
        """The same in page-locked memory; torch's DataLoader calls it by this name."""
        return self._each(lambda _, tensor: tensor.pin_memory())

    def _each(self, change: Callable[[str, Tensor], Tensor]) -> Batch:
        values = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        changed = {n: change(n, v) for n, v in values if isinstance(v, Tensor)}
        return dataclasses.replace(self, **changed)
