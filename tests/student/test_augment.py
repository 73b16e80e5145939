"""Views of images: exact against Pillow and torchvision, seeded, as likely as they should be."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image

from zsplg_ray.config import AugmentConfig
from zsplg_ray.student import augment
from zsplg_ray.student.augment import (
    Colours,
    channel_keep,
    colour_draws,
    cutmix_boxes,
    normalise,
    recolour,
    strong_view,
    weak_view,
)
from zsplg_ray.student.draws import derive

SIZES_HW = [(1, 1), (1, 300), (300, 1), (7, 5), (64, 64), (90, 200), (331, 200), (400, 401)]


def seeds(n: int, start: int = 0) -> torch.Tensor:
    return torch.from_numpy(derive(0, np.arange(start, start + n)))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def resized(array: np.ndarray, size_hw: tuple[int, int], how: Image.Resampling) -> np.ndarray:
    return np.array(Image.fromarray(array).resize((size_hw[1], size_hw[0]), how))


# Weak views ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size_hw", SIZES_HW)
@pytest.mark.parametrize("seed", range(6))
def test_a_weak_view_is_the_crop_of_pillows_resized_image(size_hw, seed):
    config = AugmentConfig(crop_px=96)
    image_HWC = noise(*size_hw)
    window = augment._window(size_hw, config, seed)
    full = resized(image_HWC, window.resized_hw, Image.Resampling.BILINEAR)
    rows = slice(window.top, window.top + window.size_hw[0])
    expected = full[rows, window.left : window.left + window.size_hw[1]]
    expected = expected[:, ::-1] if window.flip else expected

    image_CHW, _, padding_HW = weak_view(image_HWC, [], config, seed)
    got = image_CHW.permute(1, 2, 0)[~padding_HW].numpy().reshape(expected.shape)
    difference = np.abs(got.astype(int) - expected)
    # Pillow keeps the corners of a part as float32, so a value may be rounded the other way.
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.1
    assert image_CHW.dtype == torch.uint8 and image_CHW.shape == (3, 96, 96)
    assert not image_CHW[:, padding_HW].any()


@pytest.mark.parametrize("seed", range(20))
def test_maps_move_with_the_image(seed):
    """A picture of its own coordinates: the maps must hold what the picture shows."""
    config = AugmentConfig(crop_px=128)
    height, width = 150, 200
    y_HW, x_HW = np.mgrid[:height, :width].astype(np.uint8)
    image_HWC = np.stack([y_HW, x_HW, np.zeros_like(y_HW)], axis=2)
    image_CHW, (y, x), padding_HW = weak_view(image_HWC, [(y_HW, 255), (x_HW, 7)], config, seed)
    inside = ~padding_HW
    for moved, channel in ((y, image_CHW[0]), (x, image_CHW[1])):
        assert (moved.int() - channel.int())[inside].abs().max() <= 1
    assert (y[padding_HW] == 255).all() and (x[padding_HW] == 7).all()
    assert (y.dtype, x.dtype, padding_HW.dtype) == (torch.uint8, torch.uint8, torch.bool)


def test_nearest_is_pillows_where_no_middle_lies_on_an_edge():
    config = AugmentConfig(crop_px=64, min_scale=1.7, max_scale=1.7, flip=0)
    map_HW = noise(31, 37)[:, :, 0]
    _, (moved,), padding_HW = weak_view(np.zeros((31, 37, 3), np.uint8), [(map_HW, 0)], config, 1)
    window = augment._window((31, 37), config, 1)
    full = resized(map_HW, window.resized_hw, Image.Resampling.NEAREST)
    rows = slice(window.top, window.top + window.size_hw[0])
    assert (moved[~padding_HW].numpy() == full[rows, :].ravel()).all()


def test_padding_is_marked_and_flipped_along():
    config = AugmentConfig(crop_px=100, min_scale=0.5, max_scale=0.5)
    image_HWC = np.full((60, 120, 3), 200, np.uint8)
    sides = set()
    for seed in range(10):
        image_CHW, _, padding_HW = weak_view(image_HWC, [], config, seed)
        assert ((image_CHW == 200).all(0) == ~padding_HW).all()
        assert padding_HW[30:].all() and (~padding_HW[:30]).sum() == 30 * 60
        sides.add("left" if padding_HW[0, 0] else "right")
    assert sides == {"left", "right"}


def test_flips_sizes_and_places_are_as_likely_as_they_should_be():
    config = AugmentConfig(crop_px=100)
    windows = [augment._window((300, 200), config, seed) for seed in range(4000)]
    assert abs(np.mean([w.flip for w in windows]) - 0.5) < 0.03
    longs = np.array([w.resized_hw[0] for w in windows])
    assert longs.min() <= 151 and longs.max() >= 599 and abs(longs.mean() - 375) < 8
    assert all(w.resized_hw[1] == int(200 * w.resized_hw[0] / 300 + 0.5) for w in windows)
    places = np.array([w.top / (w.resized_hw[0] - 100) for w in windows])
    assert places.min() < 0.01 and places.max() == 1 and abs(places.mean() - 0.5) < 0.02
    ends = [w.left + 100 <= max(100, w.resized_hw[1]) for w in windows]
    assert all(ends)


def test_the_last_size_and_place_of_a_range_are_drawn_too():
    config = AugmentConfig(crop_px=32, min_scale=1, max_scale=1.1)
    windows = [augment._window((33, 33), config, seed) for seed in range(300)]
    assert {w.resized_hw[0] for w in windows} == {33, 34, 35, 36}
    assert {w.top for w in windows if w.resized_hw[0] == 36} == {0, 1, 2, 3, 4}


def test_a_seed_decides_a_weak_view():
    config = AugmentConfig(crop_px=64)
    image_HWC = noise(100, 120)
    first, again, other = (weak_view(image_HWC, [], config, seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_image_given_is_left_as_it_is():
    image_HWC = noise(50, 60)
    image_HWC.flags.writeable = False
    for seed in range(4):
        weak_view(image_HWC, [], AugmentConfig(crop_px=40, min_scale=1, max_scale=1), seed)


# Strong views ----------------------------------------------------------------------------------


def batch(n: int = 4, px: int = 48) -> torch.Tensor:
    """Pictures with large areas and edges, as photographs have, and a little noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (n, 3, 6, 6), dtype=torch.uint8, generator=generator)
    image = F.resize(coarse, [px, px], interpolation=F.InterpolationMode.NEAREST).int()
    grain = torch.randint(-9, 10, image.shape, generator=generator)
    return (image + grain).clamp(0, 255).to(torch.uint8)


def test_a_strong_view_is_what_torchvision_makes_of_the_same_draws():
    config, image_BCHW, seed_B = AugmentConfig(), batch(40), seeds(40)
    view_BCHW = strong_view(image_BCHW, seed_B, config, 0)
    names = {
        "brightness": F.adjust_brightness,
        "contrast": F.adjust_contrast,
        "saturation": F.adjust_saturation,
        "hue": F.adjust_hue,
    }
    for image, colours, view in zip(
        image_BCHW, colour_draws(seed_B, config, 0), view_BCHW, strict=True
    ):
        for name, factor in colours.jitter:
            image = names[name](image, factor)
        if colours.grey:
            image = F.rgb_to_grayscale(image, 3)
        if colours.sigma_px is None:
            assert torch.equal(view, image)
            continue
        side = 2 * math.ceil(3 * colours.sigma_px) + 1
        image = F.gaussian_blur(image, [side, side], [colours.sigma_px] * 2)
        # In two passes rather than one, so a value may be rounded the other way.
        assert (view.int() - image.int()).abs().max() <= 1


def test_blur_is_the_wide_one_and_keeps_means():
    image = torch.zeros(3, 33, 33, dtype=torch.uint8)
    image[:, 16, 16] = 255
    blurred = recolour(image, Colours((), False, 2.0)).float()[0]
    assert blurred[16, 16] == round(255 / (2 * math.pi * 4))
    assert blurred[16, 18] / blurred[16, 16] == pytest.approx(math.exp(-0.5), abs=0.05)
    flat = torch.full((3, 33, 33), 77, dtype=torch.uint8)
    assert torch.equal(recolour(flat, Colours((), False, 20.0)), flat)


def test_draws_are_as_likely_as_they_should_be():
    draws = colour_draws(seeds(4000), AugmentConfig(), 1)
    share = [
        np.mean(hits)
        for hits in zip(
            *((bool(d.jitter), d.grey, d.sigma_px is not None) for d in draws), strict=True
        )
    ]
    assert share == pytest.approx([0.8, 0.2, 0.5], abs=0.03)
    sigmas = np.array([d.sigma_px for d in draws if d.sigma_px is not None])
    assert sigmas.min() >= 0.1 and sigmas.max() <= 2 and abs(sigmas.mean() - 1.05) < 0.05
    jitters = [d.jitter for d in draws if d.jitter]
    for name, low, high in (
        ("brightness", 0.5, 1.5),
        ("contrast", 0.5, 1.5),
        ("saturation", 0.5, 1.5),
        ("hue", -0.25, 0.25),
    ):
        factors = np.array([dict(j)[name] for j in jitters])
        assert low <= factors.min() < low + 0.02 and high - 0.02 < factors.max() <= high
        assert abs(factors.mean() - (low + high) / 2) < 0.02
    orders = {tuple(name for name, _ in j) for j in jitters}
    assert len(orders) == 24
    firsts = [j[0][0] for j in jitters]
    assert all(abs(firsts.count(n) / len(firsts) - 0.25) < 0.04 for n in set(firsts))


def test_what_is_turned_off_does_not_happen():
    off = AugmentConfig(jitter=0, grayscale=0, blur=0)
    image_BCHW = batch()
    view_BCHW = strong_view(image_BCHW, seeds(4), off, 0)
    assert torch.equal(view_BCHW, image_BCHW)
    assert view_BCHW.data_ptr() != image_BCHW.data_ptr(), "a copy: CutMix pastes into it"
    no_hue = AugmentConfig(jitter=1, hue=0, brightness=0)
    assert {n for d in colour_draws(seeds(50), no_hue, 0) for n, _ in d.jitter} == {
        "contrast",
        "saturation",
    }


def test_two_views_of_a_seed_are_independent():
    one, two = (colour_draws(seeds(2000), AugmentConfig(), which) for which in (0, 1))
    for get in (lambda d: bool(d.jitter), lambda d: d.grey, lambda d: d.sigma_px is not None):
        pair = np.corrcoef([get(d) for d in one], [get(d) for d in two])
        assert abs(pair[0, 1]) < 0.08
    image_BCHW = batch()
    views = [strong_view(image_BCHW, seeds(4), AugmentConfig(jitter=1), which) for which in (0, 1)]
    assert not torch.equal(*views)


def test_an_images_view_does_not_depend_on_the_rest_of_the_batch():
    config, image_BCHW, seed_B = AugmentConfig(), batch(8), seeds(8)
    whole = strong_view(image_BCHW, seed_B, config, 0)
    parts = [strong_view(image_BCHW[i : i + 1], seed_B[i : i + 1], config, 0) for i in range(8)]
    assert torch.equal(whole, torch.cat(parts))
    boxes = cutmix_boxes(seed_B, 48, config, 0)
    assert torch.equal(boxes[5:], cutmix_boxes(seed_B[5:], 48, config, 0))
    keep = channel_keep(seed_B, 100, 0.5, 0)
    assert torch.equal(keep[5:], channel_keep(seed_B[5:], 100, 0.5, 0))


def test_torchs_own_generator_is_not_touched():
    before = torch.get_rng_state()
    config, image_BCHW = AugmentConfig(), batch()
    strong_view(image_BCHW, seeds(4), config, 0)
    cutmix_boxes(seeds(4), 48, config, 0)
    channel_keep(seeds(4), 64, 0.5, 0)
    weak_view(noise(50, 50), [], config, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_no_images_are_no_trouble():
    config, none = AugmentConfig(crop_px=48), torch.empty(0, dtype=torch.int64)
    image_BCHW = torch.empty(0, 3, 48, 48, dtype=torch.uint8)
    assert strong_view(image_BCHW, none, config, 0).shape == (0, 3, 48, 48)
    assert cutmix_boxes(none, 48, config, 0).shape == (0, 48, 48)
    assert channel_keep(none, 5, 0.5, 0).shape == (0, 5)
    assert normalise(image_BCHW).shape == (0, 3, 48, 48)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_makes_the_same_views():
    config, image_BCHW, seed_B = AugmentConfig(), batch(16), seeds(16)
    here = strong_view(image_BCHW, seed_B, config, 0)
    there = strong_view(image_BCHW.cuda(), seed_B, config, 0)
    assert there.is_cuda
    assert ((here.int() - there.cpu().int()).abs() > 1).float().mean() < 0.001
    assert torch.allclose(normalise(image_BCHW), normalise(image_BCHW.cuda()).cpu(), atol=1e-6)


# CutMix, feature dropout, normalisation --------------------------------------------------------


def published_box(rng: np.random.Generator, size: int) -> tuple[int, int, int, int] | None:
    """The rule of UniMatch's boxes, with a plain loop: (top, left, height, width)."""
    if rng.random() > 0.5:
        return None
    area = rng.uniform(0.02, 0.4) * size * size
    while True:
        aspect = rng.uniform(0.3, 1 / 0.3)
        width, height = int((area / aspect) ** 0.5), int((area * aspect) ** 0.5)
        left, top = rng.integers(0, size, 2)
        if left + width <= size and top + height <= size:
            return int(top), int(left), height, width


def test_boxes_are_spread_as_unimatchs_are():
    n, size = 3000, 64
    boxes_BHW = cutmix_boxes(seeds(n), size, AugmentConfig(), 0)
    ours = []
    for box_HW in boxes_BHW[boxes_BHW.flatten(1).any(1)]:
        rows, columns = box_HW.any(1).nonzero(), box_HW.any(0).nonzero()
        top, left = int(rows[0]), int(columns[0])
        height, width = len(rows), len(columns)
        assert box_HW[top : top + height, left : left + width].all()
        assert int(box_HW.sum()) == height * width, "one rectangle"
        ours.append((top, left, height, width))
    rng = np.random.default_rng(0)
    theirs = [box for box in (published_box(rng, size) for _ in range(n)) if box]
    assert len(ours) / n == pytest.approx(0.5, abs=0.03)
    ours, theirs = np.array(ours, float), np.array(theirs, float)
    areas = [b[:, 2] * b[:, 3] / size**2 for b in (ours, theirs)]
    assert areas[0].max() <= 0.4 and areas[0].min() > 0.015
    error = 4 * (ours.std(0) ** 2 / len(ours) + theirs.std(0) ** 2 / len(theirs)) ** 0.5
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < error).all()
    for quantile in (0.1, 0.5, 0.9):
        a, b = (np.quantile(area, quantile) for area in areas)
        assert a == pytest.approx(b, abs=0.025)


def test_boxes_always_and_never():
    always = cutmix_boxes(seeds(500), 321, AugmentConfig(cutmix=1), 1)
    assert always.flatten(1).any(1).all() and always.device.type == "cpu"
    assert not cutmix_boxes(seeds(50), 321, AugmentConfig(cutmix=0), 1).any()
    assert not torch.equal(always[:50], cutmix_boxes(seeds(50), 321, AugmentConfig(cutmix=1), 0))


def test_channels_fall_as_often_as_told_and_means_stay():
    keep_BC = channel_keep(seeds(50), 1000, 0.3, 0)
    assert keep_BC.dtype == torch.float32
    assert set(keep_BC.unique().tolist()) == {0.0, float(np.float32(1 / 0.7))}
    assert (keep_BC == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert keep_BC.mean().item() == pytest.approx(1, abs=0.02)
    assert (channel_keep(seeds(2), 100, 0.0, 0) == 1).all()
    assert not torch.equal(keep_BC, channel_keep(seeds(50), 1000, 0.3, 1))


def test_normalise_is_torchvisions():
    image_BCHW = batch()
    expected = F.normalize(
        F.to_dtype(image_BCHW, torch.float32, scale=True),
        list(augment.IMAGENET_MEAN),
        list(augment.IMAGENET_STD),
    )
    got = normalise(image_BCHW)
    assert got.dtype == torch.float32
    assert torch.allclose(got, expected, atol=1e-6)
