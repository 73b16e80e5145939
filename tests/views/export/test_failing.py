"""What goes wrong while an export is at work: writers that fail, rows and parts that are spoilt."""

import gc
import json
import shutil
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.views.export.readers import READERS
from tests.views.export.runs import blobs, put_run
from zsplg_ray.labels import Labels
from zsplg_ray.settings import WorkError
from zsplg_ray.views.export import FORMATS, driver, voc, write_export

MAPS = {f"d/{i}.png": blobs((20 + i, 30), i) for i in range(6)}


@pytest.fixture
def run(tmp_path) -> Labels:
    return put_run(tmp_path / "in", MAPS)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_what_fails_while_others_still_write_leaves_nothing(run, tmp_path, monkeypatch, error):
    removed, entry = threading.Event(), voc.VocWriter.entry
    rmtree = shutil.rmtree

    def late(self, item):
        if item.position:
            removed.wait(0.2)  # a thread that is at work when the writer fails
        entry(self, item)

    def failing(self, entries):
        next(entries)
        raise error

    def removing(folder, **options):
        rmtree(folder, **options)
        removed.set()

    monkeypatch.setattr(voc.VocWriter, "entry", late)
    monkeypatch.setattr(voc.VocWriter, "finish", failing)
    monkeypatch.setattr(driver.shutil, "rmtree", removing)
    with pytest.raises(type(error)) as caught:
        write_export(run, "voc", str(tmp_path / "out"))
    error.__traceback__ = None
    del caught
    gc.collect()  # all threads have ended
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_an_image_without_an_address_is_gone_where_images_are_put(run, tmp_path):
    part = run.folder.parts("labels")[0]
    table = run.folder.read_part("labels", part)
    uris = pa.array([None, *table["uri"].to_pylist()[1:]], pa.string())
    run.folder.write_part("labels", part, table.set_column(1, "uri", uris), {})
    run = Labels(run.folder.uri)
    for format, kind in FORMATS.items():
        result = write_export(run, format, str(tmp_path / format), images="copy")
        assert (result["images"], result["left_out"]) == (5, {"gone": 1})
        if "none" in kind.images and format != "unimatch":
            result = write_export(run, format, str(tmp_path / f"{format}-none"), images="none")
            assert (result["images"], result["left_out"]) == (6, {})
    omitted = json.loads((tmp_path / "voc" / "export.json").read_text())["omitted"]
    assert "the run does not tell its address" in omitted[table["image_id"][0].as_py()]
    result = write_export(run, "unimatch", str(tmp_path / "lines"), images="none")
    assert (result["images"], result["left_out"]) == (5, {"unfit": 1})


def spoil(run: Labels, part: str) -> None:
    """Make the maps of a part unreadable, but not its small columns."""
    file = Path(run.folder.path) / "labels" / f"{part}.parquet"
    group = pq.read_metadata(file).row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    column = next(c for c in columns if c.path_in_schema == "label_png")
    first = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(file.read_bytes())
    end = first + column.total_compressed_size
    data[first + 40 : end] = b"\xff" * (end - first - 40)
    file.write_bytes(data)


def test_of_a_part_that_is_torn_only_its_images_are_left_out(run, tmp_path):
    torn = run.folder.parts("labels")[1]
    ids = run.folder.read_part("labels", torn, ["image_id"])["image_id"].to_pylist()
    spoil(run, torn)
    result = write_export(run, "coco", str(tmp_path / "out"))
    assert (result["images"], result["left_out"]) == (4, {"broken": 2})
    omitted = json.loads((tmp_path / "out" / "export.json").read_text())["omitted"]
    assert list(omitted) == ids and all("cannot be read" in why for why in omitted.values())
    drawn = READERS["coco"](tmp_path / "out")
    assert {f"{i}.png" for i in drawn} == set(MAPS) - set(ids)
    for part in run.folder.parts("labels"):
        spoil(run, part)
    with pytest.raises(WorkError, match="none of 6 images could be exported"):
        write_export(run, "coco", str(tmp_path / "none"))


def test_a_run_that_is_gone_is_no_broken_part(run, tmp_path):
    shutil.rmtree(Path(run.folder.path) / "labels")
    with pytest.raises(OSError):
        write_export(run, "coco", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
