"""How many images and points SAM may work on at once in a given memory.

What enters: a SAM (its sizes are enough, weights on the `meta` device will do), the settings, the
device. What leaves: GiB, images at once, points at once. An estimate on the safe side, from the
sizes of the largest tensors that are alive together; what it underestimates is caught when memory
runs out (`labeler`).

Why images and not points: a point costs the same wherever it belongs, so the points of one image
come first (`sam.points_per_batch`), and what is left takes further images.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from segment_anything.modeling import Sam

from zsplg_ray.config import SamConfig
from zsplg_ray.label.decoder import points_in_cache

_FLOAT = 4
_GIB = 2**30

GPU_SHARE = 0.7
"""Part of a GPU's free memory for segmenting unless told; CLIP and fragments take the rest."""


class Need(NamedTuple):
    """Bytes."""

    image: int
    """For each image under way: encoder, projections, and all masks that may have to be kept."""
    point: int
    """For each point that is being decoded."""


def memory_gib(
    sam: Sam,
    config: SamConfig,
    device: torch.device | str,
    *,
    share: float = 1.0,
    taken_gib: float = 0.0,
) -> float:
    """Memory for segmenting, GiB: `config.memory_gib`, or what this machine has now.

    On a CPU that is what one image takes: several together are not quicker there.

    Args:
        sam: Any stock SAM; only its sizes are read.
        config: Resolved.
        device: Where SAM runs.
        share: Part of the GPU that is ours, (0, 1].
        taken_gib: What will be taken of the GPU before, as by weights that are not there yet.
    """
    if config.memory_gib is not None:
        return config.memory_gib
    if torch.device(device).type != "cuda":
        return needed_gib(sam, config, device)
    free, total = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    spare = torch.cuda.memory_reserved(device) - used  # torch's own, free to be used again
    ours = min(free + spare, total * share - used)
    return max(0.0, ours / _GIB - taken_gib) * GPU_SHARE


def need(sam: Sam, points: int) -> Need:
    """What an image and a point take.

    Args:
        sam: Any stock SAM; only its sizes are read.
        points: Points of one image (of one crop).
    """
    vit: Any = sam.image_encoder
    transformer: Any = sam.mask_decoder.transformer
    high, wide = sam.prompt_encoder.image_embedding_size
    low_high, low_wide = sam.prompt_encoder.mask_input_size
    tokens, low_px = high * wide, low_high * low_wide
    width = vit.patch_embed.proj.out_channels
    decoded = sam.mask_decoder.transformer_dim
    masks = sam.mask_decoder.num_multimask_outputs
    point_tokens = sam.mask_decoder.num_mask_tokens + 3  # and the IoU's, the point's, the pad's
    shares = transformer.depth * point_tokens * transformer.num_heads
    encoder = tokens * width * 10  # residual, queries, keys, values, and the MLP's inside
    kept = points * masks * low_px
    return Need(
        image=_FLOAT * (encoder + 6 * tokens * decoded + kept),
        point=_FLOAT * (3 * tokens * shares + 6 * tokens * decoded + masks * low_px),
    )


def points_together(sam: Sam, most: int, device: torch.device | str) -> int:
    """Points of an image to decode at a time: `most`, but on a CPU only what its caches hold."""
    if torch.device(device).type != "cpu":
        return most
    high, wide = sam.prompt_encoder.image_embedding_size
    return min(most, points_in_cache(high * wide))


def needed_gib(sam: Sam, config: SamConfig, device: torch.device | str) -> float:
    """What one image takes, with as many of its points as go together, GiB."""
    assert config.points_per_side is not None, "presets.resolve_sam comes first"
    points = config.points_per_side**2
    each = need(sam, points)
    together = min(points, points_together(sam, config.points_per_batch, device))
    return (each.image + each.point * together) / _GIB


def images_at_once(sam: Sam, config: SamConfig, gib: float, device: torch.device | str) -> int:
    """How many images fit in `gib`; at least 1, for smaller steps are tried when it runs out."""
    return max(1, int(gib / needed_gib(sam, config, device)))
