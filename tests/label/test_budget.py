"""How many images and points fit in a memory."""

from typing import Any

import pytest
import torch

from zsplg_ray.config import SamConfig
from zsplg_ray.label.budget import (
    GPU_SHARE,
    images_at_once,
    memory_gib,
    needed_gib,
    points_together,
)
from zsplg_ray.label.presets import resolve_sam
from zsplg_ray.label.weights import blank_sam


def settings(model: Any = "vit_b", **given: Any) -> SamConfig:
    return resolve_sam(SamConfig(model=model, **given))


def test_twice_the_memory_takes_twice_the_images():
    sam, config = blank_sam("vit_b"), settings()
    few, many = (images_at_once(sam, config, gib, "cuda") for gib in (20.0, 40.0))
    assert few >= 5 and many in (2 * few, 2 * few + 1)
    assert images_at_once(sam, config, 0.1, "cuda") == 1, "never none"


@pytest.mark.parametrize(
    ("share", "taken_gib", "expected"), [(1.0, 0.0, 6.0), (1.0, 2.0, 4.0), (0.5, 0.0, 2.0)]
)
def test_what_a_gpu_has_is_what_is_free_of_our_share(monkeypatch, share, taken_gib, expected):
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * gib, 8 * gib))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * gib)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * gib)
    given = memory_gib(
        blank_sam("shapes"), settings("shapes"), "cuda", share=share, taken_gib=taken_gib
    )
    assert given == pytest.approx(GPU_SHARE * expected)


def test_larger_models_and_more_points_need_more():
    def need(model, **given):
        return needed_gib(blank_sam(model), settings(model, **given), "cuda")

    assert need("shapes") < need("vit_b") < need("vit_h")
    assert need("vit_b", points_per_side=16) < need("vit_b", points_per_side=32)
    assert need("vit_b", points_per_batch=8) < need("vit_b", points_per_batch=64)


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
