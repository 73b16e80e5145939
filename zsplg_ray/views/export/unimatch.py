"""UniMatch's layout, which `zsplg train` takes as it is: masks/, and split files of
`image mask` lines.

Enters: label maps. Leaves: them as 8-bit PNGs, 255 too, which training ignores. Paths are relative
to the folder of the split file; images that are left where they are stand there by their address.
The two stand apart by a blank, or by a tab where a path has blanks in it.
"""

from __future__ import annotations

from collections.abc import Iterable

from zsplg_ray.settings import complain
from zsplg_ray.sources import image_key
from zsplg_ray.summary import command
from zsplg_ray.views.export.job import Item, Job
from zsplg_ray.views.export.masks import palette_png, write_classes


class UnimatchWriter:
    """Writes masks and split files."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def entry(self, item: Item) -> str:
        """The mask of an image, and its line."""
        image, mask = item.image or item.uri, f"masks/{item.name}.png"
        if not image.isprintable() or image_key(image) == image or image != image.strip():
            rule, fix = "one that fits on a line and ends like an image", "export with images copy"
            raise ValueError(complain("address of the image", rule, image, fix))
        self.job.write(mask, palette_png(item.label_HW))
        return f"{image}\t{mask}" if " " in image + mask else f"{image} {mask}"

    def finish(self, entries: Iterable[tuple[Item, str]]) -> str:
        """The split files and the classes."""
        lines: dict[str, list[str]] = {split: [] for split in self.job.splits}
        for item, line in entries:
            lines[item.split].append(line)
        for split, listed in lines.items():
            self.job.write(f"{split}.txt", "".join(f"{line}\n" for line in sorted(listed)))
        write_classes(self.job)
        out = self.job.out
        val = ["--val", f"{out}/val.txt"] if lines.get("val") else []
        given = ["--labeled", f"{out}/train.txt", *val, "--classes", f"{out}/classes.txt"]
        return command("train", *given, "--unlabeled", "IMAGES", "--out", "MODEL")
