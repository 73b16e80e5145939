"""Which image a task is about, and shapes that stick out of it."""

import json

import numpy as np
import pytest
from pycocotools import mask as rle_codec

from tests.views.reviewing import annotation, make_run
from zsplg_ray.config import ReviewImportConfig
from zsplg_ray.labels import Labels
from zsplg_ray.views.review.importing import import_masks
from zsplg_ray.views.review.studio import Called, Painted, read_tasks
from zsplg_ray.vocab import class_list


def take(tmp_path, ids, *data, unannotated=()):
    """Import a task for each data; `unannotated` are the numbers of those without annotation."""
    run = make_run(tmp_path / "run", {key: [[0]] for key in ids})
    made = [
        {"id": n, "data": d, "annotations": [] if n in unannotated else [annotation([])]}
        for n, d in enumerate(data)
    ]
    (tmp_path / "export.json").write_text(json.dumps(made))
    out = str(tmp_path / "out")
    masks = str(tmp_path / "export.json")
    result = import_masks(ReviewImportConfig(run=run, masks=masks, out=out))
    return result, set(Labels(out).ids)


def test_a_task_with_an_id_is_of_that_image_or_of_none(tmp_path):
    address = "/data/local-files/?d=cam2/a.png"
    result, found = take(
        tmp_path,
        ["a.png", "b.png"],
        {"image_id": "cam2/a.png", "image": address},
        {"image_id": "b.png", "image": address},
    )
    assert found == {"b.png"} and result["unmatched_names"] == ["cam2/a.png"]


@pytest.mark.parametrize("unannotated", [(), (0,)])
def test_images_of_two_folders_are_not_taken_for_one(tmp_path, unannotated):
    at = "/data/local-files/?d="
    result, found = take(
        tmp_path,
        ["a.png", "b.png"],
        {"image": f"{at}cam1/a.png"},
        {"image": f"{at}cam2/a.png"},
        {"image": f"{at}cam1/b.png"},
        {"image": f"{at}cam1/b.png"},
        unannotated=unannotated,
    )
    assert found == {"b.png"} and result["failed"] == 2 - len(unannotated)
    told = result["errors"][0]["error"]
    assert f"task must be of one image, got {at}cam1/a.png and {at}cam2/a.png for a.png" in told


def test_addresses_are_quoted_or_not(tmp_path):
    _, found = take(
        tmp_path,
        ["one %41.png", "two %41.png", "cam 1/three.png", "four?.png", "five.png", "A.png"],
        {"image": "s3://bucket/one %41.png"},
        {"image": "/data/local-files/?d=two%20%2541.png"},
        {"image": "s3://bucket/cam%201/three.png"},
        {"image": "s3://bucket/four?.png"},
        {"image": "https://host/five.png?key=1"},
    )
    assert found == {"one %41.png", "two %41.png", "cam 1/three.png", "four?.png", "five.png"}


def test_the_whole_address_counts_for_more_than_its_end():
    names = read_tasks([{"data": {"image": "s3://b/x%20y/a.png"}}], "file").called[0].names
    assert names.index("x y/a.png") < names.index("a.png")
    assert names.index("x%20y/a.png") < names.index("a.png")


def drawn(kind, value, size_hw):
    size = {"original_height": size_hw[0], "original_width": size_hw[1]}
    painted = Painted(
        Called(("a",), None, guessed=False),
        ("", 1),
        [{"type": kind, "value": {**value, kind: ["cat"]}, **size}],
    )
    return painted.draw(size_hw, class_list("cat")) == 1


def beyond(corner_Q2, size_hw, room=250):
    """The polygon drawn on a larger image, of which the middle is what counts."""
    rle = rle_codec.frPyObjects(
        [(corner_Q2 + room).ravel().tolist()], size_hw[0] + 2 * room, size_hw[1] + 2 * room
    )
    mask = rle_codec.decode(rle_codec.merge(rle))
    return mask[room : room + size_hw[0], room : room + size_hw[1]] == 1


def test_a_turned_box_that_sticks_out_keeps_its_shape():
    # 40 x 20 and turned by 30 degrees: its last corner is 10 pixels left of the image.
    value = {"x": 0, "y": 10, "width": 40, "height": 20, "rotation": 30}
    found = drawn("rectanglelabels", value, (100, 100))
    cos, sin = np.cos(np.pi / 6), np.sin(np.pi / 6)
    across, down = np.array([cos, sin]) * 40, np.array([-sin, cos]) * 20
    start = np.array([0, 10])
    corners = np.stack([start, start + across, start + across + down, start + down])
    assert (found != beyond(corners, (100, 100))).sum() <= 6


def test_polygons_are_cut_at_the_edges_whatever_they_are():
    rng = np.random.default_rng(0)
    size_hw = (40, 60)
    for _ in range(100):
        percent_Q2 = rng.uniform(-150, 250, (rng.integers(3, 8), 2))
        found = drawn("polygonlabels", {"points": percent_Q2.tolist()}, size_hw)
        want = beyond(percent_Q2 / 100 * (60, 40), size_hw)
        assert (found != want).mean() < 0.02
    far = [[-1e300, -1e300], [1e300, -1e300], [1e300, 1e300], [-1e300, 1e300]]
    assert drawn("polygonlabels", {"points": far}, size_hw).all()
    assert not drawn("polygonlabels", {"points": [[200, 0], [300, 0], [300, 9]]}, size_hw).any()
