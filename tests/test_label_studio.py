"""Brush strokes: the same bytes as Label Studio's own encoder, and back from whatever it writes."""

import numpy as np
import pytest

from zsplg_ray.label_studio import decode_brush, encode_brush

PACKED = [246, 71, 166, 99, 6, 5, 55, 20, 254]
"""Bits of a mask of 8 x 9 pixels, drawn at random."""
GOLDEN = [
    *(0, 0, 1, 32, 57, 27, 253, 255, 248, 192, 39, 255, 156, 2, 63, 251, 96, 23, 255, 227, 0, 143),
    *(254, 112, 9, 255, 231, 0, 159, 254, 216, 4, 255, 248, 76, 2, 127, 252, 46, 1, 31, 252, 96),
    *(17, 255, 206, 1, 63, 252, 96, 22, 255, 237, 128, 71, 255, 24, 4, 127, 243, 128, 97, 191, 248),
    *(192, 0),
]
"""What mask2rle of label_studio_sdk.converter.brush (label-studio-sdk 2.1.2) makes of it."""
GOLDEN_LONG = [0, 1, 0, 4, 57, 27, 255, 255, 255, 255, 224, 0, 127, 224]
"""The same of 1 x 16385 pixels that are all painted: a run too long for one block."""


def golden_mask() -> np.ndarray:
    return np.unpackbits(np.array(PACKED, np.uint8)).reshape(8, 9).astype(bool)


def spell(values: list[int], blocks: list[tuple[bool, int]]) -> list[int]:
    """Values as a stream of given blocks (one value or many, how many), the format word by word."""
    sizes, bits = (3, 4, 8, 16), f"{len(values):032b}00111"
    bits += "".join(f"{size - 1:04b}" for size in sizes)
    at = 0
    for same, n in blocks:
        kind = next(k for k, size in enumerate(sizes) if n <= 2**size)
        bits += f"{int(same)}{kind:02b}{n - 1:0{sizes[kind]}b}"
        bits += "".join(f"{v:08b}" for v in (values[at : at + 1] if same else values[at : at + n]))
        at += n
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def test_the_bytes_are_those_of_label_studios_own_encoder():
    assert encode_brush(golden_mask()) == GOLDEN
    assert encode_brush(np.ones((1, 16385))) == GOLDEN_LONG
    assert (decode_brush(GOLDEN, 8, 9) == golden_mask()).all()
    assert decode_brush(bytes(GOLDEN_LONG), 1, 16385).all()


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 7), (37, 1), (20, 31), (130, 129), (260, 300)])
def test_masks_come_back(size_hw):
    rng = np.random.default_rng(list(size_hw))
    for share in (0, 0.01, 0.5, 1):
        mask_HW = rng.random(size_hw) < share
        back = decode_brush(encode_brush(mask_HW), *size_hw)
        assert back.dtype == bool and (back == mask_HW).all()


def test_strokes_of_the_canvas_have_colours_soft_edges_and_blocks_of_any_kind():
    pixels = [10, 20, 30, 255, 10, 20, 30, 127, 10, 20, 30, 128, 0, 0, 0, 0]
    blocks = [(False, 12), (True, 4)]
    assert decode_brush(spell(pixels, blocks), 2, 2).tolist() == [[True, False], [True, False]]
    rng = np.random.default_rng(0)
    value_HWC = rng.integers(0, 256, (40, 30, 4))
    literal = spell(value_HWC.ravel().tolist(), [(False, 4000), (False, 3), (False, 797)])
    assert (decode_brush(literal, 40, 30) == (value_HWC[..., 3] >= 128)).all()


@pytest.mark.parametrize(
    ("rle", "told"),
    [
        (GOLDEN[:-3], "rle must be whole, got 63 bytes that end too early"),
        ([], "end too early"),
        ([0, 0, 1], "end too early"),
        ([256, 0], "rle must be whole numbers from 0 to 255"),
        (["a"], "rle must be whole numbers from 0 to 255"),
        (5.0, "rle must be whole numbers from 0 to 255"),
        ([0, 0, 1, 36, *GOLDEN[4:]], "rle must be of 288 values (9 x 8 x 4), got 292 values"),
        ([255, 255, 255, 255, *GOLDEN[4:]], "got 4294967295 values"),
        ([*GOLDEN[:4], 0x40, *GOLDEN[5:]], "rle must be of 8 bits a value, got 9 bits"),
        (spell([0] * 288, [(True, 300)]), "rle must be of 288 values, got more than that"),
    ],
)
def test_broken_strokes_are_refused_in_one_line(rle, told):
    with pytest.raises(ValueError) as caught:
        decode_brush(rle, 8, 9)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_mask_without_pixels_is_refused():
    with pytest.raises(ValueError, match="mask must be of 1 to"):
        encode_brush(np.zeros((0, 5), bool))
