"""Trains the tiny SAM of the embedded world from scratch, on scenes drawn as it goes.

Enters: a time limit and an output folder. Leaves: `sam_shapes.safetensors` (float16), rewritten
every few minutes.

Why this way: a scene costs 5 ms to draw and a step's share of it ten times that, so every image is
new and nothing is augmented or stored. A prompt is a point on a visible object or on the background
(whose mask is all of it), or a jittered box. Three choices make a small budget enough. Many prompts
share one encoder pass. A hint head, thrown away afterwards, asks the encoder where objects, edges
and object centres are: dense gradients that prompts alone give slowly. Cross-entropy on
area-averaged masks makes the logits crisp, so that stability scores mean something.

Shapes: B images, N prompts of one image, M = 4 masks of a prompt (0 single, 1..3 multi), H W
pixels, h w low-resolution mask pixels, C channels.
"""

import logging
import math
import time
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import Sam
from torch.nn import functional as F

from zsplg_ray.shapes.sam import (
    GENERATOR_SETTINGS,
    IMAGE_SIZE_PX,
    PATCH_PX,
    PROMPT_DIM,
    WEIGHTS,
    build_sam_shapes,
)
from zsplg_ray.shapes.scenes import CLASSES, TRAIN_SEED, Scene, make_scene

logger = logging.getLogger(__name__)

MASK_PX = 4 * IMAGE_SIZE_PX // PATCH_PX
"""Side of the decoder's low-resolution masks."""

IMAGES_PER_STEP = 8
PROMPTS_PER_IMAGE = 8
BACKGROUND_SHARE = 0.2
BOX_SHARE = 0.15
MUON_LR = 8e-3
ADAMW_LR = 3e-3
RESTART_LR = 0.5
WARM_UP = 0.03
WEIGHT_DECAY = 0.02
EMA_DECAY = 0.998
SAVE_EVERY_S = 180.0


@dataclass(frozen=True)
class Batch:
    """What one step learns from.

    `image_BCHW` is float32 RGB in [0, 255]; `instance_BHW` int64, 0 background, i + 1 for the i-th
    object; `choice_BN` int64, the instance that each prompt is about; `point_BN2` float32 x, y in
    pixels.
    """

    image_BCHW: torch.Tensor
    instance_BHW: torch.Tensor
    choice_BN: torch.Tensor
    point_BN2: torch.Tensor


def instances(scene: Scene) -> np.ndarray:
    """Instance map of a scene: int64 (H, W), 0 background, i + 1 where `scene.objects[i]` shows."""
    instance_HW = np.zeros(scene.label_HW.shape, np.int64)
    for index, item in enumerate(scene.objects, start=1):
        instance_HW[item.mask_HW] = index
    return instance_HW


def draw_batch(first_seed: int, rng: np.random.Generator) -> Batch:
    """Draws a step's scenes, `first_seed` and the next ones, and their prompts."""
    images, maps, choices, points = [], [], [], []
    for offset in range(IMAGES_PER_STEP):
        scene = make_scene(first_seed + offset, IMAGE_SIZE_PX)
        instance_HW = instances(scene)
        choice_N = rng.integers(1, len(scene.objects) + 1, size=PROMPTS_PER_IMAGE)
        choice_N[rng.random(PROMPTS_PER_IMAGE) < BACKGROUND_SHARE] = 0
        point_N2 = []
        for choice in choice_N:
            y, x = divmod(int(rng.choice(np.flatnonzero(instance_HW == choice))), IMAGE_SIZE_PX)
            point_N2.append((x + rng.random(), y + rng.random()))
        images.append(scene.image_HWC)
        maps.append(instance_HW)
        choices.append(choice_N)
        points.append(point_N2)
    return Batch(
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float(),
        torch.from_numpy(np.stack(maps)),
        torch.from_numpy(np.stack(choices)),
        torch.tensor(points, dtype=torch.float32),
    )


def jittered_boxes(mask_NHW: torch.Tensor) -> torch.Tensor:
    """Boxes of bool masks, each side moved by up to a tenth: float32 x0, y0, x1, y1 in pixels."""
    boxes = []
    for mask_HW in mask_NHW:
        y_P, x_P = torch.nonzero(mask_HW, as_tuple=True)
        boxes.append(torch.stack([x_P.min(), y_P.min(), x_P.max() + 1, y_P.max() + 1]).float())
    box_N4 = torch.stack(boxes)
    size_N4 = (box_N4[:, 2:] - box_N4[:, :2]).repeat(1, 2)
    return box_N4 + 0.2 * (torch.rand_like(box_N4) - 0.5) * size_N4


def prompt_loss(
    logit_NMhw: torch.Tensor, iou_NM: torch.Tensor, target_Nhw: torch.Tensor
) -> torch.Tensor:
    """Mask loss (best of three, their mean, the single one) plus the error of the predicted IoU.

    Args:
        logit_NMhw: float32 mask logits.
        iou_NM: float32 predicted IoU of each mask.
        target_Nhw: float32 in [0, 1], how much of each mask pixel the object covers.

    Returns:
        float32 scalar, the mean over prompts.
    """
    target_NMhw = target_Nhw[:, None].expand_as(logit_NMhw)
    bce_NM = F.binary_cross_entropy_with_logits(logit_NMhw, target_NMhw, reduction="none").mean(
        (2, 3)
    )
    share_NMhw = logit_NMhw.sigmoid()
    overlap_NM = (share_NMhw * target_NMhw).sum((2, 3))
    dice_NM = 1 - (2 * overlap_NM + 1) / ((share_NMhw + target_NMhw).sum((2, 3)) + 1)
    mask_NM = dice_NM + 8 * bce_NM
    with torch.no_grad():
        on_NMhw, truth_NMhw = logit_NMhw > 0, target_NMhw >= 0.5
        union_NM = (on_NMhw | truth_NMhw).sum((2, 3)).clamp(min=1)
        true_iou_NM = (on_NMhw & truth_NMhw).sum((2, 3)) / union_NM
    best_N = mask_NM[:, 1:].min(dim=1).values
    mask_N = best_N + 0.1 * mask_NM[:, 1:].mean(dim=1) + 0.25 * mask_NM[:, 0]
    return mask_N.mean() + (iou_NM - true_iou_NM).square().mean()


def hint_loss(hint_B4hw: torch.Tensor, instance_BHW: torch.Tensor) -> torch.Tensor:
    """What the hint head should say: object or not, edge or not, the way to the object's centre.

    Args:
        hint_B4hw: float32: object logit, edge logit, x and y offset to the centre in 32 px.
        instance_BHW: int64 instance maps.

    Returns:
        float32 scalar.
    """
    coarse_Bhw = instance_BHW[:, ::2, ::2]
    edge_Bhw = torch.zeros(coarse_Bhw.shape)
    for axis in (1, 2):
        near, far = (coarse_Bhw.narrow(axis, start, MASK_PX - 1) for start in (0, 1))
        edge_Bhw.narrow(axis, 0, MASK_PX - 1)[near != far] = 1
    at = torch.arange(MASK_PX, dtype=torch.float32)
    grid_2hw = torch.stack(torch.meshgrid(at, at, indexing="xy"))
    offset_B2hw = torch.zeros(len(coarse_Bhw), 2, MASK_PX, MASK_PX)
    for offset_2hw, coarse_hw in zip(offset_B2hw, coarse_Bhw, strict=True):
        for index in range(1, int(coarse_hw.max()) + 1):
            on_hw = coarse_hw == index
            place_2P = grid_2hw[:, on_hw]
            offset_2hw[:, on_hw] = (place_2P.mean(dim=1, keepdim=True) - place_2P) / 16
    object_Bhw = (coarse_Bhw > 0).float()
    said = F.binary_cross_entropy_with_logits(hint_B4hw[:, 0], object_Bhw)
    edges = F.binary_cross_entropy_with_logits(hint_B4hw[:, 1], edge_Bhw)
    way_B2hw = (hint_B4hw[:, 2:] - offset_B2hw).abs() * object_Bhw[:, None]
    return said + 2 * edges + way_B2hw.sum() / object_Bhw.sum().clamp(min=1)


def batch_loss(sam: Sam, hint_head: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, float]:
    """Runs one batch through encoder, prompts and decoder.

    Returns:
        The loss to go down, and its part that stems from the prompts.
    """
    embedding_BChw = sam.image_encoder(sam.preprocess(batch.image_BCHW))
    hint = hint_loss(hint_head(embedding_BChw), batch.instance_BHW)
    image_pe = sam.prompt_encoder.get_dense_pe()
    total = torch.zeros(())
    for embedding_Chw, instance_HW, choice_N, point_N2 in zip(
        embedding_BChw, batch.instance_BHW, batch.choice_BN, batch.point_BN2, strict=True
    ):
        mask_NHW = instance_HW[None] == choice_N[:, None, None]
        if torch.rand(()) < BOX_SHARE:
            prompt = {"points": None, "boxes": jittered_boxes(mask_NHW)}
        else:
            label_N1 = torch.ones(len(choice_N), 1)
            prompt = {"points": (point_N2[:, None], label_N1), "boxes": None}
        sparse, dense = sam.prompt_encoder(**prompt, masks=None)
        logit_NMhw, iou_NM = sam.mask_decoder.predict_masks(
            embedding_Chw[None], image_pe, sparse, dense
        )
        target_Nhw = F.avg_pool2d(mask_NHW[:, None].float(), IMAGE_SIZE_PX // MASK_PX)[:, 0]
        total = total + prompt_loss(logit_NMhw, iou_NM, target_Nhw)
    prompts = total / len(batch.image_BCHW)
    return prompts + 0.5 * hint, prompts.item()


def train(
    minutes: float = 52.0,
    out: Path = WEIGHTS.parent,
    seed: int = 0,
    start: Path | None = None,
) -> Path:
    """Trains for a given time and saves the running mean of the weights.

    Args:
        minutes: CPU time of this process, so that a busy machine changes nothing; the learning
            rate falls to zero (cosine) over it.
        out: Folder for `sam_shapes.safetensors`, made if missing.
        seed: Of the initial weights, the prompts and the scenes (10 million of its own).
        start: Weights to go on from, at `RESTART_LR` of the learning rate; None: from nothing.

    Returns:
        The weights file.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    sam = build_sam_shapes(str(start) if start else None).train()
    peak = RESTART_LR if start else 1.0
    hint_head = make_hint_head()
    mean_sam = deepcopy(sam).eval()
    weights = [*sam.parameters(), *hint_head.parameters()]
    optimizers = make_optimizers([*sam.named_parameters(), *hint_head.named_parameters()])
    path = out / WEIGHTS.name
    start_s, saved_s = time.process_time(), time.monotonic()
    step, running = 0, 0.0
    while (progress := (time.process_time() - start_s) / (60 * minutes)) < 1:
        rate = peak * min(progress / WARM_UP, 0.5 * (1 + math.cos(math.pi * progress)))
        first = TRAIN_SEED + 10_000_000 * seed + step * IMAGES_PER_STEP
        loss, prompts = batch_loss(sam, hint_head, draw_batch(first, rng))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer, peak_lr in zip(optimizers, (MUON_LR, ADAMW_LR), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak_lr * max(rate, 1e-3)
            optimizer.step()
            optimizer.zero_grad()
        follow(mean_sam, sam, min(EMA_DECAY, (1 + step) / (10 + step)))
        running += prompts
        step += 1
        if step % 50 == 0:
            logger.info("step %d, %.0f %%, prompt loss %.3f", step, 100 * progress, running / 50)
            running = 0.0
        if time.monotonic() - saved_s > SAVE_EVERY_S:
            save(mean_sam, path)
            saved_s = time.monotonic()
    save(mean_sam, path)
    return path


def make_hint_head() -> torch.nn.Module:
    """From the image embedding to the four hints of every mask pixel; used in training only."""
    scale = MASK_PX * PATCH_PX // IMAGE_SIZE_PX
    return torch.nn.Sequential(
        torch.nn.Conv2d(PROMPT_DIM, 4 * scale**2, kernel_size=1), torch.nn.PixelShuffle(scale)
    )


def make_optimizers(
    named: list[tuple[str, torch.nn.Parameter]],
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the matrices, which it trains in fewer steps, and AdamW for everything else."""
    matrices = [
        w
        for name, w in named
        if w.ndim == 2 and min(w.shape) >= 16 and not name.split(".")[-1].startswith("rel_pos")
    ]
    taken = {id(w) for w in matrices}
    rest = [w for _, w in named if id(w) not in taken]
    muon = torch.optim.Muon(
        matrices, lr=MUON_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
    )
    return muon, torch.optim.AdamW(rest, lr=ADAMW_LR, betas=(0.9, 0.98), weight_decay=0.0)


@torch.no_grad()
def follow(mean_sam: Sam, sam: Sam, decay: float) -> None:
    """Moves the mean of the weights towards the newest ones by 1 - decay, in place."""
    for mean, value in zip(mean_sam.parameters(), sam.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)


def save(sam: Sam, path: Path) -> None:
    """Writes float16 safetensors, by way of a temporary file: a reader never sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({name: v.half().contiguous() for name, v in sam.state_dict().items()}, part)
    part.replace(path)
    logger.info("saved %s", path)


def measure(weights: Path, seeds: Iterable[int]) -> dict[str, float]:
    """Judges a weights file through the stock automatic generator with `GENERATOR_SETTINGS`.

    Returns:
        `mean_best_iou` of the objects, the same for each class name and for `background`, and
        `oracle_miou`: the mean IoU of the nine classes when each mask is told its majority class
        and the masks are painted from the largest to the smallest (all in [0, 1]); `segments` and
        `spurious` (best IoU with anything below .5), mean number an image; `seconds`, CPU time of
        an image.
    """
    generator = SamAutomaticMaskGenerator(build_sam_shapes(str(weights)), **GENERATOR_SETTINGS)
    best_by_class: dict[int, list[float]] = {k: [] for k in range(len(CLASSES) + 1)}
    confusion_KK = np.zeros((len(CLASSES) + 1, len(CLASSES) + 1), np.int64)
    segments, spurious, spent_s = [], [], 0.0
    for seed in seeds:
        scene = make_scene(seed)
        start_s = time.process_time()
        records = generator.generate(scene.image_HWC)
        spent_s += time.process_time() - start_s
        records.sort(key=lambda record: -record["area"])
        truths = [(0, scene.label_HW == 0), *((o.class_index, o.mask_HW) for o in scene.objects)]
        iou_RT = np.zeros((len(records), len(truths)))
        painted_HW = np.zeros_like(scene.label_HW)
        for row_T, mask_HW in zip(iou_RT, (r["segmentation"] for r in records), strict=True):
            row_T[:] = [(mask_HW & t).sum() / (mask_HW | t).sum() for _, t in truths]
            painted_HW[mask_HW] = np.bincount(scene.label_HW[mask_HW]).argmax()
        for (class_index, _), best in zip(truths, iou_RT.max(axis=0, initial=0), strict=True):
            best_by_class[class_index].append(float(best))
        np.add.at(confusion_KK, (scene.label_HW, painted_HW), 1)
        segments.append(len(records))
        spurious.append(int((iou_RT.max(axis=1, initial=0) < 0.5).sum()))
    right_K = np.diag(confusion_KK)
    iou_K = right_K / np.maximum(confusion_KK.sum(0) + confusion_KK.sum(1) - right_K, 1)
    objects = [best for k, values in best_by_class.items() if k for best in values]
    names = ("background", *CLASSES)
    return {
        "mean_best_iou": float(np.mean(objects)),
        **{name: float(np.mean(best_by_class[k])) for k, name in enumerate(names)},
        "oracle_miou": float(iou_K.mean()),
        "segments": float(np.mean(segments)),
        "spurious": float(np.mean(spurious)),
        "seconds": spent_s / len(segments),
    }
