"""The whole pipeline with every place in an object store: what people do, and how much is asked."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.cluster.training import SMALL
from tests.s3 import FaultyProxy
from zsplg_ray.cli import main
from zsplg_ray.masks import open_truth
from zsplg_ray.rundir import RunFolder
from zsplg_ray.shapes.scenes import write_voc
from zsplg_ray.sources import list_images, read_bytes
from zsplg_ray.storage import Place

IMAGES = 24
TINY = ["--sam", "shapes", "--clip", "shapes", "--sam.points-per-side", "4", "--quiet"]


@pytest.fixture(scope="module")
def store(module_bucket, tmp_path_factory):
    """A bucket with scenes/ in VOC layout, and everything else that a source may be."""
    local = tmp_path_factory.mktemp("world")
    write_voc(local / "scenes", IMAGES, seed=0)
    write_voc(local / "labelled", 8, seed=500)
    ids = sorted(path.stem for path in (local / "scenes/JPEGImages").iterdir())
    pairs = [f"JPEGImages/{i}.jpg SegmentationClass/{i}.png" for i in ids]
    (local / "lists").mkdir()
    (local / "lists/split.txt").write_text("\n".join(pairs))
    (local / "lists/coco.json").write_text(json.dumps(coco(ids)))
    (local / "lists/classes.txt").write_text("# ours\ncircle: disc\nsquare\n")
    scenes = module_bucket.uri("scenes")
    uris = [Place.parse(scenes).child(f"JPEGImages/{i}.jpg").uri for i in ids]
    data = [(local / f"scenes/JPEGImages/{i}.jpg").read_bytes() for i in ids]
    pq.write_table(pa.table({"image_id": ids, "uri": uris}), local / "lists/uris.parquet")
    table = pa.table({"image_id": ids, "bytes": data})
    pq.write_table(table, local / "lists/bytes.parquet", row_group_size=5)
    module_bucket.put(local / "scenes", "scenes")
    module_bucket.put(local / "labelled", "labelled")
    module_bucket.put(local / "lists", "lists")
    return module_bucket


def coco(ids: list[str]) -> dict:
    """A COCO file with one square in each image."""
    square = [2.0, 2.0, 12.0, 2.0, 12.0, 12.0, 2.0, 12.0]
    return {
        "images": [
            {"id": n, "file_name": f"{i}.jpg", "width": 64, "height": 64} for n, i in enumerate(ids)
        ],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "segmentation": [square], "iscrowd": 0}
            for n in range(len(ids))
        ],
        "categories": [{"id": 1, "name": "square"}],
    }


def test_every_kind_of_source_of_images(store):
    scenes, lists = store.uri("scenes"), Place.parse(store.uri("lists"))
    images = Place.parse(scenes).child("JPEGImages")
    sources = [
        (scenes, None),
        (images.uri, None),
        (images.child("*.jpg").uri, None),
        (Place.parse(scenes).child("**/*.jpg").uri, None),
        (lists.child("split.txt").uri, scenes),
        (lists.child("coco.json").uri, images.uri),
        (lists.child("uris.parquet").uri, None),
        (lists.child("bytes.parquet").uri, None),
    ]
    contents = []
    for src, root in sources:
        uris = list_images(src, root=root)["uri"].to_pylist()
        assert len(uris) == IMAGES, src
        contents.append((read_bytes(uris[0]), read_bytes(uris[-1])))
    assert len(set(contents)) == 1
    one = list_images(images.child(images.walk()[0]).uri)["uri"].to_pylist()
    assert read_bytes(one[0]) == contents[0][0]
    with pytest.raises(ValueError, match="images must be something that exists, got s3://"):
        list_images(store.uri("nothing"))
    with pytest.raises(ValueError, match=r"unique ids|with images in it"):
        list_images(lists.uri)


def test_every_kind_of_truth(store):
    scenes, lists = Place.parse(store.uri("scenes")), Place.parse(store.uri("lists"))
    maps = []
    for src, root in (
        (scenes.uri, None),
        (scenes.child("SegmentationClass").uri, None),
        (lists.child("split.txt").uri, scenes.uri),
    ):
        truth = open_truth(src, root=root)
        assert len(truth) == IMAGES
        maps.append(truth.read(truth.ids[0]).tobytes())
    assert len(set(maps)) == 1
    drawn = open_truth(lists.child("coco.json").uri)
    assert drawn.classes is not None and drawn.classes.names[1] == "square"
    assert drawn.read(drawn.ids[0])[5, 5] == 1 and drawn.read(drawn.ids[0])[30, 30] == 0


def run(*words: str) -> None:
    """A command line that must succeed."""
    assert main(list(words)) == 0, words


def told(capsys, *words: str) -> dict:
    """What a command says in JSON."""
    capsys.readouterr()
    run(*words, "--json")
    return json.loads(capsys.readouterr().out)


def parts(store, folder: str, kind: str) -> list[str]:
    """Ids in all parts of one kind, as any reader of Parquet sees them."""
    found = []
    for name, data in store.files(f"{folder}/{kind}").items():
        assert name.endswith(".parquet")
        found += pq.read_table(pa.BufferReader(data))["image_id"].to_pylist()
    return found


@pytest.mark.ray
@pytest.mark.slow
def test_from_labels_to_a_judged_model(store, ray_new, capsys):
    """One test, as each step needs the one before. No Ray process had seen the bucket before."""
    assert os.environ["AWS_ACCESS_KEY_ID"] == "test"
    uri, scenes = store.uri, store.uri("scenes")
    settings = {"images": scenes, "out": uri("run"), "classes": "shapes"}
    RunFolder(uri("lists")).write_bytes("label.yaml", yaml.safe_dump(settings).encode())
    proxy = FaultyProxy(store.endpoint)  # counts; it stays, as its address stands in the run
    asked = {"images": uri("scenes", proxy), "out": uri("run", proxy)}
    flags = [f"--{k}={v}" for k, v in asked.items()]
    run("label", "--config", uri("lists/label.yaml"), *flags, *TINY)
    first, _ = proxy.asked.copy(), proxy.asked.clear()
    again = told(capsys, "label", "--config", uri("lists/label.yaml"), *flags, *TINY)
    second = proxy.asked.copy()
    with capsys.disabled():
        print(f"\nrequests of a run of {IMAGES} images: {first.total()} {dict(first)}")
        print(f"requests of the same again: {second.total()} {dict(second)}")
    assert again["counts"]["labelled"] == again["counts"]["skipped_as_done"] == IMAGES
    assert first["PutObject"] < 3 * IMAGES and second.total() < 100
    for kind in ("segments", "labels"):
        assert sorted(parts(store, "run", kind)) == list_images(scenes)["image_id"].to_pylist()
    names = store.files("run")
    assert "run/run.json" in names and "run/_lock.json" not in names
    assert any(name.startswith("run/preview") for name in names)

    relabelled = told(capsys, "relabel", "--run", uri("run"), "--compose.min-similarity", "0.05")
    assert relabelled["labels_state"] == "complete"
    assert relabelled["config"]["compose.min_similarity"] == 0.05
    few = ["--truth", scenes, "--trials", "30", "--quiet"]
    study = told(capsys, "tune", "labels", "--run", uri("run"), *few)
    assert study and {"run/tuned.yaml", "run/tune.json"} <= store.files("run").keys()
    run("relabel", "--run", uri("run"), "--config", uri("run/tuned.yaml"))
    scored = told(capsys, "evaluate", uri("run"), "--truth", scenes)
    assert scored["images"] == IMAGES and scored["miou"] > 0.1

    RunFolder(uri("lists")).write_bytes("train.yaml", yaml.safe_dump(train_config(store)).encode())
    trained = told(capsys, "train", "--config", uri("lists/train.yaml"))
    assert trained["state"] == "complete" and trained["data"]["unlabelled"]["zeroshot"]
    models = store.files("model")
    assert {"model/best.pt", "model/last.pt", "model/train.json"} <= models.keys()
    more = told(capsys, "train", "--config", uri("lists/train.yaml"), "--mlflow.uri", "off")
    assert more["id"] == trained["id"] and more["seconds"] == trained["seconds"]

    predicting = ["--images", scenes, "--fuse", uri("run"), "--quiet"]
    done = told(capsys, "predict", "--model", uri("model"), "--out", uri("predicted"), *predicting)
    assert done["counts"]["labelled"] == IMAGES
    assert len(set(parts(store, "predicted", "labels"))) == IMAGES
    for labels in (uri("predicted"), uri("predicted/labels"), uri("model/best.pt")):
        judged = told(capsys, "evaluate", labels, "--truth", scenes)
        assert judged["images"] == IMAGES


def train_config(store) -> dict:
    """Two epochs of the smallest student, all of it from the bucket and into it."""
    return {
        **SMALL,
        "labeled": store.uri("labelled"),
        "unlabeled": store.uri("scenes"),
        "zeroshot": store.uri("run"),
        "out": store.uri("model"),
        "train.epochs": 2,
    }


def test_what_cannot_be_written_is_told_before_anything_is_done(store, capsys):
    where = store.uri("run").replace(store.name, "no-such-bucket")
    words = ["label", "--images", store.uri("scenes"), "--classes", "shapes", "--out", where]
    assert main([*words, *TINY]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("error: address must be one in a bucket that exists, got s3://no-su")
