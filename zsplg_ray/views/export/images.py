"""Images beside their labels: copied, linked, or left where they are.

Enters: a row of labels and where its image goes. Leaves: the image there, of the size that its
labels have as pixels are stored, so that every reader sees both alike.
"""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from zsplg_ray.images import FORMATS, IMAGE_SUFFIXES, image_size, upright
from zsplg_ray.labels import LabelledImage
from zsplg_ray.settings import complain
from zsplg_ray.sources import image_key
from zsplg_ray.storage import is_address, read_bytes

_SUFFIX_OF = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif", "PPM": ".ppm", "JPEG2000": ".jp2"}


def known_suffix(row_id: str, uri: str) -> str:
    """The image suffix of an id, else of its address, with its dot; "" if neither has one."""
    address = uri.partition("?")[0] if is_address(uri) else uri
    for text in (row_id, address):
        suffix = text[len(image_key(text)) :]
        if suffix.lower() in IMAGE_SUFFIXES:
            return suffix
    return ""


def reference(image_id: str, uri: str) -> str:
    """What an image is called in its source: its id, with a suffix as far as one is known."""
    return image_id if image_key(image_id) != image_id else image_id + known_suffix("", uri)


def fetch(row: LabelledImage) -> tuple[bytes, str, bool]:
    """The bytes of an image to be put beside its labels, its suffix, and whether it was turned.

    Raises: OSError if it is not there any more, or has no address; ValueError if it is no image, or
        not of the label's size any more.
    """
    if not row.uri:
        raise FileNotFoundError("the run does not tell its address")
    data = read_bytes(row.uri)
    size_hw = image_size(data)
    if size_hw != (row.height, row.width):
        shown = f"{size_hw[1]} x {size_hw[0]}"
        rule = f"{row.width} x {row.height}"
        raise ValueError(complain(f"image {row.image_id}", rule, shown, "label it again"))
    if (turned := upright(data)) is not None:
        return *turned, True
    return data, known_suffix(row.image_id, row.uri) or _sniffed(data), False


def put(mode: str, row: LabelledImage, data: bytes, turned: bool, path: Path) -> None:
    """Write an image, or a link to its file unless it had to be turned."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode == "link" and not turned:
        path.symlink_to(Path(row.uri).absolute())
    else:
        path.write_bytes(data)


def _sniffed(data: bytes) -> str:
    """The suffix that suits the bytes of an image."""
    with Image.open(io.BytesIO(data), formats=[f for f in FORMATS if f in Image.OPEN]) as image:
        kind = image.format or ""
    return _SUFFIX_OF.get(kind, f".{kind.lower()}")
