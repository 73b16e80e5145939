"""Class names as vectors: the text side of CLIP, frozen, so that naming segments needs no CLIP.

What enters: one text embedding per alias. What leaves: cosine similarities of segments to classes.
No torch here: the workers that only relabel or tune hold a `TextBank` and cached embeddings.

Why the arithmetic is exact: labels must be the same bytes whether segments come alone or together,
on one thread or many, and a matrix product rounds differently for each of these. So both sides are
put on a grid of 2**-26 (float16 lies on it already). Products of two such numbers are multiples of
2**-52, sums of products of unit vectors stay below 2, and float64 holds every such number exactly:
no order of summation can change a bit. What the grid costs (about 1e-8) is less than float32 shows.

Shape suffixes: R segments, K classes, A aliases, D embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zsplg_ray.settings import complain

_GRID = 2.0**26


@dataclass(frozen=True, eq=False)
class TextBank:
    """Text embeddings of K classes, one or more per class.

    Raises: ValueError if shapes, order or norms are wrong.
    """

    embedding_AD: np.ndarray
    """float32 [A, D], L2-normalised, one row per alias, rows of one class side by side."""
    class_index_A: np.ndarray
    """int64 [A], rising, which class a row names; 0 are the background prompts, if any."""
    n_classes: int
    """K, background included."""

    def __post_init__(self) -> None:
        embedding, index = self.embedding_AD, self.class_index_A
        if embedding.ndim != 2 or embedding.dtype != np.float32 or index.shape != (len(embedding),):
            got = f"{embedding.dtype} {list(embedding.shape)} for {list(index.shape)} indices"
            rule = "float32 [A, D] with A class indices"
            raise ValueError(complain("embedding_AD", rule, got, "encode the classes again"))
        if not (np.abs(np.linalg.norm(embedding.astype(np.float64), axis=1) - 1.0) < 1e-3).all():
            raise ValueError(
                complain("embedding_AD", "of norm 1 in every row", "another", "normalise it")
            )
        named = set(index.tolist()) - {0}
        if (np.diff(index) < 0).any() or named != set(range(1, self.n_classes)):
            rule = f"rising, with each of 1 to {self.n_classes - 1}"
            raise ValueError(complain("class_index_A", rule, index.tolist(), "name every class"))

    def similarity(self, embedding_RD: np.ndarray) -> np.ndarray:
        """Cosine similarity of segments to classes: the best of each class's aliases.

        Args:
            embedding_RD: float16 or float32 [R, D], normalised up to rounding (norms that are far
                from 1 only lose the guarantee that the last bit is the same everywhere).

        Returns:
            sim_RK, float32 [R, K] in [-1, 1]. Column 0 is the best background prompt, -inf if there
            are none. A row whose embedding is NaN or zero is NaN (column 0 may stay -inf).

        Raises:
            ValueError: another D than the text's.
        """
        n_dim = self.embedding_AD.shape[1]
        if embedding_RD.ndim != 2 or embedding_RD.shape[1] != n_dim:
            got = list(embedding_RD.shape)
            fix = "use the CLIP model that embedded the segments"
            raise ValueError(complain("embedding_RD", f"[R, {n_dim}]", got, fix))
        segment_RD, text_AD = _on_grid(embedding_RD), _on_grid(self.embedding_AD)
        norm_R, norm_A = (np.sqrt((v * v).sum(axis=1)) for v in (segment_RD, text_AD))
        with np.errstate(invalid="ignore"):
            sim_RA = segment_RD @ text_AD.T / (norm_R[:, None] * norm_A)
        class_index, first = np.unique(self.class_index_A, return_index=True)
        sim_RK = np.full((len(embedding_RD), self.n_classes), -np.inf, np.float32)
        sim_RK[:, class_index] = np.clip(np.maximum.reduceat(sim_RA, first, axis=1), -1.0, 1.0)
        return sim_RK


def _on_grid(vector: np.ndarray) -> np.ndarray:
    """Whole numbers, in float64: multiples of 2**-26; the common factor cancels in a cosine."""
    return np.rint(vector.astype(np.float64) * _GRID)
