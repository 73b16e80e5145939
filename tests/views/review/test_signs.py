"""Each part on maps for which the number is known by hand."""

import numpy as np
import pytest

from tests.views.reviewing import CLASSES, make_run
from zsplg_ray.label.segments import Segments
from zsplg_ray.labels import Labels
from zsplg_ray.rundir import RunFolder
from zsplg_ray.views.review.maps import Source
from zsplg_ray.views.review.signs import PARTS, leads, measure, rarity


def parts(run, other=None):
    labels = Labels(run)
    source = Source(labels)
    found = measure(source, list(range(len(labels))), Source(Labels(other)) if other else None)
    table = {
        labels.ids[p]: dict(zip(PARTS, row.tolist(), strict=True))
        for p, row in zip(found.positions, found.value_NP, strict=True)
    }
    return table, found, source


def test_low_scores_weigh_by_rank_and_background_does_not(tmp_path):
    labels = {"low": [[1, 1, 0, 0]], "high": [[2, 2, 0, 0]], "none": [[0, 0, 0, 0]]}
    scores = {"low": [[60, 60, 9, 9]], "high": [[70, 70, 9, 9]], "none": [[3, 3, 3, 3]]}
    table, found, _ = parts(make_run(tmp_path / "run", labels, scores))
    # Ranks of the four class pixels: 60 has half of its own below it, 1/4; 70 has 3/4.
    assert table["low"]["confidence"] == pytest.approx(0.75 * 2 / 4)
    assert table["high"]["confidence"] == pytest.approx(0.25 * 2 / 4)
    assert table["none"]["confidence"] == 0
    assert found.used == ("confidence", "unlabelled", "rare"), "no segments, nothing to compare"
    # The same ranks at quite other scores: no scale of CLIP's enters.
    wide = {"low": [[2, 2, 0, 0]], "high": [[255, 255, 0, 0]], "none": [[0, 0, 0, 0]]}
    again, *_ = parts(make_run(tmp_path / "wide", labels, wide))
    assert again["low"]["confidence"] == table["low"]["confidence"]


def test_unlabelled_and_rare(tmp_path):
    labels = {"a": [[1, 255]], "b": [[1, 1]], "c": [[1, 2]], "d": [[0, 0]]}
    table, *_ = parts(make_run(tmp_path / "run", labels))
    assert {i: row["unlabelled"] for i, row in table.items()} == {"a": 0.5, "b": 0, "c": 0, "d": 0}
    assert table["c"]["rare"] > table["a"]["rare"] == table["b"]["rare"] > table["d"]["rare"] == 0
    holds_NK = np.array([[1, 1, 0], [1, 1, 0], [1, 0, 0]], bool)
    assert rarity(holds_NK)[0] == 0 and rarity(holds_NK)[2] == 1


def test_disagreement_weighs_by_both_scores(tmp_path):
    labels = {"a": [[1, 1, 0, 0]], "b": [[1, 1, 255, 0]], "c": [[0, 0, 0, 0]]}
    other = {"a.jpg": [[1, 2, 2, 0]], "b.jpg": [[1, 1, 2, 0]]}
    table, found, _ = parts(make_run(tmp_path / "run", labels), make_run(tmp_path / "other", other))
    # All scores of classes are alike, so their rank is 1/2; background has score 0, so rank 0.
    assert table["a"]["disagreement"] == pytest.approx((0.5 + 0.5) / 2 / 4 + (0 + 0.5) / 2 / 4)
    assert table["b"]["disagreement"] == 0, "no label is no contradiction"
    assert table["c"]["disagreement"] == 0, "and an image that the other lacks none either"
    assert table["a"]["rare"] == 1, "class 2, which the run has nowhere, may be in it"
    assert "disagreement" in found.used


def square(y, x, size_hw=(4, 8), vector=(1.0, 0.0)):
    mask_HW = np.zeros(size_hw, bool)
    mask_HW[y : y + 2, x : x + 2] = True
    return mask_HW, vector


def segments(*squares):
    masks, vectors = zip(*squares, strict=True)
    made = Segments.from_masks(np.stack(masks), [0.9] * len(masks), [0.9] * len(masks))
    return made.with_embedding(np.array(vectors, np.float32))


def test_segments_tell_what_was_rejected_and_what_is_near_another_class(tmp_path):
    clear, odd = np.zeros((4, 8), int), np.zeros((4, 8), int)
    clear[0:2, 0:2], clear[0:2, 4:6] = 1, 2
    odd[0:2, 0:2] = 1
    labels = {"clear": clear, "clear too": clear, "odd": odd, "plain": np.zeros((4, 8), int)}
    near = square(0, 4, vector=(0.0, 1.0))
    found = {
        "clear": segments(square(0, 0), near),
        "clear too": segments(square(0, 0), near),
        # named 1 and nearly a 2; and one that nothing was painted on
        "odd": segments(square(0, 0, vector=(0.72, 0.69)), square(2, 4)),
        "plain": segments(square(2, 2)),
    }
    table, signs, _ = parts(make_run(tmp_path / "run", labels, segments=found))
    assert table["odd"]["rejected"] == pytest.approx(4 / 32)
    assert table["plain"]["rejected"] == pytest.approx(4 / 32)
    assert table["clear"]["rejected"] == 0
    assert table["odd"]["margin"] == pytest.approx(4 / 32), "the least lead of all: rank 0"
    assert 0 < table["clear"]["margin"] < 8 / 32 and table["plain"]["margin"] == 0
    assert set(signs.used) == {"confidence", "margin", "rejected", "unlabelled", "rare"}
    assert np.allclose(signs.feature_ND[0], signs.feature_ND[1]), "pooled embeddings, alike"
    assert signs.feature_ND[0] @ signs.feature_ND[3] < 0.5


def test_leads_of_segments_of_no_class_are_unknown():
    mean_KD = np.array([[np.nan, np.nan], [1, 0], [0, 1]], np.float32)
    vector_RD = np.array([[1, 0], [0.6, 0.8], [1, 0], [1, 0]], np.float32)
    lead_R = leads(vector_RD, np.array([1, 1, 0, -1]), mean_KD)
    assert lead_R[:2] == pytest.approx([1, -0.2])
    assert np.isnan(lead_R[2:]).all()


def test_broken_rows_are_passed_over(tmp_path):
    labels = {"a": [[1, 0]], "b": b"no PNG", "c": [[len(CLASSES), 0]], "d": [[2, 2]]}
    table, _, source = parts(make_run(tmp_path / "run", labels, classes=CLASSES, per_part=9))
    assert set(table) == {"a", "d"}
    assert set(source.broken) == {1, 2}


def test_a_torn_part_of_segments_costs_its_images_only(tmp_path):
    labels = {name: np.zeros((4, 8), int) for name in "abcd"}
    found = {name: segments(square(0, 0)) for name in labels}
    run = make_run(tmp_path / "run", labels, segments=found, per_part=2)
    folder = RunFolder(run)
    for part in folder.parts("segments"):
        if "a" in folder.read_part("segments", part, ["image_id"])["image_id"].to_pylist():
            (tmp_path / f"run/segments/{part}.parquet").write_bytes(b"torn")
    table, _, source = parts(run)
    assert set(table) == {"c", "d"} and set(source.broken) == {0, 1}
    assert "its segments cannot be read" in source.broken[0]
