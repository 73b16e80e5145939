"""Which images are counted and which are shown, where there are more than a page holds.

What enters: numbers of each image. What leaves: positions, the same ones every time. Shown are
examples of every class, the most doubtful images, and a spread from the surest to the most
doubtful, so that the page is neither a list of the worst nor whatever came first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from zsplg_ray.records import IGNORE
from zsplg_ray.views.report.counts import Counted, is_number

FOR_CLASSES, FOR_DOUBT = 0.25, 0.4
"""Most of the places that go to examples of classes, and those that go to the most doubtful."""


def spread(items: Sequence[int], n: int) -> list[int]:
    """`n` of the items at equal distances, first and last among them; all if there are fewer."""
    if len(items) <= n:
        return list(items)
    if n < 2:
        return list(items[:n])
    return [items[i * (len(items) - 1) // (n - 1)] for i in range(n)]


def counted_positions(n_images: int, with_truth: Sequence[int], most: int) -> list[int]:
    """Positions of the images whose maps are counted, in order."""
    return sorted({*spread(range(n_images), most), *spread(with_truth, most)})


def doubt(confidence: float | None, counted: Counted) -> float:
    """How doubtful an image's labels are, in [0, 1]: the mean of what is known of it.

    That is 1 - confidence, the share of pixels that differs from the truth, and the largest share
    that differs from another run. Broken labels are the most doubtful.
    """
    if counted.labels is None:
        return 1.0
    known = [1.0 - confidence if confidence is not None and is_number(confidence) else 1.0]
    if counted.labels.wrong is not None:
        known.append(counted.labels.wrong)
    differs = [o.differs for o in counted.others if o is not None and o.differs is not None]
    if differs:
        known.append(max(differs))
    return sum(known) / len(known)


def shown_positions(
    counted: Mapping[int, Counted], doubt_of: Mapping[int, float], most: int
) -> list[int]:
    """Positions of the images that the page shows, in order.

    Args:
        counted: Numbers by position.
        doubt_of: `doubt` by position.
        most: How many there is room for.
    """
    if len(counted) <= most:
        return sorted(counted)
    by_doubt = sorted(counted, key=lambda p: (doubt_of[p], p))
    chosen = set(_examples(counted, by_doubt, int(FOR_CLASSES * most)))
    chosen |= set(by_doubt[len(by_doubt) - int(FOR_DOUBT * most) :])
    judged = [p for p in by_doubt if counted[p].truth is not None]
    for pool in (judged, by_doubt):
        rest = [p for p in pool if p not in chosen]
        chosen |= set(spread(rest, most - len(chosen)))
    return sorted(chosen)


def _examples(counted: Mapping[int, Counted], order: Iterable[int], most: int) -> Iterable[int]:
    """For each class, the rarest first, the image with the largest share of it."""
    best: dict[int, tuple[float, int]] = {}
    images: dict[int, int] = {}
    for position in order:
        found = counted[position].labels
        for k, share in (found.shares if found is not None else {}).items():
            if k in (0, IGNORE):
                continue
            images[k] = images.get(k, 0) + 1
            best[k] = max(best.get(k, (0.0, -1)), (share, position))
    rare = sorted(best, key=lambda k: (images[k], k))
    return list(dict.fromkeys(best[k][1] for k in rare))[:most]
