"""Search spaces: bounds from the data, what exists with which score, grids, and bad names."""

import math

import numpy as np
import pytest

from zsplg_ray.config import ComposeConfig, TemplateSet
from zsplg_ray.label.space import SEARCHED, TEMPLATES, Dimension, Limits, Space, compose_space
from zsplg_ray.label.sweep import QUANTILES, Ranges
from zsplg_ray.label.templates import template_set
from zsplg_ray.settings import flatten, from_mapping

LIMITS = Limits(
    cosine=(0.1, 0.6),
    softmax=(0.1, 1.0),
    margin=(0.05, 0.3),
    area_px=(4.0, 900.0),
    predicted_iou=(0.7, 0.99),
    stability=(0.8, 0.99),
)
DEFAULT = {f"compose.{k}": v for k, v in flatten(ComposeConfig(min_similarity=0.2)).items()}
DEFAULT |= {TEMPLATES: "run"}


def names(space: Space) -> list[str]:
    return [d.name for d in space.dimensions]


def test_everything_is_searched_and_fits_the_settings():
    space = compose_space(DEFAULT, LIMITS, ("run", "seven"))
    assert {d.setting for d in space.dimensions} == set(SEARCHED)
    for score in ("cosine", "softmax"):
        for end in ("low", "high"):
            params = {
                d.name: score
                if d.setting == "compose.score"
                else d.options[0]
                if d.options
                else getattr(d, end)
                for d in space.active({"compose.score": score})
            }
            settings = space.settings(params)
            assert set(settings) == set(DEFAULT)
            compose = {k[8:]: v for k, v in settings.items() if k != TEMPLATES}
            assert from_mapping(ComposeConfig, compose).score == score
    assert "compose.unsure" not in {d.setting for d in space.dimensions}


def test_thresholds_exist_with_their_score():
    space = compose_space(DEFAULT, LIMITS)
    cosine = {d.name for d in space.active({"compose.score": "cosine"})}
    softmax = {d.name for d in space.active({"compose.score": "softmax"})}
    assert "compose.min_similarity (cosine)" in cosine - softmax
    assert "compose.temperature (softmax)" in softmax - cosine
    only = compose_space(DEFAULT, LIMITS, over=["compose.min_similarity"])
    assert names(only) == ["compose.min_similarity (cosine)"]
    assert only.settings({"compose.min_similarity (cosine)": 0.123456}) == {
        **DEFAULT,
        "compose.min_similarity": 0.1235,
    }


def test_the_default_is_a_point_of_the_space():
    space = compose_space({**DEFAULT, "compose.min_similarity": -0.5}, LIMITS, ("run", "photo"))
    params = space.default_params()
    assert params["compose.min_similarity (cosine)"] == 0.1  # the nearest that can be drawn
    assert params["compose.min_area_px"] == 4
    assert params[TEMPLATES] == "run" and params["compose.order"] == "score"
    by_class = {**DEFAULT, "compose.min_similarity": {"cat": 0.2, "*": 0.4}}
    params = compose_space(by_class, LIMITS).default_params()
    assert params["compose.min_similarity (cosine)"] == pytest.approx(0.3)


def test_what_makes_no_difference_is_left_out():
    flat = Limits(LIMITS.cosine, LIMITS.softmax, (0.1, 0.2), (1, 1), (0.9, 0.9), (1.0, 1.0))
    found = {d.setting for d in compose_space(DEFAULT, flat).dimensions}
    assert not found & {TEMPLATES, "compose.min_area_px", "compose.min_stability"}
    with pytest.raises(ValueError, match=r"^search.over must be .*make a difference"):
        compose_space(DEFAULT, flat, over=["compose.min_stability"])
    with pytest.raises(ValueError, match=r"got compose.temperature, .*; add compose.score"):
        compose_space(DEFAULT, LIMITS, over=["compose.temperature", "compose.order"])


def test_one_other_set_of_templates_is_used_without_a_search():
    space = compose_space(DEFAULT, LIMITS, ("seven",), over=["compose.order"])
    assert space.settings({"compose.order": "area"})[TEMPLATES] == "seven"
    assert space.default[TEMPLATES] == "run"


@pytest.mark.parametrize("most", [130, 400, 1000])
def test_a_grid_has_as_many_levels_as_fit(most):
    over = ["compose.score", "compose.min_similarity", "compose.temperature", "compose.order"]
    over += ["compose.min_area_px"]
    space = compose_space(DEFAULT, LIMITS, over=over)
    grid = space.grid(most)
    assert most / 2 < len(grid) <= most
    assert len({tuple(sorted(point.items())) for point in grid}) == len(grid)
    cosine = [p for p in grid if p["compose.score"] == "cosine"]
    assert cosine and all("compose.temperature (softmax)" not in p for p in cosine)
    levels = {p["compose.min_similarity (cosine)"] for p in cosine}
    assert {0.1, 0.6} <= levels and len(levels) >= 3
    areas = sorted({p["compose.min_area_px"] for p in grid})
    assert areas[0] == 4 and areas[-1] == 900
    if len(areas) == 3:
        assert areas[1] == 60  # even by magnitude


def test_a_grid_that_does_not_fit_says_what_would():
    space = compose_space(DEFAULT, LIMITS)
    with pytest.raises(ValueError, match=r"^trials must be >= (\d+) for a grid") as error:
        space.grid(99)
    least = int(str(error.value).split(">= ")[1].split()[0])
    assert len(space.grid(least - 1)) == least - 1  # beside the default
    with pytest.raises(ValueError, match=r"^trials must be"):
        space.grid(least - 2)


@pytest.mark.parametrize(
    ("over", "templates", "message"),
    [
        (["compose.min_similarty"], ("run",), "did you mean compose.min_similarity?"),
        (["compose.unsure"], ("run",), "settings that can be searched"),
        (["compose.score"], ("run",), "add compose.min_similarity"),
        ([TEMPLATES], ("run",), "name more sets"),
        (["compose.order"], ("run", "seven"), "add prompts.templates"),
        ([], ("run",), "at least one setting"),
    ],
)
def test_bad_names(over, templates, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as error:
        compose_space(DEFAULT, LIMITS, templates, over)
    assert " must be " in str(error.value) and "; " in str(error.value)


def test_limits_cover_all_sets_of_templates():
    def ranges(shift: float) -> Ranges:
        rising = np.array(QUANTILES)
        return Ranges(rising + shift, rising, rising / 2, rising, rising * 9999, rising * 2, rising)

    limits = Limits.of([ranges(0.0), ranges(0.5)], image_px=10_000, n_classes=5)
    assert limits.cosine == (0.0, 0.99 + 0.5)
    assert limits.softmax == (0.2, 1.0)
    assert limits.margin == (0.25, 0.375)
    assert limits.area_px == (pytest.approx(99.99), 500)  # 5 % of the image
    assert limits.predicted_iou == (0.0, 1.0) and limits.stability == (0.0, 0.5)
    nothing = Ranges(*[np.full(len(QUANTILES), math.nan)] * 7)
    with pytest.raises(ValueError, match=r"^run must be with segments"):
        Limits.of([nothing], image_px=100, n_classes=3)


def test_levels_of_whole_numbers_coincide():
    assert Dimension("n", low=1, high=3, log=True, whole=True).levels(9) == [1, 2, 3]


def test_template_sets():
    import typing

    for name in typing.get_args(TemplateSet):
        sentences = template_set(name, ["one {class}"])
        assert sentences and all(s.count("{class}") == 1 for s in sentences)
    assert template_set("run", ["one {class}"]) == ("one {class}",)
    assert template_set("photo", []) == ("a photo of a {class}",)
