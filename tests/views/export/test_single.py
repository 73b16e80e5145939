"""What is particular to one format."""

import io
import json
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from tests.views.export.readers import coco
from tests.views.export.runs import ODD, blobs, put_run
from zsplg_ray.masks import open_truth
from zsplg_ray.rundir import RunFolder
from zsplg_ray.sources import list_images
from zsplg_ray.views.export import huggingface, write_export
from zsplg_ray.views.export.regions import regions
from zsplg_ray.views.export.yolo import _line
from zsplg_ray.vocab import ClassList, class_list

MAPS = {i: blobs((24, 32), n) for n, i in enumerate(["a.png", "b c.png", "d/e.png"])}


@pytest.fixture
def run(tmp_path):
    return put_run(tmp_path / "in", MAPS)


def read_json(path: Path):
    return json.loads(path.read_text("utf-8"))


# UniMatch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", ["copy", "link", "none"])
def test_split_files_name_images_wherever_they_are(run, tmp_path, images):
    out = tmp_path / "o u t"
    write_export(run, "unimatch", str(out), images=images)
    split = str(out / "train.txt")
    listed = list_images(split).to_pylist()
    truth = open_truth(split)
    assert len(listed) == len(truth) == 3
    drawn = [truth.read(row["image_id"]) for row in listed]
    assert all(any((d == m).all() for m in MAPS.values()) for d in drawn)
    assert all(Path(row["uri"]).is_file() for row in listed)
    assert any(255 in d for d in drawn)


def test_the_split_file_and_its_classes_are_what_train_takes(tmp_path):
    classes = ClassList.of(["cat", "dog"])
    run = put_run(tmp_path / "in", {"a.png": np.ones((3, 3), np.uint8)}, classes)
    result = write_export(run, "unimatch", str(tmp_path / "out"))
    assert class_list(str(tmp_path / "out" / "classes.txt")).names == classes.names
    assert f"--labeled {tmp_path}/out/train.txt --classes {tmp_path}/out/classes.txt" in str(
        result["next"]
    )


def test_an_address_that_no_split_file_can_hold_is_left_out(run, tmp_path):
    part = run.folder.parts("labels")[0]
    table = run.folder.read_part("labels", part)
    uris = ["/x/a\nb.png", *table["uri"].to_pylist()[1:]]
    changed = table.set_column(1, "uri", pa.array(uris))
    run.folder.write_part("labels", part, changed, {})
    result = write_export(type(run)(run.folder.uri), "unimatch", str(tmp_path / "o"), images="none")
    assert result["left_out"] == {"unfit": 1} and result["images"] == 2
    assert len((tmp_path / "o" / "train.txt").read_text().splitlines()) == 2


# COCO --------------------------------------------------------------------------------------------


def test_without_its_ignored_pixels_a_coco_file_has_background_there(run, tmp_path):
    write_export(run, "coco", str(tmp_path / "out"))
    file = tmp_path / "out/annotations/instances_train.json"
    assert 255 in coco(tmp_path / "out")["a"]
    data = read_json(file)
    for image in data["images"]:
        del image["ignore_rle"]
    file.write_text(json.dumps(data))
    assert (
        open_truth(str(file)).read("a") == np.where(MAPS["a.png"] == 255, 0, MAPS["a.png"])
    ).all()


def test_a_class_can_be_one_annotation(run, tmp_path):
    result = write_export(run, "coco", str(tmp_path / "out"), instances="classes")
    present = [set(np.unique(m).tolist()) - {0, 255} for m in MAPS.values()]
    assert result["instances"] == sum(map(len, present))
    assert (coco(tmp_path / "out")["d/e"] == MAPS["d/e.png"]).all()


def test_connected_parts_are_things_and_whole_classes_are_stuff(run, tmp_path):
    for instances, is_thing in (("components", 1), ("classes", 0)):
        out = tmp_path / instances
        write_export(run, "coco-panoptic", str(out), instances=instances)
        listed = read_json(out / "annotations/panoptic_train.json")["categories"]
        assert {c["isthing"] for c in listed} == {is_thing}


def test_more_segments_than_a_channel_counts_have_ids_of_three(tmp_path):
    label_HW = np.zeros((60, 60), np.uint8)
    label_HW[::2, ::2] = 1
    run = put_run(tmp_path / "in", {"a.png": label_HW})
    assert write_export(run, "coco-panoptic", str(tmp_path / "out"))["instances"] == 900
    with Image.open(tmp_path / "out/annotations/panoptic_train/a.png") as image:
        assert image.getpixel((58, 58)) == (900 % 256, 900 // 256, 0)


# YOLO --------------------------------------------------------------------------------------------


def test_classes_count_from_0_and_images_without_labels_have_an_empty_file(tmp_path):
    maps = {"a.png": np.zeros((4, 4), np.uint8), "b.png": np.eye(4, dtype=np.uint8)}
    run = put_run(tmp_path / "in", maps)
    write_export(run, "yolo-seg", str(tmp_path / "out"))
    assert (tmp_path / "out/labels/train/a.txt").read_text() == ""
    assert (tmp_path / "out/labels/train/b.txt").read_text() == "0 0 0 0.75 0.75 0 0\n"
    data = yaml.safe_load((tmp_path / "out/data.yaml").read_text("utf-8"))
    assert data["train"] == data["val"] == "images/train" and data["names"][0] == ODD.names[1]


def test_polygons_keep_holes_and_cut_no_pixel_off_at_any_size():
    for size_hw in ((9, 27), (97, 113), (3000, 11)):
        rng = np.random.default_rng(list(size_hw))
        label_HW = (rng.random(size_hw) < 0.6).astype(np.uint8)
        label_HW[1:-1:3, 1:-1] = 1
        drawn_HW = np.zeros_like(label_HW)
        for region in regions(label_HW, "components"):
            share_P2 = np.array(_line(region, size_hw).split()[1:], np.float32).reshape(-1, 2)
            point_P2 = (share_P2 * np.array(size_hw[::-1], np.float32)).astype(np.int32)
            cv2.fillPoly(drawn_HW, [point_P2], 1)
        assert (drawn_HW == label_HW).all()


# Label Studio ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "/data/local-files/?d=b%20c.png"),
        ({"images": "copy"}, "/data/local-files/?d=out/images/b%20c.png"),
        ({"image_prefix": "s3://b/photos/"}, "s3://b/photos/b c.png"),
        ({"image_prefix": "azure-blob://c/", "images": "copy"}, "azure-blob://c/images/b c.png"),
        ({"image_prefix": "/data/local-files/?d=p/"}, "/data/local-files/?d=p/b%20c.png"),
        ({"image_prefix": "http://h/", "images": "copy"}, "http://h/images/b%20c.png"),
    ],
)
def test_tasks_say_where_images_are(run, tmp_path, options: dict[str, str], expected):
    write_export(run, "labelstudio", str(tmp_path / "out"), **options)  # type: ignore[arg-type]
    tasks = read_json(tmp_path / "out/tasks.json")
    assert expected in [task["data"]["image"] for task in tasks]
    predictions = {t["data"]["image_id"]: t["predictions"][0] for t in tasks}
    assert "score" not in predictions["a.png"], "a score that is not a number is no score"
    assert predictions["b c.png"]["score"] == 0.5
    assert predictions["b c.png"]["model_version"] == "zsplg zeroshot"
    ids = [r["id"] for p in predictions.values() for r in p["result"]]
    assert len(ids) == len(set(ids)) > 10


# Hugging Face ------------------------------------------------------------------------------------

GOLDEN = (
    '{"info": {"features": {"image": {"_type": "Image"}, "label": {"_type": "Image"}, '
    '"image_id": {"dtype": "string", "_type": "Value"}, "width": {"dtype": "int32", "_type": '
    '"Value"}, "height": {"dtype": "int32", "_type": "Value"}, "source": {"dtype": "string", '
    '"_type": "Value"}, "confidence": {"dtype": "float32", "_type": "Value"}}}}'
)
"""Metadata that datasets 5.2.0 was seen to read as two columns of images and five of values."""


def test_parquet_tells_datasets_its_features_and_pandas_reads_it(run, tmp_path):
    write_export(run, "huggingface", str(tmp_path / "out"))
    (file,) = (tmp_path / "out/data").iterdir()
    assert file.name == "train-00000-of-00001.parquet"
    assert pq.read_schema(file).metadata[b"huggingface"].decode() == GOLDEN
    frame = pq.read_table(file).to_pandas().set_index("image_id")
    with Image.open(io.BytesIO(frame.loc["a.png", "image"]["bytes"])) as image:
        assert image.size == (32, 24) == tuple(frame.loc["a.png", ["width", "height"]])
    head = (tmp_path / "out/README.md").read_text("utf-8").split("---\n")[1]
    info = yaml.safe_load(head)["dataset_info"]
    assert info["splits"] == [
        {"name": "train", "num_bytes": info["dataset_size"], "num_examples": 3}
    ]
    assert [f["name"] for f in info["features"]] == pq.read_schema(file).names


def test_large_sets_are_sharded_and_can_do_without_images(run, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 1)
    monkeypatch.setattr(huggingface, "GROUP_BYTES", 1)
    result = write_export(run, "huggingface", str(tmp_path / "out"), images="none")
    names = sorted(p.name for p in (tmp_path / "out/data").iterdir())
    assert names == [f"train-0000{i}-of-00003.parquet" for i in range(3)]
    assert result["shards"] == 3
    table = pq.read_table(tmp_path / "out/data")
    assert "image" not in table.column_names and table.num_rows == 3


# From an object store ----------------------------------------------------------------------------


def test_a_run_and_images_in_a_bucket_are_exported(tmp_path, bucket):
    local = put_run(tmp_path / "in", {"a.jpg": MAPS["a.png"]})
    far = RunFolder(bucket.uri("run"))
    row = local.folder.read_part("labels", local.folder.parts("labels")[0])
    bucket_image = RunFolder(bucket.uri("images"))
    bucket_image.write_bytes("a.png", Path(local["a"].uri).read_bytes())
    row = row.set_column(1, "uri", pa.array([bucket.uri("images/a.png")]))
    far.write_part("labels", local.folder.parts("labels")[0], row, {})
    far.write_run(local.run or {})
    result = write_export(type(local)(far.uri), "voc", str(tmp_path / "out"))
    assert result["images"] == 1
    assert (open_truth(str(tmp_path / "out")).read("a") == MAPS["a.png"]).all()
    assert bucket.uri("run").split("?")[0] in read_json(tmp_path / "out/export.json")["run"]
