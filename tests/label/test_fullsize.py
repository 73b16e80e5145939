"""Full-size answers from low-resolution logits, against segment_anything's own functions."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_anything.modeling import Sam
from segment_anything.utils import amg
from torch import Tensor

from zsplg_ray.label import bilinear, fullsize, kernels
from zsplg_ray.label.fullsize import FullSize, Measured
from zsplg_ray.label.synthetic import VoronoiLogits


class Geometry(NamedTuple):
    low_px: int
    model_px: int
    input_hw: tuple[int, int]
    size_hw: tuple[int, int]

    def full_size(self, **options: Any) -> FullSize:
        low_hw = (self.low_px, self.low_px)
        return FullSize(low_hw, self.model_px, self.input_hw, self.size_hw, **options)


GEOMETRIES = {
    "landscape": Geometry(256, 1024, (768, 1024), (480, 640)),
    "portrait": Geometry(256, 1024, (1024, 683), (640, 427)),
    "square": Geometry(256, 1024, (1024, 1024), (333, 333)),
    "same size": Geometry(256, 1024, (576, 1024), (576, 1024)),
    "larger": Geometry(256, 1024, (700, 1024), (1025, 1500)),
    "much smaller": Geometry(256, 1024, (1024, 800), (64, 50)),
    "one row": Geometry(256, 1024, (2, 1024), (1, 600)),
    "one column": Geometry(256, 1024, (1024, 1), (700, 1)),
    "one pixel": Geometry(256, 1024, (1024, 1024), (1, 1)),
    "tiny": Geometry(64, 128, (96, 128), (96, 128)),
    "tiny, larger": Geometry(64, 128, (128, 77), (200, 120)),
    "tiny, small output": Geometry(64, 128, (128, 110), (64, 55)),
}

FIELDS = ("smooth", "noise", "steps", "constant", "empty", "full", "spot")


def field(kind: str, low_px: int, seed: int = 0, scale: float = 4.0) -> Tensor:
    """Logits of three masks of one kind, float32 [3, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    noise_MHW = torch.randn(3, low_px, low_px, generator=generator) * scale
    if kind == "smooth":
        knots = torch.randn(1, 3, 9, 9, generator=generator) * scale
        size = (low_px, low_px)
        return F.interpolate(knots, size, mode="bicubic", align_corners=False)[0]
    if kind == "steps":  # few values, so many pixels lie at a cut-off
        return (noise_MHW / scale).round()
    if kind == "constant":
        value_3 = torch.tensor([0.0, 1.0, -0.7]) * scale
        return value_3[:, None, None].expand(3, low_px, low_px).clone()
    if kind == "spot":
        spot_MHW = torch.full((3, low_px, low_px), -scale)
        for m, (y, x) in enumerate(((0, 0), (low_px // 3, low_px // 2), (1, low_px - 1))):
            spot_MHW[m, y, x] = 9 * scale
        return spot_MHW
    level = {"noise": 0, "empty": -20 * scale, "full": 20 * scale}[kind]
    return noise_MHW + level


class Official(NamedTuple):
    stability_M: np.ndarray
    box_M4: np.ndarray
    rle: list[bytes]


def official(
    logit_MHW: Tensor,
    geometry: Geometry,
    threshold: float,
    offset: float,
    image_hw: tuple[int, int] | None = None,
    origin_xy: tuple[int, int] = (0, 0),
) -> Official:
    """The same by segment_anything."""
    low_px = geometry.low_px
    stub: Any = SimpleNamespace(image_encoder=SimpleNamespace(img_size=geometry.model_px))
    batch = logit_MHW.reshape(-1, 3, low_px, low_px)
    full = Sam.postprocess_masks(stub, batch, geometry.input_hw, geometry.size_hw).flatten(0, 1)
    stability_M = amg.calculate_stability_score(full, threshold, offset)
    mask_MHW = full > threshold
    box_M4 = amg.batched_mask_to_box(mask_MHW)
    (height, width), (x, y) = geometry.size_hw, origin_xy
    image_h, image_w = image_hw or geometry.size_hw
    crop_xyxy = [x, y, x + width, y + height]
    masks = amg.uncrop_masks(mask_MHW, crop_xyxy, image_h, image_w)
    rle = [amg.coco_encode_rle(counts) for counts in amg.mask_to_rle_pytorch(masks)]
    rle = [counts["counts"].encode() for counts in rle]
    return Official(stability_M.numpy(), box_M4.numpy(), rle)


def windows(logit_MHW: Tensor, measured: Measured) -> list[Tensor]:
    cuts = zip(logit_MHW, measured.window_M4.tolist(), strict=True)
    return [logit_HW[y0:y1, x0:x1].clone() for logit_HW, (y0, x0, y1, x1) in cuts]


def check(
    logit_MHW: Tensor,
    geometry: Geometry,
    threshold: float = 0.0,
    offset: float = 1.0,
    image_hw: tuple[int, int] | None = None,
    origin_xy: tuple[int, int] = (0, 0),
    **options: Any,
) -> Measured:
    """Asserts that everything equals the official answer, bit by bit."""
    wanted = official(logit_MHW, geometry, threshold, offset, image_hw, origin_xy)
    full_size = geometry.full_size(**options)
    measured = full_size.measure(logit_MHW, threshold, offset)
    assert measured.stability_M.dtype == np.float32
    assert np.array_equal(measured.stability_M, wanted.stability_M, equal_nan=True)
    assert np.array_equal(measured.box_M4, wanted.box_M4)
    rle = full_size.encode(
        windows(logit_MHW, measured),
        measured.window_M4,
        threshold,
        image_hw or geometry.size_hw,
        origin_xy,
    )
    assert rle == wanted.rle
    return measured


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Torch rounds differently with one thread and with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", [(90, 75), (64, 65), (64, 64), (20, 37), (1, 300), (300, 1)])
@pytest.mark.parametrize("field_hw", [(256, 256), (61, 83), (1, 40), (40, 1)])
def test_a_step_is_torch_bit_by_bit(
    size: tuple[int, int], field_hw: tuple[int, int], threads: int
) -> None:
    field_HW = torch.randn(field_hw, generator=torch.Generator().manual_seed(0))
    asked = field_HW.expand(2, 3, *field_hw)
    wanted = F.interpolate(asked, size, mode="bilinear", align_corners=False)[0, 0]
    step = bilinear.torch_step(size)
    assert step is not None
    assert np.array_equal(bilinear.apply_step(field_HW.numpy(), size, step), wanted.numpy())


@pytest.mark.parametrize(("lines_in", "lines_out"), [(256, 1024), (768, 480), (13, 90), (5, 5)])
def test_taps_are_the_rows_of_torchs_matrix(lines_in: int, lines_out: int) -> None:
    step = bilinear.torch_step((3, lines_out))
    assert step is not None
    eye = torch.eye(lines_in)[None, :, None].repeat(1, 1, 3, 1)
    matrix = F.interpolate(eye, (3, lines_out), mode="bilinear", align_corners=False)[0, :, 0]
    tap_2P, weight_2P = bilinear.taps(lines_in, lines_out, step.fused_index)
    mine = np.zeros((lines_in, lines_out), np.float32)
    np.add.at(mine, (tap_2P, np.arange(lines_out)), weight_2P)
    assert np.array_equal(mine, matrix.numpy())


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_equals_official(name: str, kind: str, threads: int) -> None:
    geometry = GEOMETRIES[name]
    check(field(kind, geometry.low_px), geometry)


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("name", ["landscape", "one row", "tiny", "tiny, small output"])
def test_torch_route_equals_official(name: str, kind: str) -> None:
    geometry = GEOMETRIES[name]
    check(field(kind, geometry.low_px), geometry, by_torch=True, chunk_bytes=1)


def test_many_masks_are_shared_between_threads(threads: int) -> None:
    logit_MHW = torch.cat([field(kind, 64, seed) for kind in FIELDS for seed in range(2)])
    check(logit_MHW, GEOMETRIES["tiny, larger"])


@pytest.mark.parametrize("threshold", [0.0, 0.3, -2.5, 1.0])
@pytest.mark.parametrize("offset", [0.0, 0.1, 1.0, 1e6])
def test_thresholds(threshold: float, offset: float) -> None:
    geometry = GEOMETRIES["tiny, larger"]
    logit_MHW = torch.cat([field(kind, 64) for kind in ("smooth", "steps", "empty", "full")])
    measured = check(logit_MHW, geometry, threshold, offset)
    if offset == 0:
        assert np.isnan(measured.stability_M[6:9]).all() and (measured.stability_M[9:] == 1).all()


def test_offset_of_zero_counts_ties_once() -> None:
    geometry = GEOMETRIES["tiny"]
    measured = check(field("steps", 64), geometry, threshold=1.0, offset=0.0)
    assert (measured.stability_M == 1).all()


@pytest.mark.parametrize("origin_xy", [(0, 0), (7, 0), (0, 11), (30, 19), (80, 40)])
@pytest.mark.parametrize("by_torch", [False, True])
def test_crop_in_a_larger_image(origin_xy: tuple[int, int], by_torch: bool) -> None:
    geometry = GEOMETRIES["tiny, larger"]
    logit_MHW = torch.cat([field(kind, 64) for kind in ("smooth", "full", "empty", "spot")])
    image_hw = (240, 200)
    check(logit_MHW, geometry, image_hw=image_hw, origin_xy=origin_xy, by_torch=by_torch)


def test_full_columns_join_into_one_run() -> None:
    geometry = GEOMETRIES["tiny"]
    full_size = geometry.full_size()
    logit_MHW = field("full", 64)[:1]
    measured = full_size.measure(logit_MHW, 0.0, 1.0)
    image_hw = (geometry.size_hw[0], 500)  # as high as the crop
    rle = full_size.encode(windows(logit_MHW, measured), measured.window_M4, 0.0, image_hw, (9, 0))
    height, width = geometry.size_hw
    counts = [9 * height, width * height, (500 - 9 - width) * height]
    assert (
        rle[0].decode() == amg.coco_encode_rle({"size": list(image_hw), "counts": counts})["counts"]
    )


@pytest.mark.parametrize("name", ["landscape", "larger", "tiny", "one row"])
def test_nothing_beyond_the_extent_matters(name: str) -> None:
    geometry = GEOMETRIES[name]
    full_size = geometry.full_size()
    height, width = full_size.extent_hw
    logit_MHW = field("smooth", geometry.low_px)
    cut_MHW = logit_MHW[:, :height, :width]
    spoilt_MHW = torch.full_like(logit_MHW, torch.nan)
    spoilt_MHW[:, :height, :width] = cut_MHW
    for same in (cut_MHW, spoilt_MHW):
        pairs = zip(full_size.measure(logit_MHW, 0, 1), full_size.measure(same, 0, 1), strict=True)
        for one, other in pairs:
            assert np.array_equal(one, other)
    by_torch = geometry.full_size(by_torch=True).measure(cut_MHW, 0.0, 1.0)
    for one, other in zip(by_torch, full_size.measure(logit_MHW, 0.0, 1.0), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("by_torch", [False, True])
def test_a_window_holds_all_that_encode_needs(kind: str, by_torch: bool) -> None:
    geometry = GEOMETRIES["tiny, larger"]
    full_size = geometry.full_size(by_torch=by_torch)
    logit_MHW = field(kind, 64, seed=3)
    measured = full_size.measure(logit_MHW, 0.0, 1.0)
    whole_M4 = np.tile([0, 0, *full_size.extent_hw], (3, 1))
    height, width = full_size.extent_hw
    whole = [logit_HW[:height, :width].numpy() for logit_HW in logit_MHW]
    size_hw = geometry.size_hw
    cut = windows(logit_MHW, measured)
    assert full_size.encode(whole, whole_M4, 0.0, size_hw, (0, 0)) == full_size.encode(
        cut, measured.window_M4, 0.0, size_hw, (0, 0)
    )
    if kind == "empty":
        assert not measured.window_M4.any() and not measured.box_M4.any()
    if kind == "spot":
        size_M2 = measured.window_M4[:, 2:] - measured.window_M4[:, :2]
        assert size_M2.max() <= 9, "a window is about as large as the mask"


def test_one_pixel_in_the_corner_is_not_an_empty_mask() -> None:
    geometry = GEOMETRIES["one pixel"]
    measured = geometry.full_size().measure(field("full", 256), 0.0, 1.0)
    assert not measured.box_M4.any() and measured.window_M4.any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_no_numbers(value: float) -> None:
    geometry = GEOMETRIES["tiny, larger"]  # at the same size torch copies, and 0 * NaN is not met
    logit_MHW = field("smooth", 64)
    logit_MHW[:, 20:23, 30:35] = value
    wanted = official(logit_MHW, geometry, 0.0, 1.0)
    measured = geometry.full_size().measure(logit_MHW, 0.0, 1.0)
    assert np.array_equal(measured.stability_M, wanted.stability_M)
    assert np.array_equal(measured.box_M4, wanted.box_M4)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_size(data: st.DataObject) -> None:
    low_px = data.draw(st.sampled_from([16, 32]))
    model_px = low_px * data.draw(st.sampled_from([1, 2, 3, 4]))
    side = st.integers(1, model_px)
    input_hw = (data.draw(side), data.draw(side))
    size_hw = (data.draw(st.integers(1, 150)), data.draw(st.integers(1, 150)))
    geometry = Geometry(low_px, model_px, input_hw, size_hw)
    kind = data.draw(st.sampled_from(FIELDS))
    seed, scale = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([1e-3, 1.0, 30.0]))
    threshold = data.draw(st.sampled_from([0.0, 0.5, -1.0]))
    offset = data.draw(st.sampled_from([0.0, 0.25, 1.0, 5.0]))
    check(field(kind, low_px, seed, scale), geometry, threshold, offset)


def test_unknown_rounding_takes_the_torch_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fullsize, "torch_step", lambda size_hw: None)
    monkeypatch.setattr(kernels, "measure", None)
    monkeypatch.setattr(kernels, "encode", None)
    check(field("smooth", 64), GEOMETRIES["tiny"])


def test_no_masks() -> None:
    full_size = GEOMETRIES["tiny"].full_size()
    for each in (full_size, GEOMETRIES["tiny"].full_size(by_torch=True)):
        measured = each.measure(torch.empty(0, 64, 64), 0.0, 1.0)
        assert [part.shape for part in measured] == [(0,), (0, 4), (0, 4)]
        assert [part.dtype for part in measured] == [np.float32, np.int64, np.int64]
        assert each.encode([], measured.window_M4, 0.0, (96, 128), (0, 0)) == []


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (((64, 256), 128, (96, 128), (9, 9)), "low_hw"),
        (((64, 64), 128, (96, 129), (9, 9)), "input_hw"),
        (((64, 64), 128, (96, 128), (0, 9)), "size_hw"),
    ],
)
def test_sizes_that_do_not_fit(arguments: tuple[Any, ...], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        FullSize(*arguments)


def test_complaints_about_logits_windows_offset_and_origin() -> None:
    geometry = GEOMETRIES["tiny"]
    full_size = geometry.full_size()
    with pytest.raises(ValueError, match="logit_MHW must be"):
        full_size.measure(torch.zeros(1, 40, 64), 0.0, 1.0)
    with pytest.raises(ValueError, match="logit_MHW must be"):
        full_size.measure(torch.zeros(1, 64, 64, dtype=torch.float64), 0.0, 1.0)
    with pytest.raises(ValueError, match="offset must be"):
        full_size.measure(torch.zeros(1, 64, 64), 0.0, -1.0)
    with pytest.raises(ValueError, match="origin_xy must be"):
        full_size.encode([], np.empty((0, 4)), 0.0, (96, 128), (1, 0))
    for window in ([0, 0, 5, 5], [60, 0, 64, 4], [-4, 0, 0, 4]):
        with pytest.raises(ValueError, match="logits must be"):
            full_size.encode([torch.zeros(4, 4)], np.array([window]), 0.0, geometry.size_hw, (0, 0))


def test_kernels_compile_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernels.numba.njit

    def njit(**options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(kernels.numba, "njit", njit)
    assert kernels.compiled(lambda a, b: a + b)(1, 2) == 3


def test_synthetic_logits_do_not_depend_on_chunks() -> None:
    made = VoronoiLogits(seed=1, points_per_side=4, low_px=64, extent_hw=(48, 64))
    logit, iou = made.chunk(0, len(made))
    assert len(made) == 16 and logit.shape == (16, 3, 64, 64) and iou.shape == (16, 3)
    again_logit, again_iou = made.chunk(5, 7)
    assert torch.equal(again_logit, logit[5:7]) and torch.equal(again_iou, iou[5:7])


def test_synthetic_masks_hold_their_points_and_pass_filters_as_real_ones() -> None:
    geometry = GEOMETRIES["landscape"]
    made = VoronoiLogits(seed=0, points_per_side=8, low_px=256, extent_hw=(192, 256))
    logit, iou = made.chunk(0, len(made))
    measured = geometry.full_size().measure(logit.flatten(0, 1), 0.0, 1.0)
    good_M = iou.flatten().numpy() > 0.88
    assert 0.4 < good_M.mean() < 0.7
    assert 0.6 < (measured.stability_M[good_M] >= 0.95).mean() < 0.95
    box_M4 = measured.box_M4
    area_M = (box_M4[:, 2] - box_M4[:, 0]) * (box_M4[:, 3] - box_M4[:, 1])
    whole, part, sub = np.median(area_M.reshape(-1, 3), axis=0)
    assert whole > 2 * part > 4 * sub > 0
