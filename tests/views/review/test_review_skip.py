"""What is as the run labelled it, and is to be left out; the merge; credentials."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.views.reviewing import make_run
from zsplg_ray.config import ReviewImportConfig
from zsplg_ray.labels import Labels
from zsplg_ray.records import encode_png
from zsplg_ray.rundir import RunFolder
from zsplg_ray.views.review import importing
from zsplg_ray.views.review.importing import import_masks, next_command, summary

OWN, NEW = [[0, 1, 2]], [[3, 3, 0]]


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", {f"{n}.jpg": OWN for n in "abcd"})


def take(tmp_path, run, masks, **more):
    folder = tmp_path / f"masks {len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    for name, rows in masks.items():
        (folder / f"{name}.png").write_bytes(encode_png(np.array(rows)))
    out = str(tmp_path / "out")
    return import_masks(ReviewImportConfig(run=run, masks=str(folder), out=out, **more))


def maps(folder: Path):
    return {image.image_id: image.label_HW.tolist() for image in Labels(str(folder))}


def test_a_merge_without_any_correction_is_the_run(tmp_path, run):
    merged = str(tmp_path / "merged")
    result = take(tmp_path, run, {"a": OWN}, unchanged="skip", merged=merged)
    assert (result["skipped_unchanged"], result["corrected"]) == (1, 0)
    assert result["merged"] == merged and maps(tmp_path / "merged") == maps(tmp_path / "run")
    record = RunFolder(merged).read_run()
    assert record is not None and record["counts"]["corrected"] == 0
    assert not (tmp_path / "out/run.json").exists() and "then" not in summary(result).split()


def test_a_mask_painted_back_takes_the_correction_out(tmp_path, run):
    merged = str(tmp_path / "merged")
    take(tmp_path, run, {"a": NEW, "b": NEW}, merged=merged)
    result = take(tmp_path, run, {"a": OWN, "c": OWN}, unchanged="skip", merged=merged)
    assert (result["removed"], result["skipped_unchanged"], result["corrected"]) == (1, 2, 1)
    assert maps(tmp_path / "out") == {"b.jpg": NEW}
    assert maps(tmp_path / "merged")["a.jpg"] == OWN
    assert "1 earlier corrections were taken out" in summary(result)
    again = take(tmp_path, run, {"a": OWN}, unchanged="skip")
    assert again["removed"] == 0 and again["corrected"] == 1

    result = take(tmp_path, run, {"b": OWN}, unchanged="skip", merged=merged)
    assert (result["removed"], result["corrected"]) == (1, 0)
    assert maps(tmp_path / "merged") == maps(tmp_path / "run")
    record = RunFolder(str(tmp_path / "out")).read_run()
    assert record is not None and record["counts"]["labelled"] == 0
    assert take(tmp_path, run, {"b": NEW})["corrected"] == 1, "the folder can be added to"


def test_the_merge_opens_each_corrected_part_once_a_part_of_the_run(tmp_path, monkeypatch):
    names = [f"{n:03}" for n in range(100)]
    run = make_run(tmp_path / "run", {f"{n}.jpg": OWN for n in names}, per_part=100)
    read, opened = RunFolder.read_part, Counter()

    def counted(self, kind, name, columns=None):
        if self.uri == str(tmp_path / "out") and columns == ["label_png", "score_png"]:
            opened[name] += 1
        return read(self, kind, name, columns)

    monkeypatch.setattr(RunFolder, "read_part", counted)
    take(tmp_path, run, dict.fromkeys(names, NEW), merged=str(tmp_path / "merged"))
    assert set(maps(tmp_path / "merged")) == {f"{n}.jpg" for n in names}
    assert all(rows == NEW for rows in maps(tmp_path / "merged").values())
    assert len(opened) > 20 and set(opened.values()) == {1}


def test_nothing_told_has_credentials(tmp_path, run, monkeypatch):
    folders = {"run": run, "out": str(tmp_path / "out"), "merged": str(tmp_path / "merged")}
    secret = {name: f"s3://me:word@bucket/{name}" for name in folders}

    def here(uri):
        return next((folders[n] for n, s in secret.items() if s == uri), uri)

    labels, folder = importing.Labels, importing.RunFolder
    monkeypatch.setattr(importing, "Labels", lambda uri, **more: labels(here(uri), **more))
    monkeypatch.setattr(importing, "RunFolder", lambda uri: folder(here(uri)))
    masks = tmp_path / "masks"
    masks.mkdir()
    (masks / "a.png").write_bytes(encode_png(np.array(NEW)))
    run, out, merged = secret.values()
    config = ReviewImportConfig(masks=str(masks), run=run, out=out, merged=merged)
    result = import_masks(config)
    assert result["run"] == "s3://bucket/run" and result["merged"] == "s3://bucket/merged"
    assert "word" not in json.dumps(result) + summary(result) + next_command(result)
