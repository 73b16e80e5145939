"""The segment engine finds what segment_anything's own generator finds."""

from typing import Any

import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam

from zsplg_ray.config import SamConfig
from zsplg_ray.label.fullsize import FullSize
from zsplg_ray.label.official import agreement, official_generator, official_proposals, together
from zsplg_ray.label.presets import resolve_sam
from zsplg_ray.label.sam import MaskProposer
from zsplg_ray.label.weights import load_sam
from zsplg_ray.shapes.sam import build_sam_shapes
from zsplg_ray.shapes.scenes import make_scene


def shapes(**settings: Any) -> SamConfig:
    return resolve_sam(SamConfig(model="shapes", **settings))


@pytest.fixture(scope="module")
def sam() -> Sam:
    return load_sam(shapes())


def random_sam(seed: int) -> Sam:
    """An untrained SAM in which no parameter is zero."""
    torch.manual_seed(seed)
    sam = build_sam_shapes().eval().requires_grad_(False)
    for parameter in sam.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    return sam


def compare(sam: Sam, config: SamConfig, images):
    generator, proposer = official_generator(sam, config), MaskProposer(sam, config)
    return [
        agreement(ours, official_proposals(generator, image))
        for image, ours in zip(images, proposer.proposals(images), strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("min_mask_region_area", [0, 100])
@pytest.mark.parametrize("crop_n_layers", [0, 1])
def test_the_same_records_on_scenes(sam, crop_n_layers, min_mask_region_area):
    config = shapes(crop_n_layers=crop_n_layers, min_mask_region_area=min_mask_region_area)
    n = 20 if crop_n_layers == 0 else 4
    found = together(compare(sam, config, [make_scene(seed).image_HWC for seed in range(n)]))
    assert found.ours == found.theirs == found.same_records > 3 * n
    assert found.identical >= found.theirs - 1, "a pixel may flip where a logit is at the threshold"
    assert found.least_iou > 0.999
    assert found.largest_score_gap < 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0},
        {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 0.99},
        {"stability_score_offset": 0.0},
        {"points_per_batch": 5, "points_per_side": 7},
        {"crop_n_layers": 2, "points_per_side": 8, "crop_n_points_downscale_factor": 2},
        {"crop_n_layers": 1, "crop_overlap_ratio": 0.0, "crop_nms_thresh": 0.3},
        {"pred_iou_thresh": 1.0},
    ],
    ids=str,
)
def test_every_setting_means_what_it_means_to_sam(sam, settings):
    images = [make_scene(seed).image_HWC for seed in (3, 4)]
    found = together(compare(sam, shapes(**settings), images))
    assert found.ours == found.theirs == found.same_records
    assert found.least_iou > 0.999 and found.identical >= 0.98 * found.theirs


@pytest.mark.parametrize("size_hw", [(40, 100), (100, 40), (300, 200), (64, 64), (9, 128), (1, 30)])
def test_images_of_any_size_with_an_untrained_sam(size_hw):
    """Untrained masks are noise, crossing the threshold everywhere: the hardest to get right."""
    image = np.random.default_rng(0).integers(0, 255, (*size_hw, 3), np.uint8)
    config = shapes(
        points_per_side=4,
        pred_iou_thresh=0.0,
        stability_score_thresh=0.0,
        box_nms_thresh=1.0,
        min_mask_region_area=0,
    )
    (found,) = compare(random_sam(1), config, [image])
    assert found.ours == found.theirs == found.same_records == 48
    assert found.least_iou > 0.999


def test_the_way_that_other_devices_go_finds_the_same(sam, monkeypatch):
    """On a GPU masks are enlarged by torch, not counted by the kernels."""
    routes = []

    def no_kernel(self, device):
        routes.append(device)
        return None

    monkeypatch.setattr(FullSize, "_steps", no_kernel)
    images = [make_scene(5).image_HWC, make_scene(6).image_HWC[:90]]
    config = shapes(crop_n_layers=1, memory_gib=1.0)
    found = together(compare(sam, config, images))
    assert routes and found.exact and found.ours > 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_records_on_a_gpu(precision, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    config = shapes(precision=precision)
    found = together(
        compare(load_sam(config, "cuda"), config, [make_scene(s).image_HWC for s in range(20)])
    )
    assert abs(found.ours - found.theirs) <= (0 if precision == "float32" else 3)
    assert found.mean_best_iou > (0.999 if precision == "float32" else 0.98)


def test_images_of_different_sizes_together_as_if_alone(sam):
    images = [
        make_scene(1).image_HWC,
        make_scene(2).image_HWC[:90],
        make_scene(3).image_HWC[:, 20:95],
        np.zeros((50, 50, 3), np.uint8),
    ]
    together_, one = shapes(memory_gib=4.0), shapes(memory_gib=0.1)
    proposer, alone = MaskProposer(sam, together_), MaskProposer(sam, one)
    assert proposer.images_at_once >= len(images)
    all_found = proposer.proposals(images)
    assert sum(map(len, all_found)) > 6
    for found, image in zip(all_found, images, strict=True):
        (same,) = alone.proposals([image])
        assert agreement(found, same).least_iou > 0.999
        assert len(found) == len(same) and (found.point_xy == same.point_xy).all()
    assert proposer.proposals([]) == []


def test_the_encoder_and_decoder_get_as_many_images_as_fit(sam):
    proposer = MaskProposer(sam, shapes(points_per_side=3))
    proposer.images_at_once = 2
    seen = []
    encoder = proposer.encoder
    proposer.encoder = lambda x: seen.append(len(x)) or encoder(x)  # type: ignore[assignment]
    proposer.propose_many([make_scene(seed).image_HWC for seed in range(5)])
    assert seen == [2, 2, 1]


def test_bfloat16_masks_are_nearly_the_same(sam):
    images = [make_scene(seed).image_HWC for seed in range(12)]
    exact, fast = shapes(), shapes(precision="bfloat16")
    theirs = MaskProposer(sam, exact).proposals(images)
    ours = MaskProposer(sam, fast).proposals(images)
    found = together([agreement(a, b) for a, b in zip(ours, theirs, strict=True)])
    assert found.largest_score_gap > 0, "bfloat16 changed nothing at all: is it in use?"
    assert found.mean_best_iou > 0.98 and abs(found.ours - found.theirs) <= 0.1 * found.theirs


def test_nothing_of_the_model_is_changed(sam):
    before = {name: value.clone() for name, value in sam.state_dict().items()}
    MaskProposer(sam, shapes(points_per_side=2, precision="bfloat16")).propose(
        make_scene(0).image_HWC
    )
    for name, value in sam.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name


@pytest.mark.parametrize(("size_hw", "layers"), [((1, 600), 0), ((1, 1), 1), ((5, 40), 2)])
def test_images_too_thin_for_sam_itself_are_done(sam, size_hw, layers):
    image = np.zeros((*size_hw, 3), np.uint8)
    config = shapes(crop_n_layers=layers, points_per_side=2, pred_iou_thresh=0.0)
    (found,) = MaskProposer(sam, config).propose_many([image])
    assert found.size_hw == size_hw


def test_a_layer_of_crops_without_points_is_refused():
    with pytest.raises(ValueError, match=r"sam.points_per_side must be >= 4.*crop_n_layers"):
        SamConfig(points_per_side=3, crop_n_layers=1, crop_n_points_downscale_factor=4)
