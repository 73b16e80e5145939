"""Is a person's minute better spent on the picks than on any images? A table.

What enters: a run whose images all have a truth, and another run to compare with if there is one.
What leaves: a table in Markdown, for each budget and way of picking: the share of wrong pixels in
the images picked, the mIoU of all labels after the truth has replaced theirs, and how much of the
gain it is that the worst images by truth would bring. Ways of picking: `review export` with its
default weights, each of its parts alone, images with the most pixels of classes (which any count
could tell), and random ones (mean and standard deviation of 200 draws).

`python -m zsplg_ray.views.review.benchmark --run run/ --truth scenes/ [--compare other/]`

Shapes: N images, K classes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from zsplg_ray.config import ReviewWeights
from zsplg_ray.labels import Labels
from zsplg_ray.masks import open_truth
from zsplg_ray.metrics import confusion, scores
from zsplg_ray.views.review.choose import COLUMNS, COVERAGE, DIVERSITY, choose
from zsplg_ray.views.review.maps import Source
from zsplg_ray.views.review.signs import PARTS, Signs, measure

DRAWS = 200


class Judge:
    """What picks are worth, by the truth.

    Args:
        count_NKL: int64 [N, K, K + 1], confusion counts of each image.
        names: The K class names.
    """

    def __init__(self, count_NKL: np.ndarray, names: Sequence[str]) -> None:
        self.count_NKL, self.names = count_NKL, names
        right_N = np.einsum("nkk->n", count_NKL[:, :, :-1])
        self.error_N = 1 - right_N / np.maximum(1, count_NKL.sum(axis=(1, 2)))
        self.before = self.miou(())
        """mIoU of the labels as they are."""

    def miou(self, picks: Sequence[int]) -> float:
        """mIoU over all images once the truth has replaced the labels of some."""
        count_NKL = self.count_NKL.copy()
        picked = np.asarray(picks, np.intp)
        truth_PK = count_NKL[picked].sum(axis=2)
        count_NKL[picked] = 0
        classes = np.arange(len(self.names))
        count_NKL[picked[:, None], classes, classes] = truth_PK
        return float(scores(count_NKL.sum(axis=0), self.names)["miou"] or 0)


def rows(judge: Judge, signs: Signs, share_N: np.ndarray, budget: int) -> Iterator[list[str]]:
    """The lines of one budget: way, errors in the picks, mIoU after, share of the best gain."""
    best = judge.miou(np.argsort(-judge.error_N, kind="stable")[:budget].tolist())
    gain = max(best - judge.before, 1e-9)

    def line(way: str, picks: Sequence[int]) -> list[str]:
        after = judge.miou(picks)
        share = (after - judge.before) / gain
        return [way, f"{judge.error_N[picks].mean():.3f}", f"{after:.3f}", f"{share:.0%}"]

    nothing = dict.fromkeys(COLUMNS, 0.0)
    used = [p for p, value_N in zip(PARTS, signs.value_NP.T, strict=True) if value_N.any()]
    ways = {"review export": ReviewWeights()}
    ways |= {p: ReviewWeights(**{**nothing, p: 1.0}) for p in (*used, DIVERSITY, COVERAGE)}
    for way, weights in ways.items():
        yield line(way, [pick.position for pick in choose(signs, budget, weights)])
    yield line("most pixels of classes", np.argsort(-share_N, kind="stable")[:budget].tolist())
    rng = np.random.default_rng(0)
    draws = [rng.choice(len(share_N), budget, replace=False).tolist() for _ in range(DRAWS)]
    after = np.array([judge.miou(draw) for draw in draws])
    error = np.mean([judge.error_N[draw].mean() for draw in draws])
    told = f"{after.mean():.3f} ± {after.std():.3f}"
    yield ["random", f"{error:.3f}", told, f"{(after.mean() - judge.before) / gain:.0%}"]
    yield ["worst by truth", f"{np.sort(judge.error_N)[-budget:].mean():.3f}", f"{best:.3f}", ""]


def table(run: str, truth: str, compare: str | None, budgets: Sequence[int]) -> str:
    """The whole table. Raises: ValueError if there are no labels or masks."""
    labels, masks = Labels(run, name="run"), open_truth(truth)
    n_classes = len(labels.classes)
    other = Source(Labels(compare, name="compare")) if compare else None
    positions = [p for p, image_id in enumerate(labels.ids) if masks.has(image_id)]
    signs = measure(Source(labels), positions, other)
    order = {p: n for n, p in enumerate(signs.positions)}
    counts = np.zeros((len(order), n_classes, n_classes + 1), np.int64)
    share_N = np.zeros(len(order))
    for image in labels.read(signs.positions):
        n = order[labels.position(image.image_id)]
        counts[n] = confusion(masks.read(image.image_id), image.label_HW, n_classes)
        share_N[n] = counts[n][:, 1:-1].sum() / counts[n].sum()
    signs = Signs(
        list(range(len(order))), signs.value_NP, signs.holds_NK, signs.feature_ND, signs.used
    )
    judge = Judge(counts, labels.classes.names)
    lines = [
        f"{run}: {len(order)} images, {judge.error_N.mean():.3f} of pixels wrong, "
        f"mIoU {judge.before:.3f}",
        "",
        "| budget | picked by | wrong in picks | mIoU after | of the best gain |",
        "|--|--|--|--|--|",
    ]
    for budget in budgets:
        for line in rows(judge, signs, share_N, min(budget, len(order))):
            lines.append(f"| {budget} | {' | '.join(line)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the table to stdout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, help="folder of a label or predict run")
    parser.add_argument("--truth", required=True, help="masks of its images")
    parser.add_argument("--compare", help="folder of another run over the same images")
    parser.add_argument("--budgets", type=int, nargs="+", default=[10, 20, 40])
    given = parser.parse_args(argv)
    sys.stdout.write(table(given.run, given.truth, given.compare, given.budgets) + "\n")


if __name__ == "__main__":
    main()
