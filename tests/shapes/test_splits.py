"""Splits of scenes."""

from pathlib import Path

from zsplg_ray.masks import open_truth
from zsplg_ray.shapes import splits
from zsplg_ray.shapes.scenes import write_voc


def test_few_labelled_scenes_hold_every_class_twice(tmp_path):
    write_voc(tmp_path, 60, seed=0)
    truth = open_truth(str(tmp_path))
    chosen = splits.few_labelled(truth, 24, seed=3)
    assert len(set(chosen)) == 24 and chosen == splits.few_labelled(truth, 24, seed=3)
    assert chosen != splits.few_labelled(truth, 24, seed=4)
    for k in range(1, 9):
        assert sum(bool((truth.read(i) == k).any()) for i in chosen) >= 2
    files = splits.write_splits(tmp_path / "splits", chosen, truth.ids)
    rows = {k: Path(v).read_text().splitlines() for k, v in files.items()}
    assert len(rows["labeled"]) == 24 and len(rows["unlabeled"]) == 36
    assert not set(rows["labeled"]) & set(rows["unlabeled"])
