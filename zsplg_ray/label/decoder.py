"""Many single-point prompts -> SAM's predicted IoU and low-resolution mask logits, exactly, faster.

What enters: a `Sam`, the encoder's features of some images, points. What leaves: `Decoded`, equal
to the official decoder (multimask output, one foreground point a prompt) up to float rounding. Only
the order of the arithmetic differs, so any weights, depth, widths and head count will do.

Why this way: officially each point carries its own copy of the image, N x C numbers that every
attention projects anew. But an image position n only ever changes by what T tokens tell it through
A heads, and T A is small (56 where N = 4,096 and C = 256). So a point's image side is kept in
factors and never written out:

    keys_n = gain_n K_n G + sum_r share_rn content_r + shift

K is the image, the same for all points. G (the layers' centring and norm weights so far) and shift
(the last norm's bias) belong to the model; what a layer wants from K G is projected once an image.
At first gain = 1, shift = 0 and there are no rows r. Then:

- Image attends to tokens: keys += attention (values_at W_out,a). T A new rows, shares are the
  attention. Over t it sums to 1 for each of the A heads, so constants (the output bias, shift) hide
  in the new contents, an A-th of them in each.
- Layer norm: centring acts on K G and on the contents. The squared length of keys_n is
  gain_n^2 |K_n G|^2 + sum_r share_rn (2 gain_n K_n G . content_r + sum_s content_r . content_s
  share_sn); its inverse root multiplies gain and shares.
- Tokens attend to image: score_at,n = q_at W_k,a . (keys_n + position_n), the weights absorbed into
  the few tokens. What does not depend on n cancels in the softmax: the key's bias and shift. Over n
  the softmax sums to 1, so shift adds a constant to the values.

Then the IoU head comes first and only points that keep a mask are upscaled. Transposed convolutions
with kernel = stride are matrix products on channels-last pixels, the first of them on the factors;
taken one sub-row at a time, they leave logits in the order of the image.

Source: segment_anything/modeling/transformer.py and mask_decoder.py (Apache-2.0) for the function
that is computed.

Legend: I images, Q points an image, B = I Q, T tokens, A heads, D head channels, E = D + 1, C model
channels, N image positions, R = T A rows a layer, P points upscaled, M masks kept, L = N in the
extent, F channels of two sub-pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from segment_anything.modeling import Sam
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock, TwoWayTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from zsplg_ray.label.products import linear, matmul

UPSCALE = 4
"""Rows of logits to a row of features."""

POSITIONS = 64 * 64
"""Image positions of the published models."""

GPU_UPSCALED = 64
"""Points upscaled at a time on a GPU."""


class Decoded(NamedTuple):
    """What `PointDecoder.decode` found."""

    iou_IQ3: Tensor
    """float32 predicted IoU of the three multimask outputs, for every point."""

    index_M: Tensor
    """int64 flat index into [I, Q, 3] of the masks that pass, ascending."""

    logit_MHW: Tensor
    """float32 low-resolution logits of those masks, contiguous, only the extent asked for."""


class LayerImage(NamedTuple):
    """What one layer wants from K G."""

    key_IADN: Tensor
    value_IAND: Tensor
    query_IADN: Tensor

    square_IN: Tensor
    """|K G|^2, centred."""

    cross_IAEN: list[Tensor]
    """K G, centred, times the maps that made the contents of each layer so far."""


@dataclass(frozen=True)
class ImageSide:
    """Everything that is the same for all points of an image; `PointDecoder.prepare` makes it."""

    layers: list[LayerImage]

    final_key_IADN: Tensor

    final_value_IAND: Tensor

    pixel_ILF: list[Tensor]
    """K G through the first transposed convolution: upper and lower sub-row."""

    extent_hw: tuple[int, int]
    """Rows and columns of the logits that are wanted."""


class Keys(NamedTuple):
    """The image side of each point in factors: see the module's docstring."""

    gain_BN: Tensor
    share_BRN: Tensor
    content_BRC: Tensor

    value_BTAE: list[Tensor]
    """Token values that the contents were made from, a layer each; the last channel is 1."""


def points_in_cache(positions: int = POSITIONS) -> int:
    """Points a call for which `PointDecoder.decode` is quick on a CPU: all stays in its caches.

    Args:
        positions: Image positions of the encoder's features.
    """
    return max(4, 4 * POSITIONS // positions)


class PointDecoder:
    """SAM's mask decoder for many single points an image; make a new one when weights change.

    Args:
        sam: Stock modules in float32 on the device to work on.
    """

    @torch.no_grad()
    def __init__(self, sam: Sam) -> None:
        self.prompt_encoder, self.decoder = sam.prompt_encoder, sam.mask_decoder
        self.size_hw = self.prompt_encoder.image_embedding_size
        self.transformer = cast(TwoWayTransformer, self.decoder.transformer)
        position_NC = self.prompt_encoder.get_dense_pe()[0].flatten(1).T
        shift_C = torch.zeros_like(position_NC[0])
        self.layers: list[Layer] = []
        for module in self.transformer.layers:
            block = cast(TwoWayAttentionBlock, module)
            before = self.layers[-1].write if self.layers else None
            writer = ImageToToken(block, position_NC, shift_C, before)
            reader = TokenToImage(block.cross_attn_token_to_image, position_NC, shift_C)
            self.layers.append(Layer(block, reader, writer))
            shift_C = block.norm4.bias
        final = self.transformer.final_attn_token_to_image
        self.final = TokenToImage(final, position_NC, shift_C)
        self.upscaler = Upscaler(self.decoder.output_upscaling, self.size_hw, shift_C)

    @torch.no_grad()
    def prepare(self, feature_ICHW: Tensor, extent_hw: tuple[int, int] | None = None) -> ImageSide:
        """Projects what all points of an image share.

        Args:
            feature_ICHW: float32 output of the image encoder for I images.
            extent_hw: Rows and columns of the low-resolution logits that are wanted; the rest is
                padding of the square input. None: all.
        """
        height, width = self.size_hw
        extent_hw = extent_hw or (UPSCALE * height, UPSCALE * width)
        assert 0 < extent_hw[0] <= UPSCALE * height and 0 < extent_hw[1] <= UPSCALE * width
        no_mask_C = self.prompt_encoder.no_mask_embed.weight[0]
        image_INC = feature_ICHW.flatten(2).mT + no_mask_C
        layers = []
        for layer in self.layers:
            centred_INC = _centre(image_INC)
            layers.append(layer.prepare(image_INC, centred_INC))
            image_INC = centred_INC * layer.block.norm4.weight
        key_IADN, value_IAND = self.final.prepare(image_INC)
        pixel_ILF = self.upscaler.prepare(image_INC, extent_hw)
        return ImageSide(layers, key_IADN, value_IAND, pixel_ILF, extent_hw)

    @torch.no_grad()
    def decode(self, side: ImageSide, point_IQ2: Tensor, min_iou: float) -> Decoded:
        """Predicts the three masks of every point.

        Args:
            side: From `prepare`.
            point_IQ2: float64 x, y in pixels of the model's input, as
                `SamPredictor.transform.apply_coords` gives them; each a foreground prompt by
                itself.
            min_iou: Only masks with more predicted IoU are upscaled and returned. 0 or less: all.
        """
        images, points = point_IQ2.shape[:2]
        assert images == len(side.final_key_IADN), "one row of points an image"
        point_BTC = self._tokens(point_IQ2.flatten(0, 1))
        token_BTC, keys = point_BTC, _untouched(point_BTC, math.prod(self.size_hw))
        for layer, image in zip(self.layers, side.layers, strict=True):
            token_BTC, keys = layer(token_BTC, point_BTC, keys, image)
        # From here only the IoU token and the tokens of the multimask outputs have readers.
        pick = [0, *range(2, 1 + self.decoder.num_mask_tokens)]
        token_BTC, point_BTC = token_BTC[:, pick], point_BTC[:, pick]
        read_BTC = self.final(
            token_BTC + point_BTC, keys, side.final_key_IADN, side.final_value_IAND
        )
        token_BTC = self.transformer.norm_final_attn(token_BTC + read_BTC)
        iou_B3 = self.decoder.iou_prediction_head(token_BTC[:, 0])[:, 1:]
        kept_B3 = iou_B3 > min_iou if min_iou > 0 else torch.ones_like(iou_B3, dtype=torch.bool)
        heads = self.decoder.output_hypernetworks_mlps[1:]
        hyper_B3C = torch.stack([head(token_BTC[:, 1 + m]) for m, head in enumerate(heads)], 1)
        image_B = torch.arange(images, device=iou_B3.device).repeat_interleave(points)
        logit_MHW = self.upscaler(side, Candidates(image_B, *keys[:3], hyper_B3C, kept_B3))
        index_M = kept_B3.flatten().nonzero()[:, 0]
        return Decoded(iou_B3.unflatten(0, (images, points)), index_M, logit_MHW)

    def _tokens(self, point_B2: Tensor) -> Tensor:
        """IoU token, mask tokens, the point, the pad that stands for no box."""
        label_B1 = torch.ones(len(point_B2), 1, dtype=torch.int, device=point_B2.device)
        sparse_B2C, _ = self.prompt_encoder((point_B2[:, None], label_B1), None, None)
        own_TC = torch.cat([self.decoder.iou_token.weight, self.decoder.mask_tokens.weight])
        return torch.cat([own_TC.expand(len(sparse_B2C), -1, -1), sparse_B2C], 1)


class Layer:
    """One two-way block: tokens among themselves, from the image, alone; then the image."""

    def __init__(
        self, block: TwoWayAttentionBlock, read: TokenToImage, write: ImageToToken
    ) -> None:
        self.block, self.read, self.write = block, read, write

    def prepare(self, image_INC: Tensor, centred_INC: Tensor) -> LayerImage:
        """Projects K G, which at this layer is `image_INC`."""
        return LayerImage(
            *self.read.prepare(image_INC),
            self.write.query_ADC @ image_INC.mT[:, None],
            centred_INC.square().sum(-1),
            [map_AEC @ centred_INC.mT[:, None] for map_AEC in self.write.maps_AEC],
        )

    def __call__(
        self, token_BTC: Tensor, point_BTC: Tensor, keys: Keys, image: LayerImage
    ) -> tuple[Tensor, Keys]:
        """Tokens and image side after the block."""
        block = self.block
        if block.skip_first_layer_pe:
            token_BTC = block.self_attn(token_BTC, token_BTC, token_BTC)
        else:
            query_BTC = token_BTC + point_BTC
            token_BTC = token_BTC + block.self_attn(query_BTC, query_BTC, token_BTC)
        token_BTC = block.norm1(token_BTC)
        read_BTC = self.read(token_BTC + point_BTC, keys, image.key_IADN, image.value_IAND)
        token_BTC = block.norm2(token_BTC + read_BTC)
        token_BTC = block.norm3(token_BTC + block.mlp(token_BTC))
        return token_BTC, self.write(token_BTC + point_BTC, token_BTC, keys, image)


class TokenToImage:
    """Tokens attend to the image."""

    def __init__(self, attention: Attention, position_NC: Tensor, shift_C: Tensor) -> None:
        self.heads = attention.num_heads
        self.project_query, self.project_out = attention.q_proj, attention.out_proj
        self.key_ADC = _by_head(attention.k_proj.weight, self.heads) / _root(attention)
        self.position_ADN = self.key_ADC @ position_NC.T
        value = attention.v_proj
        self.value_ADC = _by_head(value.weight, self.heads)
        self.value_bias_AD = _by_head(value.bias + value.weight @ shift_C, self.heads)

    def prepare(self, image_INC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [I, A, D, N] and values [I, A, N, D] of K G."""
        return self.key_ADC @ image_INC.mT[:, None], image_INC[:, None] @ self.value_ADC.mT

    def __call__(
        self, token_BTC: Tensor, keys: Keys, key_IADN: Tensor, value_IAND: Tensor
    ) -> Tensor:
        """What each token reads [B, T, C]."""
        query_BTAD = self.project_query(token_BTC).unflatten(-1, (self.heads, -1))
        score_BTAN = _dot(query_BTAD, key_IADN)
        _complete(score_BTAN, query_BTAD, self.key_ADC, self.position_ADN, keys)
        weight_BTAN = score_BTAN.softmax(-1)
        read_BRC = weight_BTAN.flatten(1, 2) @ keys.share_BRN.mT @ keys.content_BRC
        read_BTAC = read_BRC.unflatten(1, weight_BTAN.shape[1:3])
        read_BTAD = torch.einsum("btac,adc->btad", read_BTAC, self.value_ADC)
        read_BTAD += _mix(weight_BTAN.mul_(keys.gain_BN[:, None, None]), value_IAND)
        return self.project_out((read_BTAD + self.value_bias_AD).flatten(2))


class ImageToToken:
    """The image attends to tokens; then the layer norm."""

    def __init__(
        self,
        block: TwoWayAttentionBlock,
        position_NC: Tensor,
        shift_C: Tensor,
        before: ImageToToken | None,
    ) -> None:
        attention, self.norm = block.cross_attn_image_to_token, block.norm4
        self.heads = heads = attention.num_heads
        self.project_key, self.project_value = attention.k_proj, attention.v_proj
        query, out = attention.q_proj, attention.out_proj
        self.query_ADC = _by_head(query.weight, heads) / _root(attention)
        constant_AD = _by_head(query.bias + query.weight @ shift_C, heads) / _root(attention)
        self.position_ADN = self.query_ADC @ position_NC.T + constant_AD[..., None]
        constant_A1C = ((out.bias + shift_C) / heads).expand(heads, 1, -1)
        self.out_AEC = torch.cat([_by_head(out.weight.T, heads), constant_A1C], 1)
        # What earlier layers added has been through norms since, and so have the maps to it.
        maps_AEC = [map_AEC * before.norm.weight for map_AEC in before.maps_AEC] if before else []
        self.maps_AEC = [_centre(map_AEC) for map_AEC in [*maps_AEC, self.out_AEC]]

    def __call__(self, token_BTC: Tensor, value_BTC: Tensor, keys: Keys, image: LayerImage) -> Keys:
        """The image side after attention and norm."""
        key_BTAD = self.project_key(token_BTC).unflatten(-1, (self.heads, -1))
        score_BTAN = _dot(key_BTAD, image.query_IADN)
        _complete(score_BTAN, key_BTAD, self.query_ADC, self.position_ADN, keys)
        share_BRN = score_BTAN.softmax(1).flatten(1, 2)
        value_BTAD = self.project_value(value_BTC).unflatten(-1, (self.heads, -1))
        value_BTAE = F.pad(value_BTAD, (0, 1), value=1.0)
        content_BRC = torch.einsum("btae,aec->btac", value_BTAE, self.out_AEC).flatten(1, 2)
        keys = Keys(
            keys.gain_BN,
            torch.cat([keys.share_BRN, share_BRN], 1),
            _centre(torch.cat([keys.content_BRC, content_BRC], 1)),
            [*keys.value_BTAE, value_BTAE],
        )
        variance_BN = _square(keys, image).clamp_(min=0) / content_BRC.shape[-1]
        scale_BN = (variance_BN + self.norm.eps).rsqrt_()
        return Keys(
            keys.gain_BN * scale_BN,
            keys.share_BRN.mul_(scale_BN[:, None]),
            keys.content_BRC * self.norm.weight,
            keys.value_BTAE,
        )


class Candidates(NamedTuple):
    """What the upscaler wants to know of each point; not all of them keep a mask."""

    image_B: Tensor
    gain_BN: Tensor
    share_BRN: Tensor
    content_BRC: Tensor
    hyper_B3C: Tensor
    kept_B3: Tensor

    def pick(self, index: slice | Tensor) -> Candidates:
        """Some of them; a slice copies nothing."""
        return Candidates(*(x[index] for x in self))


class Upscaler:
    """Features -> logits: two transposed convolutions, one sub-row at a time, and the masks."""

    def __init__(self, modules: nn.Sequential, size_hw: tuple[int, int], shift_C: Tensor) -> None:
        self.size_hw = size_hw
        first, norm, self.act1, second, self.act2 = modules
        first, second = cast(nn.ConvTranspose2d, first), cast(nn.ConvTranspose2d, second)
        assert first.bias is not None and second.bias is not None
        norm = cast(LayerNorm2d, norm)
        self.norm = norm.weight.shape, norm.weight, norm.bias, norm.eps
        # Both convolutions: a sub-row each, its left and right sub-pixel side by side.
        self.first_CF = [first.weight[:, :, y].permute(0, 2, 1).flatten(1) for y in (0, 1)]
        self.first_bias_F = [first.bias.repeat(2) + shift_C @ w_CF for w_CF in self.first_CF]
        self.second_FC = [second.weight[:, :, y].permute(2, 1, 0).flatten(0, 1) for y in (0, 1)]
        self.second_bias_F = second.bias.repeat(2)

    def prepare(self, image_INC: Tensor, extent_hw: tuple[int, int]) -> list[Tensor]:
        """K G through the first convolution, without bias."""
        image_ILC = self._crop(image_INC.mT, extent_hw).mT
        return [image_ILC @ weight_CF for weight_CF in self.first_CF]

    def __call__(self, side: ImageSide, all_points: Candidates) -> Tensor:
        """Logits [M, H, W] of the masks kept."""
        height, width = side.extent_hw
        rows, columns = _features(height), _features(width)
        count_B = all_points.kept_B3.sum(1)
        shape = int(count_B.sum()), rows, UPSCALE, UPSCALE * columns
        logit_MRYW = all_points.gain_BN.new_empty(shape)
        kept_P = count_B.nonzero()[:, 0]
        # On a CPU few at a time (one of the published size): what they need stays in the caches.
        most = max(1, POSITIONS // (rows * columns)) if kept_P.device.type == "cpu" else 64
        start = 0
        for piece in kept_P.split(most) if len(kept_P) else ():
            one = len(piece) == 1
            points = all_points.pick(slice(int(piece), int(piece) + 1) if one else piece)
            mask = points.kept_B3.nonzero(as_tuple=True)
            out_MRYW = logit_MRYW[start : start + len(mask[0])]
            for y, logit_P3L in enumerate(self._sub_rows(side, points)):
                out_MRYW[:, :, y] = logit_P3L[mask].unflatten(-1, (rows, -1))
            start += len(mask[0])
        return logit_MRYW.flatten(1, 2)[:, :height, :width].contiguous()

    def _sub_rows(self, side: ImageSide, points: Candidates) -> Iterator[Tensor]:
        """Logits of every fourth row: those that are first in their feature's row, second..."""
        gain_BL1 = self._crop(points.gain_BN, side.extent_hw)[..., None]
        share_BLR = self._crop(points.share_BRN, side.extent_hw).mT
        for pixel_ILF, weight_CF, bias_F in zip(
            side.pixel_ILF, self.first_CF, self.first_bias_F, strict=True
        ):
            pixel_BLF = pixel_ILF if len(pixel_ILF) == 1 else pixel_ILF[points.image_B]
            # Only here are products large enough for oneDNN to pay.
            x_BLF = matmul(share_BLR, points.content_BRC @ weight_CF, bias_F)
            x_BLF.addcmul_(gain_BL1, pixel_BLF)
            x_BLXC = self.act1(F.layer_norm(x_BLF.unflatten(-1, (2, -1)), *self.norm))
            for weight_FC in self.second_FC:
                up_BLXF = linear(x_BLXC, weight_FC, self.second_bias_F, act=self.act2)
                up_BLC = up_BLXF.flatten(1).unflatten(1, (-1, points.hyper_B3C.shape[-1]))
                yield points.hyper_B3C @ up_BLC.mT

    def _crop(self, x_BXN: Tensor, extent_hw: tuple[int, int]) -> Tensor:
        """The image positions (last dimension) that the extent of the logits needs."""
        rows, columns = (_features(extent) for extent in extent_hw)
        return x_BXN.unflatten(-1, self.size_hw)[..., :rows, :columns].flatten(-2)


def _untouched(point_BTC: Tensor, positions: int) -> Keys:
    """The image side before the first layer: the image alone."""
    batch, _, channels = point_BTC.shape
    return Keys(
        point_BTC.new_ones(batch, positions),
        point_BTC.new_empty(batch, 0, positions),
        point_BTC.new_empty(batch, 0, channels),
        [],
    )


def _square(keys: Keys, image: LayerImage) -> Tensor:
    """Squared length [B, N] of keys whose image and contents are centred."""
    gain_BN = keys.gain_BN
    square_BN = image.square_IN.repeat_interleave(len(gain_BN) // len(image.square_IN), 0)
    square_BN *= gain_BN.square()
    stop = 0
    for value_BTAE, cross_IAEN in zip(keys.value_BTAE, image.cross_IAEN, strict=True):
        start, stop = stop, stop + math.prod(value_BTAE.shape[1:3])
        gram_BRR = keys.content_BRC[:, start:stop] @ keys.content_BRC[:, :stop].mT
        gram_BRR[..., :start] *= 2  # the other half of the symmetric sum is left out
        sum_BRN = _dot(value_BTAE, cross_IAEN).flatten(1, 2)
        sum_BRN *= 2 * gain_BN[:, None]
        sum_BRN.baddbmm_(gram_BRR, keys.share_BRN[:, :stop])
        square_BN += sum_BRN.mul_(keys.share_BRN[:, start:stop]).sum(1)
    return square_BN


def _dot(token_BTAD: Tensor, image_IADN: Tensor) -> Tensor:
    """Products [B, T, A, N] of every token with its own image, head by head."""
    batch, tokens, heads, _ = token_BTAD.shape
    dot_BTAN = token_BTAD.new_empty(batch, tokens, heads, image_IADN.shape[-1])
    group = batch // len(image_IADN)
    # out= writes the order that all later steps want; a plain product leaves heads outermost
    for rows, out, image in zip(
        token_BTAD.split(group), dot_BTAN.split(group), image_IADN, strict=True
    ):
        torch.bmm(_heads_first(rows), image, out=_heads_first(out))
    return dot_BTAN


def _mix(weight_BTAN: Tensor, value_IAND: Tensor) -> Tensor:
    """Weighted sums [B, T, A, D] over each token's own image, head by head."""
    groups = weight_BTAN.split(len(weight_BTAN) // len(value_IAND))
    mixed = [
        torch.bmm(_heads_first(weight), value).transpose(0, 1)
        for weight, value in zip(groups, value_IAND, strict=True)
    ]
    return torch.cat(mixed).view(*weight_BTAN.shape[:3], -1)


def _complete(
    score_BTAN: Tensor, token_BTAD: Tensor, map_ADC: Tensor, position_ADN: Tensor, keys: Keys
) -> None:
    """Turns scores against K G into scores against keys + position, in place."""
    score_BTAN *= keys.gain_BN[:, None, None]
    _heads_first(score_BTAN).baddbmm_(_heads_first(token_BTAD), position_ADN)
    token_BRC = torch.einsum("btad,adc->btac", token_BTAD, map_ADC).flatten(1, 2)
    score_BTAN.flatten(1, 2).baddbmm_(token_BRC @ keys.content_BRC.mT, keys.share_BRN)


def _heads_first(x_BTAX: Tensor) -> Tensor:
    """A view [A, B T, X]."""
    return x_BTAX.flatten(0, 1).transpose(0, 1)


def _features(extent: int) -> int:
    """Rows or columns of features behind so many of logits."""
    return -(-extent // UPSCALE)


def _root(attention: Attention) -> float:
    return math.sqrt(attention.internal_dim // attention.num_heads)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[A D, ...] -> [A, D, ...]."""
    return x.unflatten(0, (heads, -1))


def _centre(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)
