"""Label maps as files of class indices: PNGs, and what stands beside them.

Enters: uint8 [H, W] label maps. Leaves: palette PNGs, which show colours and hold indices; lists of
classes.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from zsplg_ray.views.export.job import Job
from zsplg_ray.vocab import palette

_PALETTE = palette()


def palette_png(label_HW: np.ndarray) -> bytes:
    """A label map as an 8-bit PNG with Pascal VOC's colours; its values are the indices."""
    image = Image.fromarray(np.ascontiguousarray(label_HW))
    image.putpalette(_PALETTE)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_classes(job: Job) -> None:
    """Names in the order of their indices, background first: classes.txt and classes.json.

    The first is a class list of this project's too, unless a name holds : or #.
    """
    job.write("classes.txt", "".join(f"{name}\n" for name in job.classes.names))
    job.write_json("classes.json", job.classes.to_dict())
