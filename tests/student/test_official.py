"""Our step against the transcription of UniMatch's: the same loss and the same gradients."""

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from zsplg_ray.config import OptimConfig, UnimatchConfig
from zsplg_ray.student import official
from zsplg_ray.student.benchmark import (
    VARIANTS,
    Official,
    Ours,
    Size,
    Variant,
    agreement,
    main,
    random_batch,
    random_weights,
)

GOLDEN = Path(__file__).parent / "golden" / "unimatch_step.safetensors"
SMALL = Size("test_byobnet", 65, 2, 5, False, "cpu")


class Recorded:
    """Stands for a model: answers the three forward passes with recorded logits."""

    def __init__(self, answers: list[Any]) -> None:
        self.answers = answers
        self.training: list[bool] = []
        self.mode = True

    def train(self) -> None:
        self.mode = True

    def eval(self) -> None:
        self.mode = False

    def __call__(self, image: Tensor, need_fp: bool = False) -> Any:
        self.training.append(self.mode)
        answer = self.answers.pop(0)
        assert isinstance(answer, tuple) == need_fp
        return answer


@pytest.mark.parametrize("thresh", ["0.0", "0.8", "0.95"])
def test_the_transcription_gives_the_golden_figures(thresh: str) -> None:
    with safe_open(GOLDEN, "pt") as file:
        given = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        expected = json.loads(file.metadata()["expected"])[thresh]
    clean = torch.cat([given["pred_x"], given["pred_u_w"]])
    perturbed = torch.cat([given["pred_x"], given["pred_u_w_fp"]])
    strong = torch.cat([given["pred_u_s1"], given["pred_u_s2"]])
    model = Recorded([given["pred_u_w_mix"], (clean, perturbed), strong])
    image = torch.zeros(3, 3, 24, 24)
    views = official.Views(
        x_label_BHW=given["mask_x"],
        ignore_BHW=given["ignore_mask"],
        mix_ignore_BHW=given["ignore_mask_mix"],
        box1_BHW=given["cutmix_box1"],
        box2_BHW=given["cutmix_box2"],
        **{f"{name}_BCHW": image.clone() for name in ("x", "weak", "s1", "s2")},
        **{f"mix_{name}_BCHW": image.clone() for name in ("weak", "s1", "s2")},
    )
    config = UnimatchConfig(conf_thresh=float(thresh))
    terms, kept = official.forward(cast("official.OfficialModel", model), views, config)
    names = ("loss", "loss_x", "loss_u_s1", "loss_u_s2", "loss_u_fp")
    assert [float(term) for term in terms] == pytest.approx([expected[n] for n in names], abs=1e-6)
    assert kept == pytest.approx(expected["mask_ratio"], abs=1e-6)
    assert model.training == [False, True, True]


def gaps(size: Size, variant: Variant) -> tuple[float, float]:
    """How far loss and gradients are from the official ones, relative."""
    told = agreement(size, variant, random_weights(size))
    loss, gradients = (part.split()[-1] for part in told.split(", "))
    return float(loss), float(gradients)


def test_same_loss_and_gradients_where_batch_statistics_are_frozen() -> None:
    loss, gradients = gaps(dataclasses.replace(SMALL, frozen_bn=True), VARIANTS["exact"])
    assert loss < 1e-6
    assert gradients < 1e-6


def test_same_loss_and_gradients_with_the_published_batch_statistics() -> None:
    loss, gradients = gaps(SMALL, VARIANTS["exact"])
    assert loss < 1e-6
    assert gradients < 1e-6


def test_the_official_step_learns() -> None:
    weights = random_weights(SMALL)
    side = Official(SMALL, weights)
    step = side.prepare(random_batch(SMALL, 0))
    losses = [step().x for _ in range(6)]
    assert losses[-1] < losses[0]
    assert side.model.training


def test_its_learning_rates_fall() -> None:
    side = Official(SMALL, random_weights(SMALL))
    views = official.views_of(random_batch(SMALL, 0), side.config.augment)
    optim = OptimConfig(lr=0.1, head_lr=5.0)
    official.step(side.model, side.optimizer, views, UnimatchConfig(), optim, done=0.75)
    rates = [group["lr"] for group in side.optimizer.param_groups]
    assert rates == pytest.approx([0.1 * 0.25**0.9, 0.5 * 0.25**0.9])


def test_weak_labels_are_pasted_inside_the_box_only() -> None:
    own = official.Weak(*(torch.zeros(1, 2, 2) for _ in range(3)))
    other = official.Weak(*(torch.ones(1, 2, 2) for _ in range(3)))
    box = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    for part in own.pasted(other, box):
        assert torch.equal(part, box)
    assert not any(part.any() for part in own)


def test_perturbing_drops_whole_channels() -> None:
    torch.manual_seed(0)
    config = SMALL.config(VARIANTS["exact"]).student
    model = official.OfficialModel(config, 5, feature_dropout=0.0).eval()
    image = torch.randn(2, 3, 65, 65)
    with torch.no_grad():
        clean, perturbed = model(image, True)
        torch.testing.assert_close(clean, perturbed)
        torch.testing.assert_close(model(image), clean)
        model.dropout = torch.nn.Dropout2d(0.5).train()
        perturbed = model(image, True)[1]
    assert not torch.allclose(clean, perturbed)


def test_batches_have_boxes_as_often_as_drawn_ones() -> None:
    boxed = images = 0
    for number in range(8):
        views = official.views_of(random_batch(SMALL, number), SMALL.config(Variant()).augment)
        boxed += int((views.box1_BHW + views.box2_BHW).flatten(1).any(1).sum())
        images += len(views.box1_BHW)
    assert boxed / images == 0.75


def test_ours_takes_a_step_without_a_partner_view() -> None:
    side = Ours(SMALL, VARIANTS["bfloat16"], random_weights(SMALL))
    assert torch.isfinite(side.prepare(random_batch(SMALL, 0))()).all()
    assert side.state.step == 1


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    threads = str(torch.get_num_threads())
    small = ["--backbone", "test_byobnet", "--crop", "33", "--rounds", "1", "--threads", threads]
    assert main([*small, "--steps", "exact", "bfloat16", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in told["rows"]] == ["official", "exact", "bfloat16"]
    assert told["rows"][0]["ratio"] == 1
    assert all(row["seconds"] > 0 and row["images_per_s"] > 0 for row in told["rows"])
    assert told["rows"][1]["same"].startswith("loss ")
