"""Label Studio's brush strokes: masks as its run lengths, and back.

Enters: bool [H, W] masks. Leaves: lists of bytes as they stand in the `rle` of a brush region, with
`"format": "rle"`; and the way back, for what people have painted there.

The format: a picture of four equal channels (red, green, blue, opacity; 0 or 255), pixel by pixel
along the rows, as a stream of bits, highest first. A head: 32 bits of how many values there are, 5
of the bits of a value less one, four times 4 of the bits of a length less one. Then blocks: 1 bit
(1: one value many times; 0: as many values as they are), 2 bits of which kind of length, the length
less one, the value or values. What this writes is byte for byte what Label Studio's own Python
encoder writes. Source of the format: thi.ng/umbrella, packages/rle-pack (Apache-2.0).

Shapes: H, W pixels; N blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zsplg_ray.settings import complain

CHANNELS = 4
OPAQUE = 128
"""From which opacity (0 to 255) on a pixel counts as painted: strokes have soft edges."""
_VALUE_BITS = 8
_LENGTH_BITS = np.array([3, 4, 8, 16])
_HEAD_BITS = 32 + 5 + 4 * 4


def encode_brush(mask_HW: np.ndarray) -> list[int]:
    """A mask as bytes, each in [0, 255].

    Args:
        mask_HW: bool [H, W], or any numbers, of which all but 0 are in the mask.

    Raises: ValueError if it has no pixel, or more than 2**30 - 1.
    """
    flat = np.asarray(mask_HW, dtype=bool).ravel()
    if not 0 < flat.size < 2**30:
        rule, fix = "of 1 to 2**30 - 1 pixels", "scale the image down"
        raise ValueError(complain("mask", rule, f"{flat.size} pixels", fix))
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    lengths = np.diff(np.append(starts, flat.size)) * CHANNELS
    values = flat[starts].astype(np.uint64) * 255
    most = 1 << int(_LENGTH_BITS[-1])
    blocks = -(-lengths // most)  # a run longer than a length can tell takes several
    values = np.repeat(values, blocks)
    length_N = np.full(int(blocks.sum()), most)
    length_N[np.cumsum(blocks) - 1] = lengths - (blocks - 1) * most
    kind_N = np.repeat(np.searchsorted(1 << _LENGTH_BITS[:-1], lengths), blocks)
    bits_N = _LENGTH_BITS[kind_N]
    word_N = (4 + kind_N).astype(np.uint64) << bits_N.astype(np.uint64)  # 1, then two bits of kind
    word_N = (word_N | (length_N - 1).astype(np.uint64)) << np.uint64(_VALUE_BITS) | values
    head = [(flat.size * CHANNELS, 32), (_VALUE_BITS - 1, 5), *((n - 1, 4) for n in (3, 4, 8, 16))]
    words = np.concatenate([np.array([word for word, _ in head], np.uint64), word_N])
    widths = np.concatenate([[bits for _, bits in head], 3 + bits_N + _VALUE_BITS])
    return _packed(words, widths).tolist()


def _packed(words: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """The lowest bits of each word, one after the other, as bytes; 1 to 8 zeros behind."""
    ends = np.cumsum(widths)
    last = np.repeat(ends, widths)
    shifts = (last - 1 - np.arange(ends[-1])).astype(np.uint64)
    bits = (np.repeat(words, widths) >> shifts & np.uint64(1)).astype(np.uint8)
    return np.packbits(np.append(bits, np.zeros(8 - bits.size % 8, np.uint8)))


def decode_brush(rle: Sequence[int] | bytes, height: int, width: int) -> np.ndarray:
    """The mask in bytes of `encode_brush`, or in those that Label Studio wrote: bool [H, W].

    A pixel is in it whose opacity is at least `OPAQUE`.

    Raises: ValueError if they are no such bytes, end too early, or are of another size.
    """
    try:
        data = bytes(rle)
    except (TypeError, ValueError) as e:
        raise _error("whole numbers from 0 to 255", str(e)) from e
    reader = _Bits(data)
    count, bits = reader.read(32), reader.read(5) + 1
    sizes = [reader.read(4) + 1 for _ in range(4)]
    expected = height * width * CHANNELS
    if count != expected or expected <= 0:
        shown = f"{count} values"
        raise _error(f"of {expected} values ({width} x {height} x {CHANNELS})", shown)
    if bits != _VALUE_BITS:
        raise _error(f"of {_VALUE_BITS} bits a value", f"{bits} bits")
    values = np.empty(count, np.uint8)
    at = 0
    while at < count:
        same, kind = reader.read(1), reader.read(2)
        end = at + 1 + reader.read(sizes[kind])
        if end > count:
            raise _error(f"of {count} values", "more than that")
        values[at:end] = reader.read(_VALUE_BITS) if same else reader.many(end - at)
        at = end
    return values.reshape(height, width, CHANNELS)[:, :, 3] >= OPAQUE


class _Bits:
    """A stream of bits, highest first."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def _advance(self, bits: int) -> tuple[int, int]:
        """First byte and bit of the next `bits`. Raises: ValueError if there are fewer."""
        first, self._at = self._at, self._at + bits
        if self._at > 8 * len(self._data):
            raise _error("whole", f"{len(self._data)} bytes that end too early")
        return divmod(first, 8)

    def read(self, bits: int) -> int:
        """The next bits as a number; at most 32."""
        byte, bit = self._advance(bits)
        window = int.from_bytes(self._data[byte : byte + 5].ljust(5, b"\0"), "big")
        return window >> (40 - bit - bits) & ((1 << bits) - 1)

    def many(self, count: int) -> np.ndarray:
        """The next values of eight bits, uint8 [count]."""
        byte, bit = self._advance(count * _VALUE_BITS)
        data = np.frombuffer(self._data, np.uint8, min(count + 1, len(self._data) - byte), byte)
        if not bit:
            return data[:count]
        return (data[:-1] << bit) | (data[1:] >> (8 - bit))


def _error(rule: str, shown: str) -> ValueError:
    """What every refusal of run lengths looks like."""
    fix = "take the rle of a brush region as Label Studio wrote it"
    return ValueError(complain("rle", rule, shown, fix))
