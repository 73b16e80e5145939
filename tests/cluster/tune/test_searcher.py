"""Searches: what is asked and told, batches for Ray Tune, and what the best setting is worth."""

import numpy as np
import pytest
from ray.tune.search import Searcher

from zsplg_ray.cluster.tune.judgement import (
    VARIANTS,
    Subject,
    Verdict,
    choose,
    compared,
    judge,
    marks,
)
from zsplg_ray.cluster.tune.search import Search, draw_batch
from zsplg_ray.cluster.tune.searcher import BatchSearcher, batch_size, metrics_of
from zsplg_ray.config import ComposeConfig
from zsplg_ray.label.regions import cut
from zsplg_ray.label.segments import Segments
from zsplg_ray.label.space import TEMPLATES, Limits, compose_space
from zsplg_ray.label.sweep import Sweep, miou
from zsplg_ray.metrics import scores
from zsplg_ray.settings import flatten
from zsplg_ray.vocab import ClassList

CLASSES = ClassList.of(["cat", "dog"])
DEFAULT = {f"compose.{k}": v for k, v in flatten(ComposeConfig(min_similarity=0.9)).items()}
DEFAULT |= {TEMPLATES: "run"}
LIMITS = Limits((0.0, 1.0), (0.3, 1.0), (0.1, 0.3), (1, 60), (0.0, 0.5), (0.0, 0.5))


def space(over=None):
    return compose_space(DEFAULT, LIMITS, over=over)


def finish(search, objective, size=10):
    while batch := search.ask(size):
        for number, settings in batch:
            search.tell(number, {"miou": objective(settings)}, 0.0, 1.0)
    return search


def near(settings):
    """Best at a cosine of 0.3 and small areas."""
    far = abs(settings["compose.min_similarity"] - 0.3) + settings["compose.min_area_px"] / 100
    return 1.0 - far - 0.5 * (settings["compose.score"] == "softmax")


@pytest.mark.parametrize("method", ["tpe", "random"])
def test_the_default_comes_first_and_the_rest_is_drawn(method):
    search = finish(Search(0, None, space(), 80, method, seed=1), near)
    assert len(search.tried) == 80 and search.left == 0
    assert sorted(t.number for t in search.tried) == list(range(80))
    first = min(search.tried, key=lambda t: t.number)
    assert first.settings == DEFAULT  # 0.9, exactly
    assert near(search.best.settings) == max(near(t.settings) for t in search.tried)
    assert near(search.best.settings) > near(DEFAULT) + 0.3


def test_the_estimator_learns():
    """In its second half it draws better settings than chance does."""
    means = {}
    for method in ("tpe", "random"):
        tried = finish(Search(0, None, space(), 120, method, seed=2), near).tried
        means[method] = np.mean([near(t.settings) for t in tried if t.number >= 60])
    assert means["tpe"] > means["random"] + 0.1


def test_the_same_seed_asks_the_same():
    def asked(seed):
        tried = finish(Search(0, None, space(), 70, "tpe", seed=seed), near).tried
        return [dict(t.settings) for t in tried]

    assert asked(5) == asked(5) != asked(6)


def test_a_grid_tries_every_point_once():
    over = ["compose.min_similarity", "compose.order"]
    search = finish(Search(0, None, space(over), 30, "grid"), near)
    points = [
        (t.settings["compose.min_similarity"], t.settings["compose.order"]) for t in search.tried
    ]
    assert points[0] == (0.9, "score")
    assert len(search.tried) == 1 + 28 and len(set(points[1:])) == 28  # 14 levels, 2 orders
    with pytest.raises(ValueError, match=r"^trials must be >= "):
        Search(0, None, space(), 20, "grid")


def test_equal_scores_keep_the_default():
    assert finish(Search(0, None, space(), 12, "random"), lambda settings: 0.5).best.number == 0


def test_searches_keep_step():
    searches = [Search(0, 0, space(), 20, "random"), Search(0, None, space(), 40, "random")]
    order = []
    while (drawn := draw_batch(searches, 5)) is not None:
        order.append(drawn[0])
        assert 1 <= len(drawn[1]) <= 5
    assert order.count(0) == 4 and order.count(1) == 8
    half = order[:6]
    assert half.count(0) == 2 and half.count(1) == 4


def test_ray_tune_gets_batches_and_tells_what_came_of_them():
    told = []
    searches = [Search(3, 1, space(), 9, "random"), Search(4, None, space(), 9, "random")]
    searcher = BatchSearcher(searches, 4, lambda search, tried: told.append((search.run, tried)))
    trials = {}
    while (config := searcher.suggest(f"t{len(trials)}")) != Searcher.FINISHED:
        trials[f"t{len(trials)}"] = config
    assert len(trials) == 6  # 4 + 4 + 1, twice
    assert {(c["run"], c["held_out"]) for c in trials.values()} == {(3, 1), (4, None)}
    for trial_id, config in reversed(trials.items()):  # in whatever order they end
        judged = [(n, {"miou": near(s)}, 1.0, 2.0) for n, s in config["batch"]]
        searcher.on_trial_complete(trial_id, {"judged": judged})
    assert [len(s.tried) for s in searches] == [9, 9] and len(told) == 18
    assert all(t.metrics["miou"] == near(t.settings) for _, t in told)


def test_a_batch_that_failed_tells_nothing():
    searcher = BatchSearcher([Search(0, None, space(), 4, "random")], 4)
    searcher.suggest("t")
    searcher.on_trial_complete("t", None, error=True)
    assert searcher.searches[0].tried == []


@pytest.mark.parametrize(
    ("trials", "concurrent", "size"),
    [(1, 2, 8), (200, 2, 13), (500, 2, 32), (1000, 2, 50), (10**6, 2, 50), (1000, 64, 8)],
)
def test_batches_are_large_but_not_too_few(trials, concurrent, size):
    assert batch_size(trials, concurrent) == size


# What a setting is worth ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject():
    """Twelve images in three groups. Segments show a class; stray ones are similar at 0.4 at most,
    true ones at 0.5 at least, but those of dogs are 0.25.
    """
    rng = np.random.default_rng(0)
    regions, qualities, sims = [], [], []
    for _ in range(12):
        truth_HW = np.zeros((16, 16), np.uint8)
        truth_HW[2:8, 2:8], truth_HW[9:15, 9:15] = 1, 2
        masks_RHW = np.zeros((4, 16, 16), bool)
        masks_RHW[0, 2:8, 2:8] = masks_RHW[1, 9:15, 9:15] = True
        masks_RHW[2, :5, 10:] = masks_RHW[3, 10:, :5] = True  # nothing is there
        segments = Segments.from_masks(masks_RHW, [0.9] * 4, [0.9] * 4)
        sim_RK = np.full((4, 3), -0.2, np.float32)
        sim_RK[:, 0] = -np.inf
        sim_RK[0, 1] = rng.uniform(0.5, 0.6)
        sim_RK[1, 2] = 0.25
        sim_RK[2, 1] = sim_RK[3, 1] = rng.uniform(0.3, 0.4)
        regions.append(cut(segments, truth_HW, 3))
        qualities.append(segments)
        sims.append(sim_RK)
    sweep = Sweep(regions, qualities, {"run": sims}, CLASSES)
    return Subject(sweep, np.arange(12) % 3, 3, CLASSES)


def test_metrics_of_both_parts(subject):
    settings = {**DEFAULT, "compose.min_similarity": 0.45}
    counts_GKL = subject.confusion(settings)
    metrics = metrics_of(subject, settings, 1)
    told = scores(counts_GKL[0] + counts_GKL[2], CLASSES.names)
    assert metrics["miou"] == pytest.approx(told["miou"])
    held = scores(counts_GKL[1], CLASSES.names)
    assert metrics["held_out_miou"] == pytest.approx(held["miou"])
    assert metrics["coverage"] == pytest.approx(36 / 256)  # the cat
    assert metrics["precision"] == 1.0
    assert "held_out_miou" not in metrics_of(subject, settings, None)
    assert marks(np.zeros((3, 4), np.int64)) == {"miou": 0.0, "coverage": 0.0, "precision": 0.0}


def test_what_makes_no_difference_goes_back_to_the_default(subject):
    best = {**DEFAULT, "compose.min_similarity": 0.45, "compose.min_stability": 0.5}
    best |= {"compose.order": "area", "compose.min_area_px": 7}
    verdict = judge(subject, DEFAULT, best, 0, per_class=False)
    assert verdict.settings["tuned"] == {**DEFAULT, "compose.min_similarity": 0.45}
    assert set(verdict.settings) == {"default", "tuned"}


def test_class_thresholds_win_where_classes_differ(subject):
    best = {**DEFAULT, "compose.min_similarity": 0.45}
    folds = [judge(subject, DEFAULT, best, g, per_class=True) for g in range(3)]
    assert choose(folds) == "per_class"
    thresholds = folds[0].settings["per_class"]["compose.min_similarity"]
    assert 0.4 <= thresholds["cat"] <= 0.5 and thresholds["dog"] <= 0.25
    result = compared(folds, CLASSES.names)
    assert result["per_class"]["held_out"]["miou"] == 1.0
    assert result["per_class"]["held_out"]["iou"] == {"background": 1.0, "cat": 1.0, "dog": 1.0}
    held = [miou(fold.confusion["default"][g]) for g, fold in enumerate(folds)]
    assert result["default"]["held_out"]["folds"] == held
    gain = result["per_class"]["held_out"]["gain"]
    assert gain["miou"] == pytest.approx(1.0 - np.mean(held))
    assert gain["sd"] == pytest.approx(np.std(1.0 - np.array(held), ddof=1))


def test_held_out_images_decide_and_ties_stay_as_labelled():
    def verdict(default, tuned):
        """Hits in a hundred pixels of class 1: on the held-out group, all right elsewhere."""
        counts = {}
        for name, hits in zip(VARIANTS, (default, tuned), strict=False):
            counts_GKL = np.zeros((2, 2, 3), np.int64)
            counts_GKL[:, 1, 1] = 100
            counts_GKL[1, 1] = 100 - hits, hits, 0
            counts[name] = counts_GKL
        return Verdict(1, {key: {} for key in counts}, counts)

    assert choose([verdict(50, 60)]) == "tuned"
    assert choose([verdict(50, 50)]) == "default"
    assert choose([verdict(50, 60), verdict(50, 30)]) == "default"
    assert choose([verdict(50, 60), verdict(50, 45)]) == "tuned"


def test_a_threshold_for_each_class_has_to_be_worth_it():
    def verdict(*hits):
        counts = {}
        for name, right in zip(VARIANTS, hits, strict=True):
            counts_GKL = np.zeros((2, 2, 3), np.int64)
            counts_GKL[1, 1] = 10_000 - right, right, 0
            counts[name] = counts_GKL
        return Verdict(1, {key: {} for key in counts}, counts)

    assert choose([verdict(5000, 6000, 6010)]) == "tuned"  # half a thousandth
    assert choose([verdict(5000, 6000, 6100)]) == "per_class"
    assert choose([verdict(5000, 5010, 5010)]) == "default"
