"""Convolutions that give the same numbers for less work.

What enters: a model of `nn.Conv2d`. What leaves: the same model, parameters and names untouched,
whose convolutions leave out what torch computes in vain:

- Taps that only ever meet padding. On a map of 13 x 13 (crops of 193 pixels) the branch of the
  pyramid with rate 18 sees nothing but its centre: one tap of nine. Its weights for the others have
  gradient 0, as they would have anyhow.
- On one CPU thread torch sends 1 x 1 convolutions of small batches to a general matrix product, at
  half the speed of oneDNN (torch 2.15, AVX-512). A dilation has no meaning for a kernel of one tap,
  but sends them to oneDNN.

Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LeanConv2d(nn.Conv2d):
    """An `nn.Conv2d` with zeros as padding that skips needless work; see the module's text."""

    one_thread = False

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W'], as `nn.Conv2d` gives it, up to rounding."""
        weight, padding = self.weight, []
        for axis in (0, 1):
            first, count, rest = self._reach(axis, input.shape[2 + axis])
            if count < self.kernel_size[axis]:
                weight = weight.narrow(2 + axis, first, count)
            padding.append(rest)
        dilation = self.dilation
        if self.one_thread and weight.shape[2:] == (1, 1) and not input.is_cuda:
            dilation = (2, 2)
        return F.conv2d(input, weight, self.bias, self.stride, padding, dilation, self.groups)

    def _reach(self, axis: int, size_px: int) -> tuple[int, int, int]:
        """First tap along an axis that meets the map, how many do, the padding they need."""
        taps, dilation, padding = (
            int(setting[axis]) for setting in (self.kernel_size, self.dilation, self.padding)
        )
        half = taps // 2
        centred = taps % 2 == 1 and padding == dilation * half
        skipped = max(0, half - (size_px - 1) // dilation) if centred else 0
        return skipped, taps - 2 * skipped, padding - dilation * skipped


def make_lean(model: nn.Module) -> None:
    """Let every plain `nn.Conv2d` of a model be a `LeanConv2d`, in place.

    Parameters, their names and the optimiser's hold on them stay. Convolutions of other classes
    (padding worked out at run time, weights standardised) are left alone.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and module.padding_mode == "zeros":
            if isinstance(module.padding, str):
                continue
            module.__class__ = LeanConv2d  # a module's parameters have no way into another's
            cast("LeanConv2d", module).one_thread = torch.get_num_threads() == 1
