"""COCO panoptic: annotations/panoptic_SPLIT.json, and a PNG an image in a folder of that name.

Enters: label maps. Leaves: PNGs whose pixels are ids of segments, R + 256 G + 256^2 B, counted from
1 in each image; 0 is void, which is both background and what has no label (255): the format has one
name for the two. Connected parts are things, all pixels of a class are stuff.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import numpy as np
from PIL import Image

from zsplg_ray.views.export.coco import described, image_record
from zsplg_ray.views.export.job import Item, Job, things
from zsplg_ray.views.export.json_files import JsonList
from zsplg_ray.views.export.regions import regions
from zsplg_ray.vocab import palette


class PanopticWriter:
    """Writes COCO's panoptic annotations."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def entry(self, item: Item) -> tuple[dict[str, Any], dict[str, Any]]:
        """The PNG of an image, its record, its annotation."""
        options = self.job.options
        found = regions(item.label_HW, options.instances, options.min_area_px)
        segment_HW = np.zeros(item.size_hw, "<u4")
        for number, region in enumerate(found, start=1):
            left, top, width, height = region.box_xywh
            segment_HW[top : top + height, left : left + width][region.mask_hw] = number
        rgb_HWC = np.ascontiguousarray(segment_HW.view(np.uint8).reshape(*item.size_hw, 4)[..., :3])
        buffer = io.BytesIO()
        Image.fromarray(rgb_HWC).save(buffer, "PNG", compress_level=2)
        name = f"{item.name}.png"
        self.job.write(f"annotations/panoptic_{item.split}/{name}", buffer.getvalue())
        image = image_record(item)
        segments = [{"id": n, **described(region)} for n, region in enumerate(found, start=1)]
        return image, {"image_id": image["id"], "file_name": name, "segments_info": segments}

    def finish(self, entries: Iterable[tuple[Item, Any]]) -> str:
        """One JSON file a split."""
        colours, is_thing = palette(), int(self.job.options.instances == "components")
        categories = [
            {
                "id": index,
                "name": name,
                "supercategory": "thing" if is_thing else "stuff",
                "isthing": is_thing,
                "color": colours[3 * index : 3 * index + 3],
            }
            for index, name in things(self.job.classes)
        ]
        info = {"description": "labels by zsplg_ray", "version": "1.0"}
        count = 0
        with ExitStack() as stack:
            files, images = {}, {}
            for split in self.job.splits:
                path = self.job.path(f"annotations/panoptic_{split}.json")
                head = {"info": info, "licenses": [], "categories": categories}
                files[split] = stack.enter_context(JsonList(path, head, "annotations"))
                images[split] = files[split].aside("images")
            for item, (image, annotation) in entries:
                images[item.split].add(image)
                files[item.split].add(annotation)
                count += len(annotation["segments_info"])
        self.job.told["instances"] = count
        made = f"{self.job.out}/annotations/panoptic_train"
        return f"any reader of COCO panoptic: annotations {made}.json, PNGs {made}/"
