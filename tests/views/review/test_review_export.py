"""Picks as files: which, why, what is passed over, how to go on."""

import csv
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.views.reviewing import make_run
from zsplg_ray import cli
from zsplg_ray.config import ReviewExportConfig, ReviewWeights
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import WorkError
from zsplg_ray.views.review import exporting
from zsplg_ray.views.review.exporting import export_picks, summary
from zsplg_ray.vocab import class_list

SIZE = (8, 8)


def label(index, share):
    label_HW = np.zeros(SIZE, np.uint8)
    label_HW[: round(8 * share)] = index
    return label_HW


LABELS = {
    "sure": label(1, 0.5),
    "doubtful": label(1, 0.5),
    "rare": label(3, 0.25),
    "open": label(255, 0.75),
    "plain": label(1, 0.25),
    "plain too": label(1, 0.25),
}
SCORES = {name: np.where(rows % 255 > 0, 200, 0) for name, rows in LABELS.items()} | {
    "doubtful": np.where(LABELS["doubtful"] > 0, 130, 0)
}


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", LABELS, SCORES)


def picked(run, to, budget=3, **more):
    given: dict[str, Any] = {"images": "none", "format": "voc", **more}
    return export_picks(ReviewExportConfig(run=run, to=str(to), budget=budget, **given))


def test_picks_say_why(tmp_path, run):
    record = picked(run, tmp_path / "out")
    assert {p["image_id"] for p in record["picks"]} == {"doubtful", "rare", "open"}
    assert json.loads((tmp_path / "out/review.json").read_text())["picks"] == record["picks"]
    with (tmp_path / "out/picks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    by_id = {row["image_id"]: row for row in rows}
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert by_id["open"]["why"].startswith("unlabelled 1.00")
    assert float(by_id["open"]["unlabelled"]) == 0.75
    assert float(by_id["doubtful"]["confidence added"]) == 1
    for row in rows:
        added = sum(float(v) for k, v in row.items() if k.endswith(" added"))
        assert added == pytest.approx(float(row["total"]), abs=1e-3)
    assert {p.stem for p in (tmp_path / "out/SegmentationClass").iterdir()} == set(by_id)
    again = picked(run, tmp_path / "again")
    assert again["picks"] == record["picks"], "the same every time"


def test_all_if_the_budget_allows_and_corrected_ones_never_again(tmp_path, run):
    assert len(picked(run, tmp_path / "all", budget=99)["picks"]) == len(LABELS)
    earlier = make_run(tmp_path / "earlier", {"rare.jpg": [[1]], "open": [[1]], "other": [[1]]})
    record = picked(run, tmp_path / "rest", budget=99, corrected=(earlier,))
    assert {p["image_id"] for p in record["picks"]} == LABELS.keys() - {"rare", "open"}
    assert record["skipped_corrected"] == 2 and record["candidates"] == 4
    everything = make_run(tmp_path / "everything", LABELS)
    with pytest.raises(ValueError, match="corrected must be of some images, got all 6"):
        picked(run, tmp_path / "none", corrected=(everything,))


def test_where_two_runs_differ(tmp_path, run):
    other = make_run(tmp_path / "other", {k: v for k, v in LABELS.items() if k != "rare"} | {
        "plain": label(2, 0.5)
    })  # fmt: skip
    record = picked(run, tmp_path / "out", budget=1, compare=other)
    assert record["picks"][0]["image_id"] == "plain"
    assert record["not_compared"] == 1 and "1 images are not in the run to" in summary(record)
    weights = ReviewWeights(disagreement=0.0)
    record = picked(run, tmp_path / "not", budget=1, compare=other, weights=weights)
    assert record["picks"][0]["image_id"] != "plain"


@pytest.mark.parametrize(
    ("labels", "classes", "words"),
    [
        ({"sure": label(1, 0.5)}, "tree,car,sky", "classes must be those of the labels in"),
        ({"strange": label(1, 0.5)}, "cat,dog,red panda", "compare must be a run over the same"),
    ],
)
def test_runs_that_cannot_be_compared(tmp_path, run, labels, classes, words):
    other = make_run(tmp_path / "other", labels, classes=class_list(classes))
    with pytest.raises(ValueError, match=words):
        picked(run, tmp_path / "out", compare=other)
    assert not (tmp_path / "out").exists()


def test_broken_labels_are_told(tmp_path):
    run = make_run(tmp_path / "run", LABELS | {"broken": b"no PNG"})
    record = picked(run, tmp_path / "out", budget=99)
    assert record["broken"].keys() == {"broken"} and len(record["picks"]) == len(LABELS)
    assert "1 labels could not be read, such as broken" in summary(record)
    with pytest.raises(WorkError, match="none of the 1 labels"):
        picked(make_run(tmp_path / "bad", {"broken": b"no PNG"}), tmp_path / "nothing")


def test_a_torn_part_costs_its_images_only(tmp_path, run, monkeypatch):
    read = RunFolder.read_part
    bad = RunFolder(run).parts("labels")[0]
    lost = set(read(RunFolder(run), "labels", bad, ["image_id"])["image_id"].to_pylist())

    def torn(self, kind, name, columns=None):
        if self.uri == run and name == bad and "label_png" in (columns or ()):
            raise OSError("Corrupt snappy compressed data")
        return read(self, kind, name, columns)

    monkeypatch.setattr(RunFolder, "read_part", torn)
    record = picked(run, tmp_path / "out", budget=99)
    assert record["broken"] == dict.fromkeys(lost, "Corrupt snappy compressed data")
    assert {p["image_id"] for p in record["picks"]} == LABELS.keys() - lost and len(lost) == 3
    whole = make_run(tmp_path / "whole", LABELS)
    record = picked(whole, tmp_path / "compared", budget=99, compare=run)
    assert len(record["picks"]) == len(LABELS) and record["not_compared"] == 3


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"to": "s3://bucket/out"}, "to must be a folder on this machine"),
        ({"to": "full"}, "to must be a folder that is empty"),
        ({"image_prefix": "s3://bucket/"}, "image_prefix must be left out for voc"),
        ({"images": "link"}, "images must be copy or none, where images are no files"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_run_is_measured(
    tmp_path, monkeypatch, more, words
):
    run = make_run(tmp_path / "run", LABELS, photos="s3://bucket/photos")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    monkeypatch.setattr(exporting, "measure", lambda *_: pytest.fail("measured"))
    more = dict(more)
    to = more.pop("to", "out")
    with pytest.raises(ValueError, match=words):
        picked(run, to if "://" in to else tmp_path / to, **more)


def test_names_are_no_formulas_and_no_lines(tmp_path):
    names = ["=cmd|x", "a\nb", "<i>", "../../up"]
    record = picked(make_run(tmp_path / "run", dict.fromkeys(names, label(1, 0.5))), tmp_path / "o")
    with (tmp_path / "o/picks.csv").open(newline="") as file:
        listed = {row["image_id"] for row in csv.DictReader(file)}
    assert listed <= {"'=cmd|x", "a\nb", "<i>", "../../up"} and len(listed) == 3
    assert not any("\nb" in line for line in summary(record).split("next:"))


@pytest.mark.parametrize("format", ["labelstudio", "voc", "coco"])
def test_the_command_line_writes_images_and_tells_the_next_command(tmp_path, capsys, format):
    photo = tmp_path / "photos/a b.png"
    photo.parent.mkdir()
    Image.new("RGB", SIZE).save(photo)
    run = make_run(tmp_path / "run", {photo.name: label(1, 0.5)}, photos=str(photo.parent))
    to = tmp_path / "out"
    argv = ["review", "export", "--run", run, "--to", str(to), "--budget", "5"]
    assert cli.main([*argv, "--format", format]) == 0
    told = capsys.readouterr().out
    assert (
        told.startswith(f"1 of 1 images picked, in {to}")
        and "\nnext\n  1  " in told
        and "\n  2  " in told
    )
    assert "zsplg review import --masks " in told and f"--run {run} --out corrected/" in told
    assert sum(p.read_bytes() == photo.read_bytes() for p in to.rglob("*.png")) == 1
    assert cli.main([*argv, "--format", format]) == 2, "a folder that holds something"
    assert "to must be a folder that is empty" in capsys.readouterr().err
