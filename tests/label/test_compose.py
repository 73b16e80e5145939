"""Composing against a reference that goes pixel by pixel, and the cases that need a rule."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from zsplg_ray.config import ComposeConfig
from zsplg_ray.label.compose import (
    Composed,
    compose,
    decide,
    kept_segments,
    minimum_by_class,
    minimum_scores,
    precedence,
    score_segments,
    summarise,
)
from zsplg_ray.label.segments import Segments
from zsplg_ray.records import IGNORE
from zsplg_ray.vocab import ClassList

CLASSES = ClassList(("background", "cat", "dog"), ((), ("cat",), ("dog",)))
NONE = -math.inf
# Few values, so that ties, NaNs and exact hits on a threshold are common. All are exact in float32.
VALUES = st.sampled_from([-0.5, 0.0, 0.25, 0.5, 0.75, math.nan])
UNIT = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])


def f32(values):
    return np.array(values, np.float32)


def config(**changes):
    return ComposeConfig(**{"min_similarity": 0.0, **changes})


@st.composite
def scenes(draw):
    n = draw(st.integers(0, 5))
    masks = draw(hnp.arrays(np.bool_, (n, *draw(st.tuples(st.integers(1, 5), st.integers(1, 5))))))
    quality = [draw(hnp.arrays(np.float32, n, elements=UNIT)) for _ in range(2)]
    sim_RK = draw(hnp.arrays(np.float32, (n, 3), elements=VALUES))
    if draw(st.booleans()):
        sim_RK[:, 0] = NONE
    return Segments.from_masks(masks, *quality), sim_RK


configs = st.builds(
    ComposeConfig,
    score=st.sampled_from(["cosine", "softmax"]),
    temperature=st.sampled_from([0.25, 1.0]),
    min_similarity=st.one_of(
        st.sampled_from([-1.0, 0.0, 0.25, 0.5]),
        st.fixed_dictionaries(
            {"*": st.sampled_from([-0.5, 0.25])},
            optional={"dog": st.just(0.5), "background": st.just(0.25)},
        ),
    ),
    min_margin=st.sampled_from([0.0, 0.25]),
    min_area_px=st.integers(0, 6),
    min_predicted_iou=st.sampled_from([0.0, 0.5]),
    min_stability=st.sampled_from([0.0, 0.5]),
    order=st.sampled_from(["score", "area"]),
    unsure=st.sampled_from(["background", "ignore"]),
)


def scores_of(row, config):
    """Column -> score, of the columns that take part."""
    columns = {k: float(v) for k, v in enumerate(row) if v != NONE}
    if config.score == "cosine":
        return columns
    weight = {k: math.exp(v / config.temperature) for k, v in columns.items()}
    return {k: float(np.float32(w / sum(weight.values()))) for k, w in weight.items()}


def judge(segments, r, row, config):
    """(class, score) of one segment, or None if it is not painted."""
    if any(math.isnan(v) for v in row):
        return None
    scores = scores_of(row, config)
    best = max(scores, key=lambda k: (row[k], -k))
    given = config.min_similarity
    by_class = given if isinstance(given, dict) else {"*": given}
    minimum = by_class.get(CLASSES.names[best], by_class["*"] if best else NONE)
    rest = [s for k, s in scores.items() if k != best]
    good = (
        scores[best] >= minimum
        and (not rest or scores[best] - max(rest) >= config.min_margin)
        and segments.area_px[r] >= config.min_area_px
        and segments.predicted_iou[r] >= config.min_predicted_iou
        and segments.stability[r] >= config.min_stability
    )
    return (best, scores[best]) if good else None


@given(scenes(), configs)
@settings(max_examples=400, deadline=None)
def test_equals_the_reference_that_goes_pixel_by_pixel(scene, config):
    segments, sim_RK = scene
    composed = compose(segments, sim_RK, config, CLASSES)
    verdicts = {r: judge(segments, r, sim_RK[r], config) for r in range(len(segments))}
    verdicts = {r: verdict for r, verdict in verdicts.items() if verdict}
    masks = segments.masks_RHW()
    label, score = np.zeros(segments.size_hw, int), np.zeros(segments.size_hw)
    painted = np.zeros(segments.size_hw, bool)
    for y, x in np.ndindex(segments.size_hw):
        here = [r for r in verdicts if masks[r, y, x]]
        label[y, x] = 0 if config.unsure == "background" else 255
        if here:
            if config.order == "score":
                winner = max(here, key=lambda r: (verdicts[r][1], -r))
            else:
                winner = min(here, key=lambda r: (segments.area_px[r], r))
            label[y, x] = verdicts[winner][0]
            score[y, x] = min(max(verdicts[winner][1], 0.0), 1.0)
            painted[y, x] = True
    assert composed.label_HW.dtype == np.uint8
    assert composed.score_HW.dtype == np.float32
    np.testing.assert_array_equal(composed.label_HW, label)
    np.testing.assert_allclose(composed.score_HW, score, rtol=0, atol=1e-7)
    np.testing.assert_array_equal(composed.painted_HW, painted)


@given(scenes(), configs)
@settings(max_examples=100, deadline=None)
def test_decisions_paint_the_same_map(scene, config):
    segments, sim_RK = scene
    quality = segments.area_px, segments.predicted_iou, segments.stability
    decision = decide(sim_RK, *quality, config, CLASSES)
    assert sorted(decision.order_R) == list(range(len(segments)))
    assert decision.score_R.dtype == np.float32
    n_painted = (decision.class_R >= 0).sum()
    assert (decision.class_R[decision.order_R[: len(segments) - n_painted]] == -1).all()
    label = np.full(segments.size_hw, 0 if config.unsure == "background" else IGNORE)
    for r in decision.order_R[len(segments) - n_painted :]:
        label[segments.mask_HW(r)] = decision.class_R[r]
    np.testing.assert_array_equal(compose(segments, sim_RK, config, CLASSES).label_HW, label)


def decide_one(sim, config, area=10, predicted_iou=1.0, stability=1.0):
    quality = np.array([area], np.int64), f32([predicted_iou]), f32([stability])
    decision = decide(f32([sim]), *quality, config, CLASSES)
    return int(decision.class_R[0]), float(decision.score_R[0])


def test_the_papers_rule():
    masks = np.zeros((2, 2, 3), bool)
    masks[0, :, :2], masks[1, :, 1:] = True, True
    segments = Segments.from_masks(masks, [1, 1], [1, 1])
    sim_RK = f32([[NONE, 0.3, 0.1], [NONE, 0.1, 0.25]])
    paper = ComposeConfig(score="cosine", min_similarity=0.2, unsure="background")
    both = compose(segments, sim_RK, paper, CLASSES)
    assert both.label_HW.tolist() == [[1, 1, 2]] * 2
    assert both.score_HW.tolist() == [f32([0.3, 0.3, 0.25]).tolist()] * 2
    higher = dataclasses.replace(paper, min_similarity=0.28)
    assert compose(segments, sim_RK, higher, CLASSES).label_HW.tolist() == [[1, 1, 0]] * 2


def test_kept_means_at_least_also_for_numbers_that_binary_cannot_hold():
    for value in (0.1, 0.2, 0.3, 0.7):
        assert decide_one([NONE, value, 0.0], config(min_similarity=value))[0] == 1
        above = float(np.nextafter(np.float32(value), np.float32(1)))
        assert decide_one([NONE, value, 0.0], config(min_similarity=above))[0] == -1
    held = config(min_predicted_iou=0.7, min_stability=0.9, min_area_px=10)
    assert decide_one([NONE, 0.5, 0.1], held, 10, 0.7, 0.9)[0] == 1
    for quality in ((9, 0.7, 0.9), (10, 0.69, 0.9), (10, 0.7, 0.89), (10, math.nan, 0.9)):
        assert decide_one([NONE, 0.5, 0.1], held, *quality)[0] == -1


def test_equal_similarities_go_to_the_first_class_and_background_comes_first():
    assert decide_one([NONE, 0.5, 0.5], config())[0] == 1
    assert decide_one([0.5, 0.5, 0.5], config())[0] == 0
    assert decide_one([NONE, 0.5, 0.5], config(min_margin=0.01))[0] == -1


def test_background_prompts_need_the_margin_but_no_minimum_unless_named():
    assert decide_one([0.1, 0.05, 0.0], config(min_similarity=0.9))[0] == 0
    assert decide_one([0.1, 0.05, 0.0], config(min_margin=0.1))[0] == -1
    named = config(min_similarity={"*": 0.2, "background": 0.2})
    assert decide_one([0.1, 0.05, 0.0], named)[0] == -1
    assert decide_one([0.2, 0.05, 0.0], named)[0] == 0


def test_one_column_has_no_second_and_passes_any_margin():
    classes = ClassList(("background", "cat"), ((), ("cat",)))
    quality = np.array([1]), f32([1]), f32([1])
    for score, expected in (("cosine", 0.25), ("softmax", 1.0)):
        strict = config(score=score, min_margin=2.0)
        decision = decide(f32([[NONE, 0.25]]), *quality, strict, classes)
        assert decision.class_R.tolist() == [1]
        assert decision.score_R.tolist() == [expected]


def test_softmax_is_over_finite_columns_and_scaled_by_temperature():
    sims, temperature = [NONE, 0.30, 0.28], 0.01
    expected = 1 / (1 + math.exp(-2))
    found = decide_one(sims, config(score="softmax", temperature=temperature))
    assert found == (1, pytest.approx(expected, abs=1e-5))
    lead = expected - (1 - expected)
    for margin, kept in ((lead - 1e-3, 1), (lead + 1e-3, -1)):
        softmax = config(score="softmax", temperature=temperature, min_margin=margin)
        assert decide_one(sims, softmax)[0] == kept
    background = decide_one([0.5, 0.3, 0.28], config(score="softmax", temperature=0.1))
    parts = [math.exp(v / 0.1) for v in (0.5, 0.3, 0.28)]
    assert background == (0, pytest.approx(parts[0] / sum(parts), abs=1e-6))


def test_a_saturated_softmax_still_names_the_most_similar_class():
    extreme = config(score="softmax", temperature=1e-6)
    assert decide_one([NONE, -0.9, 0.9], extreme) == (2, 1.0)
    flat = config(score="softmax", temperature=1e3)
    assert decide_one([NONE, 0.25, 0.25000003], flat)[0] == 2


def test_what_could_not_be_embedded_is_not_painted():
    for sim in ([NONE] * 3, [math.nan] * 3, [NONE, math.nan, 0.9], [NONE, math.inf, 0.9]):
        for score in ("cosine", "softmax"):
            class_index, score_value = decide_one(sim, config(score=score, min_similarity=-1.0))
            assert class_index == -1
            assert math.isnan(score_value)


def test_zero_segments_and_all_below():
    empty = Segments.measured((2, 3), [], [], [])
    for unsure, label in (("background", 0), ("ignore", IGNORE)):
        composed = compose(empty, np.zeros((0, 3), np.float32), config(unsure=unsure), CLASSES)
        assert (composed.label_HW == label).all()
        assert composed.label_HW.shape == composed.score_HW.shape == (2, 3)
        assert not composed.score_HW.any()
        assert summarise(composed, 3) == ([6 if label == 0 else 0, 0, 0], 0.0)
        segments = Segments.from_masks(np.ones((1, 2, 3), bool), [1], [1])
        strict = config(unsure=unsure, min_similarity=0.9)
        below = compose(segments, f32([[NONE, 0.5, 0.2]]), strict, CLASSES)
        np.testing.assert_array_equal(below.label_HW, composed.label_HW)
        assert not below.score_HW.any()


def test_of_equal_segments_the_earlier_wins_in_both_orders():
    segments = Segments.from_masks(np.ones((3, 1, 2), bool), [1] * 3, [1] * 3)
    sim_RK = f32([[NONE, 0.1, 0.5], [NONE, 0.5, 0.1], [NONE, 0.1, 0.5]])
    for order in ("score", "area"):
        chosen = compose(segments, sim_RK, config(order=order), CLASSES)
        assert chosen.label_HW.tolist() == [[2, 2]]


def test_minimum_scores_by_class():
    cases = [
        (0.3, [NONE, 0.3, 0.3]),
        ({"*": 0.2, "dog": 0.4}, [NONE, 0.2, 0.4]),
        ({"cat": 0.1, "dog": 0.4}, [NONE, 0.1, 0.4]),
        ({"*": 0.2, "background": 0.1}, [0.1, 0.2, 0.2]),
    ]
    for given_value, expected in cases:
        found = minimum_scores(config(min_similarity=given_value), CLASSES)
        assert found.tolist() == f32(expected).tolist()


@pytest.mark.parametrize(
    ("min_similarity", "message"),
    [
        ({"dgo": 0.1, "*": 0.2}, "compose.min_similarity must .*got dgo; did you mean 'dog'"),
        ({"dog": 0.1}, "compose.min_similarity must be given for class 'cat'.*add '\\*'"),
        (None, "compose.min_similarity must be a number or one per class, got None"),
    ],
)
def test_thresholds_that_do_not_fit_the_classes_are_refused(min_similarity, message):
    with pytest.raises(ValueError, match=message):
        decide_one([NONE, 0.5, 0.1], ComposeConfig(min_similarity=min_similarity))


def test_summary_counts_classes_and_averages_over_painted_pixels():
    label_HW = np.array([[0, 0, 1], [2, 1, 255]], np.uint8)
    score_HW = f32([[0, 0.5, 0.25], [0, 0.75, 0]])
    painted_HW = np.array([[0, 1, 1], [1, 1, 0]], bool)  # the 2 was painted with a score of 0
    class_px, confidence = summarise(Composed(label_HW, score_HW, painted_HW), 4)
    assert class_px == [2, 2, 1, 0]
    assert all(type(n) is int for n in class_px)
    assert confidence == pytest.approx(1.5 / 4)
    assert type(confidence) is float


@pytest.mark.parametrize("n_classes", [2, 3, 21, 151])
@pytest.mark.parametrize("score", ["cosine", "softmax"])
def test_a_segments_numbers_do_not_depend_on_the_segments_beside_it(score, n_classes):
    """To the bit: so the segments of many images may be laid end to end."""
    rng = np.random.default_rng(n_classes)
    sim_RK = rng.normal(0.2, 0.05, (97, n_classes)).astype(np.float32)
    sim_RK[::5, 0], sim_RK[3::7, -1], sim_RK[4::9] = NONE, math.nan, NONE
    whole = score_segments(sim_RK, score, 0.013)
    bounds = [0, 1, 2, 9, 26, 97]
    parts = [
        score_segments(sim_RK[a:b].copy(), score, 0.013) for a, b in itertools.pairwise(bounds)
    ]
    for field in dataclasses.fields(whole):
        joined = np.concatenate([getattr(part, field.name) for part in parts])
        assert joined.tobytes() == getattr(whole, field.name).tobytes(), field.name
    known_R = ~np.isnan(whole.score_R)
    assert known_R.sum() > 50
    if score == "cosine":
        second_R, first_R = np.sort(sim_RK[known_R], axis=1)[:, -2:].T
        np.testing.assert_array_equal(whole.score_R[known_R], first_R)
        np.testing.assert_array_equal(whole.margin_R[known_R], first_R - second_R)


def test_what_is_kept_wins_by_its_precedence_alone():
    scored = score_segments(f32([[NONE, 0.5], [NONE, 0.25], [NONE, math.nan]]), "cosine", 1.0)
    area_px = np.array([7, 5, 9])
    by_score = precedence(scored, area_px, config(order="score"))
    assert by_score[:2].tolist() == [0.5, 0.25] and math.isnan(by_score[2])
    assert precedence(scored, area_px, config(order="area")).tolist() == [-7, -5, -9]
    ones = np.ones(3, np.float32)
    for minimum, kept in ((0.0, [1, 1, 0]), (0.3, [1, 0, 0]), (NONE, [1, 1, 0])):
        found = kept_segments(scored, area_px, ones, ones, config(), f32([NONE, minimum]))
        assert found.tolist() == [bool(one) for one in kept]


def test_minimum_by_class_keeps_numbers_as_they_were_given():
    given_value = {"*": 0.2, "dog": 0.1}
    assert minimum_by_class(config(min_similarity=given_value), CLASSES) == {"cat": 0.2, "dog": 0.1}
    named = minimum_by_class(config(min_similarity={"*": 0.2, "background": 0.3}), CLASSES)
    assert named == {"background": 0.3, "cat": 0.2, "dog": 0.2}
