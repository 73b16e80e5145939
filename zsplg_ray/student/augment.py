"""Views of an image: weak (size, crop, flip), strong (colour), and what CutMix pastes.

What enters: images as bytes, maps that belong to them, and a seed for each image. What leaves: the
views, still bytes, and `normalise` for what a model takes. A seed decides everything, on any
device: numbers are drawn from it on the CPU (draws.py), torch's own generators are not touched.

Why this way: the weak view is cut by Pillow, as UniMatch does, but only the part of the resized
image that the crop keeps is ever made. Colours are moved image by image by the functions that
torchvision's v2.ColorJitter, RandomGrayscale and GaussianBlur call; these classes would draw from
torch's global generator.

Shapes: B batch, C channels, H W pixels, N draws an image.
Source: UniMatch (Yang et al., CVPR 2023, arXiv 2208.09910; github.com/LiheYoung/UniMatch,
dataset/transform.py and dataset/semi.py, MIT).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torch import Tensor

from zsplg_ray.config import AugmentConfig
from zsplg_ray.student.draws import derive, uniform

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

BLUR_MIN_SIGMA_PX = 0.1
CUTMIX_AREA = (0.02, 0.4)
CUTMIX_ASPECT = (0.3, 1 / 0.3)
CUTMIX_TRIES = 256
"""At the largest area a try fits in 9 % of the cases: all of them fail once in 10 billion."""


# Weak views ------------------------------------------------------------------------------------


class Window(NamedTuple):
    """Which part of a resized image a view shows, pixels of the resized image."""

    resized_hw: tuple[int, int]
    top: int
    left: int
    size_hw: tuple[int, int]
    """Of the part; smaller than the crop where the resized image is."""
    flip: bool


def weak_view(
    image_HWC: np.ndarray, maps: Sequence[tuple[np.ndarray, int]], config: AugmentConfig, seed: int
) -> tuple[Tensor, list[Tensor], Tensor]:
    """An image at a random size, padded, cropped and flipped, with its maps moved along.

    Args:
        image_HWC: uint8 RGB.
        maps: uint8 maps [H, W] of the image's size, each with the value that padding gets.
        config: Size of the crop, range of scales, probability of the flip.
        seed: Decides the view.

    Returns:
        The image uint8 [3, crop_px, crop_px] (padding, to the right and below, is 0; bilinear, and
        smoothed where it gets smaller, as Pillow does), the maps uint8 [crop_px, crop_px] (nearest
        pixel), and bool [crop_px, crop_px], True on padding.
    """
    size_px = config.crop_px
    size_hw = image_HWC.shape[0], image_HWC.shape[1]
    window = _window(size_hw, config, seed)
    height, width = window.size_hw
    # Padding is to the right and below before the flip.
    columns = slice(size_px - width, None) if window.flip else slice(0, width)
    image_CHW = torch.zeros(3, size_px, size_px, dtype=torch.uint8)
    part_HWC = torch.from_numpy(_resized(image_HWC, window))
    image_CHW[:, :height, columns] = part_HWC.permute(2, 0, 1)
    rows = _nearest(window.top, height, window.resized_hw[0], size_hw[0])
    picked = _nearest(window.left, width, window.resized_hw[1], size_hw[1])
    if window.flip:
        picked = picked[::-1]
    moved = []
    for map_HW, fill in maps:
        out_HW = np.full((size_px, size_px), fill, np.uint8)
        out_HW[:height, columns] = map_HW[rows][:, picked]
        moved.append(torch.from_numpy(out_HW))
    padding_HW = torch.ones(size_px, size_px, dtype=torch.bool)
    padding_HW[:height, columns] = False
    return image_CHW, moved, padding_HW


def _window(size_hw: tuple[int, int], config: AugmentConfig, seed: int) -> Window:
    """What a seed makes of an image of this size."""
    u_long, u_top, u_left, u_flip = uniform(derive(np.array([seed]), "weak"), 4)[0].tolist()
    long = max(size_hw)
    low, high = int(long * config.min_scale), int(long * config.max_scale)
    new_long = max(1, low + int(u_long * (high - low + 1)))
    # The short side may round to 0 in images that are no more than a line.
    resized_hw = tuple(
        new_long if side == long else max(1, int(side * new_long / long + 0.5)) for side in size_hw
    )
    crop = config.crop_px
    top, left = (
        int(u * (max(side, crop) - crop + 1))
        for u, side in zip((u_top, u_left), resized_hw, strict=True)
    )
    kept_hw = min(resized_hw[0], crop), min(resized_hw[1], crop)
    return Window((resized_hw[0], resized_hw[1]), top, left, kept_hw, u_flip < config.flip)


def _resized(image_HWC: np.ndarray, window: Window) -> np.ndarray:
    """The window's part of the resized image, flipped if it says so: uint8 [H, W, 3]."""
    height, width = image_HWC.shape[:2]
    scale_y, scale_x = height / window.resized_hw[0], width / window.resized_hw[1]
    top, bottom = window.top * scale_y, (window.top + window.size_hw[0]) * scale_y
    left, right = window.left * scale_x, (window.left + window.size_hw[1]) * scale_x
    # Pillow copies what it is given: hand it no more than the filter reaches.
    reach_y, reach_x = math.ceil(max(scale_y, 1)) + 1, math.ceil(max(scale_x, 1)) + 1
    y, x = max(0, int(top) - reach_y), max(0, int(left) - reach_x)
    part_HWC = image_HWC[y : math.ceil(bottom) + reach_y, x : math.ceil(right) + reach_x]
    box = (left - x, top - y, min(right - x, part_HWC.shape[1]), min(bottom - y, len(part_HWC)))
    part = Image.fromarray(np.ascontiguousarray(part_HWC))
    size_wh = window.size_hw[1], window.size_hw[0]
    part = part.resize(size_wh, Image.Resampling.BILINEAR, box=box)
    if window.flip:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(part)


def _nearest(start: int, count: int, resized: int, original: int) -> np.ndarray:
    """For pixels start .. start + count of a resized side, which pixel of the original they show.

    The one that the middle of the pixel falls into; in whole numbers, so that ties are no matter
    of rounding.
    """
    return (2 * np.arange(start, start + count) + 1) * original // (2 * resized)


# Strong views ----------------------------------------------------------------------------------


class Colours(NamedTuple):
    """What one strong view of an image does; None for what it leaves out."""

    jitter: tuple[tuple[str, float], ...]
    """(brightness | contrast | saturation | hue, factor), in their order; empty for none."""
    grey: bool
    sigma_px: float | None


def strong_view(image_BCHW: Tensor, seed_B: Tensor, config: AugmentConfig, which: int) -> Tensor:
    """Images with their colours jittered, made grey, blurred, each by its own draw.

    Args:
        image_BCHW: uint8 RGB on any device.
        seed_B: int64, one an image.
        config: Probabilities and strengths.
        which: 0 or 1: two views of the same seeds are independent.

    Returns:
        uint8 [B, 3, H, W], a new tensor on the images' device.
    """
    view_BCHW = image_BCHW.clone()
    for image_CHW, colours in zip(view_BCHW, colour_draws(seed_B, config, which), strict=True):
        changed = recolour(image_CHW, colours)
        if changed is not image_CHW:
            image_CHW.copy_(changed)
    return view_BCHW


def colour_draws(seed_B: Tensor, config: AugmentConfig, which: int) -> list[Colours]:
    """What a strong view does to each image, drawn as v2.ColorJitter and UniMatch draw it."""
    strengths = {
        "brightness": config.brightness,
        "contrast": config.contrast,
        "saturation": config.saturation,
        "hue": config.hue,
    }
    draws_BN = uniform(derive(_seeds(seed_B), "strong", which), 12)
    colours = []
    for jitter, grey, blur, sigma, *rest in draws_BN.tolist():
        factors = []
        for (name, strength), u in zip(strengths.items(), rest[:4], strict=True):
            if strength:
                spread = (2 * u - 1) * strength
                factors.append((name, spread if name == "hue" else 1 + spread))
            else:
                factors.append((name, None))
        # Sorting random numbers gives a random order.
        order = sorted(range(4), key=rest[4:].__getitem__)
        moves = tuple(factors[i] for i in order if factors[i][1] is not None)
        width = BLUR_MIN_SIGMA_PX + sigma * (config.blur_max_sigma - BLUR_MIN_SIGMA_PX)
        colours.append(
            Colours(
                moves if jitter < config.jitter else (),
                grey < config.grayscale,
                width if blur < config.blur else None,
            )
        )
    return colours


def recolour(image_CHW: Tensor, colours: Colours) -> Tensor:
    """One uint8 image with its colours changed; itself if there is nothing to change."""
    for name, factor in colours.jitter:
        image_CHW = _ADJUST[name](image_CHW, factor)
    if colours.grey:
        image_CHW = F.rgb_to_grayscale(image_CHW, num_output_channels=3)
    if colours.sigma_px is not None:
        image_CHW = _blurred(image_CHW, colours.sigma_px)
    return image_CHW


_ADJUST = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
    "hue": F.adjust_hue,
}


def _blurred(image_CHW: Tensor, sigma_px: float) -> Tensor:
    """Gaussian blur out to three sigma, borders reflected.

    Rows, then columns: a Gaussian is separable. With channels innermost that takes a CPU a fifth
    of the time of one pass with a square kernel.
    """
    radius_x, radius_y = (
        min(math.ceil(3 * sigma_px), side - 1) for side in (image_CHW.shape[2], image_CHW.shape[1])
    )
    sigma = [sigma_px, sigma_px]
    x_BCHW = image_CHW[None].to(torch.float32, memory_format=torch.channels_last)
    x_BCHW = F.gaussian_blur(x_BCHW, [2 * radius_x + 1, 1], sigma)
    x_BCHW = F.gaussian_blur(x_BCHW, [1, 2 * radius_y + 1], sigma)
    return x_BCHW[0].round_().to(torch.uint8)


# CutMix and feature dropout --------------------------------------------------------------------


def cutmix_boxes(seed_B: Tensor, size_px: int, config: AugmentConfig, which: int) -> Tensor:
    """Where each view takes its pixels from another image: bool [B, size_px, size_px] on the CPU.

    A view has a box with probability augment.cutmix: uniform area, aspect and corner, drawn again
    (area apart) until it lies inside. No box: all False.
    """
    draws_BN = uniform(derive(_seeds(seed_B), "cutmix", which), 2 + 3 * CUTMIX_TRIES)
    tries_BTN = draws_BN[:, 2:].reshape(-1, CUTMIX_TRIES, 3)
    low, high = CUTMIX_AREA
    area_B1 = (low + draws_BN[:, 1:2] * (high - low)) * size_px**2
    aspect_BT = CUTMIX_ASPECT[0] + tries_BTN[..., 0] * (CUTMIX_ASPECT[1] - CUTMIX_ASPECT[0])
    width_BT = np.sqrt(area_B1 / aspect_BT).astype(np.int64)
    height_BT = np.sqrt(area_B1 * aspect_BT).astype(np.int64)
    left_BT, top_BT = np.moveaxis((tries_BTN[..., 1:] * size_px).astype(np.int64), -1, 0)
    fits_BT = (left_BT + width_BT <= size_px) & (top_BT + height_BT <= size_px)
    boxes = torch.zeros(len(draws_BN), size_px, size_px, dtype=torch.bool)
    for i in np.flatnonzero((draws_BN[:, 0] < config.cutmix) & fits_BT.any(axis=1)):
        t = int(fits_BT[i].argmax())
        top, left = top_BT[i, t], left_BT[i, t]
        boxes[i, top : top + height_BT[i, t], left : left + width_BT[i, t]] = True
    return boxes


def channel_keep(seed_B: Tensor, channels: int, dropout: float, which: int) -> Tensor:
    """Feature dropout of whole channels: float32 [B, channels] on the CPU, 0 or 1 / (1 - dropout).

    Args:
        seed_B: int64, one an image: what falls does not depend on the rest of the batch.
        channels: How many there are.
        dropout: Probability that a channel falls, [0, 1).
        which: Tells layers apart that share the seeds.
    """
    draws_BN = uniform(derive(_seeds(seed_B), "dropout", which), channels)
    return torch.from_numpy(draws_BN >= dropout).to(torch.float32).div_(1 - dropout)


def normalise(image_BCHW: Tensor) -> Tensor:
    """uint8 RGB -> float32 with ImageNet's mean and standard deviation, on the same device."""
    scale_C11, shift_C11 = _normalisation(image_BCHW.device)
    return image_BCHW.to(torch.float32).mul_(scale_C11).add_(shift_C11)


@lru_cache(maxsize=8)
def _normalisation(device: torch.device) -> tuple[Tensor, Tensor]:
    """What a byte is multiplied with, and what is added then, by channel."""
    mean = torch.tensor(IMAGENET_MEAN, dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, dtype=torch.float64).view(3, 1, 1)
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


def _seeds(seed_B: Tensor) -> np.ndarray:
    return seed_B.cpu().numpy()
