"""Label Studio: tasks.json with brush predictions, and config.xml, the labelling interface for it.

Enters: label maps. Leaves: a task an image, with one prediction of a brush region each. People
accept or repaint it there. Pixels without label are a region of a label of their own, `ignore`
unless a class is called so, in images where there are any.
"""

from __future__ import annotations

import hashlib
import math
import shlex
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np

from zsplg_ray.label_studio import encode_brush
from zsplg_ray.records import IGNORE
from zsplg_ray.views.export.job import Item, Job, colour_hex, things
from zsplg_ray.views.export.json_files import JsonList
from zsplg_ray.views.export.regions import Region, regions

FROM_NAME, TO_NAME = "label", "image"
LOCAL_FILES = "/data/local-files/?d="


class LabelStudioWriter:
    """Writes tasks."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def entry(self, item: Item) -> dict[str, Any]:
        """The task of an image."""
        options = self.job.options
        found = regions(item.label_HW, options.instances, options.min_area_px, ignore=True)
        results = [self._result(item, number, region) for number, region in enumerate(found)]
        prediction: dict[str, Any] = {"model_version": f"zsplg {item.source}", "result": results}
        if math.isfinite(item.confidence):
            prediction["score"] = round(item.confidence, 6)
        data = {"image": self._address(item), "image_id": item.image_id}
        return {"data": data, "predictions": [prediction]}

    def finish(self, entries: Iterable[tuple[Item, dict[str, Any]]]) -> str:
        """The list of tasks, and the interface."""
        count = 0
        with JsonList(self.job.path("tasks.json")) as tasks:
            for _, task in entries:
                tasks.add(task)
                count += len(task["predictions"][0]["result"])
        self.job.told["regions"] = count
        self.job.write("config.xml", interface(self.job))
        out = self.job.out
        where = f"a project with {out}/config.xml as its labelling interface, then import"
        local = ""
        if self.job.options.image_prefix is None:
            put = self.job.options.images != "none"
            root = shlex.quote(str(out.parent)) if put else "the images' folder"
            local = (
                f" (LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true, "
                f"LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={root}, and that as a local storage)"
            )
        return f"make {where} {out}/tasks.json{local}"

    def _address(self, item: Item) -> str:
        """Where Label Studio finds an image."""
        prefix = self.job.options.image_prefix
        if item.image is None:
            path = item.reference
        else:
            path = item.image if prefix is not None else f"{self.job.out.name}/{item.image}"
        prefix = LOCAL_FILES if prefix is None else prefix
        scheme = prefix.partition("://")[0].lower() if "://" in prefix else "http"
        # Keys in an object store (s3://, gs://, azure-blob://) are taken as they are.
        return prefix + (quote(path) if scheme in ("http", "https") else path)

    def _result(self, item: Item, number: int, region: Region) -> dict[str, Any]:
        height, width = item.size_hw
        mask_HW = np.zeros(item.size_hw, bool)
        left, top, wide, high = region.box_xywh
        mask_HW[top : top + high, left : left + wide] = region.mask_hw
        digest = hashlib.sha256(f"{number} {item.image_id}".encode()).hexdigest()
        return {
            "id": digest[:10],
            "type": "brushlabels",
            "from_name": FROM_NAME,
            "to_name": TO_NAME,
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": {
                "format": "rle",
                "rle": encode_brush(mask_HW),
                "brushlabels": [self.job.name_of(region.index)],
            },
        }


def interface(job: Job) -> str:
    """The labelling interface: an image, and a brush of its own colour for each class."""
    indices = [*(index for index, _ in things(job.classes)), IGNORE]
    labels = "".join(
        f"    <Label value={quoteattr(job.name_of(k))} background={quoteattr(colour_hex(k))}/>\n"
        for k in indices
    )
    return (
        f'<View>\n  <Image name="{TO_NAME}" value="$image" zoom="true" zoomControl="true"/>\n'
        f'  <BrushLabels name="{FROM_NAME}" toName="{TO_NAME}">\n'
        f"{labels}  </BrushLabels>\n</View>\n"
    )
