"""What all exports have in common: whole or not at all, options, images, what is left out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.views.export.readers import READERS
from tests.views.export.runs import ODD, blobs, put_run
from zsplg_ray import cli
from zsplg_ray.labels import Labels
from zsplg_ray.masks import open_truth
from zsplg_ray.settings import WorkError
from zsplg_ray.views.export import FORMATS, write_export

MAPS = {f"d/{i}.png": blobs((20 + i, 30), i) for i in range(6)}


@pytest.fixture
def run(tmp_path) -> Labels:
    return put_run(tmp_path / "in", MAPS)


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())


def test_an_image_that_is_gone_or_another_is_left_out_everywhere(tmp_path):
    run = put_run(tmp_path / "in", MAPS, gone=("d/1.png",))
    Image.new("RGB", (9, 9)).save(run["d/2.png"].uri)
    Path(run["d/3.png"].uri).write_text("no image")
    for format, kind in FORMATS.items():
        out = tmp_path / format
        result = write_export(run, format, str(out), images="copy")
        assert (result["images"], result["left_out"]) == (3, {"broken": 2, "gone": 1})
        assert len(READERS[format](out)) == 3
        record = json.loads((out / "export.json").read_text())
        assert list(record["omitted"]) == ["d/1.png", "d/2.png", "d/3.png"]
        assert "must be 30 x 22, got 9 x 9" in record["omitted"]["d/2.png"]
        if "none" in kind.images:
            result = write_export(run, format, str(tmp_path / f"{format}-none"), images="none")
            assert (result["images"], result["left_out"]) == (6, {})


def test_labels_that_are_broken_or_of_other_classes_are_left_out(tmp_path):
    maps = {"a.png": np.ones((3, 3), np.uint8), "b.png": np.full((3, 3), len(ODD), np.uint8)}
    run = put_run(tmp_path / "in", maps)
    assert write_export(run, "coco", str(tmp_path / "out"))["left_out"] == {"broken": 1}
    told = json.loads((tmp_path / "out" / "export.json").read_text())["omitted"]["b.png"]
    assert f"label_png must be of {len(ODD)} classes, got class {len(ODD)}" in told


def test_without_any_image_nothing_is_written(tmp_path):
    run = put_run(tmp_path / "in", MAPS, gone=tuple(MAPS))
    with pytest.raises(WorkError, match="none of 6 images could be exported"):
        write_export(run, "voc", str(tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_what_fails_on_the_way_leaves_nothing(run, tmp_path, monkeypatch, error):
    from zsplg_ray.views.export import voc

    count = iter(range(99))

    def failing(label_HW):
        if next(count) == 3:
            raise error
        return b"x"

    monkeypatch.setattr(voc, "palette_png", failing)
    with pytest.raises(type(error)):
        write_export(run, "voc", str(tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_a_folder_that_is_not_empty_is_left_as_it_is(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    for to, told in (
        ("full", "to must be a folder that is empty or not there yet"),
        ("full/mine.txt", "to must be a folder, got"),
        ("s3://bucket/x", "to must be a folder on this machine"),
    ):
        place = to if "://" in to else str(tmp_path / to)
        with pytest.raises(ValueError, match=told):
            write_export(run, "voc", place)
    assert listing(tmp_path / "full") == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    assert write_export(run, "voc", str(tmp_path / "link"))["to"] == str(tmp_path / "empty")
    assert (tmp_path / "empty" / "export.json").exists() and (tmp_path / "link").is_symlink()


def test_links_lead_to_the_images(run, tmp_path):
    for format in (f for f, kind in FORMATS.items() if "link" in kind.images):
        result = write_export(run, format, str(tmp_path / format), images="link")
        links = [p for p in (tmp_path / format).rglob("*.png") if p.is_symlink()]
        assert len(links) == result["images"] == len(MAPS)
        assert {str(p.resolve()) for p in links} == {run[i].uri for i in run.ids}


def test_links_to_other_machines_are_refused(run, tmp_path, monkeypatch):
    far = run.small.set_column(1, "uri", [["s3://b/x.png"] * len(run)])
    monkeypatch.setattr(run, "small", far)
    with pytest.raises(ValueError, match="images must be copy or none, where images are no files"):
        write_export(run, "voc", str(tmp_path / "out"), images="link")


@pytest.mark.parametrize("mode", ["copy", "link"])
def test_images_with_an_orientation_stand_upright(tmp_path, mode):
    label_HW = blobs((20, 30), 0)
    run = put_run(tmp_path / "in", {"a.jpg": label_HW, "b.jpg": label_HW})
    picture = Image.fromarray((np.mgrid[:20, :30].sum(axis=0) * 5).astype(np.uint8)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    turned.save(run["a.jpg"].uri, "JPEG", exif=exif, quality=95)
    result = write_export(run, "voc", str(tmp_path / "out"), images=mode)
    assert (result["images"], result["turned"]) == (2, 1)
    with Image.open(tmp_path / "out/JPEGImages/a.jpg") as image:
        assert image.size == (30, 20) and not image.getexif()
        assert np.abs(np.asarray(image).astype(int) - np.asarray(picture)).max() < 12


def test_unsure_pixels_become_ignore_but_not_unclaimed_background(tmp_path):
    label_HW = np.array([[1, 2, 0, 0, 3, 255]], np.uint8)
    score_HW = np.array([[0.3, 0.29, 0.0, 0.1, 0.9, 0.0]], np.float32)
    run = put_run(tmp_path / "in", {"a.png": label_HW}, score=score_HW)
    result = write_export(run, "voc", str(tmp_path / "out"), min_score=0.3)
    drawn = open_truth(str(tmp_path / "out")).read("a")
    assert drawn.tolist() == [[1, 255, 0, 255, 3, 255]]
    assert result["px_without_label"] == 3


def test_positions_choose_and_numbers_and_names_stay(run, tmp_path):
    result = write_export(run, "coco", str(tmp_path / "some"), positions=[4, 1, 4])
    assert result["images"] == 2
    write_export(run, "coco", str(tmp_path / "all"))
    some, every = (
        json.loads((tmp_path / n / "annotations/instances_train.json").read_text())["images"]
        for n in ("some", "all")
    )
    assert sorted(i["id"] for i in some) == [2, 5] and all(i in every for i in some)


def test_an_image_is_found_by_its_id_with_or_without_suffix(tmp_path):
    run = put_run(tmp_path / "in", {"voc_1": MAPS["d/0.png"], "d/2.png": MAPS["d/2.png"]})
    assert [run.position(i) for i in ("d/2", "d/2.png", "voc_1", "voc_1.jpg")] == [0, 0, 1, 1]
    assert "voc_1.jpg" in run and "voc_2.jpg" not in run and 0 not in run
    with pytest.raises(KeyError):
        run.position("voc_2.jpg")


def test_a_validation_split_is_told_in_each_format_that_has_one(tmp_path):
    maps = {f"{i}.png": np.ones((4, 4), np.uint8) for i in range(30)}
    run = put_run(tmp_path / "in", maps, per_part=30)

    def count(out: Path, format: str, split: str) -> int:
        if format == "voc":
            return len((out / f"ImageSets/Segmentation/{split}.txt").read_text().splitlines())
        if format.startswith("coco"):
            kind = "panoptic" if "panoptic" in format else "instances"
            return len(json.loads((out / f"annotations/{kind}_{split}.json").read_text())["images"])
        if format == "unimatch":
            return len(open_truth(str(out / f"{split}.txt")))
        if format == "yolo-seg":
            return len(list((out / f"images/{split}").iterdir()))
        import pyarrow.parquet as pq

        files = (out / "data").glob("validation-*" if split == "val" else "train-*")
        return sum(pq.read_metadata(f).num_rows for f in files)

    for format, kind in FORMATS.items():
        if "val_share" not in kind.options:
            with pytest.raises(ValueError, match=f"val_share must be left out for {format}"):
                write_export(run, format, str(tmp_path / format), val_share=0.3)
            continue
        write_export(run, format, str(tmp_path / format), val_share=0.3)
        counts = [count(tmp_path / format, format, split) for split in ("train", "val")]
        assert sum(counts) == 30 and 3 <= counts[1] <= 15, format


@pytest.mark.parametrize(
    ("format", "options", "told"),
    [
        ("voc", {"min_area_px": 5}, "min_area_px must be left out for voc, got 5; it is for coco,"),
        ("voc", {"instances": "classes"}, "instances must be left out for voc"),
        ("yolo-seg", {"instances": "classes"}, "instances must be left out for yolo-seg"),
        ("cvat", {"image_prefix": "x"}, "image_prefix must be left out for cvat, got x; it is for"),
        ("huggingface", {"images": "link"}, "images must be one of copy, none for huggingface"),
        ("vox", {}, "format must be one of voc, coco"),
    ],
)
def test_what_a_format_cannot_honour_is_refused(run, tmp_path, format, options, told):
    write: Any = write_export
    with pytest.raises(ValueError) as caught:
        write(run, format, str(tmp_path / "out"), **options)
    assert told in str(caught.value) and not (tmp_path / "out").exists()


def test_small_regions_are_left_out_where_it_is_asked(tmp_path):
    label_HW = np.zeros((10, 10), np.uint8)
    label_HW[:4, :4], label_HW[8, 8], label_HW[8, 1] = 1, 1, 255
    run = put_run(tmp_path / "in", {"a.png": label_HW})
    wanted = label_HW.copy()
    wanted[8, 8] = 0
    for format in ("coco", "coco-panoptic", "yolo-seg", "labelstudio", "cvat"):
        out, parts = tmp_path / format, None if format == "yolo-seg" else "components"
        write_export(run, format, str(out), images="copy", min_area_px=2, instances=parts)
        (drawn,) = READERS[format](out).values()
        assert (np.where(drawn == 255, 0, drawn) == np.where(wanted == 255, 0, wanted)).all()


# The command line ---------------------------------------------------------------------------------


def test_the_verb_tells_what_it_did_and_how_to_go_on(run, tmp_path, capsys):
    ids = tmp_path / "ids.txt"
    ids.write_text("d/4\nd/2.png\r\n\nd/0.png\n")
    where = ["export", run.folder.uri, "--to", str(tmp_path / "out"), "--ids", str(ids)]
    assert cli.main([*where, "--limit", "2", "--format", "unimatch"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:-1] == ["2 images as unimatch", f"  labels  {tmp_path / 'out'}", "next"]
    assert told[-1].startswith(f"  import  zsplg train --labeled {tmp_path / 'out'}/train.txt")
    assert open_truth(str(tmp_path / "out/train.txt")).ids == ["images/d/0", "images/d/2"]
    where = ["export", run.folder.uri, "--to", str(tmp_path / "two"), "--format", "cvat"]
    assert cli.main([*where, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 6


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--ids", "none.txt"], "ids must be a text file of image ids, one a line"),
        (["--ids", "wrong.txt"], "ids must be images of the run, got nobody.jpg; the run has ids"),
        (["--ids", "empty.txt"], "ids must be a file with ids in it"),
        (["--min-score", "1.5"], "min_score must be in [0, 1]"),
        (["--images", "move"], "images must be one of copy, link, none"),
        (["--min-area-px", "4"], "min_area_px must be left out for voc"),
    ],
)
def test_bad_settings_are_told_in_one_line(run, tmp_path, monkeypatch, capsys, argv, told):
    monkeypatch.chdir(tmp_path)
    Path("wrong.txt").write_text("d/1.png\nnobody.jpg\n")
    Path("empty.txt").write_text("\n")
    assert cli.main(["export", run.folder.uri, "--format", "voc", "--to", "out", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error and error.count("\n") == 1
    assert not Path("out").exists()


def test_no_run_is_told(tmp_path, capsys):
    assert cli.main(["export", str(tmp_path), "--format", "voc", "--to", str(tmp_path / "o")]) == 2
    assert "error: run must be a run's folder with labels/ in it" in capsys.readouterr().err
