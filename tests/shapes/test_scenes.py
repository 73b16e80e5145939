"""The scene generator: same bytes for a seed, masks that agree with labels, files to read back."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zsplg_ray.shapes import scenes

SAMPLE = [scenes.make_scene(seed) for seed in range(60)]


def test_a_seed_gives_the_same_scene():
    first, again = scenes.make_scene(7), scenes.make_scene(7)
    assert np.array_equal(first.image_HWC, again.image_HWC)
    assert np.array_equal(first.label_HW, again.label_HW)
    assert first.background == again.background
    assert [o.colour for o in first.objects] == [o.colour for o in again.objects]
    assert not np.array_equal(first.image_HWC, scenes.make_scene(8).image_HWC)


def test_masks_label_and_ranges_agree():
    for scene in SAMPLE:
        assert scene.image_HWC.shape == (128, 128, 3) and scene.image_HWC.dtype == np.uint8
        assert scene.label_HW.shape == (128, 128) and scene.label_HW.dtype == np.uint8
        assert 1 <= len(scene.objects) <= scenes.MAX_OBJECTS
        assert scene.background in scenes.BACKGROUNDS
        expected_HW = np.zeros((128, 128), np.uint8)
        covered_HW = np.zeros((128, 128), int)
        for item in scene.objects:
            assert item.mask_HW.dtype == np.bool_ and item.mask_HW.any()
            assert item.colour in scenes.COLOURS
            expected_HW[item.mask_HW] = item.class_index
            covered_HW += item.mask_HW
        assert covered_HW.max() == 1, "a pixel belongs to one object"
        assert np.array_equal(expected_HW, scene.label_HW)


def test_hidden_objects_keep_most_of_themselves(monkeypatch):
    """Counts each shape's pixels when it is drawn, and compares with what is left in the end."""
    drawn_px = []
    place = scenes._place

    def counting(*arguments):
        coverage_HW = place(*arguments)
        if coverage_HW is not None:
            drawn_px.append(int((coverage_HW >= 0.5).sum()))
        return coverage_HW

    monkeypatch.setattr(scenes, "_place", counting)
    some_hidden = 0
    for seed in range(100, 160):
        drawn_px.clear()
        for full_px, item in zip(drawn_px, scenes.make_scene(seed).objects, strict=True):
            assert item.mask_HW.sum() >= scenes.MIN_VISIBLE * full_px
            some_hidden += int(item.mask_HW.sum() < full_px)
    assert some_hidden > 20


def test_all_classes_colours_and_backgrounds_occur():
    objects = [item for scene in SAMPLE for item in scene.objects]
    assert {item.class_index for item in objects} == set(range(1, 9))
    assert {item.colour for item in objects} == set(scenes.COLOURS)
    assert {scene.background for scene in SAMPLE} == set(scenes.BACKGROUNDS)
    assert {len(scene.objects) for scene in SAMPLE} == set(range(1, scenes.MAX_OBJECTS + 1))


def test_colour_is_only_a_partial_shortcut():
    objects = [item for scene in SAMPLE for item in scene.objects]
    typical = np.mean(
        [o.colour == scenes.TYPICAL_COLOURS[scenes.CLASSES[o.class_index - 1]] for o in objects]
    )
    assert 0.5 < typical < 0.78  # .6, and a tenth of the other .4


def test_objects_differ_from_what_lies_behind():
    for scene in SAMPLE:
        behind_C = scene.image_HWC[scene.label_HW == 0].mean(axis=0)
        for item in scene.objects:
            assert np.abs(scene.image_HWC[item.mask_HW].mean(axis=0) - behind_C).max() > 25


@pytest.mark.parametrize("size_px", [32, 200])
def test_other_sizes(size_px):
    scene = scenes.make_scene(3, size_px)
    assert scene.image_HWC.shape == (size_px, size_px, 3)
    assert scene.label_HW.any()


def test_bad_values_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="seed must be >= 0, got -1"):
        scenes.make_scene(-1)
    with pytest.raises(ValueError, match="size_px must be >= 32, got 8"):
        scenes.make_scene(0, 8)
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        scenes.write_voc(tmp_path / "voc", 0, 0)
    with pytest.raises(ValueError, match="seed must be"):
        scenes.write_voc(tmp_path / "voc", 1, -1)
    assert not (tmp_path / "voc").exists()


def test_write_voc_reads_back(tmp_path: Path):
    scenes.write_voc(tmp_path, 3, 41)
    names = (tmp_path / "ImageSets/Segmentation/val.txt").read_text().split()
    assert names == ["scene_000041", "scene_000042", "scene_000043"]
    for seed, name in zip(range(41, 44), names, strict=True):
        scene = scenes.make_scene(seed)
        mask = Image.open(tmp_path / f"SegmentationClass/{name}.png")
        assert mask.mode == "P"
        assert (mask.getpalette() or [])[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
        assert np.array_equal(np.asarray(mask), scene.label_HW)
        image_HWC = np.asarray(Image.open(tmp_path / f"JPEGImages/{name}.jpg"), int)
        assert np.abs(image_HWC - scene.image_HWC).mean() < 8


def test_importing_scenes_needs_no_torch():
    code = "import sys, zsplg_ray.shapes.scenes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
