"""Bytes of an image file -> the RGB array that a person would see.

Enters: the bytes of an image in any of `FORMATS`. Leaves: uint8 [H, W, 3], RGB, or an `ImageError`
of one line.

Why this way: every stage must see the same pixels, so the decisions are taken once, here. The EXIF
orientation is applied. Transparent pixels are composited on white, as a page shows them: the colour
that is stored under full transparency is often rubbish. 16-bit values are divided by 257, not
stretched to the range of the image at hand. Float images are read as [0, 1], or as [0, 255] if a
value exceeds 1. Of an animation the first frame counts. Colour profiles are not applied. Only
raster formats are tried: PostScript would start another program on bytes of unknown origin.

Shapes: H, W pixels; C = 3 channels (RGB).
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from zsplg_ray.settings import complain

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What is tried on the bytes, by Pillow's names, as far as Pillow was built with it."""

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".avif"),
)
"""File name endings, in lower case, by which images are known in folders."""

MAX_PX = 200_000_000
"""Images of more pixels are refused unless told otherwise: 600 MB as RGB."""

MOST_PX = 500_000_000
"""Nothing of more pixels is made, whatever a setting allows or a file claims."""

MAX_SCANS = 100
"""A JPEG of more scans is refused: each goes over all pixels, and a scan needs few bytes. Encoders
write up to some ten."""

_ORIENTATION_TAG = 0x0112
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
"""Of a JPEG's markers those that are followed by a length, and the end."""


class ImageError(ValueError):
    """The bytes are no image that can be used; the message is one line."""


def decode_image(data: bytes, *, max_px: int = MAX_PX) -> np.ndarray:
    """The image as shown: uint8 [H, W, 3], RGB, C-contiguous, writable.

    Args:
        data: the bytes of the file.
        max_px: the most pixels, never more than `MOST_PX`; checked against the header, before
            anything is decoded.

    Raises:
        ImageError: the bytes are empty, cut short, no image, or of too many pixels.
    """
    with _opened(data, max_px) as image:
        image.load()
        orientation = _orientation(image)
        return np.ascontiguousarray(_turned(_rgb(image), orientation))


def image_size(data: bytes, *, max_px: int = MAX_PX) -> tuple[int, int]:
    """The (height, width) in pixels of what `decode_image` would return, from the header if it can.

    Raises:
        ImageError: the header is not that of an image, or promises too many pixels.
    """
    with _opened(data, max_px) as image:
        width, height = image.size
        # Pillow turns a TIFF's size by itself, and only a TIFF's.
        sideways = image.format != "TIFF" and _orientation(image) >= 5
        return (width, height) if sideways else (height, width)


def upright(data: bytes) -> tuple[bytes, str] | None:
    """The image as shown, as a file and its suffix, for programs that do not know orientations.

    Returns: None where the file itself shows it so, by its EXIF orientation. Else a JPEG of quality
        95 of a JPEG, and a PNG of anything else.

    Raises:
        ImageError: as `decode_image`.
    """
    with _opened(data, MAX_PX) as image:
        if _orientation(image) == 1:
            return None
        jpeg = image.format in ("JPEG", "MPO")
    turned, buffer = Image.fromarray(decode_image(data)), io.BytesIO()
    if jpeg:
        turned.save(buffer, "JPEG", quality=95, subsampling=0)
    else:
        turned.save(buffer, "PNG")
    return buffer.getvalue(), ".jpg" if jpeg else ".png"


def decode_indices(data: bytes, *, name: str = "mask", max_px: int = MAX_PX) -> np.ndarray:
    """The stored values of an 8-bit one-channel PNG, uint8 [H, W]: palette indices or grey values.

    Args:
        data: the bytes of the file.
        name: what it is, for errors.
        max_px: the most pixels.

    Raises:
        ImageError: it is no PNG, or its pixels are not one number of at most 8 bits.
    """
    fix = "save class indices as a palette or 8-bit greyscale PNG"
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        raise ImageError(complain(name, "a PNG", _glimpse(data), fix))
    with _opened(data, max_px, name) as image:
        depth, colour_type = data[24], data[25]
        # Palette indices are stored as they are at any depth; grey of 2 or 4 bits gets stretched.
        if colour_type != 3 and (colour_type, depth) not in ((0, 8), (0, 1)):
            kinds = {0: "greyscale", 2: "RGB", 4: "greyscale with alpha", 6: "RGBA"}
            shown = f"{depth}-bit {kinds.get(colour_type, f'colour type {colour_type}')}"
            raise ImageError(complain(name, "one 8-bit channel of class indices", shown, fix))
        return np.array(image, dtype=np.uint8)


@contextmanager
def _opened(data: bytes, max_px: int, name: str = "image") -> Iterator[Image.Image]:
    """The image, opened and not yet decoded; whatever fails inside becomes an ImageError."""
    if not data:
        raise ImageError(complain(name, "an image file", "0 bytes", "restore it or drop it"))
    try:
        with _own_pixel_bound(), Image.open(io.BytesIO(data), formats=_formats()) as image:
            width, height = image.size
            max_px = min(max_px, MOST_PX)
            if width * height > max_px:
                shown = f"{width} x {height} = {width * height} px"
                fix = "scale it down or drop it"
                raise ImageError(complain(name, f"of at most {max_px} px", shown, fix))
            # MPO is a JPEG with more JPEGs behind it, of which the first is read.
            if image.format in ("JPEG", "MPO") and (scans := _scans(data)) > MAX_SCANS:
                fix = "save it again or drop it"
                raise ImageError(complain(name, f"of at most {MAX_SCANS} scans", scans, fix))
            yield image
    except (ImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        rule = f"one of {', '.join(FORMATS)}"
        raise ImageError(complain(name, rule, _glimpse(data), "convert it or drop it")) from error
    except Exception as error:  # Pillow's plugins raise nearly anything on bytes that are broken
        shown = " ".join(f"{type(error).__name__}: {error}".split())
        raise ImageError(complain(name, "whole", shown, "restore it or drop it")) from error


def _scans(data: bytes) -> int:
    """How many scans a JPEG has. What its blocks hold and what lies behind its end is not looked
    at: cameras put whole films there. Source: ITU-T T.81, annex B.
    """
    scans, at = 0, 2
    while (found := _MARKER.search(data, at)) and found[1] != b"\xd9":
        scans += found[1] == b"\xda"
        length = int.from_bytes(data[found.end() : found.end() + 2], "big")
        at = found.end() + max(length, 2)
    return scans


def _formats() -> list[str]:
    """Those of `FORMATS` that this Pillow knows."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _glimpse(data: bytes) -> str:
    """The first bytes, for an error."""
    return f"{len(data)} bytes that start with {data[:12]!r}"


def _rgb(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3] of a decoded image of any mode, not yet turned upright."""
    if image.mode == "F":
        value_HW = np.nan_to_num(np.asarray(image), nan=0.0, posinf=np.inf, neginf=-np.inf)
        scale = 255.0 if value_HW.max() <= 1 else 1.0
        return _grey(np.rint(np.clip(value_HW * scale, 0, 255)))
    if image.mode == "I" or image.mode.startswith("I;16"):
        value_HW = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return _grey((value_HW + 128) // 257)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image.convert("RGB"))


def _grey(value_HW: np.ndarray) -> np.ndarray:
    """Three equal channels out of values in [0, 255]."""
    return np.repeat(value_HW.astype(np.uint8)[..., None], 3, axis=2)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if it is missing, wrong or unreadable."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a broken EXIF block does not make the image unusable
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turned(image_HWC: np.ndarray, orientation: int) -> np.ndarray:
    """The array turned upright. Source: the Orientation tag of EXIF 2.3 (and TIFF 6.0)."""
    if orientation >= 5:  # rows and columns are swapped as well
        image_HWC = image_HWC.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image_HWC = image_HWC[::-1]
    if orientation in (2, 3, 6, 7):
        image_HWC = image_HWC[:, ::-1]
    return image_HWC


class _PixelBound:
    """How often Pillow's own pixel bound is lifted right now, and what it was before."""

    lock = threading.Lock()
    depth = 0
    before: int | None = None


@contextmanager
def _own_pixel_bound() -> Iterator[None]:
    """Lifts Pillow's bound, which is one per process, while any thread of ours is inside.

    Pillow checks at several places, warns first and raises at twice its bound, and takes no
    argument for it. Ours is exact, so theirs must not come first; the last one out puts it back.
    """
    bound = _PixelBound
    with bound.lock:
        if bound.depth == 0:
            bound.before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        bound.depth += 1
    try:
        yield
    finally:
        with bound.lock:
            bound.depth -= 1
            if bound.depth == 0:
                Image.MAX_IMAGE_PIXELS = bound.before
