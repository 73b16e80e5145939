"""What a run's stored numbers say about one image: is it worth a person's minute?

What enters: a run's labels, its segments where it has any, and another run over the same images if
there is one. What leaves: of each image one number in [0, 1] a part, by name, and what diversity
and coverage are measured with (class shares, a pooled embedding). Nothing here needs SAM, CLIP or a
model: only maps, runs and embeddings that are stored.

The parts:
- `confidence`: mean over all pixels of 1 - rank of the pixel's score among the run's pixels of any
  class, 0 on background. Ranks, for cosines of one CLIP lie in .2 to .3 and of another in .5 to .9;
  so the pixels nearest to the threshold count most, whatever it is. Not background: its scores
  say what SAM's largest segment looks like, and little of whether something was missed.
- `margin`: the same of segments: 1 - rank of the lead with which a segment is nearer to the mean
  embedding of its own class than to that of any other class or background. Class means stand for
  the text prompts, which only CLIP could embed.
- `rejected`: share of pixels that SAM found something on and that no segment was painted on.
- `unlabelled`: share of pixels with label 255.
- `disagreement`: share of pixels that the two runs give different classes, each weighted by the
  mean rank of the two scores.
- `rare`: of the classes in the image, in either run, how rare the rarest is in the run.

Shapes: H W pixels; K classes, background included; R segments; D embedding; V = 256 score values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle_codec

from zsplg_ray.label.segments import Segments
from zsplg_ray.records import IGNORE
from zsplg_ray.views.review.maps import Maps, Source

_codec: Any = rle_codec
"""Its type stubs want a type of their own for what is a plain mapping."""

PARTS = ("confidence", "margin", "rejected", "unlabelled", "disagreement", "rare")
"""Names of the parts, in the order in which they are kept."""

SAMPLE = 1000
"""Images that ranks and class means are learnt from, spread evenly over the run."""


@dataclass(frozen=True, eq=False)
class Yardstick:
    """What is usual in a run; learnt from a sample of its images."""

    rank_2V: np.ndarray
    """float64 [2, 256], by score: the share of the run's background pixels whose score is lower,
    and of its pixels of classes; 0 at score 0, which is where no segment was painted."""
    mean_KD: np.ndarray | None
    """float32 [K, D], mean unit embedding a class, NaN for those without segments; None: none."""
    margins: np.ndarray
    """float32, sorted, leads of the sample's segments of classes."""

    @classmethod
    def learn(cls, source: Source) -> Yardstick:
        """From at most `SAMPLE` images."""
        n, n_classes = len(source.labels), len(source.labels.classes)
        sample = np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).astype(int)).tolist()
        count_2V = np.zeros((2, 256), np.int64)
        vectors, owners = [], []
        for maps in source.read(sample):
            for c, of_HW in enumerate((maps.label_HW == 0, _is_class(maps.label_HW))):
                count_2V[c] += np.bincount(maps.score_HW[of_HW], minlength=256)
            if maps.segments is not None and maps.segments.embedding_RD is not None:
                vectors.append(maps.segments.embedding_RD.astype(np.float32))
                owners.append(owner_of(maps, n_classes)[0])
        count_2V[:, 0] = 0
        below_2V = np.cumsum(count_2V, axis=1) - count_2V / 2
        rank_2V = below_2V / np.maximum(1, count_2V.sum(axis=1, keepdims=True))
        if not vectors:
            return cls(rank_2V, None, np.zeros(0, np.float32))
        vector_RD, owner_R = np.concatenate(vectors), np.concatenate(owners)
        good_R = np.isfinite(vector_RD).all(axis=1)
        vector_RD, owner_R = vector_RD[good_R], owner_R[good_R]
        mean_KD = np.full((n_classes, vector_RD.shape[1]), np.nan, np.float32)
        for k in range(n_classes):
            if (owner_R == k).any():
                mean_KD[k] = _unit(vector_RD[owner_R == k].mean(axis=0))
        lead_R = leads(vector_RD, owner_R, mean_KD)
        return cls(rank_2V, mean_KD, np.sort(lead_R[np.isfinite(lead_R)]))

    def ranks(self, maps: Maps) -> np.ndarray:
        """How sure each pixel is beside others of its kind, float64 [H, W] in [0, 1]."""
        return self.rank_2V[_is_class(maps.label_HW).astype(np.intp), maps.score_HW]


@dataclass(frozen=True, eq=False)
class Signs:
    """All parts of some images, in the order of `positions`: N images."""

    positions: list[int]
    value_NP: np.ndarray
    """float64 [N, P] in [0, 1], in the order of `PARTS`."""
    holds_NK: np.ndarray
    """bool [N, K], which classes the image holds, in either run."""
    feature_ND: np.ndarray
    """float32 [N, D], unit length or 0: pooled embeddings, or else class shares."""
    used: tuple[str, ...]
    """The parts that the run has the numbers for; others are 0."""


def measure(source: Source, positions: list[int], other: Source | None = None) -> Signs:
    """Look at images once each.

    Args:
        source: The run.
        positions: Of the images in its labels.
        other: Another run over the same images and classes, for `disagreement`.
    """
    labels, yard = source.labels, Yardstick.learn(source)
    n_classes = len(labels.classes)
    theirs = Yardstick.learn(other) if other is not None else None
    rows: dict[int, _Row] = {}
    used = {"confidence", "unlabelled", "rare"}
    for maps in source.read(positions):
        px_K = np.bincount(maps.label_HW[maps.label_HW != IGNORE], minlength=n_classes)
        theirs_K = np.zeros(n_classes, bool)
        shares = np.sqrt(px_K[1:] / maps.label_HW.size).astype(np.float32)
        values = dict.fromkeys(PARTS, 0.0)
        values["confidence"] = float(np.mean((1 - yard.ranks(maps)) * _is_class(maps.label_HW)))
        values["unlabelled"] = float(np.mean(maps.label_HW == IGNORE))
        pooled = None
        if maps.segments is not None:
            used.add("rejected")
            values["margin"], values["rejected"], pooled = of_segments(maps, yard, n_classes)
            if pooled is not None:
                used.add("margin")
        if other is not None and theirs is not None:
            used.add("disagreement")
            found = other.beside(labels.ids[maps.position], maps.label_HW.shape)
            if found is not None:
                values["disagreement"] = differing(maps, yard, found, theirs)
                named = found.label_HW[found.label_HW != IGNORE]
                theirs_K = np.bincount(named, minlength=n_classes) > 0
        feature = shares if pooled is None else pooled
        rows[maps.position] = _Row([values[p] for p in PARTS], px_K > 0, theirs_K, feature)
    return _signs(rows, n_classes, used)


class _Row(NamedTuple):
    """One image's numbers."""

    values_P: list[float]
    own_K: np.ndarray
    """bool [K], the classes that its labels hold."""
    theirs_K: np.ndarray
    """The same of the run to compare with."""
    feature_D: np.ndarray


def _signs(rows: dict[int, _Row], n_classes: int, used: set[str]) -> Signs:
    """Rows by position -> arrays, and `rare`; features of another length than most become 0."""
    positions = sorted(rows)
    value_NP = np.array([rows[p].values_P for p in positions], np.float64).reshape(-1, len(PARTS))
    own_NK = np.array([rows[p].own_K for p in positions], bool).reshape(-1, n_classes)
    theirs_NK = np.array([rows[p].theirs_K for p in positions], bool).reshape(-1, n_classes)
    holds_NK = own_NK | theirs_NK
    value_NP[:, PARTS.index("rare")] = (holds_NK * rarity(own_NK)).max(axis=1, initial=0.0)
    width = max((len(rows[p].feature_D) for p in positions), default=0)
    feature_ND = np.zeros((len(positions), width), np.float32)
    for n, p in enumerate(positions):
        if len(rows[p].feature_D) == width:
            feature_ND[n] = rows[p].feature_D
    feature_ND -= feature_ND.mean(axis=0) if len(positions) else 0.0  # else all point one way
    return Signs(
        positions, value_NP, holds_NK, _unit(feature_ND), tuple(p for p in PARTS if p in used)
    )


def owner_of(maps: Maps, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each segment the class that most of its pixels were painted with, and how large a share.

    Returns: int64 [R], -1 where most of it was painted by no segment; float64 [R] in [0, 1].
    """
    assert maps.segments is not None
    rles = _rles(maps.segments)
    if not rles:
        return np.zeros(0, np.int64), np.zeros(0)
    painted = [(maps.label_HW == k) & (maps.score_HW > 0) for k in range(n_classes)]
    share_RK = _covered(rles, painted)
    owner_R = share_RK.argmax(axis=1)
    share_R = share_RK[np.arange(len(rles)), owner_R]
    return np.where(share_RK.sum(axis=1) >= 0.5, owner_R, -1), share_R


def of_segments(
    maps: Maps, yard: Yardstick, n_classes: int
) -> tuple[float, float, np.ndarray | None]:
    """`margin`, `rejected`, and the area-weighted mean embedding, None without embeddings."""
    segments = maps.segments
    assert segments is not None
    if not len(segments):
        return 0.0, 0.0, None if yard.mean_KD is None else np.zeros(yard.mean_KD.shape[1])
    union = _codec.merge(_rles(segments))
    left = _covered([union], [maps.score_HW == 0])[0, 0]
    rejected = float(left) * float(_codec.area(union)) / maps.label_HW.size
    if segments.embedding_RD is None or yard.mean_KD is None:
        return 0.0, rejected, None
    vector_RD = np.nan_to_num(segments.embedding_RD.astype(np.float32))
    owner_R, share_R = owner_of(maps, n_classes)
    lead_R = leads(vector_RD, owner_R, yard.mean_KD)
    rank_R = np.searchsorted(yard.margins, lead_R) / max(1, len(yard.margins))
    doubt_R = np.where(np.isfinite(lead_R), 1 - rank_R, 0.0)
    margin = float((doubt_R * share_R * segments.area_px).sum()) / maps.label_HW.size
    pooled_D = segments.area_px.astype(np.float32) @ vector_RD
    return min(1.0, margin), rejected, _unit(pooled_D)


def leads(vector_RD: np.ndarray, owner_R: np.ndarray, mean_KD: np.ndarray) -> np.ndarray:
    """How much nearer each segment is to the mean of its own class than to any other, float32 [R].

    NaN for segments of no class or of background, and where there is but one mean.
    """
    known_K = np.isfinite(mean_KD).all(axis=1)
    cosine_RK = np.where(known_K, vector_RD @ np.nan_to_num(mean_KD).T, -np.inf)
    row_R, own_R = np.arange(len(vector_RD)), np.maximum(owner_R, 0)
    own_cosine_R = cosine_RK[row_R, own_R]
    cosine_RK[row_R, own_R] = -np.inf
    with np.errstate(invalid="ignore"):
        lead_R = own_cosine_R - cosine_RK.max(axis=1)
    return np.where((owner_R > 0) & np.isfinite(lead_R), lead_R, np.nan).astype(np.float32)


def rarity(holds_NK: np.ndarray) -> np.ndarray:
    """How rare each class is in a run, float64 [K] in [0, 1]: 0 in every image or background, 1 in
    none; the logarithm of the share of images that hold it.
    """
    n = len(holds_NK)
    if not n:
        return np.zeros(holds_NK.shape[1])
    rare_K = np.log((n + 1) / (holds_NK.sum(axis=0) + 1)) / np.log(n + 1)
    rare_K[0] = 0.0
    return rare_K


def differing(maps: Maps, yard: Yardstick, other: Maps, theirs: Yardstick) -> float:
    """Share of pixels that two runs name differently, weighted by how sure they are."""
    both_HW = (maps.label_HW != IGNORE) & (other.label_HW != IGNORE)
    differ_HW = both_HW & (maps.label_HW != other.label_HW)
    sure_HW = yard.ranks(maps) + theirs.ranks(other)
    return float(np.mean(sure_HW / 2 * differ_HW))


def _is_class(label_HW: np.ndarray) -> np.ndarray:
    """Where a label is a class, neither background nor 255; bool [H, W]."""
    return (label_HW != IGNORE) & (label_HW != 0)


def _rles(segments: Segments) -> list[dict[str, Any]]:
    return [{"size": list(segments.size_hw), "counts": rle} for rle in segments.rle]


def _covered(rles: list[dict[str, Any]], masks: list[np.ndarray]) -> np.ndarray:
    """Of each run-length mask the share that lies in each dense mask, float64 [R, M]; no mask of
    the R is decoded for it.
    """
    dense = [_codec.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]
    shares = _codec.iou(rles, dense, [1] * len(dense))  # "crowd": over the area of the first
    return np.nan_to_num(np.asarray(shares, np.float64).reshape(len(rles), len(dense)))


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1; of length 0 where they are 0."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.where(length > 0, length, 1)).astype(np.float32)
