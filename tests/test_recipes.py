"""The recipes in jobs/: one file serves every verb, and says what its data set's authors say."""

from pathlib import Path

import pytest

from zsplg_ray import cli, config
from zsplg_ray.settings import flatten, setting_types
from zsplg_ray.shapes.recipe import BACKBONE_WEIGHTS, TRAIN_SETTINGS, with_weights

JOBS = Path(__file__).parents[1] / "jobs"
LABEL = ["--images", "i", "--out", "o"]
TRAIN = ["--labeled", "l", "--unlabeled", "u", "--out", "o"]


def read(name: str, verb: str, argv: list[str]) -> dict:
    cls = cli.VERBS[verb][0]
    return flatten(cli.parse(cls, [*argv, "--config", str(JOBS / name)], verb))


@pytest.mark.parametrize("name", ["pascal.yaml", "coco.yaml", "shapes.yaml"])
def test_a_recipe_serves_label_and_train(name):
    labelling, training = read(name, "label", LABEL), read(name, "train", TRAIN)
    assert (
        labelling["classes"] == training["classes"] == name.split(".")[0].replace("pascal", "voc")
    )
    plain = flatten(config.TrainConfig(labeled="l", unlabeled="u", out="o"))
    assert sum(training[k] != plain[k] for k in plain) >= 2, "it sets something"


def test_published_settings():
    voc, coco = (read(f"{n}.yaml", "train", TRAIN) for n in ("pascal", "coco"))
    shared = {"unimatch.conf_thresh": 0.95, "train.batch_labeled": 8, "train.batch_unlabeled": 8}
    shared |= {"optim.head_lr": 10.0, "optim.momentum": 0.9, "optim.weight_decay": 1e-4}
    for recipe in (voc, coco):
        assert {k: recipe[k] for k in shared} == shared
    names = ("augment.crop_px", "train.epochs", "optim.lr", "student.backbone", "workers.num")
    assert [voc[k] for k in names] == [321, 80, 0.001, "resnet101s.gluon_in1k", 4]
    assert [coco[k] for k in names] == [513, 30, 0.004, "xception65", 8]


def test_the_embedded_world_has_one_recipe():
    given = read("shapes.yaml", "train", TRAIN)
    assert {k: given[k] for k in TRAIN_SETTINGS} == TRAIN_SETTINGS
    made = with_weights(config.TrainConfig(labeled="l", out="o"))
    assert made.student.init is None
    student = config.StudentConfig(init="shapes")
    made = with_weights(config.TrainConfig(labeled="l", out="o", student=student))
    assert made.student.init == str(BACKBONE_WEIGHTS) and BACKBONE_WEIGHTS.exists()


def test_what_no_verb_knows_is_still_refused(tmp_path):
    for text, name in (("sma: vit_b\n", "sma"), ("student:\n  backbne: x\n", "student.backbne")):
        file = tmp_path / "wrong.yaml"
        file.write_text(text)
        with pytest.raises(ValueError, match=f"{name} must be a known setting"):
            cli.parse(config.TrainConfig, [*TRAIN, "--config", str(file)], "train")


def test_sections_of_the_same_name_are_the_same_setting():
    for cls, _, _ in cli.VERBS.values():
        for name, hint in setting_types(cls).items():
            if name in ("fusion", "actors", "ray", "sam", "clip"):
                assert hint is setting_types(_owner(name))[name]


def _owner(name: str) -> type:
    return config.PredictConfig if name == "fusion" else config.LabelConfig
