"""The tiny SAM: its weights load strictly, it finds held-out objects, its training learns."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from zsplg_ray.shapes import sam as shapes_sam
from zsplg_ray.shapes import train_sam
from zsplg_ray.shapes.scenes import make_scene


def test_weights_are_small_half_precision_and_complete():
    assert shapes_sam.WEIGHTS.stat().st_size <= 2_500_000
    state = load_file(shapes_sam.WEIGHTS)
    assert {value.dtype for value in state.values()} == {torch.float16}
    model = shapes_sam.build_sam_shapes(str(shapes_sam.WEIGHTS))
    assert isinstance(model, Sam) and not model.training
    assert set(state) == set(model.state_dict())
    assert {w.dtype for w in model.parameters()} == {torch.float32}


def test_a_missing_weight_is_refused(tmp_path: Path):
    state = load_file(shapes_sam.WEIGHTS)
    state.popitem()
    save_file(state, tmp_path / "holes.safetensors")
    with pytest.raises(RuntimeError, match="Missing key"):
        shapes_sam.build_sam_shapes(str(tmp_path / "holes.safetensors"))


def test_generator_finds_the_objects_of_held_out_scenes():
    figures = train_sam.measure(shapes_sam.WEIGHTS, range(5000, 5008))
    assert figures["mean_best_iou"] > 0.68
    assert figures["background"] > 0.95
    assert figures["oracle_miou"] > 0.72
    assert figures["spurious"] < 3


def test_a_point_and_a_box_each_give_the_object():
    predictor = SamPredictor(shapes_sam.build_sam_shapes(str(shapes_sam.WEIGHTS)))
    found = []
    for seed in range(5000, 5008):
        scene = make_scene(seed)
        predictor.set_image(scene.image_HWC)
        truth_HW = scene.objects[-1].mask_HW  # the foremost
        y_P, x_P = np.nonzero(truth_HW)
        middle = len(x_P) // 2
        point_xy = np.array([[x_P[middle], y_P[middle]]])
        box_xyxy = np.array([x_P.min(), y_P.min(), x_P.max() + 1, y_P.max() + 1])
        for masks_RHW, scores_R, _ in (
            predictor.predict(point_coords=point_xy, point_labels=np.ones(1)),
            predictor.predict(box=box_xyxy),
        ):
            mask_HW = masks_RHW[scores_R.argmax()]
            found.append((mask_HW & truth_HW).sum() / (mask_HW | truth_HW).sum())
    assert np.mean(found) > 0.75


def test_hint_targets_know_objects_edges_and_centres():
    instance_BHW = torch.zeros(1, 128, 128, dtype=torch.int64)
    instance_BHW[:, 32:64, 32:64] = 1
    at = torch.arange(64.0)
    inside_hw = (instance_BHW[0, ::2, ::2] > 0).float()
    edge_hw = torch.zeros(64, 64)
    edge_hw[16:32, 15:32:16] = 1
    edge_hw[15:32:16, 16:32] = 1
    way_2hw = (23.5 - torch.stack(torch.meshgrid(at, at, indexing="xy"))) / 16
    right_B4hw = torch.stack([40 * inside_hw - 20, 40 * edge_hw - 20, *way_2hw])[None]
    assert train_sam.hint_loss(right_B4hw, instance_BHW) < 1e-3
    assert train_sam.hint_loss(-right_B4hw, instance_BHW) > 5


def test_prompt_loss_takes_the_best_of_three_masks():
    target_Nhw = torch.zeros(1, 64, 64)
    target_Nhw[:, 20:40, 20:40] = 1
    right_hw = 40 * target_Nhw[0] - 20
    wrong_hw = -right_hw
    iou_NM = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    one_right = torch.stack([right_hw, wrong_hw, right_hw, wrong_hw])[None]
    none_right = torch.stack([right_hw, wrong_hw, wrong_hw, wrong_hw])[None]
    good = train_sam.prompt_loss(one_right, iou_NM, target_Nhw)
    assert good < 0.2 * train_sam.prompt_loss(none_right, iou_NM, target_Nhw)


def test_a_short_training_runs_and_saves(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(train_sam, "IMAGES_PER_STEP", 2)
    path = train_sam.train(minutes=0.02, out=tmp_path / "new")
    assert path.name == shapes_sam.WEIGHTS.name
    shapes_sam.build_sam_shapes(str(path))
    assert not list(path.parent.glob("*.part"))


def test_one_batch_can_be_learnt():
    torch.manual_seed(0)
    model = shapes_sam.build_sam_shapes().train()
    hint_head = train_sam.make_hint_head()
    batch = train_sam.draw_batch(0, np.random.default_rng(0))
    few = train_sam.Batch(*(getattr(batch, name)[:2] for name in batch.__dataclass_fields__))
    named = [*model.named_parameters(), *hint_head.named_parameters()]
    optimizers = train_sam.make_optimizers(named)
    losses = []
    for _ in range(8):
        loss, prompts = train_sam.batch_loss(model, hint_head, few)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(prompts)
    assert losses[-1] < 0.8 * losses[0]
