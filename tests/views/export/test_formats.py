"""Every format, opened by its reader: the same label maps, classes and names as the run has."""

import json

import numpy as np
import pytest

from tests.views.export.readers import READERS, class_names
from tests.views.export.runs import ODD, odd_maps, put_run
from zsplg_ray.config import export as settings
from zsplg_ray.sources import image_key
from zsplg_ray.views.export import FORMATS, write_export

NO_IGNORE = {"yolo-seg", "coco-panoptic"}
"""Formats that do not tell background from what has no label."""
BY_ID = {"labelstudio", "huggingface"}
"""Formats that tell the image's id itself."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return put_run(tmp_path_factory.mktemp("odd"), odd_maps())


def test_the_settings_know_the_formats():
    assert tuple(FORMATS) == settings.ExportFormat.__args__ == tuple(READERS)


@pytest.mark.parametrize("format", FORMATS)
def test_label_maps_and_class_names_come_back_as_they_were(run, tmp_path, format):
    out = tmp_path / "out"
    result = write_export(run, format, str(out), images="copy")
    assert (result["images"], result["left_out"]) == (len(run), {})
    assert class_names(out, format) == list(ODD.names[1:])
    maps, record = READERS[format](out), json.loads((out / "export.json").read_text())
    assert len(maps) == len(run) and len(set(maps)) == len(run)
    assert len(record["names"]) == result["renamed"] > 0
    for image_id, expected in odd_maps().items():
        name = record["names"].get(image_id, image_key(image_id))
        key = image_id if format in BY_ID else name
        if format == "cvat":
            (key,) = (k for k in maps if image_key(k) == name)
        wanted = np.where(expected == 255, 0, expected) if format in NO_IGNORE else expected
        assert maps[key].shape == wanted.shape and (maps[key] == wanted).all(), image_id
    assert result["px_without_label"] == sum(int((m == 255).sum()) for m in odd_maps().values())


@pytest.mark.parametrize("format", FORMATS)
def test_no_file_lies_outside_or_is_hidden(run, tmp_path, format):
    before = sorted(p.name for p in tmp_path.iterdir())
    write_export(run, format, str(tmp_path / "out"), images="copy")
    assert sorted(p.name for p in tmp_path.iterdir()) == [*before, "out"]
    for path in (tmp_path / "out").rglob("*"):
        assert not path.name.startswith(".") and path.name.isprintable()
        assert len(path.name.encode()) < 160
