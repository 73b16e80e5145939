"""The text side: best alias, background column, the same bytes in any company."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from zsplg_ray.label.textbank import TextBank


def unit(rng, n, d):
    vector = rng.normal(size=(n, d))
    return (vector / np.linalg.norm(vector, axis=1, keepdims=True)).astype(np.float32)


def bank(index, d=48, seed=0, n_classes=None):
    index = np.asarray(index, np.int64)
    text = unit(np.random.default_rng(seed), len(index), d)
    return TextBank(text, index, max(index) + 1 if n_classes is None else n_classes)


def test_a_class_is_as_similar_as_its_best_alias():
    rng = np.random.default_rng(1)
    for index in ([1, 1, 2, 3, 3, 3], [0, 0, 1, 2, 2]):
        texts = bank(index)
        segment_RD = unit(rng, 7, 48).astype(np.float16)
        sim_RK = texts.similarity(segment_RD)
        assert sim_RK.dtype == np.float32
        assert sim_RK.shape == (7, max(index) + 1)
        for r, segment in enumerate(segment_RD.astype(np.float64)):
            for k in range(max(index) + 1):
                rows = [a for a, of in enumerate(index) if of == k]
                cosines = [
                    segment @ texts.embedding_AD[a].astype(np.float64) / np.linalg.norm(segment)
                    for a in rows
                ]
                assert sim_RK[r, k] == pytest.approx(max(cosines, default=-np.inf), abs=1e-7)


def test_without_background_prompts_column_0_is_minus_infinity():
    assert np.isneginf(bank([1, 2]).similarity(unit(np.random.default_rng(0), 3, 48))[:, 0]).all()
    with_prompts = bank([0, 1, 2]).similarity(unit(np.random.default_rng(0), 3, 48))
    assert np.isfinite(with_prompts).all()


def test_bytes_do_not_depend_on_company_layout_or_order_of_sums():
    rng = np.random.default_rng(2)
    texts = bank(np.repeat(np.arange(40), 3), d=512)
    segment_RD = unit(rng, 33, 512).astype(np.float16)
    together = texts.similarity(segment_RD)
    for r in range(33):
        np.testing.assert_array_equal(texts.similarity(segment_RD[r : r + 1])[0], together[r])
    np.testing.assert_array_equal(texts.similarity(np.asfortranarray(segment_RD)), together)
    np.testing.assert_array_equal(texts.similarity(segment_RD.astype(np.float32)), together)
    shuffle = rng.permutation(512)
    shuffled = TextBank(texts.embedding_AD[:, shuffle], texts.class_index_A, 40)
    np.testing.assert_array_equal(shuffled.similarity(segment_RD[:, shuffle]), together)


def test_identical_vectors_are_similar_by_one_and_never_more():
    texts = bank(range(1, 30), d=512)
    sim_RK = texts.similarity(texts.embedding_AD)
    assert np.diag(sim_RK[:, 1:]) == pytest.approx(1.0, abs=1e-7)
    assert sim_RK.max() <= 1.0


def test_what_cannot_be_compared_is_nan_and_spoils_no_other_row():
    segment_RD = unit(np.random.default_rng(3), 4, 48)
    good = bank([0, 1]).similarity(segment_RD)
    spoiled_RD = segment_RD.copy()
    spoiled_RD[1], spoiled_RD[2] = np.nan, 0.0
    sim_RK = bank([0, 1]).similarity(spoiled_RD)
    assert np.isnan(sim_RK[1:3]).all()
    np.testing.assert_array_equal(sim_RK[[0, 3]], good[[0, 3]])


def test_no_segments():
    assert bank([0, 1, 2]).similarity(np.zeros((0, 48), np.float16)).shape == (0, 3)


def test_pickles_and_needs_no_torch():
    texts = bank([1, 1, 2])
    segment_RD = unit(np.random.default_rng(4), 3, 48)
    again = pickle.loads(pickle.dumps(texts))
    np.testing.assert_array_equal(again.similarity(segment_RD), texts.similarity(segment_RD))
    code = (
        "import sys, zsplg_ray.label.textbank, zsplg_ray.label.compose;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("index", "n_classes", "message"),
    [
        ([1, 3], 4, "class_index_A must be rising, with each of 1 to 3"),
        ([2, 1], 3, "class_index_A must be rising"),
        ([1, 2], 2, "class_index_A must be"),
        ([-1, 1], 2, "class_index_A must be"),
        ([0], 2, "class_index_A must be"),
    ],
)
def test_every_class_has_a_row(index, n_classes, message):
    with pytest.raises(ValueError, match=message):
        bank(index, n_classes=n_classes)


def test_vectors_are_checked():
    rows = np.ones((2, 4), np.float32)
    with pytest.raises(ValueError, match="embedding_AD must be of norm 1"):
        TextBank(rows, np.array([1, 2]), 3)
    with pytest.raises(ValueError, match="embedding_AD must be of norm 1"):
        TextBank(rows * np.nan, np.array([1, 2]), 3)
    with pytest.raises(ValueError, match=r"embedding_AD must be float32 \[A, D\]"):
        TextBank(rows / 2, np.array([1]), 2)
    with pytest.raises(ValueError, match=r"embedding_RD must be \[R, 48\], got \[2, 4\]"):
        bank([1]).similarity(rows)
