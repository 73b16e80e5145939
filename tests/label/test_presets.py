"""Settings left open are filled in, given ones stay."""

import typing

import pytest

from zsplg_ray.config import ClipConfig, LabelConfig, RelabelConfig
from zsplg_ray.label.presets import (
    CLIP_DEFAULTS,
    SAM_DEFAULTS,
    resolve_label,
    resolve_text,
    unknown_names,
)
from zsplg_ray.settings import flatten, from_mapping, override
from zsplg_ray.shapes.clip import SETTINGS
from zsplg_ray.shapes.sam import GENERATOR_SETTINGS
from zsplg_ray.vocab import class_list

EMBEDDERS = typing.get_args(typing.get_type_hints(ClipConfig)["embedder"])
OPEN = {
    *(f"sam.{name}" for name in SAM_DEFAULTS),
    *("clip.gem_depth", "clip.dense_px"),
    *("prompts.templates", "prompts.background", "compose.min_similarity"),
}
"""Settings whose None means: what suits the model."""


def config(**values) -> LabelConfig:
    return from_mapping(LabelConfig, {"images": "i", "classes": "cat", "out": "o", **values})


@pytest.mark.parametrize(
    "models", [{}, {"sam": "vit_b"}, {"sam": "shapes"}, {"clip": "shapes"}, {"clip": "RN50/openai"}]
)
@pytest.mark.parametrize("score", ["cosine", "softmax"])
@pytest.mark.parametrize("embedder", EMBEDDERS)
def test_everything_open_is_filled_in_and_nothing_else_changes(models, score, embedder):
    given = config(**models, **{"clip.embedder": embedder, "compose.score": score})
    before, after = flatten(given), flatten(resolve_label(given))
    assert {k for k in before if before[k] != after[k]} == OPEN
    assert {k for k in OPEN if before[k] is not None or after[k] is None} == set()
    assert all("{class}" in template for template in after["prompts.templates"])
    assert resolve_label(resolve_label(given)) == resolve_label(given)


def test_the_published_settings_are_those_of_their_authors():
    flat = flatten(resolve_label(config()))
    assert {k: flat[f"sam.{k}"] for k in SAM_DEFAULTS} == {
        "points_per_side": 32,
        "pred_iou_thresh": 0.88,
        "stability_score_thresh": 0.95,
        "stability_score_offset": 1.0,
        "box_nms_thresh": 0.7,
        "min_mask_region_area": 0,
    }
    assert (
        flat["prompts.templates"] == ["a photo of a {class}"] and flat["prompts.background"] == []
    )
    assert (flat["clip.gem_depth"], flat["clip.dense_px"]) == (7, 448)
    assert flat["compose.min_similarity"] == 0.2
    assert (
        flatten(resolve_label(config(**{"compose.score": "softmax"})))["compose.min_similarity"]
        == 0.5
    )


def test_given_values_stay():
    values = {
        "sam": "shapes",
        "clip": "shapes",
        "sam.points_per_side": 3,
        "sam.pred_iou_thresh": 0,
        "clip.gem_depth": 1,
        "prompts.templates": ["the {class}"],
        "prompts.background": [],
        "compose.min_similarity": {"*": 0.1},
    }
    given = override(
        config(sam="shapes", clip="shapes"), {k: v for k, v in values.items() if "." in k}
    )
    flat = flatten(resolve_label(given))
    assert {k: flat[k] for k in values if "." in k} == {k: v for k, v in values.items() if "." in k}


def test_the_tiny_models_bring_their_own():
    flat = flatten(resolve_label(config(sam="shapes")))
    ours = {k: v for k, v in GENERATOR_SETTINGS.items() if k in SAM_DEFAULTS}
    assert {k: flat[f"sam.{k}"] for k in ours} == ours != SAM_DEFAULTS
    tiny = flatten(resolve_label(config(clip="shapes")))
    assert tiny["clip.gem_depth"] < CLIP_DEFAULTS["gem_depth"], "it has fewer blocks than that"
    assert tiny["prompts.background"], "it was trained with words for the background"


@pytest.mark.parametrize("score", ["cosine", "softmax"])
@pytest.mark.parametrize("embedder", EMBEDDERS)
def test_the_tiny_clips_threshold_is_that_of_the_embedder(score, embedder):
    given = {"clip.model": "shapes", "clip.embedder": embedder, "compose.score": score}
    threshold = SETTINGS["min_similarity"][score]
    assert set(threshold) == set(EMBEDDERS)
    assert resolve_label(config(**given)).compose.min_similarity == threshold[embedder]


def test_relabelling_fills_in_what_belongs_to_its_score():
    for score, threshold in CLIP_DEFAULTS["min_similarity"].items():
        given = from_mapping(RelabelConfig, {"run": "r", "compose.score": score})
        resolved = resolve_text(given, "ViT-B-16/openai", "gem")
        assert resolved.compose.min_similarity == threshold
        assert resolved.prompts.templates == CLIP_DEFAULTS["templates"]
    resolved = resolve_text(from_mapping(RelabelConfig, {"run": "r"}), "shapes", "gem")
    label = resolve_label(config(clip="shapes"))
    assert (resolved.prompts, resolved.compose) == (label.prompts, label.compose)


def test_names_that_the_tiny_clip_was_never_taught():
    assert unknown_names("shapes", class_list("shapes")) == []
    assert unknown_names("shapes", class_list("dog,circle,truck")) == ["dog", "truck"]
    assert unknown_names("ViT-B-16/openai", class_list("dog,circle,truck")) == []
