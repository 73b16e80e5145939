"""The loss: the published step's figures, sums over parts of a batch, nothing to learn from."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from zsplg_ray.config import FusionConfig, UnimatchConfig
from zsplg_ray.student.fusion import Targets, fuse, predict
from zsplg_ray.student.unimatch import (
    Losses,
    partner,
    paste,
    pixel_counts,
    supervised_loss,
    target_sum,
    unimatch_loss,
)

GOLDEN = Path(__file__).parent / "golden" / "unimatch_step.safetensors"
NAMES = ("loss", "loss_x", "loss_u_s1", "loss_u_s2", "loss_u_fp")
K = 4


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(GOLDEN, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["expected"])


@pytest.mark.parametrize("thresh", ["0.0", "0.8", "0.95"])
def test_golden_figures(golden: tuple[dict[str, Tensor], dict[str, Any]], thresh: str) -> None:
    given, expected = golden
    none = torch.full_like(given["ignore_mask"], 255).byte()

    def weak(logits: Tensor, ignore: Tensor) -> Targets:
        config = FusionConfig(rule="unimatch")
        return fuse(config, predict(logits), none, none, ignore == 255, float(thresh), 0)

    own = weak(given["pred_u_w"], given["ignore_mask"])
    other = weak(given["pred_u_w_mix"], given["ignore_mask_mix"])
    s1, s2 = (paste(own, other, given[f"cutmix_box{which}"] == 1) for which in (1, 2))
    counts = pixel_counts(given["mask_x"], s1.valid_BHW, s2.valid_BHW, own.valid_BHW)
    losses = unimatch_loss(
        given["pred_x"],
        given["pred_u_s1"],
        given["pred_u_s2"],
        given["pred_u_w_fp"],
        given["mask_x"],
        s1,
        s2,
        own,
        counts,
        UnimatchConfig(),
    )
    for name, loss in zip(NAMES, losses, strict=True):
        assert float(loss) == pytest.approx(expected[thresh][name], rel=0, abs=1e-6)
    kept = float(own.keep_BHW.sum() / own.valid_BHW.sum())
    assert kept == pytest.approx(expected[thresh]["mask_ratio"], abs=1e-6)


class Step(NamedTuple):
    logits: tuple[Tensor, Tensor, Tensor, Tensor]
    label: Tensor
    targets: tuple[Targets, Targets, Targets]

    def counts(self) -> Tensor:
        return pixel_counts(self.label, *(target.valid_BHW for target in self.targets))

    def losses(self, counts: Tensor, config: UnimatchConfig) -> Losses:
        return unimatch_loss(*self.logits, self.label, *self.targets, counts, config)

    def part(self, index: Tensor) -> "Step":
        x, s1, s2, fp = (logits[index] for logits in self.logits)
        t1, t2, t3 = (target.at(index) for target in self.targets)
        return Step((x, s1, s2, fp), self.label[index], (t1, t2, t3))


def made(images: int, *, soft: bool = False) -> Step:
    """Random logits, labels and targets, with pixels that are ignored, dropped or padding."""
    g = torch.Generator().manual_seed(0)
    shape = (images, 5, 6)

    def logits() -> Tensor:
        return torch.randn(images, K, 5, 6, generator=g).requires_grad_()

    def target() -> Targets:
        valid = torch.rand(shape, generator=g) < 0.8
        keep = valid & (torch.rand(shape, generator=g) < 0.6)
        spread = torch.randn(images, K, 5, 6, generator=g).softmax(1) if soft else None
        return Targets(torch.randint(K, shape, generator=g), keep, valid, spread)

    label = torch.randint(K, shape, generator=g)
    label[torch.rand(shape, generator=g) < 0.3] = 255
    return Step(
        (logits(), logits(), logits(), logits()), label.byte(), (target(), target(), target())
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_parts_of_a_batch_add_up(soft: bool, smoothing: float) -> None:
    batch, config = made(6, soft=soft), UnimatchConfig(label_smoothing=smoothing)
    whole = batch.losses(batch.counts(), config)
    gradients = torch.autograd.grad(whole.total, batch.logits)
    parts = [batch.part(index) for index in torch.arange(6).split([1, 3, 2])]
    counts = torch.stack([part.counts() for part in parts]).sum(0)
    losses = [part.losses(counts, config) for part in parts]
    summed = [torch.stack(terms).sum() for terms in zip(*losses, strict=True)]
    torch.testing.assert_close(summed, list(whole), rtol=1e-6, atol=1e-6)
    again = torch.autograd.grad(summed[0], batch.logits)
    torch.testing.assert_close(again, gradients, rtol=1e-6, atol=1e-8)


def test_counts_are_of_what_is_not_ignored() -> None:
    batch = made(2)
    valid = [target.valid_BHW for target in batch.targets]
    expected = [(batch.label != 255).sum().item(), *(v.sum().item() for v in valid)]
    assert batch.counts().tolist() == expected
    assert batch.counts().dtype == torch.float64


@pytest.mark.parametrize("soft", [False, True])
def test_a_batch_with_nothing_to_learn_has_loss_and_gradient_zero(soft: bool) -> None:
    batch = made(2, soft=soft)
    batch.label.fill_(255)
    no = torch.zeros_like(batch.label, dtype=torch.bool)
    s1, s2, fp = (t._replace(keep_BHW=no, valid_BHW=no) for t in batch.targets)
    batch = batch._replace(targets=(s1, s2, fp))
    losses = batch.losses(batch.counts(), UnimatchConfig())
    assert torch.stack(losses).tolist() == [0] * 5
    for gradient in torch.autograd.grad(losses.total, batch.logits):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_no_unlabelled_images() -> None:
    batch = made(3)
    empty = batch.part(torch.arange(0))
    s1, s2, fp = empty.logits[1:]
    batch = empty._replace(logits=(batch.logits[0], s1, s2, fp), label=batch.label)
    losses = batch.losses(batch.counts(), UnimatchConfig())
    mean = F.cross_entropy(batch.logits[0], batch.label.long(), ignore_index=255)
    torch.testing.assert_close(losses.x, mean)
    torch.testing.assert_close(losses.total, mean / 2)
    assert torch.stack(losses[2:]).tolist() == [0, 0, 0]
    alone = supervised_loss(batch.logits[0], batch.label, batch.counts(), 0.0)
    torch.testing.assert_close(alone.total, mean)
    assert float(alone.fp) == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_terms_are_torch_s_cross_entropy(smoothing: float) -> None:
    batch, config = made(3), UnimatchConfig(label_smoothing=smoothing)
    losses = batch.losses(batch.counts(), config)
    mean = F.cross_entropy(
        batch.logits[0], batch.label.long(), ignore_index=255, label_smoothing=smoothing
    )
    torch.testing.assert_close(losses.x, mean)
    target = batch.targets[0]
    loss_BHW = F.cross_entropy(
        batch.logits[1], target.class_BHW, label_smoothing=smoothing, reduction="none"
    )
    expected = (loss_BHW * target.keep_BHW).sum() / target.valid_BHW.sum()
    torch.testing.assert_close(losses.s1, expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_soft_targets_of_one_class_are_hard_ones(smoothing: float) -> None:
    batch = made(2)
    logits, hard = batch.logits[0], batch.targets[0]
    soft = hard._replace(soft_BKHW=F.one_hot(hard.class_BHW, K).movedim(-1, 1).float())
    torch.testing.assert_close(
        target_sum(logits, soft, smoothing), target_sum(logits, hard, smoothing)
    )


def test_weights_of_the_terms() -> None:
    batch = made(2)
    x, s1, s2, fp = batch.losses(batch.counts(), UnimatchConfig())[1:]
    total = batch.losses(batch.counts(), UnimatchConfig(strong=0.7, perturbed=0.3)).total
    torch.testing.assert_close(total, (x + 0.7 * s1 + 0.7 * s2 + 0.3 * fp) / 2)


@pytest.mark.parametrize("soft", [False, True])
def test_bfloat16_logits_give_a_float32_loss(soft: bool) -> None:
    batch, config = made(3, soft=soft), UnimatchConfig(label_smoothing=0.1)
    x, s1, s2, fp = (logits.bfloat16() for logits in batch.logits)
    with torch.autocast("cpu", torch.bfloat16):
        under = batch._replace(logits=(x, s1, s2, fp)).losses(batch.counts(), config)
    rounded = (x.float(), s1.float(), s2.float(), fp.float())
    plain = batch._replace(logits=rounded).losses(batch.counts(), config)
    for loss, expected in zip(under, plain, strict=True):
        assert loss.dtype == torch.float32
        assert torch.equal(loss, expected)


@pytest.mark.parametrize(
    ("images", "index"),
    [(0, []), (1, [0]), (2, [1, 0]), (3, [1, 0, 0]), (4, [1, 0, 3, 2]), (5, [1, 0, 3, 2, 0])],
)
def test_partner(images: int, index: list[int]) -> None:
    assert partner(images).tolist() == index


def test_partners_are_the_same_on_several_workers() -> None:
    whole = partner(8)
    shares = torch.cat([partner(2) + 2 * rank for rank in range(4)])
    assert torch.equal(whole, shares)


def test_paste_fills_the_boxes() -> None:
    own, other = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    box = torch.zeros(2, 4, 4, dtype=torch.bool)
    box[0, 1:3, 2:] = True
    pasted = paste(own, other, box)
    assert torch.equal(pasted, box[:, None].expand(2, 3, 4, 4).float())
    assert torch.equal(paste(own[:, 0], other[:, 0], box), box.float())
