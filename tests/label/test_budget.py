"""How many images and points fit in a memory."""

from typing import Any

import pytest

from zsplg_ray.config import SamConfig
from zsplg_ray.label.budget import images_at_once, memory_gib, needed_gib, points_together
from zsplg_ray.label.presets import resolve_sam
from zsplg_ray.label.weights import blank_sam


def settings(model: Any = "vit_b", **given: Any) -> SamConfig:
    return resolve_sam(SamConfig(model=model, **given))


@pytest.mark.parametrize("model", ["vit_b", "vit_h", "shapes"])
def test_memory_for_n_images_takes_n_images(model):
    sam, config = blank_sam(model), settings(model)
    each = needed_gib(sam, config, "cpu")
    for n in (1, 2, 7):
        assert images_at_once(sam, config, n * each * 1.001, "cpu") == n
    assert images_at_once(sam, config, each / 10, "cpu") == 1, "never none"


def test_larger_models_and_more_points_need_more():
    def need(model, **given):
        return needed_gib(blank_sam(model), settings(model, **given), "cuda")

    assert need("shapes") < need("vit_b") < need("vit_h")
    assert need("vit_b", points_per_side=16) < need("vit_b", points_per_side=32)
    assert need("vit_b", points_per_batch=8) < need("vit_b", points_per_batch=64)


def test_vit_h_needs_what_was_seen_not_more_than_a_small_gpu():
    assert 0.5 < needed_gib(blank_sam("vit_h"), settings("vit_h"), "cuda") < 4


def test_on_a_cpu_one_image_at_a_time_unless_memory_is_given():
    sam = blank_sam("shapes")
    config = settings("shapes")
    assert images_at_once(sam, config, memory_gib(sam, config, "cpu"), "cpu") == 1
    config = settings("shapes", memory_gib=1.0)
    assert memory_gib(sam, config, "cpu") == 1.0
    assert images_at_once(sam, config, 1.0, "cpu") > 10


def test_points_together_are_never_more_than_asked_for():
    sam = blank_sam("vit_b")
    assert points_together(sam, 64, "cpu") == 4, "what a CPU's caches hold"
    assert points_together(sam, 3, "cpu") == 3
    assert points_together(sam, 500, "cuda") == 500
    assert points_together(blank_sam("shapes"), 64, "cpu") == 64
