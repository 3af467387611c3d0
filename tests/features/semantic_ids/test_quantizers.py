"""All three quantisers: what the protocol promises, and what fitting must survive."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score

from features.semantic_ids.config import (
    KMeansFsqConfig,
    LetterConfig,
    QuantizerConfig,
    ResidualKMeansConfig,
    RqVaeConfig,
)
from features.semantic_ids.errors import SidsError
from features.semantic_ids.quantizers import fit, load
from features.semantic_ids.quantizers.protocol import Codes, Floats, Quantizer

SMALL: dict[str, Any] = {"hidden": [16], "latent": 8, "steps": 30, "batch": 128}
CONFIGS: dict[str, QuantizerConfig] = {
    "residual_kmeans": ResidualKMeansConfig(),
    "rqvae_ema": RqVaeConfig(**SMALL),
    "rqvae_loss": RqVaeConfig(**SMALL, codewords="loss"),
    "rqvae_letter": RqVaeConfig(
        **SMALL, codewords="loss", letter=LetterConfig(collaborative=0.1, diversity=0.1, clusters=4)
    ),
    "kmeans_fsq": KMeansFsqConfig(steps=30, batch=128),
}
QUANTIZERS = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
LEVELS = [16, 8]
DIM = 8


def blobs(items: int = 1_000, spread: float = 0.15, seed: int = 0) -> tuple[Floats, Codes]:
    """Vectors of 16 well-separated Gaussian blobs, and each one's blob."""
    rng = np.random.default_rng(seed)
    centres = 3 * rng.standard_normal((16, DIM))
    blob = rng.integers(0, 16, items)
    return (centres[blob] + spread * rng.standard_normal((items, DIM))).astype(np.float32), blob.astype(np.int32)


def fitted(
    config: QuantizerConfig, vectors: Floats, levels: list[int] = LEVELS, seed: int = 0, threads: int = 1
) -> Quantizer:
    """Without progress; the vectors themselves stand for behaviour, which every tenth item lacks."""
    collaborative = vectors.copy()
    collaborative[::10] = 0
    return fit(config, levels, vectors, seed, threads, lambda _: None, collaborative)


def summed(quantizer: Quantizer, codes: Codes, levels: int) -> Floats:
    """The sum of the codewords of the first levels."""
    books = quantizer.codewords()
    return np.sum([books[level][codes[:, level]] for level in range(levels)], axis=0, dtype=np.float32)


@QUANTIZERS
def test_shapes_ranges_and_types(config: QuantizerConfig) -> None:
    vectors, _ = blobs()
    quantizer = fitted(config, vectors)
    codes, inner = quantizer.encode(vectors)
    assert codes.dtype == np.int32
    assert codes.shape == (len(vectors), 2)
    assert (codes >= 0).all()
    assert (codes < LEVELS).all()
    assert [book.shape for book in quantizer.codewords()] == [(size, inner.shape[1]) for size in LEVELS]
    assert quantizer.decode(summed(quantizer, codes, 2)).shape == vectors.shape
    assert quantizer.decode(summed(quantizer, codes, 2)).dtype == np.float32


@QUANTIZERS
def test_state_makes_the_same_quantiser_again(config: QuantizerConfig) -> None:
    vectors, _ = blobs()
    quantizer = fitted(config, vectors)
    again = load(config, LEVELS, DIM, {name: value.copy() for name, value in quantizer.state().items()})
    other, _ = blobs(seed=1)
    codes, inner = quantizer.encode(other)
    codes_again, inner_again = again.encode(other)
    np.testing.assert_array_equal(codes, codes_again)
    np.testing.assert_array_equal(inner, inner_again)
    np.testing.assert_array_equal(quantizer.decode(inner), again.decode(inner))
    for book, book_again in zip(quantizer.codewords(), again.codewords(), strict=True):
        np.testing.assert_array_equal(book, book_again)


@QUANTIZERS
def test_the_seed_decides_and_the_threads_do_not(config: QuantizerConfig) -> None:
    vectors = np.random.default_rng(0).standard_normal((1_000, DIM), dtype=np.float32)
    codes, _ = fitted(config, vectors, threads=1).encode(vectors)
    np.testing.assert_array_equal(codes, fitted(config, vectors, threads=2).encode(vectors)[0])
    assert (codes != fitted(config, vectors, seed=1).encode(vectors)[0]).any()


@QUANTIZERS
def test_fitting_leaves_the_callers_random_numbers_and_threads_alone(config: QuantizerConfig) -> None:
    vectors, _ = blobs()
    torch.manual_seed(7)
    threads, expected = torch.get_num_threads(), torch.rand(3)
    torch.manual_seed(7)
    fitted(config, vectors)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


@QUANTIZERS
def test_every_level_brings_the_sample_nearer(config: QuantizerConfig) -> None:
    vectors = np.random.default_rng(0).standard_normal((1_000, DIM), dtype=np.float32)
    quantizer = fitted(config, vectors)
    codes, inner = quantizer.encode(vectors)
    errors = [np.square(inner - inner.mean(0)).sum()]
    errors += [np.square(inner - summed(quantizer, codes, levels)).sum() for levels in (1, 2)]
    assert errors[0] > errors[1] > errors[2]


@QUANTIZERS
def test_an_items_codes_do_not_depend_on_its_company(config: QuantizerConfig) -> None:
    vectors, _ = blobs()
    quantizer = fitted(config, vectors)
    together = quantizer.encode(vectors[:100])[0]
    apart = np.concatenate([quantizer.encode(vectors[i : i + 1])[0] for i in range(100)])
    np.testing.assert_array_equal(together, apart)


@pytest.mark.parametrize(
    "config",
    [
        ResidualKMeansConfig(restarts=5),
        RqVaeConfig(**SMALL | {"latent": 16, "hidden": [32], "steps": 150}),
        KMeansFsqConfig(restarts=5, steps=10),
    ],
    ids=["residual_kmeans", "rqvae", "kmeans_fsq"],
)
def test_well_separated_clusters_are_the_first_level(config: QuantizerConfig) -> None:
    vectors, blob = blobs()
    codes, _ = fitted(config, vectors).encode(vectors)
    assert adjusted_mutual_info_score(blob, codes[:, 0]) > 0.95


@QUANTIZERS
def test_one_level(config: QuantizerConfig) -> None:
    vectors, _ = blobs()
    quantizer = fitted(config, vectors, levels=[16])
    codes, inner = quantizer.encode(vectors)
    assert codes.shape == (len(vectors), 1)
    error = np.square(inner - summed(quantizer, codes, 1)).sum()
    assert error < 0.8 * np.square(inner - inner.mean(0)).sum()


@QUANTIZERS
def test_levels_of_unequal_size_and_more_codes_than_items_below_the_first(config: QuantizerConfig) -> None:
    vectors, _ = blobs(items=50)
    quantizer = fitted(config, vectors, levels=[4, 64, 8])
    codes, _ = quantizer.encode(vectors)
    assert [len(book) for book in quantizer.codewords()] == [4, 64, 8]
    assert (codes < [4, 64, 8]).all()
    assert all(np.isfinite(book).all() for book in quantizer.codewords())


@QUANTIZERS
def test_items_that_repeat_a_few_vectors_leave_nothing_over_and_are_coded_all_the_same(config: QuantizerConfig) -> None:
    few, _ = blobs(items=16, spread=1.0)
    vectors = few[np.arange(320) % 16]
    quantizer = fitted(config, vectors)
    codes, _ = quantizer.encode(vectors)
    np.testing.assert_array_equal(codes, fitted(config, vectors).encode(vectors)[0])
    np.testing.assert_array_equal(codes, codes[np.arange(320) % 16])
    assert all(np.isfinite(book).all() for book in quantizer.codewords())


@QUANTIZERS
def test_fewer_distinct_vectors_than_codes_of_the_first_level_is_an_error(config: QuantizerConfig) -> None:
    few, _ = blobs(items=15, spread=1.0)
    with pytest.raises(SidsError, match=r"levels\[0\]: 16 codes.* 300 items .*only 15 distinct.*fewer codes"):
        fitted(config, few[np.arange(300) % 15])
