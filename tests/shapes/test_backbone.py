"""The pretrained backbone of the embedded world."""

import numpy as np
import torch
from safetensors.torch import load_file

from zsplg_ray.config import StudentConfig
from zsplg_ray.shapes import train_backbone
from zsplg_ray.shapes.recipe import BACKBONE, BACKBONE_WEIGHTS
from zsplg_ray.shapes.train_backbone import Namer, Objects
from zsplg_ray.student.checkpoint import load_init
from zsplg_ray.student.model import DeepLabV3Plus


def test_the_committed_weights_are_the_students_backbone_and_tell_shapes_apart():
    student = DeepLabV3Plus(StudentConfig(backbone=BACKBONE), 9)
    load_init(student, str(BACKBONE_WEIGHTS))
    weights = load_file(BACKBONE_WEIGHTS)
    ours = {f"backbone.{k}": v for k, v in student.backbone.state_dict().items()}
    assert weights.keys() == ours.keys()
    assert all(torch.equal(ours[k], v.to(ours[k].dtype)) for k, v in weights.items())

    # What stands at the centre can be read off: by the mean features of each class.
    objects = Objects(150, 700_000)
    windows, names = objects.batch(objects.rows, None)
    student.eval()
    with torch.no_grad():
        high = student.backbone(windows)[-1][..., 1:3, 1:3].mean((2, 3))
    half = len(names) // 2
    means = torch.stack([high[:half][names[:half] == k].mean(0) for k in range(8)])
    nearest = torch.cdist(high[half:], means).argmin(1)
    assert (nearest == names[half:]).double().mean() > 0.85


def test_windows_show_the_object_and_are_shaken_when_training():
    objects = Objects(3, 800_000)
    plain, names = objects.batch(objects.rows[:2], None)
    again, _ = objects.batch(objects.rows[:2], None)
    shaken, _ = objects.batch(objects.rows[:2], np.random.default_rng(0))
    assert plain.shape == (2, 3, 64, 64) and torch.equal(plain, again)
    assert not torch.equal(plain, shaken) and names.tolist() == objects.rows[:2, 1].tolist()


def test_training_writes_what_a_student_takes(tmp_path):
    path = train_backbone.train(minutes=0.01, out=tmp_path, scenes=5)
    again = train_backbone.train(minutes=0.01, out=tmp_path / "on", scenes=5, start=path)
    assert load_file(path).keys() == load_file(again).keys() == load_file(BACKBONE_WEIGHTS).keys()
    assert 0 <= train_backbone.measure(Namer(), 2) <= 1
