"""The embedded world: small pictures of eight shapes, with exact masks, out of nothing but a seed.

Enters: a seed. Leaves: a `Scene` (image, label map, objects, background word), or a folder in VOC
layout.

Why: the tiny SAM and CLIP, the tests and the demo need labelled images that come without a download
and that are the same on every machine. Everything is drawn with numpy and PIL; this module needs no
torch.

How hard it is: any colour on any background is out of reach for nets of half a million parameters.
So backgrounds are dull (low saturation, middle brightness), and an object wears its class's typical
colour with probability `TYPICAL_COLOUR_PROBABILITY`. Colour is therefore a partial shortcut to the
class: a figure measured on these scenes says that the machinery works, not how well it would do on
photographs.

Seeds: everything that is trained uses seeds from `TRAIN_SEED` up, so every smaller seed is held
out.

Shapes: H, W pixels; C = 3 channels (RGB); V vertices.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

logger = logging.getLogger(__name__)

CLASSES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "crescent")
"""Class names; the label of `CLASSES[k]` is k + 1, and 0 is background."""

COLOURS = {
    "red": (214, 40, 36),
    "blue": (38, 84, 214),
    "green": (36, 168, 64),
    "yellow": (242, 214, 34),
    "orange": (244, 138, 24),
    "white": (246, 246, 246),
    "pink": (248, 122, 182),
    "purple": (132, 44, 176),
    "cyan": (48, 208, 220),
    "black": (20, 20, 20),
}
"""Colour word -> RGB in [0, 255], before each object's own jitter."""

TYPICAL_COLOURS = dict(zip(CLASSES, COLOURS, strict=False))
"""Class name -> the colour word that it wears most often (circle red, square blue, ...)."""

TYPICAL_COLOUR_PROBABILITY = 0.6
"""How often an object wears its class's typical colour, a partial shortcut; else any colour."""

BACKGROUNDS = ("plain", "striped", "checkered", "gradient", "noisy", "cloudy")
"""The words for what may lie behind the objects."""

TRAIN_SEED = 1_000_000_000
"""Training uses this seed and those above; every smaller seed is held out."""

MAX_OBJECTS = 6
MIN_VISIBLE = 0.55
"""An object that is partly hidden keeps at least this fraction of its pixels."""

_RADIUS = (0.085, 0.22)  # of the image's side
_SUPERSAMPLE = 4
_PLACEMENT_TRIES = 12
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class SceneObject:
    """One drawn shape: class (1..8), colour word, and the pixels that are not hidden (bool, H
    W)."""

    class_index: int
    colour: str
    mask_HW: np.ndarray


@dataclass(frozen=True)
class Scene:
    """One picture and the truth about it.

    `image_HWC` is uint8 RGB, `label_HW` uint8 with 0 for background and k + 1 for `CLASSES[k]`,
    `objects` go from the rearmost to the foremost, `background` is one of `BACKGROUNDS`.
    """

    image_HWC: np.ndarray
    label_HW: np.ndarray
    objects: tuple[SceneObject, ...]
    background: str


def make_scene(seed: int, size_px: int = 128) -> Scene:
    """Draws the scene of a seed.

    Args:
        seed: Any integer >= 0; the same seed and size give the same bytes.
        size_px: Side of the square image, at least 32.

    Returns:
        A scene with 1 to 6 objects; a pixel belongs to the foremost shape that covers half of it.

    Raises:
        ValueError: If `seed` is negative or `size_px` is below 32.
    """
    if seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}; count scenes from 0")
    if size_px < 32:
        raise ValueError(f"size_px must be >= 32, got {size_px}; shapes would be unreadable")
    rng = np.random.default_rng(seed)
    background = str(rng.choice(BACKGROUNDS))
    image_HWC = _draw_background(rng, background, size_px)
    objects: list[SceneObject] = []
    full_areas_px: list[int] = []
    for _ in range(int(rng.integers(1, MAX_OBJECTS + 1))):
        class_index = int(rng.integers(1, len(CLASSES) + 1))
        colour = _pick_colour(rng, class_index)
        coverage_HW = _place(rng, class_index, colour, objects, full_areas_px, size_px)
        if coverage_HW is None:
            continue
        image_HWC = _paint(rng, image_HWC, coverage_HW, colour)
        mask_HW = coverage_HW >= 0.5
        objects = [SceneObject(o.class_index, o.colour, o.mask_HW & ~mask_HW) for o in objects]
        objects.append(SceneObject(class_index, colour, mask_HW))
        full_areas_px.append(int(mask_HW.sum()))
    label_HW = np.zeros((size_px, size_px), np.uint8)
    for item in objects:
        label_HW[item.mask_HW] = item.class_index
    return Scene(_degrade(rng, image_HWC), label_HW, tuple(objects), background)


def write_voc(folder: str | Path, n: int, seed: int, size_px: int = 128) -> None:
    """Writes scenes in Pascal VOC's layout: JPEG images, palette PNG masks, a `val.txt`.

    Args:
        folder: Where `JPEGImages/`, `SegmentationClass/` and `ImageSets/Segmentation/` are made.
        n: Number of scenes, at least 1; their seeds are `seed`, `seed + 1`, ...
        seed: First seed, >= 0. A scene's name is `scene_` and its seed, at least six digits.
        size_px: Side of the images.

    Raises:
        ValueError: If `n` is below 1, or `make_scene` refuses a value.
    """
    from zsplg_ray.vocab import palette

    if n < 1:
        raise ValueError(f"n must be >= 1, got {n}; ask for at least one scene")
    make_scene(seed, size_px)  # a bad value is refused before a folder is made
    root = Path(folder)
    images, masks, splits = (
        root / part for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation")
    )
    for part in (images, masks, splits):
        part.mkdir(parents=True, exist_ok=True)
    names = []
    for scene_seed in range(seed, seed + n):
        scene = make_scene(scene_seed, size_px)
        name = f"scene_{scene_seed:06d}"
        Image.fromarray(scene.image_HWC).save(images / f"{name}.jpg", quality=_JPEG_QUALITY)
        mask = Image.fromarray(scene.label_HW)
        mask.putpalette(palette())
        mask.save(masks / f"{name}.png")
        names.append(name)
    (splits / "val.txt").write_text("".join(f"{name}\n" for name in names))
    logger.debug("wrote %d scenes to %s", n, root)


def _pick_colour(rng: np.random.Generator, class_index: int) -> str:
    if rng.random() < TYPICAL_COLOUR_PROBABILITY:
        return TYPICAL_COLOURS[CLASSES[class_index - 1]]
    return str(rng.choice(list(COLOURS)))


def _place(
    rng: np.random.Generator,
    class_index: int,
    colour: str,
    objects: list[SceneObject],
    full_areas_px: list[int],
    size_px: int,
) -> np.ndarray | None:
    """Looks for a place that hides nothing too much and nothing of the same colour at all.

    Returns:
        float32 coverage in [0, 1] (H, W), or None if no such place was found.
    """
    for _ in range(_PLACEMENT_TRIES):
        radius_px = rng.uniform(*_RADIUS) * size_px
        centre_xy = rng.uniform(radius_px, size_px - radius_px, size=2)
        angle = rng.uniform(0, 2 * math.pi)
        coverage_HW = _draw_shape(CLASSES[class_index - 1], radius_px, centre_xy, angle, size_px)
        mask_HW = coverage_HW >= 0.5
        clear = True
        for item, full_px in zip(objects, full_areas_px, strict=True):
            hidden_px = int((item.mask_HW & mask_HW).sum())
            left_px = int(item.mask_HW.sum()) - hidden_px
            too_hidden = left_px < MIN_VISIBLE * full_px
            clear &= not (too_hidden or (hidden_px > 0 and item.colour == colour))
        if clear:
            return coverage_HW
    return None


def _regular(corners: int, radius: float = 1.0, start: float = 0.0) -> np.ndarray:
    """Vertices of a regular polygon (float64, V 2), the first one at the angle `start`."""
    angle_V = start + 2 * math.pi * np.arange(corners) / corners
    return radius * np.stack([np.cos(angle_V), np.sin(angle_V)], axis=1)


def _outline(shape: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Outline and hole (or None) of a shape that fits the unit circle: float64 (V, 2) each."""
    if shape == "square":
        return _regular(4), None
    if shape == "triangle":
        return _regular(3), None
    if shape == "star":
        points_V2 = _regular(10)
        points_V2[1::2] *= 0.45
        return points_V2, None
    if shape == "ring":
        return _regular(48), _regular(48, radius=0.55)
    if shape == "cross":
        a, b = 0.32, 0.94
        corners = [(a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a)]
        return np.array(corners + [(-x, -y) for x, y in corners]), None
    if shape == "heart":
        t_V = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        y_V = 13 * np.cos(t_V) - 5 * np.cos(2 * t_V) - 2 * np.cos(3 * t_V) - np.cos(4 * t_V)
        return np.stack([16 * np.sin(t_V) ** 3, -y_V - 2.5], axis=1) / 17, None
    if shape == "crescent":
        return _regular(48), _regular(48, radius=0.82) + np.array([0.52, 0.0])
    return _regular(48), None


def _draw_shape(
    shape: str, radius_px: float, centre_xy: np.ndarray, angle: float, size_px: int
) -> np.ndarray:
    """Fraction of every pixel that the turned shape covers: float32 in [0, 1] (H, W)."""
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    x0, y0 = (int(v) for v in np.floor(centre_xy - radius_px))
    side_px = 2 * math.ceil(radius_px) + 2
    canvas = Image.new("L", (side_px * _SUPERSAMPLE, side_px * _SUPERSAMPLE))
    for points_V2, fill in zip(_outline(shape), (255, 0), strict=True):
        if points_V2 is not None:
            at_V2 = (radius_px * points_V2 @ turn + centre_xy - (x0, y0)) * _SUPERSAMPLE - 0.5
            ImageDraw.Draw(canvas).polygon([(x, y) for x, y in at_V2.tolist()], fill=fill)
    patch_HW = np.asarray(canvas.reduce(_SUPERSAMPLE), np.float32) / 255
    coverage_HW = np.zeros((size_px + side_px, size_px + side_px), np.float32)
    coverage_HW[y0 : y0 + side_px, x0 : x0 + side_px] = patch_HW
    return coverage_HW[:size_px, :size_px]


def _paint(
    rng: np.random.Generator, image_HWC: np.ndarray, coverage_HW: np.ndarray, colour: str
) -> np.ndarray:
    """Lays a shape over the picture: jittered colour, shaded across, sometimes striped."""
    size_px = image_HWC.shape[0]
    shade_HW = 1 + rng.uniform(0, 0.15) * _ramp(rng, size_px)
    if rng.random() < 0.25:
        shade_HW *= 1 + 0.12 * np.sin(rng.uniform(15, 40) * _ramp(rng, size_px))
    base_C = np.array(COLOURS[colour]) + rng.uniform(-14, 14, size=3)
    paint_HWC = shade_HW[..., None] * base_C
    return image_HWC + coverage_HW[..., None] * (paint_HWC - image_HWC)


def _ramp(rng: np.random.Generator, size_px: int) -> np.ndarray:
    """A plane in a random direction: float64 in about [-0.7, 0.7] (H, W)."""
    angle = rng.uniform(0, 2 * math.pi)
    at = np.linspace(-0.5, 0.5, size_px)
    return at[None, :] * math.cos(angle) + at[:, None] * math.sin(angle)


def _dull(rng: np.random.Generator) -> np.ndarray:
    """A colour of low saturation and middle brightness: float64 RGB (C,)."""
    return rng.uniform(75, 185) + rng.uniform(-16, 16, size=3)


def _draw_background(rng: np.random.Generator, background: str, size_px: int) -> np.ndarray:
    """Blends two dull colours by the pattern that the word names: float64 RGB (H, W, C)."""
    first_C, second_C = _dull(rng), _dull(rng)
    second_C = first_C + np.clip(second_C - first_C, -45, 45)
    if background == "striped":
        mix_HW = np.sin(rng.uniform(25, 70) * _ramp(rng, size_px)) > 0
    elif background == "checkered":
        frequency, angle = rng.uniform(18, 45), rng.uniform(0, 2 * math.pi)
        at = frequency * np.linspace(-0.5, 0.5, size_px)
        along_HW = at[None, :] * math.cos(angle) + at[:, None] * math.sin(angle)
        across_HW = at[:, None] * math.cos(angle) - at[None, :] * math.sin(angle)
        mix_HW = (np.sin(along_HW) > 0) ^ (np.sin(across_HW) > 0)
    elif background == "gradient":
        mix_HW = _ramp(rng, size_px) + 0.5
    elif background == "noisy":
        mix_HW = rng.random((size_px, size_px), dtype=np.float32)
    elif background == "cloudy":
        coarse = Image.fromarray(rng.random((9, 9), dtype=np.float32))
        mix_HW = np.asarray(coarse.resize((size_px, size_px), Image.Resampling.BICUBIC))
    else:
        mix_HW = np.zeros((size_px, size_px))
    return first_C + mix_HW.astype(np.float64)[..., None] * (second_C - first_C)


def _degrade(rng: np.random.Generator, image_HWC: np.ndarray) -> np.ndarray:
    """Adds what a camera adds, blur (35 % of scenes) and noise (70 %): uint8 RGB (H, W, C)."""
    picture = Image.fromarray(np.clip(image_HWC, 0, 255).astype(np.uint8))
    if rng.random() < 0.35:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.0)))
    if rng.random() < 0.7:
        noise_HWC = rng.standard_normal(image_HWC.shape, dtype=np.float32) * rng.uniform(2, 10)
        noisy_HWC = np.clip(np.asarray(picture, np.float32) + noise_HWC, 0, 255)
        return noisy_HWC.astype(np.uint8)
    return np.asarray(picture).copy()
