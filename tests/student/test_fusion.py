"""Targets: each rule by hand on a 2x2 image, and what must hold of every rule."""

import typing

import pytest
import torch
from torch import Tensor

from zsplg_ray.config import FusionConfig, FusionRule
from zsplg_ray.student.fusion import RULES, Prediction, Targets, fuse, needs_probability, predict
from zsplg_ray.student.unimatch import partner, paste

THRESH = 0.8
K = 3

# One image of 2 x 2 pixels:  sure of 0        sure of 1
#                             unsure, 2        unsure, 0
PROBABILITY = torch.tensor(
    [[[[0.9, 0.05], [0.3, 0.5]], [[0.05, 0.85], [0.3, 0.3]], [[0.05, 0.1], [0.4, 0.2]]]]
)
MODEL = Prediction(PROBABILITY.argmax(dim=1), PROBABILITY.amax(dim=1), PROBABILITY)
LABEL = torch.tensor([[[0, 2], [2, 255]]], dtype=torch.uint8)
SCORE = torch.tensor([[[255, 102], [204, 0]]], dtype=torch.uint8)
NO_PADDING = torch.zeros(1, 2, 2, dtype=torch.bool)


def targets(config: FusionConfig, *, label=LABEL, padding=NO_PADDING, progress=0.5) -> Targets:
    return fuse(config, MODEL, label, SCORE, padding, THRESH, progress)


def seen(answer: Targets) -> list[list[int | None]]:
    """The classes of the only image; None where the pixel is ignored."""
    kept, classes = answer.keep_BHW[0].tolist(), answer.class_BHW[0].tolist()
    pairs = [zip(*rows, strict=True) for rows in zip(kept, classes, strict=True)]
    return [[number if keep else None for keep, number in row] for row in pairs]


@pytest.mark.parametrize(
    ("rule", "classes"),
    [
        ("unimatch", [[0, 1], [None, None]]),
        ("zeroshot", [[0, 2], [2, None]]),
        ("model_else_zeroshot", [[0, 1], [2, None]]),
        ("zeroshot_else_model", [[0, 2], [2, None]]),
        ("agree", [[0, None], [2, None]]),
    ],
)
def test_rules_by_hand(rule: FusionRule, classes: list[list[int | None]]) -> None:
    assert seen(targets(FusionConfig(rule=rule))) == classes


@pytest.mark.parametrize(
    ("rule", "classes"),
    [
        ("unimatch", [[0, 1], [None, None]]),
        ("zeroshot", [[0, None], [2, None]]),  # the label alone: never the model for a weak one
        ("model_else_zeroshot", [[0, 1], [2, None]]),
        ("zeroshot_else_model", [[0, 1], [2, None]]),
        ("agree", [[0, 1], [2, None]]),
        ("mix", [[0, 1], [2, None]]),
    ],
)
def test_labels_of_a_low_score_do_not_count(
    rule: FusionRule, classes: list[list[int | None]]
) -> None:
    assert seen(targets(FusionConfig(rule=rule, min_score=0.5))) == classes


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.7, 0.8, 1.0])
def test_a_score_that_is_the_least_one_passes(share: float) -> None:
    score = torch.full_like(SCORE, round(share * 255))  # 0.7 * 255 is 178.5, a label may have 179
    config = FusionConfig(rule="zeroshot", min_score=round(share * 255) / 255)
    assert fuse(config, MODEL, LABEL, score, NO_PADDING, THRESH, 0).keep_BHW[LABEL != 255].all()
    if share:
        below = score - 1
        answer = fuse(config, MODEL, LABEL, below, NO_PADDING, THRESH, 0)
        assert not answer.keep_BHW.any()


def test_scores_may_be_fractions() -> None:
    config = FusionConfig(rule="zeroshot_else_model", min_score=0.5)
    as_bytes = fuse(config, MODEL, LABEL, SCORE, NO_PADDING, THRESH, 0)
    as_fractions = fuse(config, MODEL, LABEL, SCORE.float() / 255, NO_PADDING, THRESH, 0)
    assert all(torch.equal(a, b) for a, b in zip(as_bytes[:3], as_fractions[:3], strict=True))


def test_mix_by_hand() -> None:
    config = FusionConfig(rule="mix", mix_start=1.0, mix_end=0.5)  # half way the weight is 0.75
    answer = targets(config, progress=0.5)
    assert answer.soft_BKHW is not None
    expected = {
        (0, 0): [0.75 + 0.25 * 0.9, 0.25 * 0.05, 0.25 * 0.05],
        (0, 1): [0.25 * 0.05, 0.25 * 0.85, 0.75 + 0.25 * 0.1],
        (1, 0): [0.25 * 0.3, 0.25 * 0.3, 0.75 + 0.25 * 0.4],
        (1, 1): [1.0, 0.0, 0.0],  # no label: the model's class, were it confident
    }
    for (y, x), probabilities in expected.items():
        torch.testing.assert_close(answer.soft_BKHW[0, :, y, x], torch.tensor(probabilities))
    assert seen(answer) == [[0, 2], [2, None]]


def test_mix_goes_from_the_label_to_the_model() -> None:
    config = FusionConfig(rule="mix", mix_start=1.0, mix_end=0.0)
    known = (LABEL != 255)[:, None].expand_as(PROBABILITY)
    first, last = (targets(config, progress=progress).soft_BKHW for progress in (0.0, 1.0))
    assert first is not None and last is not None
    one_hot = torch.nn.functional.one_hot(LABEL.long().clamp(max=K - 1), K).movedim(-1, 1).float()
    torch.testing.assert_close(first[known], one_hot[known])
    torch.testing.assert_close(last[known], PROBABILITY[known])


def test_every_rule_of_the_settings_is_there() -> None:
    assert tuple(RULES) == typing.get_args(FusionRule)


@pytest.mark.parametrize("rule", RULES)
def test_without_a_label_every_rule_is_unimatch(rule: FusionRule) -> None:
    none = torch.full_like(LABEL, 255)
    for progress in (0.0, 1.0):
        answer = targets(FusionConfig(rule=rule, warmup=0.5), label=none, progress=progress)
        assert torch.equal(answer.keep_BHW, MODEL.confidence_BHW >= THRESH)
        assert torch.equal(answer.class_BHW, MODEL.class_BHW)
        if answer.soft_BKHW is not None:
            assert torch.equal(answer.soft_BKHW.argmax(1), MODEL.class_BHW)
            assert torch.equal(answer.soft_BKHW.amax(1), torch.ones(1, 2, 2))


@pytest.mark.parametrize("rule", RULES)
def test_padding_is_never_kept_and_never_valid(rule: FusionRule) -> None:
    padding = torch.tensor([[[True, False], [True, False]]])
    plain = targets(FusionConfig(rule=rule))
    answer = targets(FusionConfig(rule=rule), padding=padding)
    assert torch.equal(answer.valid_BHW, ~padding)
    assert torch.equal(answer.keep_BHW, plain.keep_BHW & ~padding)
    assert plain.valid_BHW.all()


@pytest.mark.parametrize("rule", RULES)
def test_what_is_kept_is_a_class(rule: FusionRule) -> None:
    for min_score in (0.0, 0.5):
        answer = targets(FusionConfig(rule=rule, min_score=min_score))
        assert answer.class_BHW.max() < K
        assert answer.class_BHW.dtype == torch.int64


@pytest.mark.parametrize("rule", RULES)
def test_warm_up_is_zeroshot_except_for_unimatch(rule: FusionRule) -> None:
    config = FusionConfig(rule=rule, warmup=0.3)
    early, late = targets(config, progress=0.29), targets(config, progress=0.3)
    first = "unimatch" if rule == "unimatch" else "zeroshot"
    assert seen(early) == seen(targets(FusionConfig(rule=first)))
    assert early.soft_BKHW is None
    assert seen(late) == seen(targets(FusionConfig(rule=rule), progress=0.3))


@pytest.mark.parametrize("rule", RULES)
def test_pasting_targets_is_pasting_before_fusing(rule: FusionRule) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    logits = 3 * torch.randn(4, K, 6, 6, generator=generator)
    label = torch.where(draw(2, 4, 6, 6) == 0, draw(K, 4, 6, 6), 255).byte()
    score, padding = draw(256, 4, 6, 6).byte(), draw(4, 4, 6, 6) == 0
    box = draw(2, 4, 6, 6) == 0
    other = partner(4)
    config = FusionConfig(rule=rule, min_score=0.3, mix_end=0.4)

    def fused(*inputs: Tensor) -> Targets:
        model = predict(inputs[0], probability=True)
        return fuse(config, model, inputs[1], inputs[2], inputs[3], 0.6, 0.5)

    inputs = (logits, label, score, padding)
    own = fused(*inputs)
    after = paste(own, own.at(other), box)
    before = fused(*(paste(part, part[other], box) for part in inputs))
    assert torch.equal(after.keep_BHW, before.keep_BHW)
    assert torch.equal(after.valid_BHW, before.valid_BHW)
    assert torch.equal(after.class_BHW, before.class_BHW)
    if rule == "mix":
        assert after.soft_BKHW is not None and before.soft_BKHW is not None
        torch.testing.assert_close(after.soft_BKHW, before.soft_BKHW)


def test_predict_tells_the_softmax() -> None:
    logits = torch.randn(2, 5, 4, 4, requires_grad=True)
    answer = predict(logits, probability=True)
    assert answer.probability_BKHW is not None and not answer.probability_BKHW.requires_grad
    torch.testing.assert_close(answer.probability_BKHW, logits.softmax(1))
    assert torch.equal(answer.class_BHW, logits.argmax(1))
    assert torch.equal(answer.confidence_BHW, answer.probability_BKHW.amax(1))
    assert predict(logits).probability_BKHW is None


def test_predict_computes_in_float32() -> None:
    logits = torch.randn(2, 5, 4, 4).bfloat16()
    answer = predict(logits)
    assert answer.confidence_BHW.dtype == torch.float32
    torch.testing.assert_close(answer.confidence_BHW, logits.float().softmax(1).amax(1))


def test_only_mix_needs_probabilities() -> None:
    rules: tuple[FusionRule, ...] = typing.get_args(FusionRule)
    assert [rule for rule in rules if needs_probability(FusionConfig(rule=rule))] == ["mix"]
