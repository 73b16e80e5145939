"""The figures by which the picks are judged, on counts made by hand; and the table."""

import numpy as np
import pytest

from tests.views.reviewing import make_run
from zsplg_ray.records import encode_png
from zsplg_ray.views.review.benchmark import Judge, main

COUNTS = np.array(
    [
        [[3, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],  # one background pixel taken for class 1
        [[0, 0, 0, 0], [0, 2, 0, 2], [0, 0, 0, 0]],  # two pixels of class 1 left open
        [[4, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
    ]
)


def test_the_truth_replaces_what_is_picked():
    judge = Judge(COUNTS, ["background", "cat", "dog"])
    assert judge.error_N.tolist() == [0.25, 0.5, 0.0]
    assert judge.before == pytest.approx((7 / 8 + 2 / 5) / 2)
    assert judge.miou([0]) == pytest.approx((1 + 2 / 4) / 2)
    assert judge.miou([1]) == pytest.approx((7 / 8 + 4 / 5) / 2)
    assert judge.miou([0, 1]) == 1.0
    assert judge.miou([2]) == judge.before


def test_the_table(tmp_path, capsys):
    labels = {f"{n}.jpg": np.full((4, 4), n % 3) for n in range(6)}
    truth = {**labels, "0.jpg": np.full((4, 4), 2)}
    run = make_run(tmp_path / "run", labels)
    other = make_run(tmp_path / "other", truth)
    masks = tmp_path / "masks"
    masks.mkdir()
    for name, rows in truth.items():
        (masks / f"{name[:-4]}.png").write_bytes(encode_png(rows))
    argv = ["--run", run, "--truth", str(masks), "--compare", other, "--budgets", "1", "9"]
    main(argv)
    told = capsys.readouterr().out
    assert "6 images, 0.167 of pixels wrong" in told
    assert "| 1 | disagreement | 1.000 | 1.000 | 100% |" in told
    assert "| 9 | random | 0.167 | 1.000 ± 0.000 | 100% |" in told
