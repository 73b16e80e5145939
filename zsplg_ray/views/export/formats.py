"""The formats that labels can be exported to, by name."""

from __future__ import annotations

from zsplg_ray.views.export.coco import CocoWriter
from zsplg_ray.views.export.cvat import CvatWriter
from zsplg_ray.views.export.fiftyone import FiftyoneWriter
from zsplg_ray.views.export.huggingface import HuggingfaceWriter
from zsplg_ray.views.export.job import Format
from zsplg_ray.views.export.labelstudio import LabelStudioWriter
from zsplg_ray.views.export.panoptic import PanopticWriter
from zsplg_ray.views.export.unimatch import UnimatchWriter
from zsplg_ray.views.export.voc import VocWriter
from zsplg_ray.views.export.yolo import YoloWriter

_SPLIT = frozenset({"val_share"})
_REGIONS = frozenset({"min_area_px", "instances"})

FORMATS: dict[str, Format] = {
    "voc": Format(VocWriter, image_folder="JPEGImages", options=_SPLIT),
    "coco": Format(CocoWriter, options=_SPLIT | _REGIONS),
    "coco-panoptic": Format(PanopticWriter, options=_SPLIT | _REGIONS),
    "unimatch": Format(UnimatchWriter, options=_SPLIT),
    "yolo-seg": Format(
        YoloWriter,
        image_folder="images/{split}",
        options=_SPLIT | {"min_area_px"},
        reserved=frozenset({"images"}),  # it finds labels by replacing the last one in a path
    ),
    "labelstudio": Format(
        LabelStudioWriter,
        images=("none", "copy", "link"),
        options=_REGIONS | {"image_prefix"},
        instances="classes",
    ),
    "cvat": Format(
        CvatWriter, images=("none", "copy", "link"), options=_REGIONS, instances="classes"
    ),
    "fiftyone": Format(FiftyoneWriter, image_folder="data"),
    "huggingface": Format(
        HuggingfaceWriter, image_folder="", images=("copy", "none"), options=_SPLIT
    ),
}
"""By the name that `--format` takes."""
