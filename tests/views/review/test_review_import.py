"""What comes back: each image once, what is of no use is counted, readers take the folder as is."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.views.reviewing import CLASSES, annotation, make_run
from zsplg_ray import cli
from zsplg_ray.config import EvaluateConfig, ReviewImportConfig, TrainConfig
from zsplg_ray.label_studio import encode_brush
from zsplg_ray.labels import Labels
from zsplg_ray.masks import open_truth
from zsplg_ray.records import encode_png
from zsplg_ray.rundir import RunFolder
from zsplg_ray.sources import list_images
from zsplg_ray.student.data import TrainingData
from zsplg_ray.views.evaluate import evaluate
from zsplg_ray.views.export import write_export
from zsplg_ray.views.review.corrected import shard_of
from zsplg_ray.views.review.importing import import_masks, next_command, summary
from zsplg_ray.vocab import class_list

RUN = {name: [[0, 1, 2], [0, 1, 255]] for name in ("a.jpg", "b.jpg", "sub/c.jpg", "d.jpg")}


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", RUN)


def pngs(folder: Path, **maps) -> str:
    for name, rows in maps.items():
        data = rows if isinstance(rows, bytes) else encode_png(np.array(rows))
        file = folder / f"{name.replace('__', '/')}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return str(folder)


def take(run, masks, out, **more):
    return import_masks(ReviewImportConfig(run=run, masks=str(masks), out=str(out), **more))


def maps(out):
    return {image.image_id: image.label_HW.tolist() for image in Labels(str(out))}


def recorded(out):
    run = RunFolder(str(out)).read_run()
    assert run is not None
    return run


def rows(out, kind):
    table = RunFolder(str(out)).read(kind)
    return table.to_pylist() if table is not None else []


def files(folder: Path):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


NEW = [[3, 3, 0], [0, 255, 0]]


def test_importing_again_doubles_nothing_and_more_is_added(tmp_path, run):
    out = tmp_path / "out"
    first = pngs(tmp_path / "first", a=NEW, sub__c=RUN["a.jpg"])
    result = take(run, first, out)
    assert (result["added"], result["changed"], result["unchanged"]) == (2, 1, 1)
    assert maps(out) == {"a.jpg": NEW, "sub/c.jpg": RUN["a.jpg"]}
    before = files(out / "labels")
    made = recorded(out)
    result = take(run, first, out)
    assert (result["added"], result["replaced"], result["same"]) == (0, 0, 2)
    assert files(out / "labels") == before
    assert recorded(out)["labels_fingerprint"] == made["labels_fingerprint"]

    second = pngs(tmp_path / "second", a=[[1, 1, 1], [1, 1, 1]], b=NEW)
    result = take(run, second, out)
    assert (result["added"], result["replaced"], result["same"]) == (1, 1, 0)
    assert result["corrected"] == 3
    assert maps(out)["a.jpg"] == [[1, 1, 1], [1, 1, 1]]
    assert recorded(out)["labels_fingerprint"] != made["labels_fingerprint"]
    assert sorted(row["image_id"] for row in rows(out, "labels")) == ["a.jpg", "b.jpg", "sub/c.jpg"]


def test_images_that_share_a_part_do_not_push_each_other_out(tmp_path):
    names = [f"{n}" for n in range(500) if shard_of(f"{n}.jpg") == shard_of("0.jpg")][:3]
    run = make_run(tmp_path / "run", {f"{n}.jpg": RUN["a.jpg"] for n in names})
    for n, name in enumerate(names):
        take(run, pngs(tmp_path / f"masks {n}", **{name: NEW}), tmp_path / "out")
    assert maps(tmp_path / "out") == {f"{n}.jpg": NEW for n in names}
    assert len(list((tmp_path / "out/labels").iterdir())) == 1 and len(names) == 3


def test_an_import_that_was_killed_leaves_whole_parts_and_the_next_ends_alike(
    tmp_path, run, monkeypatch
):
    masks = pngs(tmp_path / "masks", a=NEW, b=NEW, d=NEW)
    take(run, masks, tmp_path / "whole")
    write, left = RunFolder.write_bytes, [2]

    def dies(self, name, data):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        write(self, name, data)

    monkeypatch.setattr(RunFolder, "write_bytes", dies)
    with pytest.raises(KeyboardInterrupt):
        take(run, masks, tmp_path / "out")
    monkeypatch.undo()
    assert len(maps(tmp_path / "out")) == 2
    assert take(run, masks, tmp_path / "out")["corrected"] == 3
    assert files(tmp_path / "out/labels") == files(tmp_path / "whole/labels")


def test_masks_of_no_use_are_told_and_do_not_stop_the_others(tmp_path, run):
    masks = pngs(
        tmp_path / "masks", a=[[1, 1]], b=NEW, sub__c=b"no PNG", d=[[9, 0, 0]] * 2, zebra=NEW
    )
    out = tmp_path / "out"
    result = take(run, masks, out)
    assert maps(out) == {"b.jpg": NEW}
    assert (result["failed"], result["unmatched"]) == (3, 1)
    told = {e["image"]: e["error"] for e in result["errors"]}
    assert "mask must be of the image's size 3 x 2, got 2 x 1" in told["a.jpg"]
    assert "must be a PNG" in told["sub/c.jpg"] and "below 4, or 255, got 9" in told["d.jpg"]
    assert {row["image_id"] for row in rows(out, "errors")} == {
        "a.jpg",
        "sub/c.jpg",
        "d.jpg",
        "zebra",
    }
    text = summary(result)
    assert "3 could not be used" in text and "zebra" in text and "zsplg train --labeled" in text
    take(run, pngs(tmp_path / "good", a=NEW), out)
    assert not rows(out, "errors"), "errors tell of the last import"
    assert set(maps(out)) == {"a.jpg", "b.jpg"}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"zebra": NEW}, "masks must be of images of the run, got 1 others, such as 'zebra'"),
        ({"a": [[1]]}, "masks must be of use, got 1 of which none is; mend them (a.jpg: mask"),
    ],
)
def test_nothing_is_written_if_none_is_good(tmp_path, run, names, words):
    with pytest.raises(ValueError) as caught:
        take(run, pngs(tmp_path / "masks", **names), tmp_path / "out")
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_unchanged_masks_may_be_left_out(tmp_path, run):
    masks = pngs(tmp_path / "masks", a=RUN["a.jpg"], b=NEW)
    result = take(run, masks, tmp_path / "out", unchanged="skip")
    assert maps(tmp_path / "out") == {"b.jpg": NEW}
    assert (result["unchanged"], result["skipped_unchanged"]) == (1, 1)


def test_coco_classes_go_by_name(tmp_path, run):
    square = [[0, 0, 2, 0, 2, 2, 0, 2]]
    names = {7: "red panda", 8: "CAT", 9: "unsure", 10: "horse"}
    images = [{"id": i, "file_name": n, "width": 3, "height": 2} for i, n in enumerate(sorted(RUN))]
    drawn = [(0, 7), (1, 8), (2, 10), (3, 9)]  # a.jpg, b.jpg, d.jpg, sub/c.jpg
    data = {
        "images": images,
        "categories": [{"id": k, "name": name} for k, name in names.items()],
        "annotations": [
            {"id": n, "image_id": i, "category_id": k, "segmentation": square}
            for n, (i, k) in enumerate(drawn)
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(data))
    result = take(run, tmp_path / "coco.json", tmp_path / "out")
    found = maps(tmp_path / "out")
    assert found["a.jpg"] == [[3, 3, 0]] * 2 and found["b.jpg"] == [[1, 1, 0]] * 2
    assert found["sub/c.jpg"] == [[255, 255, 0]] * 2 and "d.jpg" not in found
    assert "got horse" in result["errors"][0]["error"]


def test_what_is_drawn_in_coco_on_pixels_without_a_label_counts(tmp_path, run):
    write_export(Labels(run), "coco", str(tmp_path / "coco"), images="none")
    file = tmp_path / "coco/annotations/instances_train.json"
    data = json.loads(file.read_text())
    drawn = {"segmentation": [[2, 1, 3, 1, 3, 2, 2, 2]], "category_id": 3, "id": 99}
    data["annotations"].append({**drawn, "image_id": data["images"][0]["id"]})
    file.write_text(json.dumps(data))
    take(run, file, tmp_path / "out")
    assert maps(tmp_path / "out")["a.jpg"] == [[0, 1, 2], [0, 1, 3]]
    assert maps(tmp_path / "out")["b.jpg"] == [[0, 1, 2], [0, 1, 255]]


# Label Studio ------------------------------------------------------------------------------------


def region(kind, value, name, size_hw=(20, 30), **more):
    size = {"original_width": size_hw[1], "original_height": size_hw[0], "image_rotation": 0}
    return {"type": kind, "value": {**value, kind: [name]}, **size, **more}


def brush(mask_HW, name, **more):
    mask_HW = np.asarray(mask_HW)
    rle = {"format": "rle", "rle": encode_brush(mask_HW)}
    return region("brushlabels", rle, name, mask_HW.shape, **more)


def task(image_id, *annotations, **data):
    return {"id": 1, "data": {"image_id": image_id, **data}, "annotations": list(annotations)}


@pytest.fixture
def wide(tmp_path):
    return make_run(tmp_path / "wide", {f"{n}.jpg": np.zeros((20, 30)) for n in "abcdef"})


def studio(tmp_path, run, *tasks):
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    result = take(run, tmp_path / "export.json", tmp_path / "out")
    return result, {i: np.array(m) for i, m in maps(tmp_path / "out").items()}


def area(y0, y1, x0, x1):
    mask_HW = np.zeros((20, 30), bool)
    mask_HW[y0:y1, x0:x1] = True
    return mask_HW


def test_the_newest_annotation_counts_and_skipped_ones_do_not(tmp_path, wide):
    def at(day, name, **more):
        when = f"2026-01-0{day}T00:00:00Z"
        return annotation([brush(area(0, 5, 0, 5), name)], updated_at=when, **more)

    result, found = studio(
        tmp_path,
        wide,
        task("a.jpg", at(2, "dog"), at(1, "cat"), at(3, "cat", was_cancelled=True)),
        task("b.jpg", at(1, "cat", was_cancelled=True)),
        task("c.jpg"),
        task("d.jpg", at(4, "cat")),
        task("d.jpg", at(3, "dog")),
        task("e.jpg", annotation([])),
        {"id": 9, "data": {"text": "no image"}, "annotations": [at(1, "cat")]},
    )
    assert found.keys() == {"a.jpg", "d.jpg", "e.jpg"}
    assert found["a.jpg"][0, 0] == 2 and found["d.jpg"][0, 0] == 1 and not found["e.jpg"].any()
    assert (result["cancelled"], result["not_annotated"], result["failed"]) == (1, 1, 1)
    assert "task 9" in result["errors"][0]["image"]


def test_shapes_are_drawn_in_their_order(tmp_path, wide):
    box = {"x": 10.0, "y": 50.0, "width": 20.0, "height": 25.0, "rotation": 0}
    turned = {"x": 50.0, "y": 50.0, "width": 20.0, "height": 10.0, "rotation": 90}
    corners = [[0, 0], [50, 0], [50, 50], [0, 50]]
    _, found = studio(
        tmp_path,
        wide,
        task("a.jpg", annotation([region("rectanglelabels", box, "dog")])),
        task("b.jpg", annotation([region("rectanglelabels", turned, "Red Panda")])),
        task("c.jpg", annotation([region("polygonlabels", {"points": corners}, "cat")])),
        task(
            "d.jpg",
            annotation(
                [
                    brush(area(0, 10, 0, 10), "cat"),
                    {"type": "choices", "value": {"choices": ["blurred"]}},
                    brush(area(5, 15, 5, 15), "dog"),
                    brush(area(9, 10, 9, 10), "ignore"),
                    brush(area(0, 1, 0, 1), "background"),
                ]
            ),
        ),
    )
    assert np.array_equal(found["a.jpg"], 2 * area(10, 15, 3, 9))
    assert np.array_equal(found["b.jpg"], 3 * area(10, 16, 13, 15))
    assert np.array_equal(found["c.jpg"], area(0, 10, 0, 15))
    want = np.zeros((20, 30), int)
    want[:10, :10], want[5:15, 5:15], want[9, 9], want[0, 0] = 1, 2, 255, 0
    assert np.array_equal(found["d.jpg"], want)


BAD = [
    (brush(area(0, 1, 0, 1), "horse"), "got horse"),
    (brush(np.ones((3, 3)), "cat"), "of the image's size 30 x 20, got 3 x 3"),
    (region("ellipselabels", {"x": 1}, "cat"), "got ellipselabels"),
    (region("brushlabels", {"format": "rle", "rle": [1, 2]}, "cat"), "end too early"),
    (region("brushlabels", {"format": "rle", "rle": "text"}, "cat"), "a list, got str"),
    (region("brushlabels", {"format": "rle", "rle": 10**9}, "cat"), "a list, got int"),
    (region("brushlabels", {"format": "png"}, "cat"), "brushes of format rle"),
    (region("polygonlabels", {"points": [[0, "x"]]}, "cat"), "of numbers"),
    (region("polygonlabels", {"points": [[0, float("nan")]] * 3}, "cat"), "finite"),
    (region("rectanglelabels", {"x": None}, "cat"), "finite"),
    (brush(area(0, 1, 0, 1), "cat", image_rotation=90), "not turned"),
    ({"type": "brushlabels", "value": {"brushlabels": []}}, "one label each"),
    ({"type": ["x"], "value": 3}, "regions of"),
    ("text", "list of regions"),
]


def test_regions_of_no_use_cost_their_task_only(tmp_path, wide):
    for bad, words in BAD:
        tasks = task("a.jpg", annotation([bad])), task("b.jpg", annotation([]))
        (tmp_path / "export.json").write_text(json.dumps(tasks))
        result = take(wide, tmp_path / "export.json", tmp_path / "out")
        assert result["failed"] == 1 and words in result["errors"][0]["error"], (bad, result)
    assert set(maps(tmp_path / "out")) == {"b.jpg"}


def test_a_task_is_found_by_its_image_where_it_has_no_id(tmp_path, wide):
    def of(image):
        return {"id": 1, "data": {"image": image}, "annotations": [annotation([])]}

    result, found = studio(
        tmp_path,
        wide,
        of("/data/local-files/?d=photos/a.jpg"),
        of("s3://bucket/deep/b.jpg"),
        of("/data/upload/1/0a1b2c3d-c.jpg"),
        of("/data/upload/1/zebra.jpg"),
    )
    assert found.keys() == {"a.jpg", "b.jpg", "c.jpg"} and result["unmatched"] == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "Label Studio's tasks"),
        ('[{"image": "a.jpg", "tag": []}]', "not as JSON-MIN"),
        ("{", "a JSON file"),
        ("[" * 100_000, "a JSON file"),
        ('{"images": 3}', "masks must be a COCO file"),
        ('[{"data": {"image": "a.jpg"}}]', "a source with annotations"),
        ('[{"data": {"image": "a.jpg"}, "annotations": [{"result": 3}]}]', "a list called result"),
    ],
)
def test_files_that_are_none(tmp_path, wide, text, words):
    (tmp_path / "export.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        take(wide, tmp_path / "export.json", tmp_path / "out")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


# Readers -----------------------------------------------------------------------------------------


@pytest.fixture
def scenes(tmp_path):
    """A run over images that are there, two of them corrected."""
    labels = {}
    for n in range(4):
        image = tmp_path / "photos" / f"{n}.png"
        image.parent.mkdir(exist_ok=True)
        Image.new("RGB", (3, 2)).save(image)
        labels[f"{n}.png"] = RUN["a.jpg"]
    run = make_run(tmp_path / "run", labels)
    masks = pngs(tmp_path / "masks", **{"1": NEW, "2": NEW, "9": NEW, "0": [[1]]})
    result = take(run, masks, tmp_path / "out", merged=str(tmp_path / "merged"))
    (tmp_path / "out/preview.png").write_bytes((tmp_path / "photos/0.png").read_bytes())
    return run, result


def test_training_takes_the_folder_as_it_is(tmp_path, scenes):
    run, _ = scenes
    out = str(tmp_path / "out")
    assert list_images(out)["image_id"].to_pylist() == ["1.png", "2.png"]
    assert open_truth(out).classes == CLASSES
    data = TrainingData.open(
        TrainConfig(labeled=out, val=out, unlabeled=run, zeroshot=run, out=str(tmp_path / "model"))
    )
    assert data.classes == CLASSES and len(data.labelled) == len(data.validation) == 2
    assert data.truth.read("1.png").tolist() == NEW
    assert data.labelled["uri"].to_pylist() == ["/photos/1.png", "/photos/2.png"]
    masks = TrainConfig(
        labeled=str(tmp_path / "run"), labeled_masks=str(tmp_path / "merged"), out="m"
    )
    assert len(TrainingData.open(masks).labelled) == 3, "one of four is held out"


def test_scores_of_what_is_corrected_and_of_the_whole(tmp_path, scenes):
    run, result = scenes
    truth = str(tmp_path / "out")
    assert evaluate(EvaluateConfig(labels=truth, truth=truth))["miou"] == 1
    assert evaluate(EvaluateConfig(labels=run, truth=truth))["images"] == 2
    merged = Labels(str(tmp_path / "merged"))
    assert evaluate(EvaluateConfig(labels=result["merged"], truth=truth))["pixel_accuracy"] == 1
    assert [image.source for image in merged] == ["zeroshot", *["corrected"] * 2, "zeroshot"]
    assert merged["0.png"].label_png == Labels(run)["0.png"].label_png
    assert next_command(result).endswith(f"--zeroshot {tmp_path}/merged --out model/")


def test_other_folders_are_not_written_to(tmp_path, scenes):
    run, _ = scenes
    masks = tmp_path / "masks"
    before = files(tmp_path / "run")
    for out, words in (
        (run, "out must be a folder of `zsplg review import`, got one of `zsplg label`"),
        (tmp_path / "merged", "got one of a run"),
    ):
        with pytest.raises(ValueError, match=words):
            take(run, masks, out)
    for merged, words in (
        (run, "merged must be another folder than run"),
        (tmp_path / "out", "merged must be another folder than out"),
    ):
        with pytest.raises(ValueError, match=words):
            take(run, masks, tmp_path / "out", merged=str(merged))
    third = make_run(tmp_path / "third", {"x": [[1]]})
    with pytest.raises(ValueError, match="merged must be an empty folder"):
        take(run, masks, tmp_path / "new", merged=third)
    others = make_run(tmp_path / "others", {"1.png": NEW}, classes=class_list("tree,car,sky"))
    with pytest.raises(ValueError, match="classes must be those of the run"):
        take(others, masks, tmp_path / "out")
    assert files(tmp_path / "run") == before and not (tmp_path / "new").exists()


def test_the_command_line(tmp_path, run, capsys):
    masks = pngs(tmp_path / "masks", a=NEW, zebra=NEW)
    out = str(tmp_path / "out dir")
    argv = ["review", "import", "--masks", masks, "--run", run, "--out", out]
    assert cli.main(argv) == 0
    told = capsys.readouterr().out
    assert told.startswith("1 corrected masks (1 new); 1 in ")
    assert f"zsplg train --labeled '{out}' --unlabeled {run} --zeroshot {run}" in told
    assert cli.main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["same"] == 1
    assert cli.main([*argv[:-1], run]) == 2
    assert cli.main(["review", "imports"]) == 2
    assert "did you mean `review import`?" in capsys.readouterr().err
