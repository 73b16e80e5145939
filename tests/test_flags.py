"""Settings spelled as flags are the settings again."""

import pytest

from zsplg_ray import cli
from zsplg_ray.config import EvaluateConfig, LabelConfig
from zsplg_ray.flags import spelled
from zsplg_ray.settings import from_mapping

GIVEN = {"images": "a b", "classes": "cat,dog", "out": "s3://b/run?x=1&y=2"}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"sam": "vit_b", "clip": "RN50/openai", "sam.checkpoint": "x y.pth"},
        {"compose.min_similarity": {"cat": 0.3, "*": 0.25}},
        {"compose.min_similarity": -0.5},
        {"prompts.templates": ["a {class}", "the 'nice' {class}"], "prompts.background": ["sky"]},
        {"quiet": True, "sam.random_weights": True, "max_errors": 0},
        {"actors.resources": {"label_node": 0.001}, "actors.gpus": 0.5, "mlflow.uri": "off"},
        {"images": "--odd", "root": "-"},
    ],
)
def test_flags_make_the_same_settings(more):
    config = from_mapping(LabelConfig, {**GIVEN, **more})
    assert cli.parse(LabelConfig, spelled(config), "label") == config


def test_only_what_was_chosen_is_spelled():
    config = from_mapping(LabelConfig, {**GIVEN, "sam": "vit_b"})
    words = ["--images", "a b", "--classes", "cat,dog", "--out", GIVEN["out"], "--sam", "vit_b"]
    assert spelled(config) == words
    judged = from_mapping(EvaluateConfig, {"labels": "run", "truth": "masks"})
    assert spelled(judged) == ["run", "--truth", "masks"]
