"""Label maps as pictures: the image, its labels in colours, and the truth where there is one.

What enters: uint8 RGB images and label maps. What leaves: one contact sheet PNG.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from zsplg_ray.images import decode_image
from zsplg_ray.masks import Truth
from zsplg_ray.records import IGNORE, decode_png
from zsplg_ray.rundir import RunFolder
from zsplg_ray.storage import read_bytes
from zsplg_ray.vocab import ClassList, palette

log = logging.getLogger(__name__)

_TRIES = 4
"""Images tried for each one on a sheet, before the source is taken to have gone."""


@dataclass(frozen=True)
class Shot:
    """One line of a contact sheet."""

    image_HWC: np.ndarray
    maps: tuple[np.ndarray, ...]
    """Label maps uint8 [H, W], painted over the image from left to right."""


def overlay(image_HWC: np.ndarray, label_HW: np.ndarray, strength: float = 0.7) -> np.ndarray:
    """The image with each class in its palette colour over grey; background stays as it is.

    Grey below the colour, so that the colour of the thing itself does not change that of its class.
    """
    colour_KC = np.array(palette(), np.float32).reshape(-1, 3)
    colour_KC[IGNORE] = 128
    grey_HW1 = image_HWC.mean(axis=2, dtype=np.float32, keepdims=True)
    mixed_HWC = np.rint(grey_HW1 * (1 - strength) + colour_KC[label_HW] * strength)
    return np.where((label_HW == 0)[..., None], image_HWC, mixed_HWC.astype(np.uint8))


def contact_sheet(shots: Sequence[Shot], classes: ClassList, cell_px: int = 192) -> bytes:
    """A PNG: per shot the image and its overlays side by side, and below them a legend."""
    columns = 1 + max((len(shot.maps) for shot in shots), default=1)
    pairs = 2 if len(shots) > 4 else 1
    lines = -(-len(shots) // pairs)
    legend = _legend(shots, classes, pairs * columns * cell_px)
    sheet = Image.new("RGB", (pairs * columns * cell_px, lines * cell_px + legend.height), "white")
    y = 0
    for first in range(0, len(shots), pairs):
        height = 0
        for i, shot in enumerate(shots[first : first + pairs]):
            cells = [shot.image_HWC, *(overlay(shot.image_HWC, m) for m in shot.maps)]
            for j, cell in enumerate(cells):
                tile = _fitted(cell, cell_px - 4)
                sheet.paste(tile, ((i * columns + j) * cell_px + 2, y + 2))
                height = max(height, tile.height + 4)
        y += height
    sheet.paste(legend, (0, y))
    sheet = sheet.crop((0, 0, sheet.width, y + legend.height))
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def _fitted(cell_HWC: np.ndarray, side_px: int) -> Image.Image:
    """Scaled so that the longer side is `side_px`; small images grow in whole pixels' look."""
    tile = Image.fromarray(cell_HWC)
    scale = side_px / max(tile.size)
    size = (max(1, round(tile.width * scale)), max(1, round(tile.height * scale)))
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
    return tile.resize(size, how)


def _legend(shots: Sequence[Shot], classes: ClassList, width: int) -> Image.Image:
    """Names of the classes that occur, each on its colour."""
    used = sorted({int(k) for s in shots for m in s.maps for k in np.unique(m)} - {0, IGNORE})
    font = ImageFont.load_default(14)
    colours = palette()
    names = [*classes.names, *(f"class {k}" for k in range(len(classes), IGNORE))]
    items = [(names[k][:40], tuple(colours[3 * k : 3 * k + 3])) for k in used]
    spots, x, y = [], 6, 4
    for name, colour in items:
        w = 28 + int(font.getlength(name))
        if x + w > width and x > 6:
            x, y = 6, y + 22
        spots.append((x, y, name, colour))
        x += w + 8
    legend = Image.new("RGB", (width, y + 24 if items else 1), "white")
    draw = ImageDraw.Draw(legend)
    for x, y, name, colour in spots:
        draw.rectangle((x, y, x + 16, y + 16), fill=colour)
        draw.text((x + 22, y), name, fill="black", font=font)
    return legend


def _small(image_HWC: np.ndarray, maps: Sequence[np.ndarray], most_px: int = 512) -> Shot:
    """An image and its label maps, made smaller where needed: a sheet holds a dozen of them."""
    scale = min(1.0, most_px / max(image_HWC.shape[:2]))
    height, width = (max(1, round(side * scale)) for side in image_HWC.shape[:2])
    image = Image.fromarray(image_HWC).resize((width, height), Image.Resampling.BOX)
    nearest = Image.Resampling.NEAREST
    small = (np.asarray(Image.fromarray(m).resize((width, height), nearest)) for m in maps)
    return Shot(np.asarray(image), tuple(small))


def write_preview(folder: RunFolder) -> str | None:
    """Put a contact sheet of a run's first images beside run.json; None if none can be read."""
    try:
        run = folder.read_run()
        sheet = run and run_sheet(folder, ClassList.from_dict(run["classes"]))
        if not sheet:
            return None
        folder.write_bytes("preview.png", sheet)
    except OSError as e:  # the labels are there all the same
        log.warning("no preview: %s", e)
        return None
    return "preview.png"


def run_sheet(
    folder: RunFolder, classes: ClassList, truth: Truth | None = None, n: int = 12
) -> bytes | None:
    """A contact sheet of the first `n` images whose files are still there as they were labelled."""
    shots: list[Shot] = []
    left = _TRIES * n
    for name in folder.parts("labels"):
        rows = folder.read_part("labels", name, ["image_id", "uri", "label_png"]).to_pylist()
        for row in rows:
            if len(shots) == n or not left:
                return contact_sheet(shots, classes) if shots else None
            left -= 1
            try:
                image_HWC = decode_image(read_bytes(row["uri"]))
            except (OSError, ValueError):
                continue
            maps = [decode_png(row["label_png"])]
            if truth is not None and truth.has(row["image_id"]):
                maps.append(truth.read(row["image_id"]))
            if all(label_HW.shape == image_HWC.shape[:2] for label_HW in maps):
                shots.append(_small(image_HWC, maps))
    return contact_sheet(shots, classes) if shots else None
