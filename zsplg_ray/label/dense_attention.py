"""The parts of a CLIP block, and the training-free ways of putting its last one together.

Enters: the blocks of an open_clip ViT and the tokens before them. Leaves: the tokens after them.
Only the last block is changed: what it attends to, and whether its residual and its MLP take part.

Why a method is data, not a function: in CLIP's last block attention serves the class token, and
each method mends that by another choice of the same three parts. Written as a `LastBlock` the
differences stand side by side, and the ordinary choice of all three is the tower itself: that is
how each is checked.

Not taken over from the official codes, as it lies around the map: sliding windows of 224 pixels,
prompt ensembles, key smoothing, prompt denoising, PAMR. The position embedding is interpolated as
in `zsplg_ray.label.dense` (antialiased), which officially it is not.

Shape suffixes: B batch, N tokens (class token first), P patches, E width of the tower, A attention
heads, F features of one head, H W patches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor, tuple[int, int]], Tensor]
"""(query_BANF, key_BANF, value_BANF, patch grid height and width) -> attended_BANF."""

NACLIP_STD_PATCHES = 5.0
"""Standard deviation of NACLIP's neighbourhood, in patches, as officially for all data sets."""


@dataclass(frozen=True)
class LastBlock:
    """What becomes of a tower's last block; ordinary attention, True, True is the tower's own."""

    attend: Attend
    """What takes the place of its attention, between the projections to q, k, v and out_proj."""
    residual: bool
    """Whether the tokens that enter the block are added to what attention gives."""
    mlp: bool
    """Whether the MLP follows, with its own residual."""


def run_blocks(
    visual: VisionTransformer, token_BNE: Tensor, grid_hw: tuple[int, int], last: LastBlock
) -> Tensor:
    """All blocks, the last one changed.

    Args:
        visual: Image tower with at least one ordinary attention block.
        token_BNE: Embedded tokens, class token first.
        grid_hw: Rows and columns of patches; their product is N - 1.
        last: What to do in the last block.

    Returns:
        token_BNE before the last layer norm and projection, in the tower's dtype. The class token
        goes along, but no method says what it then means.
    """
    blocks: Any = visual.transformer.resblocks
    for block in blocks[:-1]:
        token_BNE = ordinary_block(block, token_BNE)
    final = blocks[-1]
    query, key, value = query_key_value(final.attn, final.ln_1(token_BNE))
    attended_BANF = last.attend(query, key, value, grid_hw)
    attended_BNE = final.ls_1(merge_heads(final.attn, attended_BANF))
    token_BNE = token_BNE + attended_BNE if last.residual else attended_BNE
    return add_mlp(final, token_BNE) if last.mlp else token_BNE


def ordinary_block(block: ResidualAttentionBlock, token_BNE: Tensor) -> Tensor:
    """One block as the model itself computes it, without attention dropout (CLIP has none)."""
    query, key, value = query_key_value(block.attn, block.ln_1(token_BNE))
    attended_BANF = F.scaled_dot_product_attention(query, key, value)
    return add_mlp(block, token_BNE + block.ls_1(merge_heads(block.attn, attended_BANF)))


def query_key_value(attention: nn.MultiheadAttention, token_BNE: Tensor) -> tuple[Tensor, ...]:
    """Project tokens to queries, keys and values, each B x A x N x F."""
    qkv = F.linear(token_BNE, attention.in_proj_weight, attention.in_proj_bias)
    return tuple(
        part.unflatten(2, (attention.num_heads, attention.head_dim)).transpose(1, 2)
        for part in qkv.chunk(3, dim=2)
    )


def merge_heads(attention: nn.MultiheadAttention, token_BANF: Tensor) -> Tensor:
    """Put the heads side by side and through the output projection, B x N x E."""
    return attention.out_proj(token_BANF.transpose(1, 2).flatten(2))


def add_mlp(block: ResidualAttentionBlock, token_BNE: Tensor) -> Tensor:
    """The second half of a block: its MLP, added to what enters it."""
    return token_BNE + block.ls_2(block.mlp(block.ln_2(token_BNE)))


def ordinary_attention(
    query: Tensor, key: Tensor, value: Tensor, grid_hw: tuple[int, int]
) -> Tensor:
    """CLIP's own: softmax(q k^T / sqrt(F)) v."""
    return F.scaled_dot_product_attention(query, key, value)


def value_attention(query: Tensor, key: Tensor, value: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Every token attends to itself alone: v.

    Source: Zhou, Loy, Dai: "Extract Free Dense Labels from CLIP", ECCV 2022, section 3.2; its
    official code (chongzhou96/MaskCLIP, a fork of mmsegmentation, Apache 2.0), read in copies of
    its mmseg/models/backbones/vit.py that other projects carry.
    """
    return value


def correlative_attention(
    query: Tensor, key: Tensor, value: Tensor, grid_hw: tuple[int, int]
) -> Tensor:
    """(softmax(q q^T / sqrt(F)) + softmax(k k^T / sqrt(F))) v: a sum, so weights add up to 2.

    Source: Wang, Mei, Yuille: "SCLIP: Rethinking Self-Attention for Dense Vision-Language
    Inference", ECCV 2024 (arXiv 2312.01597), and its official code (wangf3014/SCLIP,
    clip/model.py, published without a licence, hence only read).
    """
    by_query = F.scaled_dot_product_attention(query, query, value)
    return by_query + F.scaled_dot_product_attention(key, key, value)


def neighbourhood_attention(
    query: Tensor, key: Tensor, value: Tensor, grid_hw: tuple[int, int]
) -> Tensor:
    """softmax(k k^T / sqrt(F) + neighbourhood) v; see `neighbourhood_bias`.

    Source: Hajimiri, Ben Ayed, Dolz: "Pay Attention to Your Neighbours: Training-Free
    Open-Vocabulary Semantic Segmentation", WACV 2025 (arXiv 2404.08181), and its official code
    (sinahmr/NACLIP, clip/model.py, MIT licence), attn_strategy "naclip".
    """
    bias_NN = neighbourhood_bias(grid_hw, NACLIP_STD_PATCHES, key.device).to(key.dtype)
    return F.scaled_dot_product_attention(key, key, value, attn_mask=bias_NN)


def neighbourhood_bias(
    grid_hw: tuple[int, int], std_patches: float, device: torch.device | None = None
) -> Tensor:
    """What NACLIP adds to the scores: a Gaussian around each patch, 1 at the patch itself.

    The class token is nobody's neighbour: its row and its column are 0.

    Args:
        grid_hw: Rows and columns of patches.
        std_patches: Standard deviation in patches.
        device: Where to make it.

    Returns:
        bias_NN, float32; N x N numbers, so 4 times the side needs 256 times the memory.
    """
    gauss_HH, gauss_WW = (_gauss(side, std_patches, device) for side in grid_hw)
    bias_PP = torch.kron(gauss_HH, gauss_WW)  # a Gaussian of a distance is a product of two
    return F.pad(bias_PP, (1, 0, 1, 0))


def _gauss(side: int, std: float, device: torch.device | None) -> Tensor:
    place = torch.arange(side, dtype=torch.float32, device=device)
    return torch.exp(-((place[:, None] - place) ** 2) / (2 * std**2))


PLAIN = LastBlock(ordinary_attention, residual=True, mlp=True)
"""The tower as it was trained."""

LAST_BLOCKS: dict[str, LastBlock] = {
    "maskclip": LastBlock(value_attention, residual=True, mlp=True),
    "sclip": LastBlock(correlative_attention, residual=True, mlp=True),
    "naclip": LastBlock(neighbourhood_attention, residual=False, mlp=False),
}
"""Name to last block, as officially.

MaskCLIP's paper speaks of value and output projection only, which is all that a ResNet's attention
pooling has; its code for a ViT then adds the residual and runs the MLP. NACLIP's is its "reduced"
architecture.
"""
