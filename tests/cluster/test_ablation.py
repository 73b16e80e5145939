"""The ablation's helpers, and the whole of it in very small."""

import json

import numpy as np
import pyarrow as pa
import pytest

from zsplg_ray.cluster import ablation
from zsplg_ray.masks import open_truth
from zsplg_ray.records import LABELS, encode_png, encode_score
from zsplg_ray.rundir import RunFolder, part_name
from zsplg_ray.shapes.scenes import write_voc


def test_the_trusted_score_is_the_least_that_is_right_often_enough(tmp_path):
    write_voc(tmp_path / "scenes", 4, seed=0)
    truth = open_truth(str(tmp_path / "scenes"))
    rows = []
    for image_id in truth.ids:
        label_HW = truth.read(image_id)
        named = label_HW > 0
        # The left half has score .8 and is right, the right half has .4 and is wrong.
        left = np.arange(128) < 64
        wrong_HW = np.where(named & ~left, label_HW % 8 + 1, label_HW).astype(np.uint8)
        score_HW = np.where(left, 0.8, 0.4) * named
        rows.append(
            {"image_id": image_id, "uri": image_id, "width": 128, "height": 128}
            | {"label_png": encode_png(wrong_HW), "score_png": encode_score(score_HW)}
            | {"class_px": [0] * 9, "source": "zeroshot", "confidence": 0.5}
        )
    folder = RunFolder(str(tmp_path / "labels"))
    table = pa.Table.from_pylist(rows, schema=LABELS)
    folder.write_part("labels", part_name(truth.ids), table, {})
    assert ablation.trusted_score(tmp_path / "labels", truth, truth.ids) == pytest.approx(0.41)


def test_the_table_has_mean_and_deviation_over_seeds():
    rows = [
        {"arm": "unimatch", "last": last, "best": 0.5, "steps": 10, "cpu_s": 3.0}
        for last in (0.4, 0.6)
    ]
    lines = ablation.table(rows, 0.55).splitlines()
    assert lines[1].split() == [
        "unimatch",
        "0.500",
        "±",
        "0.141",
        "0.500",
        "±",
        "0.000",
        "2",
        "10",
        "3",
    ]
    assert lines[-1].endswith("0.550")


@pytest.mark.ray
@pytest.mark.slow
def test_the_whole_of_it_in_small(tmp_path, capsys, ray_local):
    argv = ["--out", str(tmp_path), "--seconds", "1", "--seeds", "1"]
    argv += ["--labelled", "8", "--unlabelled", "8", "--held-out", "3"]
    argv += ["--arms", "supervised", "agree"]
    assert ablation.main(argv) == 0
    told = capsys.readouterr().out
    assert told.count("±") == 4 and "zero-shot labels themselves" in told
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {r["arm"] for r in rows} == {"supervised", "agree"}
    assert all(0 <= r[which] <= 1 for r in rows for which in ("last", "best"))
    assert ablation.main(argv) == 0, "what is done is not done again"
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
