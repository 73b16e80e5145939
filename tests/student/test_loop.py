"""The training loop: the same weights however it is cut, and what it tells."""

import contextlib
import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.student.test_data import label_row, write_run
from zsplg_ray.config import TrainConfig
from zsplg_ray.images import decode_image
from zsplg_ray.masks import open_truth
from zsplg_ray.metrics import confusion, scores
from zsplg_ray.settings import WorkError, from_mapping, override
from zsplg_ray.shapes.scenes import write_voc
from zsplg_ray.storage import read_bytes
from zsplg_ray.student.data import TrainingData
from zsplg_ray.student.loader import batches
from zsplg_ray.student.loop import Meter, fit, validator
from zsplg_ray.student.predict import Predictor
from zsplg_ray.student.state import Ranks, Schedule, TrainState
from zsplg_ray.student.step import SUMS, train_step
from zsplg_ray.vocab import class_list

RANKS = Ranks()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Six labelled scenes; seven unlabelled ones, six of them with (true) zero-shot labels."""
    folder = tmp_path_factory.mktemp("loop")
    write_voc(folder / "few", 6, seed=0)
    write_voc(folder / "many", 7, seed=100)
    rows = []
    for number in range(100, 106):
        label_HW = truth_of(folder / "many", number)
        rows.append(label_row(f"scene_{number:06d}", label_HW, 0.8))
    write_run(folder / "labels", [rows], class_list("shapes"))
    return folder


def truth_of(folder, number):
    return open_truth(str(folder)).read(f"scene_{number:06d}")


def config_of(world, **changes) -> TrainConfig:
    values = {"labeled": str(world / "few"), "unlabeled": str(world / "many"), "out": "-"}
    values |= {"zeroshot": str(world / "labels"), "classes": "shapes"}
    values |= {"student.backbone": "test_byobnet", "student.pretrained": False}
    values |= {"student.decoder_channels": 16, "augment.crop_px": 64, "train.epochs": 2}
    values |= {"train.batch_labeled": 2, "train.batch_unlabeled": 2, "unimatch.conf_thresh": 0.2}
    return from_mapping(TrainConfig, {**values, **changes})


def start(config, data, saved=None) -> TrainState:
    schedule = Schedule.of(config, len(data.labelled), len(data.unlabelled))
    return TrainState(config, len(data.classes), schedule, RANKS, saved)


def run(config, data, state, reports=None, until=None):
    """Train to the end, or to the report after `until` steps."""

    class Stop(Exception):
        pass

    def report(told, now):
        if reports is not None:
            reports.append(told)
        if until is not None and told.step >= until:
            raise Stop

    source = batches(data, config, first_step=state.step, steps=state.schedule.steps - state.step)
    validate = validator(data, config, RANKS)
    with contextlib.suppress(Stop):
        fit(config, state, source, ranks=RANKS, validate=validate, report=report)
    return state


def same_weights(a: TrainState, b: TrainState) -> bool:
    ours, theirs = a.weights(), b.weights()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def through_a_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim.ema_decay": 0.9, "fusion.rule": "mix"},
        {"unimatch.same_image": True, "train.accumulate": 2},
        {"unlabeled": None, "zeroshot": None},
        {"train.precision": "bfloat16", "fusion.warmup": 0.5},
    ],
    ids=["default", "teacher", "same image", "supervised", "bfloat16"],
)
def test_stopped_and_resumed_is_bit_for_bit_the_straight_run(world, changes):
    config = config_of(world, **changes)
    data = TrainingData.open(config)
    reports = []
    straight = run(config, data, start(config, data), reports)
    half = run(config, data, start(config, data), until=1)
    assert 0 < half.step < straight.step
    torch.manual_seed(999)  # another process has another past
    resumed = run(config, data, start(config, data, through_a_file(half.save())))
    assert same_weights(straight, resumed)
    assert [h["loss"] for h in resumed.history] == [h["loss"] for h in straight.history]
    assert [r.epoch for r in reports] == [1, 2] and reports[-1].last and not reports[0].last
    fresh = start(config, data)
    assert not same_weights(fresh, straight), "something was learned"


def test_what_a_report_tells(world):
    config = config_of(world)
    data = TrainingData.open(config)
    reports = []
    state = run(config, data, start(config, data), reports)
    told = reports[0].metrics
    total = told["loss_x"] + 0.25 * (told["loss_s1"] + told["loss_s2"]) + 0.5 * told["loss_fp"]
    assert told["loss"] == pytest.approx(total / 2, rel=1e-6)
    assert 0 < told["confident"] < 1 and 0 <= told["agreement"] <= 1 and told["images_per_s"] > 0
    assert told["used"] > told["confident"], "the zero-shot labels fill in"
    best = max(reports, key=lambda r: r.metrics["val_miou"])
    assert state.best is not None and state.best["val_miou"] == best.metrics["val_miou"]
    assert reports[0].scores is not None and len(state.history[0]["iou"]) == 9


def test_labels_that_nobody_has_change_nothing_against_plain_unimatch(world):
    plain = config_of(world, zeroshot=None, **{"fusion.rule": "unimatch"})
    for rule in ("model_else_zeroshot", "agree", "mix", "zeroshot", "zeroshot_else_model"):
        other = override(plain, {"fusion.rule": rule})
        data = TrainingData.open(plain)
        a, b = (start(c, data) for c in (plain, other))
        for state, config in ((a, plain), (b, other)):
            for step in batches(data, config, first_step=0, steps=2):
                train_step(state, step, config, RANKS)
        assert same_weights(a, b), rule


def test_micro_batches_add_up_to_the_batch(world):
    frozen = {"student.frozen_bn": True, "train.batch_labeled": 4, "train.batch_unlabeled": 4}
    whole = config_of(world, **frozen)
    data = TrainingData.open(whole)
    states = []
    for config in (whole, override(whole, {"train.accumulate": 2})):
        state = start(config, data)
        told = [
            train_step(state, step, config, RANKS)
            for step in batches(data, config, first_step=0, steps=3)
        ]
        states.append((state, torch.stack(told)))
    (a, told_a), (b, told_b) = states
    torch.testing.assert_close(told_a, told_b, rtol=1e-5, atol=1e-5)
    for name, value in a.weights().items():
        torch.testing.assert_close(value, b.weights()[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_learning_rate_falls_to_zero_and_follows_the_batch(world):
    config = config_of(world, **{"optim.lr": 0.016, "optim.head_lr": 5.0, "train.epochs": 4})
    data = TrainingData.open(config)
    state = start(config, data)
    assert state.learning_rate == pytest.approx(0.016 * 4 / 16)
    state.step = state.schedule.steps // 2
    state.set_learning_rate()
    backbone, head = state.optimizer.param_groups
    assert backbone["lr"] == pytest.approx(0.004 * 0.5**0.9)
    assert head["lr"] == pytest.approx(5 * backbone["lr"])
    n_backbone = sum(p.numel() for p in backbone["params"])
    assert n_backbone == sum(p.numel() for p in state.model.backbone.parameters())
    state.step = state.schedule.steps
    assert state.learning_rate == 0.0


def test_a_teacher_is_the_moving_average(world):
    config = config_of(world, **{"optim.ema_decay": 0.5})
    data = TrainingData.open(config)
    state = start(config, data)
    before = {k: v.clone() for k, v in state.teacher.state_dict().items()}
    for step in batches(data, config, first_step=0, steps=1):
        train_step(state, step, config, RANKS)
    after = state.model.state_dict()
    for name, mean in state.teacher.state_dict().items():
        if mean.is_floating_point():
            torch.testing.assert_close(mean, (before[name] + after[name]) / 2)
    assert not any(p.requires_grad for p in state.teacher.parameters())
    assert all(torch.equal(state.weights()[k], v) for k, v in state.teacher.state_dict().items())


def test_frozen_batch_normalisation_keeps_its_statistics(world):
    config = config_of(world, **{"student.frozen_bn": True})
    data = TrainingData.open(config)
    state = start(config, data)
    before = {k: v.clone() for k, v in state.model.named_buffers()}
    for step in batches(data, config, first_step=0, steps=1):
        train_step(state, step, config, RANKS)
    assert all(torch.equal(v, before[k]) for k, v in state.model.named_buffers())


def test_validation_counts_each_image_once_however_many_ranks(world):
    config = config_of(world, **{"train.holdout": 0.5})
    data = TrainingData.open(config)
    model = start(config, data).model
    whole = validator(data, config, RANKS)(model)
    predictor = Predictor(model)
    counts = np.zeros((9, 10), np.int64)
    for row in data.validation.to_pylist():
        label_HW, _ = predictor.predict(decode_image(read_bytes(row["uri"])))
        counts += confusion(data.validation_truth.read(row["image_id"]), label_HW, 9)
    assert whole == scores(counts, data.classes.names) | {"unreadable": 0}

    class Kept(Ranks):
        def sum(self, tensor):
            return tensor

    parts = [validator(data, config, Kept(rank=r, world=2))(model) for r in range(2)]
    summed = np.sum([part["confusion"] for part in parts if part], axis=0)
    assert np.array_equal(summed, counts)
    empty = replace(data, validation=data.validation.slice(0, 0))
    assert validator(empty, config, RANKS)(model) is None


def test_without_validation_the_last_is_the_best(world):
    config = config_of(world, **{"train.holdout": 0.0})
    data = TrainingData.open(config)
    reports = []
    state = run(config, data, start(config, data), reports)
    assert [r.best for r in reports] == [True, True] and state.best is not None
    assert state.best["epoch"] == 2 and "val_miou" not in reports[0].metrics


def test_a_validation_image_that_has_gone_is_left_out(world, caplog):
    config = config_of(world, **{"train.holdout": 0.5})
    data = TrainingData.open(config)
    uris = data.validation["uri"].to_pylist()
    gone = data.validation.set_column(1, "uri", [["/nowhere.jpg", *uris[1:]]])
    model = start(config, data).model
    result = validator(replace(data, validation=gone), config, RANKS)(model)
    assert result is not None and result["pixels"] == (len(uris) - 1) * 128 * 128
    assert "left out" in caplog.text and result["unreadable"] == 1


def test_a_loss_that_is_no_number_stops_the_work():
    meter = Meter(RANKS)
    meter.add(torch.full((len(SUMS) + 5,), math.nan, dtype=torch.float64), [])
    with pytest.raises(WorkError, match=r"lower optim.lr"):
        meter.read()


def test_a_validation_without_a_score_is_never_the_best_after_one_with(world):
    config = config_of(world, **{"train.epochs": 4})
    data = TrainingData.open(config)
    answers = iter([None, 0.3, None, 0.2])
    reports = []

    def validate(model):
        return {"miou": next(answers), "iou": {}, "unreadable": 0}

    state = start(config, data)
    source = batches(data, config, first_step=0, steps=state.schedule.steps)
    fit(
        config,
        state,
        source,
        ranks=RANKS,
        validate=validate,
        report=lambda told, now: reports.append(told.best),
    )
    assert reports == [True, True, False, False]
    assert state.best is not None and state.best["val_miou"] == 0.3


def test_synchronised_batch_normalisation_keeps_the_activations_of_timm(world):
    from timm.layers.norm_act import convert_sync_batchnorm

    config = config_of(world)  # its backbone has normalisation and activation in one module
    model = start(config, TrainingData.open(config)).model.eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(image)[0]
        after = convert_sync_batchnorm(model)(image)[0]
    torch.testing.assert_close(before, after)
