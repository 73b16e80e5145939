"""Training of the tiny CLIP, from nothing, on generated scenes, in under an hour of one CPU core.

Enters: a time budget and a seed. Leaves: a packed weights file (see `zsplg_ray.shapes.clip`).

What is learned: regions and captions, with every caption positive for every region it is true of
(`captions.py`). A region is seen in two ways, because it is used in two ways:

* as a crop, through `encode_image`: the box of its mask, with context or without, the outside of
  the mask filled or not;
* as a mask over the dense map of a whole scene, through the same `gem_tokens` and the same depth as
  later: exactly the bilinear pooling of the method. Without this, dense features of so small a CLIP
  know nothing (they were never asked for).

Masks are made as imperfect as a segmenter's: grown, shrunk, shifted, cut in parts, merged.
Background regions come in every form, the silhouettes of objects laid over nothing included.

Why two losses: contrast between captions decides which class wins, but says nothing of how high a
cosine is, and the method rejects background by a threshold on the cosine. So a second, sigmoid term
pulls true pairs above `_COSINE_MIDDLE` and pushes false ones below it.

Shape suffixes: B batch, C channels, H W pixels, G side of the patch grid, R regions, T captions, N
tokens, L positions of a text, D joint embedding.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from zsplg_ray.label.dense import DenseTokens, embed_patches, gem_streams
from zsplg_ray.shapes import clip
from zsplg_ray.shapes.captions import Caption, all_texts, sample_bank
from zsplg_ray.shapes.scenes import CLASSES, TRAIN_SEED, TYPICAL_COLOURS, Scene, make_scene

logger = logging.getLogger(__name__)

_SCENES = 26
_DENSE_SCENES = 5
_CROPS = 40
_WINDOWS = 28
_WINDOW = 10
_EARLY = 0.75
_TYPICAL_EARLY = 0.1
_TYPICAL_LATE = 0.5
_MUON_RATE = 7e-3
_ADAMW_RATE = 2e-3
_WEIGHT_DECAY = 0.02
_COSINE_MIDDLE = 0.4
_COSINE_SLOPE = 12.0
_SAVE_EVERY_S = 240.0


@dataclass(frozen=True, eq=False)
class Region:
    """Part of a scene and the truth about it.

    `class_index` 0 is background; `detail` is a colour or background word.
    """

    image_HWC: np.ndarray
    label_HW: np.ndarray
    mask_HW: np.ndarray
    class_index: int
    detail: str


def train(
    out: Path = clip.WEIGHTS, minutes: float = 45, seed: int = 0, start: Path | None = None
) -> Path:
    """Train for a time and write packed weights; also written every few minutes on the way.

    The learning rate follows the CPU's clock, so a faster machine takes more steps in the same
    time: same seed, same scenes in the same order, but not the same bits.

    Args:
        out: Weights file to write, or the folder to write `clip.WEIGHTS.name` in.
        minutes: CPU time of this process, above 0.
        seed: Of the initial weights, the scenes (all from `TRAIN_SEED` up) and the captions.
        start: Packed weights to go on from, as if half of the time were over; None: from nothing.

    Returns:
        The weights file.

    Raises:
        ValueError: If `minutes` is not positive.
    """
    if minutes <= 0:
        raise ValueError(f"minutes must be > 0, got {minutes}; 45 gives the committed quality")
    path = out if out.suffix == ".safetensors" else out / clip.WEIGHTS.name
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vocabulary = Vocabulary()
    model = build_model(vocabulary)
    if start is not None:
        load(model, start)
    optimizers = _optimizers(model)
    start_s, saved_s = time.process_time(), time.monotonic()
    scenes: list[Scene] = []
    step, scene_seed, average = 0, TRAIN_SEED + seed * 10_000_000, 0.0
    while (spent := (time.process_time() - start_s) / (60 * minutes)) < 1:
        done = spent if start is None else 0.5 + 0.5 * spent
        for optimizer, rate in zip(optimizers, (_MUON_RATE, _ADAMW_RATE), strict=True):
            optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 100) * _cosine(done)
        seeds = range(scene_seed, scene_seed + _SCENES)
        scenes = [make_scene(s) for s in seeds]
        scene_seed = seeds.stop
        kept_typical = _TYPICAL_EARLY if done < _EARLY else _TYPICAL_LATE
        whole = rng.random() < done**3
        loss = step_loss(model, vocabulary, scenes, rng, kept_typical, whole)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(50))
        average += (loss.item() - average) / min(step + 1, 25)
        if step % 50 == 0:
            logger.info("step %d, %.0f %% of the time, loss %.3f", step, 100 * done, average)
        if time.monotonic() - saved_s > _SAVE_EVERY_S:
            save(model, vocabulary, path)
            saved_s = time.monotonic()
        step += 1
    save(model, vocabulary, path)
    logger.info("%d steps of %d scenes each, weights in %s", step, len(scenes), path)
    return path


class Vocabulary:
    """The tokenizer's ids squeezed to those that captions use; 0 stands for every other token."""

    def __init__(self) -> None:
        self._tokenizer = open_clip.SimpleTokenizer(
            context_length=clip.MODEL_CONFIG["text_cfg"]["context_length"]
        )
        used = self._tokenizer(all_texts()).unique(sorted=True)
        self.token_id_U = used
        self._row_V = torch.zeros(self._tokenizer.vocab_size, dtype=torch.long)
        self._row_V[used] = torch.arange(1, len(used) + 1)

    def __call__(self, texts: list[str]) -> Tensor:
        """Rows of the squeezed table, int64, T x L; the end token stays highest, as CLIP needs."""
        return self._row_V[self._tokenizer(texts)]


def build_model(vocabulary: Vocabulary) -> open_clip.CLIP:
    """Make an untrained CLIP of `clip.MODEL_CONFIG`; its token table is squeezed.

    The image tower starts from positions that are waves (a random table would not survive being
    interpolated to the dense grid) and from keys equal to queries, so that attention begins local.

    Source: the second is the idea of Trockman and Kolter, "Mimetic Initialization of Self-Attention
    Layers", ICML 2023, in its simplest form.
    """
    config = clip.MODEL_CONFIG
    text_config = config["text_cfg"] | {"vocab_size": len(vocabulary.token_id_U) + 1}
    model = open_clip.CLIP(**(config | {"text_cfg": text_config}))
    visual: Any = model.visual
    with torch.no_grad():
        visual.positional_embedding[1:] = _waves(visual.grid_size[0], len(visual.class_embedding))
        for block in visual.transformer.resblocks:
            query_EE, key_EE, _ = block.attn.in_proj_weight.chunk(3)
            key_EE.copy_(query_EE)
    return model


def _waves(grid: int, width: int) -> Tensor:
    """Sines and cosines of rows and columns, float32 grid*grid x width: smooth, so interpolable."""
    frequency_F = math.pi * 2 ** torch.linspace(-4, 0, width // 4) * 0.8
    phase_GF = torch.arange(grid)[:, None] * frequency_F
    wave_GF = 0.3 * torch.cat([phase_GF.sin(), phase_GF.cos()], dim=1)
    row_GGF = wave_GF[:, None].expand(-1, grid, -1)
    column_GGF = wave_GF[None].expand(grid, -1, -1)
    return torch.cat([row_GGF, column_GGF], dim=2).flatten(0, 1)


def save(model: open_clip.CLIP, vocabulary: Vocabulary, path: Path) -> None:
    """Write the model as packed weights."""
    state = dict(model.state_dict())
    table = state["token_embedding.weight"]
    state["token_embedding.weight"] = table[1:]
    clip.pack(path, state, vocabulary.token_id_U, table[0])


def load(model: open_clip.CLIP, path: Path) -> None:
    """Read packed weights into a model made by `build_model`."""
    state = {name: value.float() for name, value in load_file(path).items()}
    del state["token_ids"]
    unknown_E, table = state.pop("token_unknown"), state["token_embedding.weight"]
    state["token_embedding.weight"] = torch.cat([unknown_E[None], table])
    model.load_state_dict(state)


def average(paths: Sequence[Path], out: Path) -> Path:
    """Write the mean of several packed weights, which must stem from one another.

    Source: Wortsman et al., "Model soups", ICML 2022.
    """
    states = [load_file(path) for path in paths]
    mean = {
        name: torch.stack([state[name].float() for state in states]).mean(0)
        for name, value in states[0].items()
        if value.is_floating_point()
    }
    unknown_E = mean.pop("token_unknown")
    path = out if out.suffix == ".safetensors" else out / clip.WEIGHTS.name
    clip.pack(path, mean, states[0]["token_ids"], unknown_E)
    return path


def _cosine(done: float) -> float:
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def _optimizers(model: open_clip.CLIP) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all else: far fewer steps than AdamW alone."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if ".resblocks." in name and parameter.ndim == 2 else others).append(parameter)
    muon = torch.optim.Muon(
        matrices, lr=_MUON_RATE, weight_decay=_WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(others, lr=_ADAMW_RATE, weight_decay=0.0, betas=(0.9, 0.98))
    return [muon, adamw]


def step_loss(
    model: open_clip.CLIP,
    vocabulary: Vocabulary,
    scenes: list[Scene],
    rng: np.random.Generator,
    kept_typical: float,
    whole: bool,
) -> Tensor:
    """Loss of one step over all views of the regions.

    Args:
        model: The model, with the squeezed token table.
        vocabulary: Its token ids.
        scenes: What to look at.
        rng: Decides on masks, crops, windows and captions.
        kept_typical: Share of the objects in their class's typical colour that are looked at.
        whole: Dense features of a few whole scenes, or of windows out of all of them.
    """
    region_lists = [_regions(scene, rng, kept_typical) for scene in scenes]
    scenes = [scene for scene, regions in zip(scenes, region_lists, strict=True) if regions]
    region_lists = [regions for regions in region_lists if regions]
    crops = [region for regions in region_lists for region in regions]
    crops = [crops[i] for i in rng.permutation(len(crops))[:_CROPS]]
    bank = sample_bank(rng, [(r.class_index, r.detail) for r in crops])
    text_TD = model.encode_text(vocabulary([c.text for c in bank]), normalize=True)

    def loss_of(embedding_RD: Tensor, regions: list[Region]) -> Tensor:
        cosine_RT = F.normalize(embedding_RD, dim=-1) @ text_TD.T
        return _pair_loss(cosine_RT, _truth(regions, bank), model.logit_scale.exp())

    crop_RD = model.encode_image(normalise(np.stack([crop_view(r, rng) for r in crops])))
    windows = _whole_scenes() if whole else _draw_windows(region_lists, rng)
    tokens = _window_tokens(model, scenes, windows)
    regions, pooling_RM = _window_regions(windows, region_lists)
    gem_MD, plain_MD = (token_BND[:, 1:].flatten(0, 1) for token_BND in tokens)
    loss = loss_of(crop_RD, crops) + loss_of(pooling_RM @ gem_MD, regions)
    return loss + 0.3 * loss_of(pooling_RM @ plain_MD, regions)


def _truth(regions: list[Region], bank: list[Caption]) -> Tensor:
    """Which caption holds for which region, bool R x T."""
    return torch.tensor([[c.is_true(r.class_index, r.detail) for c in bank] for r in regions])


def _pair_loss(cosine_RT: Tensor, truth_RT: Tensor, scale: Tensor) -> Tensor:
    """Contrast in both directions plus the sigmoid term on the cosine itself; a scalar."""
    logit_RT = scale * cosine_RT
    contrast = _contrast(logit_RT, truth_RT) + 0.5 * _contrast(logit_RT.T, truth_RT.T)
    margin_RT = _COSINE_SLOPE * (cosine_RT - _COSINE_MIDDLE)
    true_mean = (F.softplus(-margin_RT) * truth_RT).sum() / truth_RT.sum().clamp(min=1)
    false_mean = (F.softplus(margin_RT) * ~truth_RT).sum() / (~truth_RT).sum().clamp(min=1)
    return contrast + 0.5 * (true_mean + false_mean)


def _contrast(logit_RT: Tensor, truth_RT: Tensor) -> Tensor:
    """Mean over rows of the mean over true pairs of -log softmax against that row's false pairs."""
    against_R1 = logit_RT.masked_fill(truth_RT, -torch.inf).logsumexp(1, keepdim=True)
    loss_RT = F.softplus(against_R1 - logit_RT) * truth_RT
    true_R = truth_RT.sum(1)
    return (loss_RT.sum(1) / true_R.clamp(min=1)).sum() / (true_R > 0).sum().clamp(min=1)


def _regions(scene: Scene, rng: np.random.Generator, kept_typical: float) -> list[Region]:
    """Objects of a scene under imperfect masks, and half of the time a background region.

    Six objects in ten wear their class's typical colour. Most of those are left out, or colour
    would stand in for shape: that is learned first, and nothing after it.
    """
    regions = []
    for item in scene.objects:
        typical = item.colour == TYPICAL_COLOURS[CLASSES[item.class_index - 1]]
        if not typical or rng.random() < kept_typical:
            known = (item.mask_HW, item.class_index, item.colour)
            others = [other.mask_HW for other in scene.objects if other is not item]
            whole = Region(scene.image_HWC, scene.label_HW, *known)
            regions.append(_perturb(whole, others, rng))
    if rng.random() < 0.5:
        return regions
    silhouettes = [item.mask_HW for item in scene.objects]
    kind = str(rng.choice(("whole", "halo", "silhouette", "box")))
    mask_HW = _background_mask(scene.label_HW, silhouettes, kind, rng)
    if mask_HW.sum() >= 40:
        known = (mask_HW, 0, scene.background)
        regions.append(Region(scene.image_HWC, scene.label_HW, *known))
    return regions


def _perturb(region: Region, others: list[np.ndarray], rng: np.random.Generator) -> Region:
    """Makes the mask as bad as a segmenter's may be; left alone if too little would be right.

    The tiny SAM's own mistakes are mostly two: parts of an object, and a neighbour's part too.
    """
    mask_HW = region.mask_HW
    kind = rng.choice(
        ("none", "grow", "shrink", "shift", "leak", "part", "merge"),
        p=(0.34, 0.08, 0.08, 0.06, 0.04, 0.22, 0.18),
    )
    if kind == "grow":
        mask_HW = _grow(mask_HW, int(rng.integers(1, 4)))
    elif kind == "shrink":
        mask_HW = ~_grow(~mask_HW, int(rng.integers(1, 3)))
    elif kind == "shift":
        mask_HW = np.roll(mask_HW, rng.integers(-4, 5, size=2), (0, 1))
    elif kind == "leak":
        mask_HW = mask_HW | (_grow(mask_HW, 9) & _half_plane(mask_HW, rng, 0.15))
    elif kind == "part":
        mask_HW = mask_HW & _half_plane(mask_HW, rng, rng.uniform(0.25, 0.8))
    elif kind == "merge" and others:
        middle_yx = np.argwhere(mask_HW).mean(0)
        far = [np.hypot(*(np.argwhere(other).mean(0) - middle_yx)) for other in others]
        near_HW = others[int(np.argmin(far))]
        mask_HW = mask_HW | (near_HW & _half_plane(near_HW, rng, rng.uniform(0.1, 0.9)))
    inside = (region.mask_HW & mask_HW).sum()
    if inside < 20 or inside < 0.55 * mask_HW.sum():
        return region
    return replace(region, mask_HW=mask_HW)


def _half_plane(mask_HW: np.ndarray, rng: np.random.Generator, keep: float) -> np.ndarray:
    """Pixels on one side of a random line that leaves a share `keep` of the mask there."""
    y, x = np.nonzero(mask_HW)
    angle = rng.uniform(0, 2 * math.pi)
    limit = np.quantile(x * math.cos(angle) + y * math.sin(angle), keep)
    at_y, at_x = np.mgrid[: mask_HW.shape[0], : mask_HW.shape[1]]
    return at_x * math.cos(angle) + at_y * math.sin(angle) <= limit


def _background_mask(
    label_HW: np.ndarray, silhouettes: list[np.ndarray], kind: str, rng: np.random.Generator
) -> np.ndarray:
    """A background region, bool H x W: all, around an object, an object's outline moved, a box."""
    free_HW = label_HW == 0
    silhouette_HW = silhouettes[rng.integers(len(silhouettes))]
    if kind == "whole":
        return (
            ~_grow(~free_HW, int(rng.integers(0, 3)))
            if rng.random() < 0.8
            else np.ones_like(free_HW)
        )
    if kind == "halo":
        return _grow(silhouette_HW, int(rng.integers(4, 13))) & free_HW
    if kind == "silhouette":
        moved_HW = np.roll(silhouette_HW, rng.integers(0, 128, size=2), (0, 1))
        return moved_HW & free_HW
    height, width = rng.integers(12, 64, size=2)
    top, left = rng.integers(0, label_HW.shape[0] - 12, size=2)
    box_HW = np.zeros_like(free_HW)
    box_HW[top : top + height, left : left + width] = True
    return box_HW & free_HW


def _grow(mask_HW: np.ndarray, by_px: int) -> np.ndarray:
    """Dilate by a square, rows and columns in turn."""
    if by_px == 0:
        return mask_HW
    size = 2 * by_px + 1
    grown_1HW = torch.from_numpy(mask_HW).float()[None]
    grown_1HW = F.max_pool2d(grown_1HW, (1, size), 1, (0, by_px))
    return F.max_pool2d(grown_1HW, (size, 1), 1, (by_px, 0))[0].numpy() > 0


def crop_view(region: Region, rng: np.random.Generator) -> np.ndarray:
    """A region as an image of its own, uint8 RGB.

    Mostly the tight square box, shifted into the image; else with context, stretched, hanging over
    the edge, or with the outside of the mask filled (always where the box would show mostly
    something else than the region).
    """
    y, x = np.nonzero(region.mask_HW)
    x0, y0, x1, y1 = int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1
    label_box = region.label_HW[y0:y1, x0:x1]
    honest = (label_box == region.class_index).mean() > (0.7 if region.class_index == 0 else 0.25)
    image_HWC = region.image_HWC
    fill = 128 if rng.random() < 0.8 else int(rng.integers(0, 256))
    if rng.random() < 0.3 or not honest:
        image_HWC = np.where(region.mask_HW[..., None], image_HWC, np.uint8(fill))
    margin = rng.uniform(0, 0.25) if rng.random() < 0.4 else 0.0
    if rng.random() < 0.2:  # specks far from the rest of a mask make its box larger
        x0, y0 = (v - int(rng.integers(0, 20)) for v in (x0, y0))
        x1, y1 = (v + int(rng.integers(0, 20)) for v in (x1, y1))
    half_w, half_h = (x1 - x0) * (0.5 + margin), (y1 - y0) * (0.5 + margin)
    if rng.random() < 0.85:
        half_w = half_h = max(half_w, half_h)
    centre_xy = [(x0 + x1) / 2, (y0 + y1) / 2]
    if rng.random() < 0.7:
        height, width = image_HWC.shape[:2]
        centre_xy = [
            float(np.clip(at, min(half, size / 2), max(size - half, size / 2)))
            for at, half, size in zip(centre_xy, (half_w, half_h), (width, height), strict=True)
        ]
    return cut(image_HWC, (centre_xy[0], centre_xy[1]), (half_w, half_h), fill)


def cut(
    image_HWC: np.ndarray, centre_xy: tuple[float, float], half_wh: tuple[float, float], fill: int
) -> np.ndarray:
    """Cut a box, filled where it leaves the image, and resize it to the model's side: uint8 RGB."""
    side_px = clip.MODEL_CONFIG["vision_cfg"]["image_size"]
    (x, y), (half_w, half_h) = centre_xy, half_wh
    height, width = image_HWC.shape[:2]
    outside = max(half_w - x, half_h - y, x + half_w - width, y + half_h - height, 0)
    pad = math.ceil(outside) + 1
    padded_HWC = np.pad(image_HWC, ((pad, pad), (pad, pad), (0, 0)), constant_values=fill)
    box = (x - half_w + pad, y - half_h + pad, x + half_w + pad, y + half_h + pad)
    picture = Image.fromarray(padded_HWC)
    return np.asarray(picture.resize((side_px, side_px), Image.Resampling.BICUBIC, box=box))


def dense_view(image_HWC: np.ndarray) -> np.ndarray:
    """A whole scene at the side that dense features are taken at: uint8 RGB."""
    side_px = clip.SETTINGS["dense_px"]
    return np.asarray(
        Image.fromarray(image_HWC).resize((side_px, side_px), Image.Resampling.BICUBIC)
    )


def normalise(image_BHWC: np.ndarray) -> Tensor:
    """Images as the model wants them: float32, B x 3 x H x W."""
    mean = torch.tensor(clip.PREPROCESS_CONFIG["mean"])
    std = torch.tensor(clip.PREPROCESS_CONFIG["std"])
    return ((torch.from_numpy(image_BHWC) / 255 - mean) / std).permute(0, 3, 1, 2)


def pool_weights(mask_RHW: np.ndarray) -> Tensor:
    """Weights of patches for mask pooling, float32 R x G*G, each row summing to 1.

    Equal to upsampling the map bilinearly to the mask's size and averaging under the mask: that is
    linear in the patches, so the masks go through the transposed upsampling, not the features.
    """
    side_px = mask_RHW.shape[-1]
    up_HG = F.interpolate(torch.eye(_grid())[None], size=side_px, mode="linear")[0].T
    weight_RGG = up_HG.T @ torch.from_numpy(mask_RHW).float() @ up_HG
    return weight_RGG.flatten(1) / weight_RGG.sum((1, 2))[:, None]


@dataclass(frozen=True)
class Window:
    """A square of patches of one scene: number of the scene, and rows and columns as a slice."""

    scene: int
    rows: slice
    columns: slice

    def cut(self, grid_RGG: Tensor) -> Tensor:
        """The part of R x G x G in the window, R x N."""
        return grid_RGG[:, self.rows, self.columns].flatten(1)


def _grid() -> int:
    return clip.SETTINGS["dense_px"] // clip.MODEL_CONFIG["vision_cfg"]["patch_size"]


def _whole_scenes() -> list[Window]:
    everything = slice(0, _grid())
    return [Window(number, everything, everything) for number in range(_DENSE_SCENES)]


def _draw_windows(region_lists: list[list[Region]], rng: np.random.Generator) -> list[Window]:
    """Windows around objects, up to `_WINDOWS`: a quarter of the tokens, all of the object."""
    windows = []
    for number, regions in enumerate(region_lists):
        for region in regions:
            if region.class_index == 0:
                continue
            middle_yx = np.argwhere(region.mask_HW).mean(0) * _grid() / region.mask_HW.shape[0]
            start_yx = middle_yx - _WINDOW / 2 + rng.uniform(-1.5, 1.5, size=2)
            top, left = np.clip(np.round(start_yx).astype(int), 0, _grid() - _WINDOW).tolist()
            windows.append(Window(number, slice(top, top + _WINDOW), slice(left, left + _WINDOW)))
    return [windows[i] for i in rng.permutation(len(windows))[:_WINDOWS]]


def _window_tokens(
    model: open_clip.CLIP, scenes: list[Scene], windows: list[Window]
) -> DenseTokens:
    """Both streams of every window, its patches where they are in the scene; class token first."""
    visual: Any = model.visual
    used = scenes[: max(window.scene for window in windows) + 1]
    images = normalise(np.stack([dense_view(scene.image_HWC) for scene in used]))
    token_SNE = embed_patches(visual, images)
    number_1GG = torch.arange(1, _grid() ** 2 + 1).view(1, _grid(), _grid())
    parts = []
    for window in windows:
        index_N = torch.cat([torch.zeros(1, dtype=torch.long), window.cut(number_1GG)[0]])
        parts.append(token_SNE[window.scene, index_N])
    return gem_streams(visual, torch.stack(parts), gem_depth=clip.SETTINGS["gem_depth"])


def _window_regions(
    windows: list[Window], region_lists: list[list[Region]]
) -> tuple[list[Region], Tensor]:
    """Regions that lie (mostly) in a window, and their pooling over all windows' patches, R x M."""
    regions, rows = [], []
    for number, window in enumerate(windows):
        candidates = region_lists[window.scene]
        weight_RGG = pool_weights(np.stack([r.mask_HW for r in candidates]))
        weight_RN = window.cut(weight_RGG.unflatten(1, (_grid(), _grid())))
        for region, weight_N in zip(candidates, weight_RN, strict=True):
            if weight_N.sum() >= (0.2 if region.class_index == 0 else 0.75):
                row_BN = torch.zeros(len(windows), len(weight_N))
                row_BN[number] = weight_N / weight_N.sum()
                regions.append(region)
                rows.append(row_BN.flatten())
    return regions, torch.stack(rows)
