"""Pictures of the page: photographs as small JPEGs, label maps as small palette PNGs.

What enters: addresses of images, label maps. What leaves: bytes. A map is stored once, as class
indices; the page gives it its colours, so opacity and highlighting cost nothing.

Memory: a large JPEG is decoded at a fraction of its size; of other large images, and of large
maps, one at a time is in memory.
"""

from __future__ import annotations

import io
import math
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from zsplg_ray.images import decode_small, image_size
from zsplg_ray.storage import is_address, read_bytes

PAGE_BYTES = 11_000_000
"""What all photographs of a page take together, before they are written as text (4/3)."""
_LEAST_SIDE_PX, _MOST_SIDE_PX = 160, 1024
_BYTES_PER_PX = 0.22
"""Of a busy photograph as JPEG of the first quality."""
_QUALITIES = (82, 70, 55, 40)
LARGE_PX = 24_000_000
"""Images of more pixels are looked at one at a time."""
_PATIENCE = 3
"""Reads from one store that may fail in a row before it is left alone."""

_large = threading.RLock()


def one_at_a_time(pixels: int) -> AbstractContextManager[object]:
    """What to hold while an image is worked on: others of more than LARGE_PX wait meanwhile."""
    return _large if pixels > LARGE_PX else nullcontext()


@dataclass(frozen=True)
class Photo:
    """An image as the page shows it, or why it cannot."""

    jpeg: bytes | None
    why: str = ""


def side_for(n_images: int) -> int:
    """The longer side, in px, at which so many photographs make a page of bounded size."""
    px = PAGE_BYTES / max(1, n_images) / _BYTES_PER_PX
    side = math.sqrt(px / 0.75)
    return int(min(_MOST_SIDE_PX, max(_LEAST_SIDE_PX, side)))


class Photographer:
    """Reads images and makes them small; a store that does not answer is asked no more.

    Args:
        side_px: Most of the longer side.
        most_bytes: Most that a JPEG should take; it is written in a lower quality if it would not.
    """

    def __init__(self, side_px: int, most_bytes: int) -> None:
        self.side_px, self.most_bytes = side_px, most_bytes
        self._failed: dict[str, int] = {}

    def take(self, uri: str | None, size_hw: tuple[int, int] | None) -> Photo:
        """The image at an address.

        Args:
            uri: As labels/ has it.
            size_hw: The size that it was labelled at; None: any.
        """
        if not uri:
            return Photo(None, "its address is not known")
        try:
            store = "{0.scheme}://{0.netloc}".format(urlsplit(uri)) if is_address(uri) else ""
        except ValueError:  # such as http://[x/a.jpg
            return Photo(None, "its address cannot be understood")
        if store and self._failed.get(store, 0) >= _PATIENCE:
            return Photo(None, "the storage does not answer")
        try:
            data = read_bytes(uri)
        except FileNotFoundError:
            return Photo(None, "the image is gone")
        except (OSError, ValueError):
            self._failed[store] = self._failed.get(store, 0) + 1
            return Photo(None, "the image cannot be read")
        self._failed[store] = 0
        try:
            with one_at_a_time(math.prod(image_size(data))):
                small_HWC, found_hw = decode_small(data, self.side_px)
        except (ValueError, MemoryError):
            return Photo(None, "the file is no image any more")
        if size_hw is not None and found_hw != size_hw:
            told = f"the image is {found_hw[1]} x {found_hw[0]} now, not as it was labelled"
            return Photo(None, told)
        return Photo(self._jpeg(small_HWC))

    def _jpeg(self, small_HWC: np.ndarray) -> bytes:
        image, data = Image.fromarray(small_HWC), b""
        for quality in _QUALITIES:
            out = io.BytesIO()
            image.save(out, "JPEG", quality=quality)
            data = out.getvalue()
            if len(data) <= self.most_bytes:
                break
        return data


def small_map(label_HW: np.ndarray, side_px: int) -> bytes:
    """A label map as an 8-bit palette PNG of at most `side_px`, sized as its photograph is.

    Its palette is one of greys and means nothing: the page puts in its own.
    """
    scale = min(1.0, side_px / max(label_HW.shape))
    height, width = (max(1, round(side * scale)) for side in label_HW.shape)
    image = Image.fromarray(label_HW).resize((width, height), Image.Resampling.NEAREST)
    indexed = Image.frombytes("P", image.size, image.tobytes())
    indexed.putpalette([grey for index in range(256) for grey in (index,) * 3])
    out = io.BytesIO()
    indexed.save(out, "PNG", bits=8, compress_level=6)
    return out.getvalue()
