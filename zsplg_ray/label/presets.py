"""What suits which model: fills in every setting that was left None.

What enters: a config as the user gave it. What leaves: the same with every None of `sam`, `clip`,
`prompts` and `compose` replaced, so that run.json tells what was really used.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from zsplg_ray.config import LabelConfig, RelabelConfig, SamConfig
from zsplg_ray.settings import flatten, override
from zsplg_ray.vocab import ClassList

C = TypeVar("C", LabelConfig, RelabelConfig)

SAM_DEFAULTS = {
    "points_per_side": 32,
    "pred_iou_thresh": 0.88,
    "stability_score_thresh": 0.95,
    "stability_score_offset": 1.0,
    "box_nms_thresh": 0.7,
    "min_mask_region_area": 0,
}
"""Defaults of segment_anything's SamAutomaticMaskGenerator."""

CLIP_DEFAULTS: dict[str, Any] = {
    "gem_depth": 7,
    "dense_px": 448,
    "templates": ("a photo of a {class}",),
    "background": (),
    "min_similarity": {"cosine": 0.2, "softmax": 0.5},
}
"""GEM's own depth and size for ViT-B-16; the paper's prompt. The paper's threshold is not public:
0.2 is a starting point for CLIP's cosine similarities, to be tuned on a few labelled images. A
model for which it depends on the embedder gives a number for each."""


def resolve_label(config: LabelConfig) -> LabelConfig:
    """`config` with every setting that depends on the models filled in."""
    clip = clip_defaults(config.clip.model)
    known = {f"clip.{k}": clip[k] for k in ("gem_depth", "dense_px")}
    flat = flatten(config)
    config = override(config, {k: v for k, v in known.items() if flat[k] is None})
    config = dataclasses.replace(config, sam=resolve_sam(config.sam))
    return resolve_text(config, config.clip.model, config.clip.embedder)


def resolve_sam(config: SamConfig) -> SamConfig:
    """The settings of the mask generator with those filled in that depend on the model."""
    known = dict(SAM_DEFAULTS)
    if config.model == "shapes":
        from zsplg_ray.shapes.sam import GENERATOR_SETTINGS

        known |= {k: v for k, v in GENERATOR_SETTINGS.items() if k in SAM_DEFAULTS}
    return dataclasses.replace(
        config, **{k: v for k, v in known.items() if getattr(config, k) is None}
    )


def resolve_text(config: C, clip_model: str, embedder: str) -> C:
    """`prompts` and `compose` filled in for a CLIP model; all that `relabel` needs."""
    clip = clip_defaults(clip_model)
    threshold = clip["min_similarity"][config.compose.score]
    known = {
        "prompts.templates": clip["templates"],
        "prompts.background": clip["background"],
        "compose.min_similarity": threshold[embedder] if isinstance(threshold, dict) else threshold,
    }
    flat = flatten(config)
    return override(config, {k: v for k, v in known.items() if flat[k] is None})


def clip_defaults(model: str) -> dict[str, Any]:
    """The keys of `CLIP_DEFAULTS` for a model; `shapes` brings its own."""
    if model != "shapes":
        return CLIP_DEFAULTS
    from zsplg_ray.shapes.clip import SETTINGS

    return {**CLIP_DEFAULTS, **SETTINGS}


def unknown_names(model: str, classes: ClassList) -> list[str]:
    """Classes that the model was never taught; only the tiny one of the shapes world tells."""
    if model != "shapes":
        return []
    from zsplg_ray.shapes.clip import KNOWN_WORDS

    aliases = zip(classes.names[1:], classes.aliases[1:], strict=True)
    return [name for name, words in aliases if not KNOWN_WORDS & set(words)]
