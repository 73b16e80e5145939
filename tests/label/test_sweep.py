"""A sweep over regions against composing pixels, and thresholds against trying every one."""

import dataclasses
import itertools
import json
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from zsplg_ray import metrics
from zsplg_ray.config import ComposeConfig
from zsplg_ray.label import sweep as sweep_module
from zsplg_ray.label import sweep_benchmark
from zsplg_ray.label.compose import compose, score_segments
from zsplg_ray.label.regions import cut
from zsplg_ray.label.segments import Segments
from zsplg_ray.label.sweep import QUANTILES, Sweep, miou
from zsplg_ray.label.sweep_kernels import climb, tally
from zsplg_ray.vocab import ClassList

CLASSES = ClassList.of(["cat", "dog"])
K = len(CLASSES)
# Few values, so that ties, NaNs and exact hits on a threshold are common.
VALUES = st.sampled_from([-1.0, -0.5, 0.0, 0.25, 0.3, 0.5, 0.75, 1.0, math.nan])
UNIT = st.sampled_from([0.0, 0.25, 0.5, 0.7, 1.0])
TRUTH = st.sampled_from([0, 1, 2, 255])

configs = st.builds(
    ComposeConfig,
    score=st.sampled_from(["cosine", "softmax"]),
    temperature=st.sampled_from([0.01, 0.25, 1.0]),
    min_similarity=st.one_of(
        st.sampled_from([-1.0, 0.0, 0.3, 0.5]),
        st.fixed_dictionaries(
            {"*": st.sampled_from([-0.5, 0.25])},
            optional={"dog": st.just(0.5), "background": st.sampled_from([-1.0, 0.25])},
        ),
    ),
    min_margin=st.sampled_from([0.0, 0.05, 0.25]),
    min_area_px=st.integers(0, 6),
    min_predicted_iou=st.sampled_from([0.0, 0.5]),
    min_stability=st.sampled_from([0.0, 0.7]),
    order=st.sampled_from(["score", "area"]),
    unsure=st.sampled_from(["background", "ignore"]),
)


@st.composite
def images(draw):
    """(segments, similarities, truth); empty masks and images without a segment are common."""
    n = draw(st.integers(0, 6))
    size_hw = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    masks = draw(hnp.arrays(np.bool_, (n, *size_hw)))
    quality = [draw(hnp.arrays(np.float32, n, elements=UNIT)) for _ in range(2)]
    sim_RK = draw(hnp.arrays(np.float32, (n, K), elements=VALUES))
    sim_RK[draw(hnp.arrays(np.bool_, n))] = sim_RK[:1]  # ties between segments
    if draw(st.booleans()):
        sim_RK[:, 0] = -np.inf
    truth_HW = draw(hnp.arrays(np.uint8, size_hw, elements=TRUTH))
    return Segments.from_masks(masks, *quality), sim_RK, truth_HW


def swept(scene, **more):
    regions = [cut(segments, truth_HW, K) for segments, _, truth_HW in scene]
    sims = {"photo": [sim_RK for _, sim_RK, _ in scene], **more}
    return Sweep(regions, [segments for segments, _, _ in scene], sims, CLASSES)


def by_pixels(scene, config):
    """int64 [I, K, K + 1], the honest way."""
    counts = [
        metrics.confusion(truth_HW, compose(segments, sim_RK, config, CLASSES).label_HW, K)
        for segments, sim_RK, truth_HW in scene
    ]
    return np.array(counts, np.int64).reshape(-1, K, K + 1)


@given(st.lists(images(), max_size=4), st.lists(configs, min_size=1, max_size=4), st.data())
@settings(max_examples=300, deadline=None)
def test_counts_equal_those_of_composed_pixels(scene, several, data):
    sweep = swept(scene)
    assert sweep.n_images == len(scene)
    group_I = data.draw(hnp.arrays(np.int64, len(scene), elements=st.integers(-1, 2)))
    for config in several:
        pixels = by_pixels(scene, config)
        found = sweep.confusion(config, "photo")
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, pixels.sum(axis=0)[None])
        grouped = sweep.confusion(config, "photo", group_I, 3)
        for g in range(3):
            np.testing.assert_array_equal(grouped[g], pixels[group_I == g].sum(axis=0))
        expected = metrics.scores(found[0], CLASSES.names)["miou"]
        assert miou(found[0]) == pytest.approx(expected or 0.0, abs=1e-12)


def thresholds_that_matter(scene, config, k):
    """Every minimum in [-1, 1] that selects another set of the segments of class k."""
    scores = np.unique([score for one in scene for score in scores_of(one, config, k)])
    above = [float(np.nextafter(np.float32(s), np.float32(2))) for s in scores]
    return [t for t in (-1.0, *map(float, scores), *above) if -1 <= t <= 1]


def scores_of(one, config, k):
    """Scores of an image's segments that are most like class k, kept or not."""
    scored = score_segments(one[1], config.score, config.temperature)
    mine = (scored.best_R == k) & ~np.isnan(scored.score_R)
    return scored.score_R[mine].tolist()


@given(st.lists(images(), min_size=1, max_size=3), configs, st.data())
@settings(max_examples=150, deadline=None)
def test_no_threshold_of_one_class_is_better_than_those_found(scene, config, data):
    image_I = data.draw(hnp.arrays(np.bool_, len(scene)))
    chosen = [one for one, counts in zip(scene, image_I, strict=True) if counts]
    sweep = swept(scene)

    def score(thresholds):
        setting = dataclasses.replace(config, min_similarity=thresholds)
        return miou(by_pixels(chosen, setting).sum(axis=0))

    thresholds, best = sweep.class_thresholds(config, "photo", image_I)
    given_value = config.min_similarity
    named = isinstance(given_value, dict) and "background" in given_value
    assert set(thresholds) == {"cat", "dog"} | ({"background"} if named else set())
    assert all(type(t) is float and -1 <= t <= 1 for t in thresholds.values())
    assert best == pytest.approx(score(thresholds), abs=1e-12)
    assert best >= score(given_value) - 1e-12
    for name in thresholds:
        for t in thresholds_that_matter(chosen, config, CLASSES.index(name)):
            assert score({**thresholds, name: t}) <= best + 1e-9


def pixels_of(*segments_of_one_class):
    """One row of pixels, a segment each: (similarity to cat, to dog, true class)."""
    n = len(segments_of_one_class)
    masks = np.eye(n, dtype=np.bool_)[:, None, :]
    cat, dog, truth = zip(*segments_of_one_class, strict=True)
    sim_RK = np.array([[-np.inf] * n, cat, dog], np.float32).T
    return Segments.from_masks(masks, [1] * n, [1] * n), sim_RK, np.array([truth], np.uint8)


@pytest.mark.parametrize(
    ("segments", "start", "expected"),
    [
        # right above 0.5, wrong below 0.25: half-way between
        ([(0.75, 0, 1), (0.5, 0, 1), (0.25, 0, 0), (0.125, 0, 0)], 0.0, 0.375),
        # 0.3 says the same as half-way does, so it stays
        ([(0.75, 0, 1), (0.5, 0, 1), (0.25, 0, 0), (0.125, 0, 0)], 0.3, 0.3),
        # all are right: down to the lowest, no further
        ([(0.75, 0, 1), (0.5, 0, 1), (0.25, 0, 1)], 0.6, 0.25),
        # all are wrong: the least value above the highest
        ([(0.75, 0, 0), (0.5, 0, 0)], 0.0, float(np.nextafter(np.float32(0.75), np.float32(1)))),
        # no minimum in [-1, 1] keeps out a score of 1, so nothing better than the start
        ([(1.0, 0, 0)], 0.2, 0.2),
        # two scores that are neighbours in float32: the higher itself
        ([(np.nextafter(np.float32(0.5), np.float32(1)), 0, 1), (0.5, 0, 0)], 0.0, 0.50000006),
        # the second and third together change nothing: of 0.625 and 0.25 the nearer to the start
        ([(0.75, 0, 1), (0.5, 0, 255), (0.375, 0, 255), (0.125, 0, 0)], 0.1, 0.25),
        ([(0.75, 0, 1), (0.5, 0, 255), (0.375, 0, 255), (0.125, 0, 0)], 0.8, 0.625),
    ],
)
def test_where_a_threshold_is_put(segments, start, expected):
    sweep = swept([pixels_of(*segments)])
    config = ComposeConfig(min_similarity=start)
    thresholds, best = sweep.class_thresholds(config, "photo", np.ones(1, np.bool_))
    assert np.float32(thresholds["cat"]) == np.float32(expected)
    assert thresholds["dog"] == start, "no segment, so nothing to gain"
    setting = dataclasses.replace(config, min_similarity=thresholds)
    assert best == pytest.approx(miou(sweep.confusion(setting, "photo")[0]), abs=1e-12)


def test_classes_are_gone_through_until_none_improves():
    """A false dog hides the cat below it: only without the dog does painting the cat help."""
    masks = np.zeros((3, 1, 7), np.bool_)
    masks[0, :, :6], masks[1, :, :3], masks[2, :, 6] = True, True, True
    segments = Segments.from_masks(masks, [1] * 3, [1] * 3)
    sim_RK = np.array([[-np.inf, 0.25, 0.5], [-np.inf, 0.375, 0], [-np.inf, 0, 0.75]], np.float32)
    scene = [(segments, sim_RK, np.array([[1, 1, 1, 0, 0, 0, 2]], np.uint8))]
    config = ComposeConfig(min_similarity={"cat": 0.9, "dog": 0.0})
    thresholds, best = swept(scene).class_thresholds(config, "photo", np.ones(1, np.bool_))
    assert thresholds == {"cat": 0.375, "dog": 0.625}
    assert best == 1.0


def test_arrays_from_an_object_store_are_read_only():
    scene = [pixels_of((0.75, 0, 1), (0.5, 0, 1), (0.25, 0, 0)), pixels_of((0.5, 0.25, 2))]
    sweep, config = swept(scene), ComposeConfig(min_similarity=0.3)
    sweep.confusion(config, "photo")
    buffers = []
    data = pickle.dumps(sweep, protocol=5, buffer_callback=buffers.append)
    again = pickle.loads(data, buffers=[bytes(buffer.raw()) for buffer in buffers])
    group_I = np.array([1, 0])
    for array in (group_I, image_I := np.ones(2, np.bool_)):
        array.flags.writeable = False
    np.testing.assert_array_equal(
        again.confusion(config, "photo", group_I, 2), sweep.confusion(config, "photo", group_I, 2)
    )
    assert again.class_thresholds(config, "photo", image_I) == sweep.class_thresholds(
        config, "photo", image_I
    )
    assert len(data) < 4000, "no scores that were only remembered"
    for kernel in (tally, climb):
        assert len(kernel.signatures) == 1, "read-only or not, compiled once"


def test_scores_are_remembered_by_what_they_depend_on(monkeypatch):
    calls = []
    real = sweep_module.score_segments
    monkeypatch.setattr(sweep_module, "score_segments", lambda *a: calls.append(a) or real(*a))
    other = pixels_of((0.25, 0, 1))[1]
    sweep = swept([pixels_of((0.75, 0, 1))], seven=[other])
    for score, temperature, margin in itertools.product(
        ("cosine", "softmax"), (0.1, 0.5), (0.0, 0.5)
    ):
        config = ComposeConfig(
            score=score, temperature=temperature, min_similarity=0.3, min_margin=margin
        )
        for templates in ("photo", "seven"):
            sweep.confusion(config, templates)
    assert len(calls) == 2 * (1 + 2), "cosine has no temperature"


def test_ranges_are_quantiles_over_the_segments_of_the_images_that_count():
    scene = [
        pixels_of((0.75, 0.5, 1), (0.5, math.nan, 1), (0.25, 0.125, 0)),
        pixels_of((0.5, 0.25, 2)),
        (
            Segments.measured((1, 1), [], [], []),
            np.zeros((0, K), np.float32),
            np.zeros((1, 1), "u1"),
        ),
    ]
    sweep, config = swept(scene), ComposeConfig(min_similarity=0.3, temperature=0.5)
    found = sweep.ranges("photo", config)
    cosine, lead = [0.75, 0.25, 0.5], [0.25, 0.125, 0.25]
    np.testing.assert_allclose(found.cosine, np.quantile(cosine, QUANTILES))
    np.testing.assert_allclose(found.cosine_margin, np.quantile(lead, QUANTILES))
    softmax = [1 / (1 + math.exp(-x / 0.5)) for x in lead]
    np.testing.assert_allclose(found.softmax, np.quantile(softmax, QUANTILES), atol=1e-6)
    assert found.softmax_margin[-1] == pytest.approx(2 * softmax[0] - 1, abs=1e-6)
    for same in (found.area_px, found.predicted_iou, found.stability):
        np.testing.assert_array_equal(same, 1.0)
    second = sweep.ranges("photo", config, np.array([False, True, False]))
    np.testing.assert_array_equal(second.cosine, 0.5)
    assert np.isnan(sweep.ranges("photo", config, np.zeros(3, np.bool_)).cosine).all()


def test_what_does_not_belong_together_is_refused():
    segments, sim_RK, truth_HW = pixels_of((0.75, 0, 1), (0.5, 0, 2))
    regions, two = cut(segments, truth_HW, K), ClassList.of(["cat"])
    cases = [
        ("sims must be of as many images", [regions], [segments], [], CLASSES),
        ("qualities must be those that cut", [regions], [segments.select([0])], [sim_RK], CLASSES),
        ("regions must be counted with classes below 2", [regions], [segments], [sim_RK], two),
        ("sims\\['photo'\\] must be of shape", [regions], [segments], [sim_RK[:1]], CLASSES),
    ]
    for message, cuts, qualities, sims, classes in cases:
        with pytest.raises(ValueError, match=message):
            Sweep(cuts, qualities, {"photo": sims}, classes)
    sweep, config = swept([(segments, sim_RK, truth_HW)]), ComposeConfig(min_similarity=0.3)
    for message, group_I in (
        ("integers \\[1\\], got", np.zeros(2, np.int64)),
        ("integers \\[1\\], got", np.zeros(1)),
        ("in \\[-1, 1\\)", np.ones(1, np.int64)),
        ("in \\[-1, 1\\)", np.full(1, -2)),
    ):
        with pytest.raises(ValueError, match=message):
            sweep.confusion(config, "photo", group_I)
    with pytest.raises(ValueError, match="image_I must be bool"):
        sweep.class_thresholds(config, "photo", np.ones(1, np.int64))
    with pytest.raises(ValueError, match="templates must be one of photo, got seven"):
        sweep.confusion(config, "seven")
    with pytest.raises(ValueError, match=r"compose\.min_similarity must be by class name, got dgo"):
        sweep.confusion(ComposeConfig(min_similarity={"dgo": 0.1, "*": 0.2}), "photo")


def test_the_benchmark_compares_counts_while_it_measures(capsys, monkeypatch):
    small = ["--images", "2", "--segments", "9", "--settings", "4", "--rounds", "1"]
    small += ["--width", "50", "--height", "40", "--json"]
    assert sweep_benchmark.main(small) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["settings"], row["images"]) for row in rows] == [
        (settings, images) for settings in ("all", "one temperature") for images in (1, 2)
    ]
    assert all(row["ratio"] > row["ratio_with_build"] > 0 for row in rows)
    real = sweep_benchmark.on_pixels
    monkeypatch.setattr(sweep_benchmark, "on_pixels", lambda *a: real(*a)[::-1])
    assert sweep_benchmark.main(small) == 1
    assert "counts on regions and on pixels differ" in capsys.readouterr().err
