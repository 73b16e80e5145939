"""The verbs as Python functions do what the command line does."""

import subprocess
import sys

import numpy as np
import pytest

from zsplg_ray import api

TINY = {"sam": "shapes", "clip": {"model": "shapes", "embedder": "crop"}, "quiet": True}


@pytest.mark.ray
def test_label_relabel_and_evaluate(ray_local, scenes, tmp_path):
    out = str(tmp_path / "run")
    some = str(scenes / "JPEGImages" / "*[05].jpg")
    labels = api.label(some, "shapes", out, **TINY)
    assert 2 <= len(labels) < 24
    before = {row.image_id: row.label_HW for row in labels}
    assert any(label_HW.any() for label_HW in before.values())

    same = api.relabel(out, quiet=True)
    assert all(np.array_equal(row.label_HW, before[row.image_id]) for row in same)
    none = api.relabel(out, compose={"min_similarity": 1.0}, **{"prompts.background": []})
    assert not any(row.label_HW.any() for row in none), "nothing is as similar as that"
    result = api.evaluate(out, str(scenes / "SegmentationClass"))
    assert result["images"] == len(labels) and result["iou"]["background"] > 0.5

    row = labels[0]
    labeler = api.load_labeler("shapes", sam="shapes", clip=TINY["clip"])
    _, composed = labeler.label(row.image_HWC)
    assert np.array_equal(composed.label_HW, before[row.image_id]), "without Ray the same"


def test_arrays_are_labelled_without_ray():
    look = "import sys; from zsplg_ray import api; api.load_labeler('shapes', sam='shapes', clip="
    look += "'shapes'); print({'ray', 'mlflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    with pytest.raises(ValueError, match=r"labeler must be one of sam, .*, got quiet"):
        api.load_labeler("shapes", quiet=True)


def test_bad_settings_are_told_by_their_names(tmp_path):
    with pytest.raises(ValueError, match=r"compose\.min_area_px must be >= 0, got -1"):
        api.label("x", "cat", str(tmp_path / "o"), compose={"min_area_px": -1})
    with pytest.raises(ValueError, match="did you mean `zeroshot`"):
        api.train("x", str(tmp_path / "o"), zero_shot="y")
    with pytest.raises(ValueError, match="known setting"):
        api.evaluate("x", "y", nonsense=1)
    with pytest.raises(ValueError, match="known setting"):
        api.predict("x", "y", str(tmp_path / "o"), nonsense=1)
    assert not (tmp_path / "o").exists()
