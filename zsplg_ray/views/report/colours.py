"""Colours of classes on the page: apart from each other, legible on white, black and photographs.

What enters: how many classes. What leaves: `#rrggbb` for each. The first dozen are chosen by hand;
further ones go round the hue circle by the golden angle, in three lightnesses, in a space where
equal steps look equal. (Palette PNGs that others read keep the colours of Pascal VOC; those are too
dark and too alike for a page.)
"""

from __future__ import annotations

import math

_FIRST = (
    *("#2f7ed8", "#f28e2b", "#2ca58d", "#e1575c", "#9467d1", "#e0b000"),
    *("#17becf", "#d660a8", "#6aa84f", "#a0673c", "#7f8fa9", "#c0ca33"),
)
_GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))
_LIGHTNESS = (0.66, 0.54, 0.76)


def class_colours(n_classes: int) -> list[str]:
    """A colour for each class; background, class 0, is grey."""
    others = n_classes - 1 - len(_FIRST)
    more = (oklch(_LIGHTNESS[i % 3], 0.14, i * _GOLDEN_ANGLE) for i in range(max(0, others)))
    return ["#8c9096", *_FIRST, *more][:n_classes]


def oklch(lightness: float, chroma: float, hue: float) -> str:
    """A colour of OKLCH (lightness in [0, 1], hue in radians) as `#rrggbb`, cut to what is shown.

    Source: Björn Ottosson, "A perceptual color space for image processing" (2020).
    """
    a, b = chroma * math.cos(hue), chroma * math.sin(hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    return "#" + "".join(f"{round(255 * _encoded(min(1.0, max(0.0, v)))):02x}" for v in linear)


def _encoded(value: float) -> float:
    """Linear light to sRGB."""
    return 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055
