"""Pascal VOC: JPEGImages/, SegmentationClass/ with palette PNGs, ImageSets/Segmentation/*.txt.

Enters: label maps. Leaves: them as they are, 255 too, which VOC calls void. The lists hold names
without suffix, one a line: train.txt, trainval.txt and, with val_share, val.txt.
"""

from __future__ import annotations

from collections.abc import Iterable

from zsplg_ray.summary import command
from zsplg_ray.views.export.job import Item, Job
from zsplg_ray.views.export.masks import palette_png, write_classes

LISTS = "ImageSets/Segmentation"


class VocWriter:
    """Writes a VOC folder."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def entry(self, item: Item) -> None:
        """The mask of an image."""
        self.job.write(f"SegmentationClass/{item.name}.png", palette_png(item.label_HW))

    def finish(self, entries: Iterable[tuple[Item, None]]) -> str:
        """The lists and the classes."""
        names: dict[str, list[str]] = {split: [] for split in self.job.splits}
        for item, _ in entries:
            names[item.split].append(item.name)
        names["trainval"] = [name for listed in names.values() for name in listed]
        for split, listed in names.items():
            self.job.write(f"{LISTS}/{split}.txt", "".join(f"{n}\n" for n in sorted(listed)))
        write_classes(self.job)
        again = command("evaluate", "ANOTHER_RUN", "--truth", str(self.job.out))
        return f"{again}, or any reader of Pascal VOC"
