"""CVAT: annotations.xml in its own format ("CVAT for images 1.1") with masks, and labels.json.

Enters: label maps. Leaves: a <mask> element a region: a box and run lengths along its rows, outside
first. CVAT takes that file as it is (annotations of a task, "CVAT 1.1") and keeps masks as masks;
its other mask format, a zip of coloured PNGs, has no names with commas or colons and needs the
colours of the labels to fit. Images are found by their names. Pixels without label are a mask of a
label of their own, `ignore` unless a class is called so. labels.json is what CVAT's raw label
editor takes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from zsplg_ray.records import IGNORE
from zsplg_ray.views.export.job import Item, Job, colour_hex, things
from zsplg_ray.views.export.regions import Region, regions

_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class CvatWriter:
    """Writes CVAT's XML."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def entry(self, item: Item) -> tuple[str, int]:
        """The element of an image, and how many masks it holds."""
        options, (height, width) = self.job.options, item.size_hw
        found = regions(item.label_HW, options.instances, options.min_area_px, ignore=True)
        name = item.name if _NO_XML.search(item.reference) else item.reference
        size = f'width="{width}" height="{height}"'
        masks = "".join(f"    {self._mask(region)}\n" for region in found)
        head = f'  <image id="{item.position}" name={quoteattr(name)} {size}>\n'
        return f"{head}{masks}  </image>\n", len(found)

    def finish(self, entries: Iterable[tuple[Item, tuple[str, int]]]) -> str:
        """The file, and the labels."""
        indices = [*(index for index, _ in things(self.job.classes)), IGNORE]
        labels = [
            {"name": self.job.name_of(k), "color": colour_hex(k), "type": "mask", "attributes": []}
            for k in indices
        ]
        listed = "".join(
            f"<label><name>{escape(self.job.name_of(k))}</name><color>{colour_hex(k)}</color>"
            "<type>mask</type><attributes></attributes></label>\n"
            for k in indices
        )
        count = 0
        path = self.job.path("annotations.xml")
        with path.open("w", encoding="utf-8", newline="\n") as stream:
            stream.write('<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n')
            stream.write("<version>1.1</version>\n<meta><task><mode>annotation</mode>\n")
            stream.write(f"<labels>\n{listed}</labels></task></meta>\n")
            for _, (element, masks) in entries:
                stream.write(element)
                count += masks
            stream.write("</annotations>\n")
        self.job.told["regions"] = count
        self.job.write_json("labels.json", labels)
        out = self.job.out
        return (
            f"make a task of the images with {out}/labels.json in Labels > Raw, then its menu > "
            f"Upload annotations > CVAT 1.1 > {out}/annotations.xml"
        )

    def _mask(self, region: Region) -> str:
        left, top, width, height = region.box_xywh
        label = quoteattr(self.job.name_of(region.index))
        box = f'left="{left}" top="{top}" width="{width}" height="{height}"'
        rle = ", ".join(map(str, row_runs(region.mask_hw)))
        return f'<mask label={label} source="file" occluded="0" rle="{rle}" {box} z_order="0"/>'


def row_runs(mask_hw: np.ndarray) -> list[int]:
    """Run lengths of a mask along its rows, outside first, so that the first may be 0."""
    flat = mask_hw.ravel().view(np.int8)
    at = np.flatnonzero(np.diff(flat, prepend=np.int8(0)))
    return np.diff(at, prepend=0, append=flat.size).tolist()
