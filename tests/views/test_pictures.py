"""Overlays and contact sheets: right colours in the right place, whatever the images are like."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from zsplg_ray.masks import open_truth
from zsplg_ray.records import LABELS, encode_png
from zsplg_ray.rundir import RunFolder, part_name
from zsplg_ray.views.pictures import Shot, contact_sheet, overlay, run_sheet, write_preview
from zsplg_ray.vocab import class_list, palette

CLASSES = class_list("cat,dog")
CAT, DOG = (np.array(palette()[3 * k : 3 * k + 3]) for k in (1, 2))


def opened(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def flat(size_hw, colour) -> np.ndarray:
    return np.full((*size_hw, 3), colour, np.uint8)


def test_an_overlay_tints_classes_and_leaves_background():
    image_HWC = flat((1, 4), (100, 50, 201))
    label_HW = np.array([[0, 1, 2, 255]], np.uint8)
    for strength in (0.25, 1.0):
        mixed = overlay(image_HWC, label_HW, strength)[0]
        assert mixed.dtype == np.uint8
        assert mixed[0].tolist() == [100, 50, 201]
        for at, colour in ((1, CAT), (2, DOG), (3, np.array([128] * 3))):
            expected = np.rint((1 - strength) * image_HWC[0, 0].mean() + strength * colour)
            assert mixed[at].tolist() == expected.tolist()
    assert (image_HWC == (100, 50, 201)).all(), "the image was painted on"


def test_a_sheet_shows_image_and_maps_side_by_side():
    cat, dog = np.ones((20, 20), np.uint8), np.full((20, 20), 2, np.uint8)
    shots = [Shot(flat((20, 20), (0, 0, 255)), (cat, dog))]
    sheet = opened(contact_sheet(shots, CLASSES, cell_px=50))
    assert sheet.shape[1] == 150 and sheet.shape[0] > 50, "three cells and a legend"
    blue = np.array([0, 0, 255])
    assert sheet[25, 25].tolist() == blue.tolist()
    assert sheet[25, 75].tolist() == np.rint(0.3 * blue.mean() + 0.7 * CAT).tolist()
    assert sheet[25, 125].tolist() == np.rint(0.3 * blue.mean() + 0.7 * DOG).tolist()
    legend = sheet[50:]
    assert (legend == CAT).all(axis=2).any() and (legend == DOG).all(axis=2).any()


def test_every_shot_is_on_the_sheet_also_in_two_columns():
    colours = [(40 * i, 255 - 40 * i, 7) for i in range(7)]
    for n in (1, 4, 5, 7):
        shots = [Shot(flat((30, 30), c), (np.zeros((30, 30), np.uint8),)) for c in colours[:n]]
        sheet = opened(contact_sheet(shots, CLASSES, cell_px=40))
        shown = [int((sheet == c).all(axis=2).sum()) for c in colours]
        assert shown == [2 * 36 * 36] * n + [0] * (7 - n)


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 3000), (3000, 1), (36, 36), (500, 300)])
def test_images_of_any_shape_keep_theirs(size_hw):
    shot = Shot(flat(size_hw, (255, 0, 0)), (np.ones(size_hw, np.uint8),))
    sheet = opened(contact_sheet([shot], CLASSES, cell_px=40))
    red = (sheet[:, :40] == (255, 0, 0)).all(axis=2)
    rows, columns = np.nonzero(red.any(axis=1))[0], np.nonzero(red.any(axis=0))[0]
    scale = 36 / max(size_hw)
    assert len(rows) == pytest.approx(max(1, size_hw[0] * scale), abs=1)
    assert len(columns) == pytest.approx(max(1, size_hw[1] * scale), abs=1)


def test_maps_of_a_truth_with_more_classes_can_be_shown():
    maps = (np.array([[0, 1], [254, 255]], np.uint8),)
    assert opened(contact_sheet([Shot(flat((2, 2), 9), maps)], CLASSES)).size


# Runs --------------------------------------------------------------------------------------------


def put_run(folder: Path, images: dict[str, np.ndarray | None]) -> RunFolder:
    """A run in which every pixel is a cat; an image that is None has vanished."""
    rows = []
    for name, image_HWC in images.items():
        file = folder / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if image_HWC is not None:
            Image.fromarray(image_HWC).save(file)
        shape = (8, 8) if image_HWC is None else image_HWC.shape[:2]
        png = encode_png(np.ones(shape, np.uint8))
        rows.append({"image_id": name, "uri": str(file), "label_png": png})
    run = RunFolder(str(folder / "run"))
    written = pa.Table.from_pylist(rows, schema=LABELS)
    run.write_part("labels", part_name(images), written, {})
    keys = {key: {} for key in ("config", "resolved", "weights")}
    run.write_run({**keys, "classes": CLASSES.to_dict(), "labels_state": "complete"})
    return run


def count_tiles(sheet: bytes | None, colour) -> int:
    assert sheet is not None
    return int((opened(sheet) == colour).all(axis=2).sum()) // (188 * 188)


def test_the_first_images_that_are_still_there_are_shown(tmp_path):
    red = flat((8, 8), (255, 0, 0))
    images = {f"{i}.png": None if i < 5 else red for i in range(12)}
    run = put_run(tmp_path, images)
    assert count_tiles(run_sheet(run, CLASSES, n=3), (255, 0, 0)) == 3
    assert count_tiles(run_sheet(run, CLASSES, n=12), (255, 0, 0)) == 7


def test_an_image_changed_since_is_left_out(tmp_path):
    run = put_run(
        tmp_path, {"a.png": flat((8, 8), (255, 0, 0)), "b.png": flat((8, 8), (0, 0, 255))}
    )
    Image.fromarray(flat((9, 8), (255, 0, 0))).save(tmp_path / "images" / "a.png")
    sheet = run_sheet(run, CLASSES)
    assert (count_tiles(sheet, (255, 0, 0)), count_tiles(sheet, (0, 0, 255))) == (0, 1)


def test_the_truth_stands_beside_where_there_is_one(tmp_path):
    run = put_run(tmp_path, {"a.png": flat((8, 8), 10), "b.png": flat((8, 8), 10)})
    (tmp_path / "truth").mkdir()
    (tmp_path / "truth" / "a.png").write_bytes(encode_png(np.full((8, 8), 2, np.uint8)))
    truth = open_truth(str(tmp_path / "truth"))
    sheet = run_sheet(run, CLASSES, truth)
    tints = [np.rint(0.3 * 10 + 0.7 * colour) for colour in (CAT, DOG)]
    assert [count_tiles(sheet, tint) for tint in tints] == [2, 1]


def test_the_preview_is_put_beside_run_json(tmp_path):
    run = put_run(tmp_path, {"a.png": flat((8, 8), 10)})
    assert write_preview(run) == "preview.png"
    assert (tmp_path / "run" / "preview.png").read_bytes() == run_sheet(run, CLASSES)


def test_without_images_there_is_no_preview(tmp_path):
    assert write_preview(RunFolder(str(tmp_path / "none"))) is None
    assert write_preview(put_run(tmp_path, {"a.png": None})) is None
    assert not (tmp_path / "run" / "preview.png").exists()
