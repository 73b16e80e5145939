"""Settings of `export`: a run's labels in the formats of other tools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional

from zsplg_ray.settings import Range, Section

ExportFormat = Literal[
    "voc",
    "coco",
    "coco-panoptic",
    "unimatch",
    "yolo-seg",
    "labelstudio",
    "cvat",
    "fiftyone",
    "huggingface",
]
ImagesMode = Literal["copy", "link", "none"]
Instances = Literal["components", "classes"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Section):
    """Labels of a run in the format of another tool. An option that the format has no place for is
    refused. OUT appears whole or not at all; OUT/export.json tells what was done."""

    run: Positional[str]
    """Folder of a `zsplg label` or `zsplg predict` run."""
    format: ExportFormat
    """voc: palette PNGs; coco: instances with RLE; coco-panoptic; unimatch: split files and masks
    for `zsplg train`; yolo-seg: polygons; labelstudio: brush predictions; cvat: "CVAT 1.1" masks;
    fiftyone: ImageSegmentationDirectory; huggingface: Parquet for `datasets`."""
    to: str
    """Folder to make on this machine. It must not exist yet, or be empty."""
    images: ImagesMode | None = None
    """What becomes of the images: copy puts them beside the labels (one with an EXIF orientation is
    turned upright, for not all tools do that), link puts links to them, none leaves them where they
    are. None: copy, but none for labelstudio and cvat."""
    min_score: Annotated[float | None, Range(0, 1)] = None
    """Pixels whose score is below become ignore (255), [0, 1]; background that nothing has claimed
    (score 0) stays background. None: labels as they are."""
    min_area_px: Annotated[int | None, Range(1, 1_000_000_000)] = None
    """Of formats with regions: smaller ones are left out, so become background, px, [1, 1e+09].
    None: all are kept."""
    instances: Instances | None = None
    """Of formats with regions, what a region is: components, each connected part of a class (8
    neighbours), or classes, all pixels of a class in an image. None: components; classes for
    labelstudio and cvat."""
    val_share: Annotated[float | None, Range(0, 1)] = None
    """Share of the images that goes into the validation split, [0, 1], chosen by their ids: the
    same ones every time. None: there is no such split."""
    ids: str | None = None
    """Text file of the ids of images to take, one a line, with or without suffix. None: all."""
    limit: Annotated[int | None, Range(1, 1_000_000_000)] = None
    """Take only so many images, the first ones by id, [1, 1e+09]. None: all."""
    image_prefix: str | None = None
    """For labelstudio: what stands before an image's path in the tasks, such as
    s3://bucket/photos/. None: /data/local-files/?d=, Label Studio's address of local files."""
    json: bool = False
    """One JSON object on stdout instead of text."""
