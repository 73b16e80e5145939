"""Out as pre-annotations, nothing changed, back in: the very same label maps."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.views.reviewing import make_run, submitted
from zsplg_ray.config import ReviewImportConfig
from zsplg_ray.labels import Labels
from zsplg_ray.views.export import write_export
from zsplg_ray.views.review.importing import import_masks
from zsplg_ray.vocab import class_list

FORMATS = ("labelstudio", "voc", "coco")


def ring(size, *bounds):
    """Squares within squares, each with a number of its own."""
    label_HW = np.zeros((size, size), np.uint8)
    for inset, index in enumerate(bounds):
        label_HW[inset : size - inset, inset : size - inset] = index
    return label_HW


ODD = {
    "one pixel": [[2]],
    "one pixel of nothing": [[255]],
    "one background": [[0]],
    "a row.png": [[1, 0, 2, 2, 255, 0, 0, 1, 3]],
    "a column": [[1], [0], [255], [3], [3]],
    "all ignored": np.full((7, 13), 255),
    "all of one": np.full((5, 3), 3),
    "all background": np.zeros((3, 31)),
    "chess": np.indices((17, 19)).sum(0) % 2 * 2,
    "nested/holes": ring(15, 1, 0, 2, 255, 2, 0, 3, 1),
    "same class in itself": ring(11, 1, 0, 1, 0, 1),
    "corners": np.pad([[255, 2], [2, 255]], 4, constant_values=1),
    "<b>'html' & \"more\"</b>": [[1, 2], [3, 255]],
    "../../up": [[3, 3], [0, 255]],
    "line\nbreak.jpg": [[0, 255, 1]],
    "Case": [[1, 1]],
    "case": [[2, 2]],
    "x" * 3000: [[1, 3]],
}


def back(run: str, folder: Path, format: str) -> dict[str, np.ndarray]:
    """Export, submit what is there, import."""
    write_export(Labels(run), format, str(folder / "out"), images="none")
    masks = folder / "out"
    if format == "labelstudio":
        masks = folder / "submitted.json"
        masks.write_text(json.dumps(submitted(folder / "out/tasks.json")), encoding="utf-8")
    elif format == "coco":
        masks = folder / "out/annotations/instances_train.json"
    corrected = str(folder / "corrected")
    result = import_masks(ReviewImportConfig(masks=str(masks), run=run, out=corrected))
    assert result["failed"] == result["unmatched"] == result["changed"] == 0
    return {image.image_id: image.label_HW for image in Labels(corrected)}


@pytest.mark.parametrize("format", FORMATS)
def test_odd_masks_of_odd_names_come_back(tmp_path, format):
    run = make_run(tmp_path / "run", ODD)
    found = back(run, tmp_path, format)
    assert found.keys() == ODD.keys()
    for name, label in ODD.items():
        assert np.array_equal(found[name], np.asarray(label)), name
    for image in Labels(str(tmp_path / "corrected")):
        assert image.source == "corrected" and image.uri == Labels(run)[image.image_id].uri
        assert np.array_equal(image.score_HW, image.label_HW != 255)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    label_HW=st.tuples(st.integers(1, 24), st.integers(1, 24)).flatmap(
        lambda size: arrays(np.uint8, size, elements=st.sampled_from([0, 0, 1, 2, 3, 255]))
    )
)
def test_any_mask_comes_back(tmp_path_factory, format, label_HW):
    folder = tmp_path_factory.mktemp("any")
    run = make_run(folder / "run", {"a": label_HW})
    assert np.array_equal(back(run, folder, format)["a"], label_HW)


@pytest.mark.parametrize("format", FORMATS)
def test_classes_that_are_called_like_what_has_no_label(tmp_path, format):
    classes = class_list("ignore,unsure,no label")
    run = make_run(tmp_path / "run", {"a": [[0, 1, 2, 3, 255]]}, classes=classes)
    assert back(run, tmp_path, format)["a"].tolist() == [[0, 1, 2, 3, 255]]
