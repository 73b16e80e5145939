"""Everything random about training data, as pure functions: which image comes when, and seeds.

What enters: `train.seed`, the number of a step, of a pass over the data, of an image. What leaves:
indices of images, seeds and uniform numbers, the same ones whoever asks, whenever.

Why this way: a generator with a state would have to be saved and shared. Here step t takes the
draws [t * G, (t + 1) * G) of an endless stream whatever happened before, so a resumed run goes on
exactly, and N workers together draw what one would. All numbers come from SplitMix64 in plain
integer arithmetic, so no release of NumPy or torch changes them.

Shapes: B seeds, N numbers a seed.
Source: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), with the constants of its reference
implementation.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from functools import lru_cache

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_INT63 = np.uint64(2**63 - 1)


def derive(seed: np.ndarray | int, *parts: np.ndarray | int | str) -> np.ndarray:
    """A new seed from a seed and whole numbers or words, int64 in [0, 2**63); arrays broadcast.

    Other parts, or the same in another order, give a seed that has nothing to do with this one.
    """
    state = _mix(_uint64(seed))
    for part in parts:
        state = _mix(state ^ _uint64(_word(part) if isinstance(part, str) else part))
    return (state & _INT63).astype(np.int64)


def image_seed(seed: int, kind: str, number: int, image: int) -> int:
    """The seed of an image in one pass over the data, in [0, 2**63).

    Args:
        seed: train.seed.
        kind: a word for what the seed is for, so that no two uses share one.
        number: the pass.
        image: the image's index in its source.
    """
    return int(derive(seed, kind, number, image))


def uniform(seed_B: np.ndarray, n: int) -> np.ndarray:
    """The first n numbers of each seed's stream, float64 [B, N], evenly spread over [0, 1)."""
    with np.errstate(over="ignore"):
        steps_N = np.arange(n, dtype=np.uint64) * _GOLDEN
        bits_BN = _mix(_uint64(seed_B)[:, None] + steps_N)
    return (bits_BN >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, kind: str, number: int, n: int) -> np.ndarray:
    """The order of n images in one pass, int64 [n]."""
    # Sorting hashes is slower than shuffling (0.1 s for a million), but it is the same for ever.
    return np.argsort(derive(seed, kind, number, np.arange(n)), kind="stable")


class Stream:
    """The endless chain of seeded permutations of n images.

    Draw d belongs to pass d // n. Args: as for `permutation`.
    """

    KEPT = 2  # a step touches two passes where one ends

    def __init__(self, seed: int, kind: str, n: int) -> None:
        assert n > 0, "a stream of no images"
        self.seed, self.kind, self.n = seed, kind, n
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()

    def at(self, draw: int) -> tuple[int, int]:
        """The image that a draw is, and the pass it belongs to."""
        number, place = divmod(draw, self.n)
        return int(self._order(number)[place]), number

    def _order(self, number: int) -> np.ndarray:
        order = self._orders.get(number)
        if order is None:
            order = permutation(self.seed, self.kind, number, self.n)
            self._orders[number] = order
            if len(self._orders) > self.KEPT:
                self._orders.popitem(last=False)
        return order

    def __reduce__(self) -> tuple[type[Stream], tuple[int, str, int]]:
        # The orders need not travel to another process.
        return Stream, (self.seed, self.kind, self.n)


def chunks(draws: range, parts: int) -> list[range]:
    """Consecutive draws cut into as many parts: part r of R takes [G * r // R, G * (r + 1) // R).

    Parts differ by at most one draw; where there are more parts than draws some are empty.
    """
    total = len(draws)
    return [draws[total * r // parts : total * (r + 1) // parts] for r in range(parts)]


def step_draws(step: int, batch: int, rank: int, world: int, accumulate: int) -> list[range]:
    """The draws of each micro batch of one worker in a step; `batch` is over all workers."""
    mine = chunks(range(step * batch, (step + 1) * batch), world)[rank]
    return chunks(mine, accumulate)


@lru_cache(maxsize=64)
def _word(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def _uint64(value: np.ndarray | int) -> np.ndarray:
    return np.asarray(value, dtype=np.int64).astype(np.uint64)


def _mix(state: np.ndarray) -> np.ndarray:
    """SplitMix64's next number, a bijection of 64 bits (that wraps around, as it must)."""
    with np.errstate(over="ignore"):
        z = state + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))
