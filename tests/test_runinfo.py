"""run.json: which changes a run's folder refuses, and which fingerprint follows from what."""

import copy
import json
import re
from typing import Any

import pyarrow as pa
import pytest

from zsplg_ray.config import LabelConfig, PredictConfig, RelabelConfig
from zsplg_ray.label.presets import resolve_label, resolve_text
from zsplg_ray.rundir import RunFolder, part_name
from zsplg_ray.runinfo import (
    ADDED_LATER,
    describe_prediction,
    describe_run,
    label_settings,
    part_meta,
    refuse_other_run,
    relabelled,
    segment_settings,
    with_fingerprints,
)
from zsplg_ray.settings import flatten, from_mapping
from zsplg_ray.vocab import class_list

WEIGHTS = {"sam": "5a3", "clip": "c11b"}

KNOWN_FROM_THE_FIRST = {
    "clip": "dense_px embedder gem_depth model random_weights",
    "compose": "min_area_px min_margin min_predicted_iou min_similarity min_stability order score "
    "temperature unsure",
    "prompts": "background templates",
    "sam": "box_nms_thresh crop_n_layers min_mask_region_area model points_per_side "
    "pred_iou_thresh random_weights stability_score_offset stability_score_thresh",
}


def describe(weights: Any = WEIGHTS, classes: Any = "cat,dog", **changes: Any) -> dict[str, Any]:
    values = {"images": "i", "classes": classes, "out": "o"}
    config = from_mapping(
        LabelConfig, values | {k.replace("__", "."): v for k, v in changes.items()}
    )
    return describe_run(config, resolve_label(config), class_list(classes), weights)


@pytest.fixture
def folder(tmp_path):
    made = RunFolder(str(tmp_path))
    made.write_run(describe())
    return made


def prints(run):
    return run["fingerprint"], run["labels_fingerprint"]


def test_what_run_json_tells():
    run = describe(sam="vit_b", compose__min_margin=0.25)
    assert json.loads(json.dumps(run)) == run
    assert run["config"]["sam.points_per_side"] is None, "config is as given"
    assert run["resolved"]["sam.points_per_side"] == 32, "resolved is as used"
    assert not [
        k for k, v in run["resolved"].items() if v is None and k.startswith(("sam.p", "cl"))
    ]
    assert run["classes"]["names"] == ["background", "cat", "dog"]
    assert run["weights"] == WEIGHTS and run["labels_state"] == "complete"
    assert set(run["versions"]) >= {"zsplg_ray", "torch", "ray"}
    assert part_meta(run) == {
        "fingerprint": run["fingerprint"],
        "labels_fingerprint": run["labels_fingerprint"],
        "classes": run["classes"],
    }


def test_a_new_folder_and_the_same_settings_are_welcome(tmp_path, folder):
    refuse_other_run(RunFolder(str(tmp_path / "new")), describe())
    refuse_other_run(folder, describe())
    refuse_other_run(folder, describe(sam__points_per_side=32, compose__min_similarity=0.2))


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"out must be a folder, got .*file; give another"):
        refuse_other_run(RunFolder(str(tmp_path / "file")), describe())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sam": "vit_b"}, "sam.model must be vit_h as in DIR, got vit_b;"),
        ({"sam__points_per_side": 16}, "sam.points_per_side must be 32 as in DIR, got 16;"),
        ({"clip__embedder": "crop"}, "clip.embedder must be gem as in DIR, got crop;"),
        ({"clip__dense_px": 224}, "clip.dense_px must be 448 as in DIR, got 224;"),
        ({"sam__random_weights": True}, "sam.random_weights must be False as in DIR, got True;"),
        ({"weights": {**WEIGHTS, "sam": "new"}}, "weights of sam must be 5a3 as in DIR, got new;"),
        (
            {"weights": {**WEIGHTS, "clip": "new"}},
            "weights of clip must be c11b as in DIR, got new;",
        ),
        (
            {"sam": "vit_b", "weights": {**WEIGHTS, "sam": "new"}},
            "sam.model must be vit_h as in DIR, got vit_b;",
        ),
        ({"compose__min_margin": 0.1}, "compose.min_margin must be 0.0 as in DIR, got 0.1;"),
        (
            {"prompts__templates": ["the {class}"]},
            "prompts.templates must be ['a photo of a {class}'] as in DIR, got ['the {class}'];",
        ),
        (
            {"classes": "cat,cow"},
            "classes must be ['background', 'cat', 'dog'] as in DIR, "
            "got ['background', 'cat', 'cow'];",
        ),
    ],
)
def test_another_setting_is_refused_by_name_with_both_values(folder, changes, told):
    with pytest.raises(
        ValueError, match="^" + re.escape(told.replace("DIR", folder.uri))
    ) as caught:
        refuse_other_run(folder, describe(**changes))
    told_fix = str(caught.value).partition("; ")[2]
    only_labels = told.startswith(("compose", "prompts", "classes"))
    assert ("zsplg relabel --run" in told_fix) == only_labels
    assert "another --out" in told_fix


@pytest.mark.parametrize(
    "changes",
    [
        {"sam__points_per_batch": 4},
        {"clip__crop_batch": 2},
        {"ray__num_cpus": 3},
        {"actors__max": 9},
        {"actors__in_flight": 2},
        {"sam__checkpoint": "elsewhere/the_same.pth"},
        {"device": "cuda"},
        {"quiet": True},
        {"max_errors": 3},
        {"images": "more"},
    ],
    ids=str,
)
def test_settings_that_change_no_result_are_free(folder, changes):
    refuse_other_run(folder, describe(**changes))
    assert prints(describe(**changes)) == prints(describe())


def test_fingerprints_follow_what_they_are_for():
    segments, labels = prints(describe())
    for changes in ({"compose__unsure": "ignore"}, {"prompts__background": ["sky"]}):
        assert describe(**changes)["fingerprint"] == segments
        assert describe(**changes)["labels_fingerprint"] != labels
    assert describe(classes="cat,cow")["fingerprint"] == segments
    for changes in ({"sam": "vit_l"}, {"clip__gem_depth": 3}, {"weights": {"sam": "x"}}):
        changed = prints(describe(**changes))
        assert changed[0] != segments and changed[1] != labels
    assert len({prints(describe(compose__min_margin=m / 10)) for m in range(5)}) == 5


def test_a_half_relabelled_folder_is_refused(folder):
    run = describe()
    folder.write_run({**run, "labels_state": "relabelling"})
    with pytest.raises(ValueError, match=r"half relabelled one; run `zsplg relabel --run .*finish"):
        refuse_other_run(folder, run)


def from_before(run):
    """The run as a version would have written it that knew none of the later settings."""
    old = copy.deepcopy(run)
    for key in ("config", "resolved"):
        old[key] = {k: v for k, v in old[key].items() if k not in ADDED_LATER}
    return with_fingerprints(old)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sam__precision": "bfloat16"}, "sam.precision must be float32 as in DIR, got bfloat16;"),
        ({"sam__crop_nms_thresh": 0.5}, "sam.crop_nms_thresh must be 0.7 as in DIR, got 0.5;"),
    ],
)
def test_a_run_made_before_a_setting_existed_goes_on_as_it_was_made(folder, changes, told):
    folder.write_run(from_before(describe()))
    refuse_other_run(folder, describe())
    with pytest.raises(ValueError, match="^" + re.escape(told.replace("DIR", folder.uri))):
        refuse_other_run(folder, describe(**changes))
    with pytest.raises(ValueError, match=r"^sam\.points_per_side must be 32 as in"):
        refuse_other_run(folder, describe(sam__points_per_side=16))


def test_parts_made_before_a_setting_existed_carry_the_same_fingerprints(tmp_path):
    run = describe()
    old = from_before(run)
    assert len(old["resolved"]) < len(run["resolved"])
    assert prints(old) == prints(run) == prints(relabel(old))
    folder = RunFolder(str(tmp_path))
    folder.write_part("segments", part_name("a"), pa.table({"image_id": ["a"]}), part_meta(old))
    refuse_other_run(folder, run)  # no run.json: the part alone decides
    changed = describe(sam__precision="bfloat16")
    assert prints(changed)[0] != prints(run)[0] and prints(changed)[1] != prints(run)[1]
    with pytest.raises(ValueError, match="out must be a folder of segments with fingerprint"):
        refuse_other_run(folder, changed)


def test_every_setting_of_segments_and_labels_has_a_value_in_older_runs():
    names = {*segment_settings(describe()), *label_settings(describe())}
    first = {f"{k}.{name}" for k, known in KNOWN_FROM_THE_FIRST.items() for name in known.split()}
    assert names - first == ADDED_LATER.keys(), "what did older runs work by?"


def relabel(run, **changes):
    given = from_mapping(RelabelConfig, {"run": "o", **changes})
    resolved = resolve_text(given, "ViT-B-16/laion2b_s34b_b88k", "gem")
    classes = class_list(given.classes or "cat,dog")
    return relabelled(run, given, resolved, classes)


def test_relabelling_changes_what_labels_depend_on_and_nothing_else():
    old = describe()
    before = copy.deepcopy(old)
    new = relabel(old, **{"compose.min_margin": 0.5, "ray.num_cpus": 3})
    assert old == before, "the old run was changed"
    assert new["fingerprint"] == old["fingerprint"]
    assert new["labels_fingerprint"] != old["labels_fingerprint"]
    assert new["labels_state"] == "relabelling"
    for key in ("config", "resolved"):
        changed = {k for k in new[key] if new[key][k] != old[key][k]}
        assert changed == {"compose.min_margin"} and new[key].keys() == old[key].keys()
    assert {k for k in new if new[k] != old[k]} == {
        "labels_state",
        "labels_fingerprint",
        "config",
        "resolved",
    }
    assert relabel(old)["labels_fingerprint"] == old["labels_fingerprint"]


def test_a_run_relabelled_with_other_classes_goes_on_with_those(tmp_path):
    new = relabel(describe(), classes="cat,cow", **{"prompts.templates": ["the {class}"]})
    folder = RunFolder(str(tmp_path))
    folder.write_run({**new, "labels_state": "complete"})
    refuse_other_run(folder, describe(classes="cat,cow", prompts__templates=["the {class}"]))
    assert new["config"]["classes"] == "cat,cow"
    with pytest.raises(ValueError, match=r"prompts\.templates must be"):
        refuse_other_run(folder, describe())


def test_label_settings_are_those_that_relabel_starts_from(folder):
    folder.write_run(describe(compose__min_margin=0.5, sam__points_per_side=3))
    settings = folder.label_settings()
    assert settings["compose.min_margin"] == 0.5
    assert settings["compose.min_similarity"] is None, "as given, for another score needs another"
    assert {k.split(".")[0] for k in settings} == {"prompts", "compose"}
    made = from_mapping(RelabelConfig, {"run": "o", **settings})
    assert {k: v for k, v in flatten(made).items() if k in settings} == settings
    with pytest.raises(ValueError, match=r"run must be a run's folder .* got none"):
        RunFolder("none").label_settings()


# Predictions -------------------------------------------------------------------------------------

ZEROSHOT = {"uri": "z", "labels_fingerprint": "0f"}


def predicted(sha="5a3", classes="cat,dog", zeroshot=None, **changes) -> dict[str, Any]:
    values = {"images": "i", "model": "m", "out": "o"}
    given = {k.replace("__", "."): v for k, v in changes.items()}
    config = from_mapping(PredictConfig, values | given)
    return describe_prediction(config, config, class_list(classes), {"model": sha}, zeroshot)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sha": "new"}, "weights of the model must be 5a3 as in DIR, got new;"),
        ({"conf_thresh": 0.5}, "conf_thresh must be 0.0 as in DIR, got 0.5;"),
        ({"max_side_px": 64}, "max_side_px must be 2048 as in DIR, got 64;"),
        ({"precision": "bfloat16"}, "precision must be float32 as in DIR, got bfloat16;"),
        ({"zeroshot": None}, "labels of fuse must be 0f as in DIR, got None;"),
        ({"zeroshot": {**ZEROSHOT, "labels_fingerprint": "1"}}, "labels of fuse must be 0f as"),
        ({"fusion__rule": "agree"}, "fusion.rule must be model_else_zeroshot as in DIR, got agree"),
        ({"classes": "cat,cow"}, "classes must be ['background', 'cat', 'dog'] as in DIR, got"),
    ],
)
def test_predictions_of_another_kind_are_refused(tmp_path, changes, told):
    folder = RunFolder(str(tmp_path))
    folder.write_run(predicted(zeroshot=ZEROSHOT))
    with pytest.raises(ValueError, match="^" + re.escape(told.replace("DIR", folder.uri))):
        refuse_other_run(folder, predicted(**{"zeroshot": ZEROSHOT, **changes}))
    assert prints(predicted(**{"zeroshot": ZEROSHOT, **changes})) != prints(
        predicted(zeroshot=ZEROSHOT)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"actors__in_flight": 3},
        {"device": "cpu"},
        {"images": "more"},
        {"model": "the same, elsewhere"},
        {"fusion__rule": "agree"},
        {"max_pixels": 5},
    ],
    ids=str,
)
def test_what_changes_no_prediction_is_free(tmp_path, changes):
    RunFolder(str(tmp_path)).write_run(predicted())
    refuse_other_run(RunFolder(str(tmp_path)), predicted(**changes))
    assert prints(predicted(**changes)) == prints(predicted())


def test_labels_and_predictions_do_not_go_into_one_folder(tmp_path, folder):
    with pytest.raises(ValueError, match=r"^out must be a folder of `zsplg predict`, got one of `"):
        refuse_other_run(folder, predicted())
    other = RunFolder(str(tmp_path / "predicted"))
    other.write_run(predicted())
    with pytest.raises(ValueError, match=r"^out must be a folder of `zsplg label`, got one of `"):
        refuse_other_run(other, describe())


def test_without_run_json_the_parts_decide(tmp_path):
    run, labels = predicted(), pa.table({"image_id": ["a"]})
    folder = RunFolder(str(tmp_path))
    folder.write_part("labels", part_name("a"), labels, part_meta(run))
    refuse_other_run(folder, run)
    for other in (predicted(conf_thresh=0.5), describe()):
        with pytest.raises(ValueError, match=r"^out must be a folder of labels with fingerprint"):
            refuse_other_run(folder, other)
