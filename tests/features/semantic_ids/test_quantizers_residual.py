"""Residual coding against literal loops in float64, and K-means' corners."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from features.semantic_ids.config import KMeansFsqConfig, ResidualKMeansConfig
from features.semantic_ids.errors import SidsError
from features.semantic_ids.quantizers import fit, kmeans_fsq, residual, residual_kmeans
from features.semantic_ids.quantizers.protocol import Floats

LARGE_PRIMES = [p for p in range(17, 5_001) if all(p % factor for factor in range(2, int(p**0.5) + 1))]
# Small multiples of 1/4 and their products are exact in float32, so ties are ties.
QUARTERS = st.integers(-8, 8).map(lambda i: i / 4)


def literal_codes(vector: Floats, codebooks: list[Floats]) -> tuple[list[int], list[float]]:
    """k_l = argmin_j ‖r_{l−1} − c_{l,j}‖, the lowest j of equals, and the last r."""
    left = [float(v) for v in vector]
    codes: list[int] = []
    for book in codebooks:
        distances = [sum((r - float(c)) ** 2 for r, c in zip(left, word, strict=True)) for word in book]
        codes.append(distances.index(min(distances)))
        left = [r - float(c) for r, c in zip(left, book[codes[-1]], strict=True)]
    return codes, left


@st.composite
def vectors_and_codebooks(draw: st.DrawFn) -> tuple[Floats, list[Floats]]:
    """Up to 40 vectors (faiss computes 20 and more in another way), up to 3 levels of unequal sizes."""
    dim = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(2, 9), min_size=1, max_size=3))
    vectors = draw(arrays(np.float32, (draw(st.integers(1, 40)), dim), elements=QUARTERS))
    return vectors, [draw(arrays(np.float32, (size, dim), elements=QUARTERS)) for size in sizes]


@settings(max_examples=80, deadline=None)
@given(vectors_and_codebooks())
def test_codes_and_what_is_left_over_are_those_of_literal_loops(case: tuple[Floats, list[Floats]]) -> None:
    vectors, codebooks = case
    codes, left = residual.encode(vectors, codebooks)
    for i, vector in enumerate(vectors):
        expected_codes, expected_left = literal_codes(vector, codebooks)
        assert codes[i].tolist() == expected_codes
        assert left[i].tolist() == expected_left


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_vector_is_the_sum_of_its_codewords_and_what_is_left_over(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((30, 5), dtype=np.float32)
    books = [rng.standard_normal((size, 5), dtype=np.float32) for size in (8, 3)]
    codes, left = residual.encode(vectors, books)
    np.testing.assert_allclose(books[0][codes[:, 0]] + books[1][codes[:, 1]] + left, vectors, atol=1e-5)


def test_new_vectors_of_a_fitted_quantiser_are_coded_as_by_literal_loops() -> None:
    rng = np.random.default_rng(0)
    sample, new = rng.standard_normal((2, 300, 6), dtype=np.float32)
    quantizer = fit(ResidualKMeansConfig(), [8, 4], sample, 0, 1, lambda _: None)
    codes, _ = quantizer.encode(new)
    assert codes.tolist() == [literal_codes(vector, quantizer.codewords())[0] for vector in new]


def test_codewords_nearer_than_float32_products_can_tell_are_told_apart() -> None:
    rng = np.random.default_rng(0)
    codewords = (1_000 + 1e-2 * rng.standard_normal((50, 16))).astype(np.float32)
    vectors = (1_000 + 1e-2 * rng.standard_normal((100, 16))).astype(np.float32)
    expected = [literal_codes(vector, [codewords])[0][0] for vector in vectors]
    assert residual.nearest(vectors, codewords).tolist() == expected


def test_the_lowest_of_equal_codewords_is_nearest_in_any_company() -> None:
    codewords = np.repeat(np.float32([[0.3, 0.1, 0.7], [0.2, 0.9, 0.4]]), 20, axis=0)[::-1].copy()
    vectors = np.tile(np.float32([[0.2, 0.9, 0.4], [0.3, 0.1, 0.7]]), (50, 1))
    assert residual.nearest(vectors, codewords).tolist() == [0, 20] * 50
    assert residual.nearest(vectors[:1], codewords).tolist() == [0]


def test_error_of_residual_k_means_never_grows_with_the_level() -> None:
    vectors = np.random.default_rng(0).standard_normal((500, 6), dtype=np.float32)
    books = fit(ResidualKMeansConfig(), [16, 8, 8, 4], vectors, 0, 1, lambda _: None).codewords()
    left = [vectors, *(residual.encode(vectors, books[: level + 1])[1] for level in range(4))]
    errors = [float(np.square(x).sum()) for x in left]
    assert errors == sorted(errors, reverse=True)


def test_of_no_more_distinct_vectors_than_codes_each_is_a_centroid_and_the_other_codes_stay_unused() -> None:
    vectors = np.float32([[1, 2], [3, 4], [1, 2], [5, 6]])
    centroids = residual_kmeans.cluster(vectors, 6, iterations=5, restarts=1, seed=0)
    codes, left = residual.encode(vectors, [centroids])
    assert centroids.shape == (6, 2)
    assert not left.any()
    assert sorted(set(codes[:, 0].tolist())) == [0, 1, 2]


def test_more_restarts_never_bring_more_error() -> None:
    vectors = np.random.default_rng(0).standard_normal((400, 4), dtype=np.float32)

    def error(restarts: int) -> float:
        centroids = residual_kmeans.cluster(vectors, 20, iterations=10, restarts=restarts, seed=3)
        return float(np.square(residual.encode(vectors, [centroids])[1]).sum())

    assert error(8) < error(1)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        (2, [2]),
        (4, [4]),
        (8, [8]),
        (6, [6]),
        (24, [6, 4]),
        (64, [4, 4, 4]),
        (256, [4, 4, 4, 4]),
        (512, [8, 4, 4, 4]),
        (1000, [8, 5, 5, 5]),
        (2 * 11 * 13, [13, 11, 2]),
    ],
)
def test_default_steps_of_scalars_are_fours_where_that_goes(codes: int, expected: list[int]) -> None:
    assert kmeans_fsq.default_fsq_levels(codes) == expected


@settings(deadline=None)
@given(st.integers(2, 5_000))
def test_default_steps_multiply_to_the_codes_or_there_is_a_large_prime(codes: int) -> None:
    if any(codes % prime == 0 for prime in LARGE_PRIMES):
        with pytest.raises(SidsError, match=f"quantizer.fsq_levels: {codes} codes"):
            kmeans_fsq.default_fsq_levels(codes)
    else:
        steps = kmeans_fsq.default_fsq_levels(codes)
        assert np.prod(steps) == codes
        assert all(2 <= count <= 16 for count in steps)


def test_a_prime_number_of_codes_has_no_steps() -> None:
    vectors = np.random.default_rng(0).standard_normal((200, 4), dtype=np.float32)
    with pytest.raises(SidsError, match=r"quantizer\.fsq_levels: 127 codes of the last level.*e\.g\. 64"):
        fit(KMeansFsqConfig(), [4, 127], vectors, 0, 1, lambda _: None)


def test_the_last_code_of_k_means_with_fsq_stands_for_the_codeword_that_its_scalars_project_to() -> None:
    vectors = np.random.default_rng(0).standard_normal((600, 6), dtype=np.float32)
    quantizer = fit(KMeansFsqConfig(steps=50, batch=128, fsq_levels=[3, 2, 5]), [8, 30], vectors, 0, 1, lambda _: None)
    assert isinstance(quantizer, kmeans_fsq.KMeansFsq)
    codes, _ = quantizer.encode(vectors)
    _, left = residual.encode(vectors, quantizer.codewords()[:1])
    down, up = quantizer.scalars.down, quantizer.scalars.up
    s = left @ down.weight.detach().numpy().T + down.bias.detach().numpy()
    steps, weight = np.array([3, 2, 5]), 1
    place = np.floor((steps - 1) * (np.tanh(s) + 1) / 2 + 0.5)  # 0 … steps − 1, the nearest of even places in [−1, 1]
    expected = np.zeros(len(vectors), int)
    for scalar, count in enumerate(steps):
        expected += (place[:, scalar] * weight).astype(int)
        weight *= count
    assert (codes[:, 1] == expected).mean() > 0.99  # but for rounding at the borders
    places = 2 * place / (steps - 1) - 1
    reconstructed = places @ up.weight.detach().numpy().T + up.bias.detach().numpy()
    same = codes[:, 1] == expected
    np.testing.assert_allclose(quantizer.codewords()[1][codes[same, 1]], reconstructed[same], atol=1e-5)


def test_learning_the_projection_lowers_the_error() -> None:
    rng = np.random.default_rng(0)
    vectors = (rng.standard_normal((2_000, 3)) ** 3 @ rng.standard_normal((3, 8))).astype(np.float32)

    def error(steps: int) -> float:
        quantizer = fit(KMeansFsqConfig(steps=steps, batch=256), [64], vectors, 0, 1, lambda _: None)
        codes, _ = quantizer.encode(vectors)
        return float(np.square(vectors - quantizer.codewords()[0][codes[:, 0]]).sum())

    assert error(300) < 0.95 * error(1)


def test_more_scalars_than_columns_still_make_codes() -> None:
    vectors = np.random.default_rng(0).standard_normal((500, 2), dtype=np.float32)
    quantizer = fit(KMeansFsqConfig(steps=20, batch=128), [256], vectors, 0, 1, lambda _: None)
    codes, _ = quantizer.encode(vectors)
    assert len(set(codes[:, 0].tolist())) > 32
