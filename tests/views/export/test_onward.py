"""What an export says about how to go on, and what it does with the lists of many images."""

import json
import runpy
import shlex
import sys
import types
import weakref
from typing import Any

import numpy as np
import pytest

from tests.views.export.runs import blobs, put_run
from zsplg_ray.labels import Labels
from zsplg_ray.views.export import driver, write_export
from zsplg_ray.views.export.json_files import JsonList

MAPS = {f"d/{i}.png": blobs((20 + i, 30), i) for i in range(6)}


@pytest.fixture
def run(tmp_path) -> Labels:
    return put_run(tmp_path / "in", MAPS)


@pytest.mark.parametrize(
    ("format", "options", "words"),
    [
        ("unimatch", {"val_share": 0.5}, ["{}/train.txt", "{}/val.txt", "{}/classes.txt"]),
        ("yolo-seg", {}, ["data={}/data.yaml"]),
        ("fiftyone", {}, ["{}/load.py"]),
        ("fiftyone", {"images": "none"}, ["{}/load.py", "IMAGES"]),
        ("coco", {}, ["{}/annotations/instances_train.json"]),
        ("voc", {}, ["{},"]),
        ("huggingface", {}, ["upload", "NAME", "{}"]),
    ],
)
def test_how_to_go_on_can_be_pasted_whatever_the_folder_is_called(
    run, tmp_path, format, options: dict[str, Any], words
):
    out = tmp_path / "o u;t $x"
    following = shlex.split(write_export(run, format, str(out), **options)["next"])
    assert {word.format(out) for word in words} <= set(following)
    assert ("IMAGES" in following) == (options.get("images") == "none" or format == "unimatch")


def test_what_loads_fiftyone_takes_the_folder_of_the_images(run, tmp_path, monkeypatch):
    calls = []
    fake = types.ModuleType("fiftyone")
    vars(fake).update(
        Dataset=types.SimpleNamespace(
            from_dir=lambda **given: (
                calls.append(given["data_path"])
                or types.SimpleNamespace(mask_targets={}, save=lambda: None)
            )
        ),
        types=types.SimpleNamespace(ImageSegmentationDirectory=None),
        launch_app=lambda _: types.SimpleNamespace(wait=lambda: None),
    )
    monkeypatch.setitem(sys.modules, "fiftyone", fake)
    write_export(run, "fiftyone", str(tmp_path / "out"), images="none")
    load = str(tmp_path / "out" / "load.py")
    for argv in ([load, "/my/images"], [load]):
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(load, run_name="__main__")
    assert calls == ["/my/images", str(tmp_path / "out" / "data")]


def test_a_list_beside_a_list_waits_on_disk(tmp_path):
    file = tmp_path / "a.json"
    with JsonList(file, {"head": 1}, "long") as long:
        beside, empty = long.aside("beside"), long.aside("empty")
        for i in range(3):
            long.add(i)
            beside.add({"é": i})
        assert len(list(tmp_path.iterdir())) == 3
    wanted = {"head": 1, "long": [0, 1, 2], "beside": [{"é": i} for i in range(3)], "empty": []}
    assert json.loads(file.read_text("utf-8")) == wanted and empty.count == 0
    assert list(tmp_path.iterdir()) == [file]


class _Record(dict):
    """A mapping that can be watched."""

    __hash__ = object.__hash__  # type: ignore[assignment]


@pytest.mark.parametrize("format", ["coco", "coco-panoptic"])
def test_records_of_images_go_to_disk_as_they_come(run, tmp_path, monkeypatch, format):
    """None is still there when the next ones are written."""
    alive, most = weakref.WeakSet(), []

    def add(self, value):
        most.append(sum(1 for _ in alive))
        return real(self, value)

    real = JsonList.add
    monkeypatch.setattr(JsonList, "add", add)
    maps = {f"{i}.png": np.ones((3, 3), np.uint8) for i in range(40)}
    many = put_run(tmp_path / "many", maps)
    taken = driver._Export._taken

    def counting(self, future):
        for item, (image, rest) in taken(self, future):
            record = _Record(image)
            alive.add(record)
            yield item, (record, rest)
            del record, image

    monkeypatch.setattr(driver._Export, "_taken", counting)
    write_export(many, format, str(tmp_path / "out"))
    assert max(most) <= 3
