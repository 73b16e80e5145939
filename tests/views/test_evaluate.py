"""Labels against truth: exact numbers from every kind of source, and what is not compared."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from tests.student.models import write_model
from zsplg_ray.config import EvaluateConfig
from zsplg_ray.images import decode_image
from zsplg_ray.records import LABELS, decode_png, encode_png
from zsplg_ray.rundir import RunFolder, part_name
from zsplg_ray.shapes.scenes import write_voc
from zsplg_ray.student.checkpoint import load_student, read_weights
from zsplg_ray.student.predict import Predictor
from zsplg_ray.views.evaluate import evaluate, open_labels, table
from zsplg_ray.vocab import class_list

CLASSES = class_list("cat,dog")

TRUTH = {
    "a": [[0, 1, 1, 255], [0, 0, 2, 2]],
    "sub/b": [[1, 1]],
    "not labelled": [[0, 0]],
}
LABEL = {
    "a.jpg": [[0, 1, 0, 1], [0, 255, 2, 1]],
    "sub/b.JPG": [[1, 2]],
    "without truth.png": [[2, 2, 2]],
}
CONFUSION = [[2, 0, 0, 1], [1, 2, 1, 0], [0, 1, 1, 0]]
"""Rows: truth; columns: background, cat, dog, left open. Counted by hand."""


def png_folder(folder: Path, maps) -> str:
    for name, rows in maps.items():
        file = folder / (name.rsplit(".", 1)[0] + ".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_png(np.array(rows)))
    return str(folder)


def put_labels(folder: Path, maps, classes=CLASSES) -> None:
    rows = [
        {"image_id": i, "label_png": m if isinstance(m, bytes) else encode_png(np.array(m))}
        for i, m in maps.items()
    ]
    meta = {"classes": classes.to_dict()} if classes else {}
    parts = RunFolder(str(folder))
    parts.write_part("labels", part_name(maps), pa.Table.from_pylist(rows, schema=LABELS), meta)


def put_run(folder: Path, labels_state="complete", state="complete") -> None:
    keys = {key: {} for key in ("config", "resolved", "weights")}
    run = {**keys, "classes": CLASSES.to_dict(), "labels_state": labels_state, "state": state}
    RunFolder(str(folder)).write_run(run)


@pytest.fixture
def truth(tmp_path):
    return png_folder(tmp_path / "truth", TRUTH)


@pytest.fixture
def run(tmp_path):
    """A run whose labels lie in two parts."""
    folder = tmp_path / "run"
    (first, label), *rest = LABEL.items()
    put_labels(folder, {first: label})
    put_labels(folder, dict(rest))
    put_run(folder)
    return folder


def scores(labels, truth, **config):
    return evaluate(EvaluateConfig(labels=str(labels), truth=str(truth), **config))


def check_by_hand(result):
    assert result["confusion"] == CONFUSION
    assert result["iou"] == {"background": 2 / 4, "cat": 2 / 5, "dog": 1 / 3}
    assert result["miou"] == pytest.approx((2 / 4 + 2 / 5 + 1 / 3) / 3, abs=1e-15)
    assert result["precision_by_class"] == {"background": 2 / 3, "cat": 2 / 3, "dog": 1 / 2}
    assert result["recall_by_class"] == {"background": 2 / 3, "cat": 2 / 4, "dog": 1 / 2}
    assert (result["pixel_accuracy"], result["coverage"], result["pixels"]) == (5 / 9, 8 / 9, 9)
    counted = (result["images"], result["without_truth"], result["without_label"])
    assert counted == (2, 1, 1)
    assert result["classes"] == ["background", "cat", "dog"]
    assert json.loads(json.dumps(result)) == result


def test_a_run(run, truth):
    check_by_hand(scores(run, truth))


def test_a_run_at_a_uri(run, truth):
    check_by_hand(scores(run.as_uri(), truth))


def test_labels_without_their_run(run, truth):
    (run / "run.json").unlink()
    check_by_hand(scores(run, truth))
    check_by_hand(scores(run / "labels", truth))


def test_a_folder_of_png_masks(tmp_path, truth):
    masks = png_folder(tmp_path / "masks", LABEL)
    check_by_hand(scores(masks, truth, classes="cat,dog"))


def test_the_truth_may_bring_the_classes(tmp_path, run):
    put_labels(tmp_path / "truth", TRUTH)
    check_by_hand(scores(png_folder(tmp_path / "masks", LABEL), tmp_path / "truth"))
    check_by_hand(scores(run, tmp_path / "truth"))


def test_a_run_that_was_interrupted_is_scored_as_far_as_it_got(run, truth):
    put_run(run, state="interrupted")
    check_by_hand(scores(run, truth))


def test_an_image_that_stands_twice_counts_once(run, truth):
    twice = {i: LABEL[i] for i in ("without truth.png", "sub/b.JPG")}
    put_labels(run, twice)
    assert len(RunFolder(str(run)).parts("labels")) == 3
    check_by_hand(scores(run, truth))


def test_only_what_is_compared_is_read(tmp_path, truth):
    put_labels(tmp_path / "run", {**LABEL, "without truth.png": b"broken"})
    check_by_hand(scores(tmp_path / "run", truth))


def test_leaving_every_pixel_open_scores_nothing(tmp_path, truth):
    put_labels(tmp_path / "run", {"a": np.full((2, 4), 255)})
    result = scores(tmp_path / "run", truth)
    assert (result["miou"], result["coverage"], result["pixel_accuracy"]) == (0, 0, 0)
    assert result["precision_by_class"] == {"background": None, "cat": None, "dog": None}


# Refusals ----------------------------------------------------------------------------------------


def refusal(labels, truth, **config) -> str:
    with pytest.raises(ValueError) as caught:
        scores(labels, truth, **config)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_half_relabelled_runs_are_refused(run, truth):
    put_run(run, labels_state="relabelling")
    assert "labels must be whole, got a half relabelled run; run `zsplg relabel" in refusal(
        run, truth
    )


def test_numbers_without_a_meaning_are_refused(tmp_path, truth):
    masks = png_folder(tmp_path / "masks", LABEL)
    assert refusal(masks, truth).startswith("classes must be given, got nothing; add --classes")


def test_numbers_with_another_meaning_are_refused(tmp_path, run):
    put_labels(tmp_path / "truth", TRUTH, class_list("dog,cat"))
    message = refusal(run, tmp_path / "truth")
    assert message.startswith("classes must be those of the truth, where class 1 is dog, got cat;")
    told = refusal(run, png_folder(tmp_path / "pngs", TRUTH), classes="cat,dog,cow")
    assert told.startswith("classes must be those of the labels, where class 3 is nothing, got cow")


def test_aliases_are_no_other_meaning(tmp_path, run):
    (tmp_path / "classes.txt").write_text("cat: kitten\ndog\n")
    put_labels(tmp_path / "truth", TRUTH, class_list(str(tmp_path / "classes.txt")))
    check_by_hand(scores(run, tmp_path / "truth"))


def test_maps_that_do_not_fit_are_told_with_their_image(tmp_path, truth):
    put_labels(tmp_path / "size", {"a": [[0, 1]]})
    assert "(1, 2)" in (message := refusal(tmp_path / "size", truth)) and "image a" in message
    put_labels(tmp_path / "index", {"a": np.full((2, 4), 3)})
    assert "class indices below 3" in refusal(tmp_path / "index", truth)


def test_nothing_to_compare_shows_how_both_are_called(tmp_path, truth):
    put_labels(tmp_path / "run", {"x/other.jpg": [[0]]})
    message = refusal(tmp_path / "run", truth)
    assert "labels such as 'x/other.jpg'" in message and "masks are called such as 'a'" in message


def test_sources_without_labels(tmp_path, truth):
    assert "labels must be an existing folder" in refusal(tmp_path / "none", truth)
    (tmp_path / "empty").mkdir()
    assert " must be " in refusal(tmp_path / "empty", truth)
    put_run(tmp_path / "bare")
    assert "got no labels" in refusal(tmp_path / "bare", truth, classes="cat,dog")
    assert open_labels(str(tmp_path / "bare")).ids == []


# For the terminal --------------------------------------------------------------------------------


def test_the_table(run, truth):
    lines = table(scores(run, truth)).splitlines()
    assert lines[0].split() == ["class", "IoU", "precision", "recall"]
    assert [line.split() for line in lines[1:4]] == [
        ["background", "0.500", "0.667", "0.667"],
        ["cat", "0.400", "0.667", "0.500"],
        ["dog", "0.333", "0.500", "0.500"],
    ]
    assert lines[-1] == (
        "miou 0.4111  pixel_accuracy 0.5556  coverage 0.8889  over 2 images "
        "(1 without truth, 1 unlabelled)"
    )
    assert len({len(line) for line in lines[:4]}) == 1, "columns do not line up"


def test_the_table_of_classes_that_never_occur(tmp_path):
    put_labels(tmp_path / "run", {"a": [[0]]})
    truth = png_folder(tmp_path / "truth", {"a": [[255]]})
    text = table(scores(tmp_path / "run", truth))
    assert "miou -  pixel_accuracy -  coverage -  over 1 images" in text
    assert text.splitlines()[2].split() == ["cat", "-", "-", "-"]


# Models ------------------------------------------------------------------------------------------

SCENES = 4


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_voc(folder, SCENES, seed=0)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "best.pt")


def as_masks(model, scenes, out) -> str:
    """What the model says of the scenes, as a folder of PNGs."""
    predictor = Predictor(load_student(model))
    for path in (scenes / "JPEGImages").iterdir():
        label_HW, _ = predictor.predict(decode_image(path.read_bytes()))
        out.mkdir(exist_ok=True)
        (out / f"{path.stem}.png").write_bytes(encode_png(label_HW))
    return str(out)


def test_a_model_scores_as_its_label_maps_wherever_the_images_are_listed(tmp_path, scenes, model):
    expected = scores(as_masks(model, scenes, tmp_path / "masks"), scenes, classes="shapes")
    assert scores(model, scenes) == expected and expected["images"] == SCENES
    masks = scenes / "SegmentationClass"
    assert scores(model, masks, images=str(scenes)) == expected
    names = sorted(path.stem for path in masks.iterdir())
    lines = [f"JPEGImages/{name}.jpg SegmentationClass/{name}.png" for name in names]
    (tmp_path / "val.txt").write_text("\n".join(lines[1:]))
    some = scores(model, tmp_path / "val.txt", root=str(scenes))
    assert (some["images"], some["without_truth"], some["without_label"]) == (SCENES - 1, 0, 0)
    run = tmp_path / "training"
    run.mkdir()
    shutil.copy(model, run / "best.pt")
    (run / "train.json").write_text("{}")
    assert scores(run, scenes, device="cpu") == expected
    (masks / f"{names[0]}.png").rename(tmp_path / "away.png")
    fewer = scores(model, scenes)
    (tmp_path / "away.png").rename(masks / f"{names[0]}.png")
    assert (fewer["images"], fewer["without_truth"]) == (SCENES - 1, 1)
    assert fewer["confusion"] == some["confusion"]


def test_a_model_without_class_names_takes_those_given_or_of_the_truth(tmp_path, scenes, model):
    plain = str(tmp_path / "plain.pth")
    torch.save(read_weights(model).state, plain)
    assert "classes must be given" in refusal(plain, scenes)
    expected = scores(model, scenes)
    assert scores(plain, scenes, classes="shapes") == expected
    truth = {p.stem: decode_png(p.read_bytes()) for p in (scenes / "SegmentationClass").iterdir()}
    put_labels(tmp_path / "truth", truth, class_list("shapes"))
    assert scores(plain, tmp_path / "truth", images=str(scenes)) == expected
    assert "classes must be 9 with background" in refusal(plain, scenes, classes="cat,dog")


def test_models_and_images_that_do_not_fit_are_refused(tmp_path, scenes, model):
    masks = scenes / "SegmentationClass"
    assert refusal(model, masks).startswith("images must be given for a model, got nothing; add")
    assert "labels must be something that exists" in refusal(tmp_path / "none.pt", scenes)
    (tmp_path / "train.json").write_text("{}")
    assert "a folder with best.pt or last.pt" in refusal(tmp_path, scenes)
    put_labels(tmp_path / "truth", {"scene_000000": [[0]]})
    told = refusal(model, tmp_path / "truth", images=str(scenes))
    assert "where class 1 is circle, got cat" in told or "where class 1 is cat, got circle" in told
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "scene_000000.jpg").write_bytes(b"no image")
    told = refusal(model, masks, images=str(tmp_path / "images"))
    assert "(image scene_000000.jpg)" in told
