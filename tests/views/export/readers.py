"""What reads each format back: by the tools' own readers where they are small, else by their rules.

Each takes the folder of an export and gives label maps by the name of the file or the id that the
format has for an image.
"""

import io
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from urllib.parse import unquote

import cv2
import numpy as np
import pyarrow.parquet as pq
import yaml
from PIL import Image
from pycocotools.coco import COCO

from zsplg_ray.images import image_size
from zsplg_ray.label_studio import decode_brush
from zsplg_ray.masks import open_truth
from zsplg_ray.sources import image_key, list_images
from zsplg_ray.vocab import ClassList, class_list

Maps = dict[str, np.ndarray]


def voc(out: Path) -> Maps:
    names = (out / "ImageSets/Segmentation/trainval.txt").read_text("utf-8").split("\n")[:-1]
    assert (
        sorted(names)
        == open_truth(str(out)).ids
        == [row["image_id"] for row in list_images(str(out)).to_pylist()]
    )
    maps = {}
    for name in names:
        with Image.open(out / f"SegmentationClass/{name}.png") as image:
            assert image.mode == "P"
            palette = image.getpalette() or []
            assert palette[:6] == [0, 0, 0, 128, 0, 0] and palette[-3:] == [224, 224, 192]
            maps[name] = np.array(image)
        assert (maps[name] == open_truth(str(out)).read(name)).all()
    return maps


def unimatch(out: Path) -> Maps:
    split = str(out / "train.txt")
    truth, images = open_truth(split), list_images(split).to_pylist()
    maps = {}
    for row in images:
        label_HW = truth.read(row["image_id"])
        assert image_size(Path(row["uri"]).read_bytes()) == label_HW.shape
        maps[image_key(row["image_id"]).removeprefix("images/")] = label_HW
    return maps


def fiftyone(out: Path) -> Maps:
    """By FiftyOne's rule: a mask is the file in labels/ of the path that the image has in data/."""
    maps = {}
    for path in sorted((out / "data").rglob("*.*")):
        name = str(path.relative_to(out / "data").with_suffix(""))
        with Image.open(out / "labels" / f"{name}.png") as image:
            assert image.mode == "L"
            maps[name] = np.array(image)
    return maps


def huggingface(out: Path) -> Maps:
    table = pq.read_table(out / "data")
    told = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert told["image"] == told["label"] == {"_type": "Image"}
    assert list(told) == table.column_names
    maps = {}
    for row in table.to_pylist():
        with Image.open(io.BytesIO(row["label"]["bytes"])) as image:
            maps[row["image_id"]] = np.array(image)
        assert image_size(row["image"]["bytes"]) == maps[row["image_id"]].shape
    return maps


def coco(out: Path) -> Maps:
    """By our own reader, checked against pycocotools: masks, areas, boxes, ids."""
    file = out / "annotations/instances_train.json"
    truth, theirs = open_truth(str(file)), COCO(str(file))
    assert truth.classes is not None
    maps = {}
    for number, image in theirs.imgs.items():
        name = image_key(image["file_name"])
        drawn = np.zeros((image["height"], image["width"]), np.uint8)
        for annotation in theirs.loadAnns(theirs.getAnnIds(imgIds=[number])):
            mask = theirs.annToMask(annotation).astype(bool)
            assert not drawn[mask].any() and annotation["iscrowd"] == 0
            drawn[mask] = annotation["category_id"]
            x, y, w, h = annotation["bbox"]
            assert (annotation["area"], cv2.boundingRect(mask.view(np.uint8))) == (
                mask.sum(),
                (x, y, w, h),
            )
        maps[name] = truth.read(name)
        assert (np.where(maps[name] == 255, 0, maps[name]) == drawn).all()
    assert sorted(theirs.anns) == list(range(1, len(theirs.anns) + 1))
    return maps


def panoptic(out: Path) -> Maps:
    """By panopticapi's convention: the id of a segment is R + 256 G + 256^2 B, 0 is void."""
    data = json.loads((out / "annotations/panoptic_train.json").read_text("utf-8"))
    images = {image["id"]: image for image in data["images"]}
    maps = {}
    for annotation in data["annotations"]:
        image = images.pop(annotation["image_id"])
        with Image.open(out / "annotations/panoptic_train" / annotation["file_name"]) as png:
            rgb = np.array(png.convert("RGB")).astype(np.uint32)
        ids_HW = rgb[..., 0] + 256 * rgb[..., 1] + 256**2 * rgb[..., 2]
        assert ids_HW.shape == (image["height"], image["width"])
        segments = {segment["id"]: segment for segment in annotation["segments_info"]}
        assert set(np.unique(ids_HW).tolist()) - {0} == set(segments)
        label_HW = np.zeros(ids_HW.shape, np.uint8)
        for number, segment in segments.items():
            mask = ids_HW == number
            assert segment["area"] == mask.sum()
            assert tuple(segment["bbox"]) == cv2.boundingRect(mask.view(np.uint8))
            label_HW[mask] = segment["category_id"]
        maps[image_key(image["file_name"])] = label_HW
    assert not images
    return maps


def yolo(out: Path) -> Maps:
    """By Ultralytics' rules: labels/ for images/, float32 points, cv2.fillPoly of whole pixels."""
    data = yaml.safe_load((out / "data.yaml").read_text("utf-8"))
    maps = {}
    for path in sorted((out / data["train"]).rglob("*.*")):
        labels = "/labels/".join(str(path).rsplit("/images/", 1)).rsplit(".", 1)[0] + ".txt"
        height, width = image_size(path.read_bytes())
        label_HW = np.zeros((height, width), np.uint8)
        for line in Path(labels).read_text("utf-8").splitlines():
            index, *points = line.split()
            assert len(points) >= 6 and len(points) % 2 == 0 and int(index) in data["names"]
            share_P2 = np.array(points, np.float32).reshape(-1, 2)
            assert (share_P2 >= 0).all() and (share_P2 <= 1).all()
            point_P2 = (share_P2 * np.array([width, height], np.float32)).astype(np.int32)
            cv2.fillPoly(label_HW, [point_P2], int(index) + 1)
        maps[str(path.relative_to(out / data["train"]).with_suffix(""))] = label_HW
    return maps


def labelstudio(out: Path) -> Maps:
    tasks = json.loads((out / "tasks.json").read_text("utf-8"))
    view = ET.parse(out / "config.xml").getroot()
    names = [label.attrib["value"] for label in view.iter("Label")]
    brush, image = view.find("BrushLabels"), view.find("Image")
    assert brush is not None and image is not None
    maps = {}
    for task in tasks:
        (prediction,) = task["predictions"]
        label_HW = None
        for result in prediction["result"]:
            assert result["type"] == "brushlabels" and result["value"]["format"] == "rle"
            assert (result["from_name"], result["to_name"]) == (
                brush.attrib["name"],
                image.attrib["name"],
            )
            height, width = result["original_height"], result["original_width"]
            if label_HW is None:
                label_HW = np.zeros((height, width), np.uint8)
            (name,) = result["value"]["brushlabels"]
            index = 255 if name == names[-1] else names.index(name) + 1
            label_HW[decode_brush(result["value"]["rle"], height, width)] = index
        assert unquote(task["data"]["image"]).startswith("/data/local-files/?d=")
        # A task without regions does not tell the size of its image.
        maps[task["data"]["image_id"]] = (
            np.zeros((5, 4), np.uint8) if label_HW is None else label_HW
        )
    return maps


def cvat(out: Path) -> Maps:
    """By CVAT's rule: run lengths along the rows of a box, outside first."""
    root = ET.parse(out / "annotations.xml").getroot()
    assert root.tag == "annotations" and root.findtext("version") == "1.1"
    labels = json.loads((out / "labels.json").read_text("utf-8"))
    names = [label["name"] for label in labels]
    assert names == [element.text for element in root.findall("meta/task/labels/label/name")]
    assert len({label["color"] for label in labels}) == len(labels)
    maps = {}
    for image in root.findall("image"):
        label_HW = np.zeros((int(image.attrib["height"]), int(image.attrib["width"])), np.uint8)
        for mask in image.findall("mask"):
            left, top, width, height = (
                int(mask.attrib[k]) for k in ("left", "top", "width", "height")
            )
            runs = [int(n) for n in mask.attrib["rle"].split(",")]
            inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
            index = names.index(mask.attrib["label"]) + 1
            box = label_HW[top : top + height, left : left + width]
            box[inside] = 255 if index == len(names) else index
        maps[image.attrib["name"]] = label_HW
    return maps


READERS = {
    "voc": voc,
    "coco": coco,
    "coco-panoptic": panoptic,
    "unimatch": unimatch,
    "yolo-seg": yolo,
    "labelstudio": labelstudio,
    "cvat": cvat,
    "fiftyone": fiftyone,
    "huggingface": huggingface,
}


def class_names(out: Path, format: str) -> list[str]:
    """The names of the classes without background, in their order, as the format tells them."""

    def in_json(name: str):
        return json.loads((out / name).read_text("utf-8"))

    if format in ("voc", "unimatch"):
        listed = ClassList.from_dict(in_json("classes.json")).names
        assert (out / "classes.txt").read_text("utf-8").split("\n")[:-1] == list(listed)
        return list(listed[1:])
    if format.startswith("coco"):
        kind = "panoptic" if format.endswith("panoptic") else "instances"
        listed = in_json(f"annotations/{kind}_train.json")["categories"]
        assert [c["id"] for c in listed] == list(range(1, len(listed) + 1))
        return [c["name"] for c in listed]
    if format == "yolo-seg":
        names = yaml.safe_load((out / "data.yaml").read_text("utf-8"))["names"]
        assert list(names) == list(range(len(names)))
        return list(names.values())
    if format == "labelstudio":
        return [e.attrib["value"] for e in ET.parse(out / "config.xml").iter("Label")][:-1]
    if format == "cvat":
        return [label["name"] for label in in_json("labels.json")][:-1]
    if format == "fiftyone":
        return list(in_json("mask_targets.json").values())[:-1]
    return list(in_json("id2label.json").values())[1:-1]


__all__ = ["READERS", "class_list", "class_names"]
