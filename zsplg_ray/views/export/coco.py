"""COCO instances: annotations/instances_SPLIT.json with compressed run lengths.

Enters: label maps. Leaves: an annotation a region (never a crowd), whose `category_id` is the class
index; background is no category. Paths are relative to images/, or to where the images of the
source are. Nothing in COCO's format says that a pixel has no label, so these pixels (255) stand in
an entry `ignore_rle` of their image, which other readers pass over and zsplg_ray.coco reads: with
it, the label map comes back as it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from zsplg_ray.records import IGNORE
from zsplg_ray.summary import command
from zsplg_ray.views.export.job import Item, Job, things
from zsplg_ray.views.export.json_files import JsonList
from zsplg_ray.views.export.regions import Region, coco_rle, regions


class CocoWriter:
    """Writes COCO's instance annotations."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def entry(self, item: Item) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The record of an image, and its annotations without ids of their own."""
        options, size_hw = self.job.options, item.size_hw
        found = regions(item.label_HW, options.instances, options.min_area_px, ignore=True)
        image = image_record(item)
        annotations = []
        for region in found:
            rle = coco_rle(region, size_hw)
            if region.index == IGNORE:
                image["ignore_rle"] = rle
            else:
                annotations.append({**described(region), "segmentation": rle})
        return image, annotations

    def finish(self, entries: Iterable[tuple[Item, Any]]) -> str:
        """One JSON file a split."""
        categories = [
            {"id": index, "name": name, "supercategory": "thing"}
            for index, name in things(self.job.classes)
        ]
        info = {"description": "labels by zsplg_ray", "version": "1.0"}
        count = 0
        with ExitStack() as stack:
            files, images = {}, {}
            for split in self.job.splits:
                path = self.job.path(f"annotations/instances_{split}.json")
                head = {"info": info, "licenses": [], "categories": categories}
                files[split] = stack.enter_context(JsonList(path, head, "annotations"))
                images[split] = files[split].aside("images")
            for item, (image, annotations) in entries:
                images[item.split].add(image)
                for annotation in annotations:
                    count += 1
                    files[item.split].add({"id": count, "image_id": image["id"], **annotation})
        self.job.told["instances"] = count
        file = f"{self.job.out}/annotations/instances_train.json"
        again = command("evaluate", "ANOTHER_RUN", "--truth", file)
        return f"pycocotools.coco.COCO({file!r}), or {again}"


def image_record(item: Item) -> dict[str, Any]:
    """What COCO tells of an image; its id stays the same whatever part of a run is exported."""
    height, width = item.size_hw
    name = item.reference
    return {"id": item.position + 1, "file_name": name, "width": width, "height": height}


def described(region: Region) -> dict[str, Any]:
    """What COCO tells of a region, but for its mask."""
    return {
        "category_id": region.index,
        "area": region.area_px,
        "bbox": region.box_xywh,
        "iscrowd": 0,
    }
