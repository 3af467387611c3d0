"""RQ-VAE's training: codes as the library's, dead codes, and LETTER's losses against literal loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from features.semantic_ids.config import LetterConfig, RqVaeConfig
from features.semantic_ids.quantizers import letter, rqvae
from features.semantic_ids.quantizers.protocol import Floats

SMALL: dict[str, Any] = {"hidden": [16], "latent": 8, "batch": 128}


def skewed(seed: int, items: int = 2_000) -> Floats:
    """Unit vectors around 40 centres, the first of which have most of the items."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, 41) ** 1.5
    centres = rng.standard_normal((40, 8))[rng.choice(40, items, p=weights / weights.sum())]
    vectors = centres + 0.2 * rng.standard_normal((items, 8))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("levels", [[16, 8], [8, 8, 8]])
@pytest.mark.parametrize("codewords", ["ema", "loss"])
def test_codes_are_those_of_the_librarys_residual_quantiser_in_eval_mode(codewords: Any, levels: list[int]) -> None:
    vectors = np.random.default_rng(0).standard_normal((600, 8), dtype=np.float32)
    config = RqVaeConfig(**SMALL, steps=20, codewords=codewords)
    fitted = rqvae.fit(config, levels, vectors, 0, lambda _: None)
    library = rqvae._residual_vq(config, levels).eval()
    for codebook, words in zip(rqvae._codebooks(library), fitted.codewords(), strict=True):
        codebook.embed.data.copy_(torch.from_numpy(words))
        codebook.initted.fill_(True)
    codes, latent = fitted.encode(vectors)
    with torch.no_grad():
        quantized, indices, _ = library(torch.from_numpy(latent))
    np.testing.assert_array_equal(codes, indices.numpy())
    summed = sum(book[codes[:, level]] for level, book in enumerate(fitted.codewords()))
    np.testing.assert_allclose(quantized.numpy(), summed, atol=1e-5)


def test_training_lowers_the_error_of_reconstruction() -> None:
    vectors = skewed(0)

    def error(steps: int) -> float:
        fitted = rqvae.fit(RqVaeConfig(**SMALL, steps=steps, lr=3e-3), [32, 16], vectors, 0, lambda _: None)
        codes, _ = fitted.encode(vectors)
        summed = np.sum([book[codes[:, level]] for level, book in enumerate(fitted.codewords())], axis=0)
        return float(np.square(vectors - fitted.decode(summed)).sum())

    assert error(200) < 0.5 * error(5)


def test_codes_that_items_have_left_start_anew() -> None:
    def perplexity(dead_below: float) -> float:
        config = RqVaeConfig(**SMALL, steps=150, lr=3e-3, codewords="loss", dead_below=dead_below)
        vectors = skewed(0)
        codes, _ = rqvae.fit(config, [32], vectors, 0, lambda _: None).encode(vectors)
        share = np.bincount(codes[:, 0]) / len(codes)
        return float(np.exp(-(share[share > 0] * np.log(share[share > 0])).sum()))

    assert perplexity(0.03) > 1.3 * perplexity(0)


def test_progress_names_the_losses_and_the_codes_in_use() -> None:
    lines: list[str] = []
    config = RqVaeConfig(**SMALL, steps=10, codewords="loss", letter=LetterConfig(collaborative=1, diversity=1))
    rqvae.fit(config, [8, 4], skewed(0), 0, lines.append, collaborative=skewed(1))
    assert len(lines) == 1
    assert lines[0].startswith("step 10 of 10: reconstruction ")
    assert all(name in lines[0] for name in ("commitment", "codewords", "collaborative", "diversity", "codes in use"))


def test_collaborative_loss_is_the_contrast_of_literal_loops_without_items_that_have_no_behaviour() -> None:
    generator = torch.Generator().manual_seed(0)
    z, h = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    h[2] = 0
    known = [0, 1, 3, 4, 5]
    expected = 0.0
    for i in known:
        agree = {j: math.exp(float(torch.cosine_similarity(z[i], h[j], dim=0)) / 0.3) for j in known}
        expected -= math.log(agree[i] / sum(agree.values())) / len(known)
    assert letter.collaborative_loss(z, h, 0.3).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("known", [0, 1])
def test_no_two_items_with_behaviour_make_no_contrast(known: int) -> None:
    z, h = torch.randn(4, 3, requires_grad=True), torch.zeros(4, 3)
    h[:known] = 1
    loss = letter.collaborative_loss(z, h, 0.1)
    loss.backward()
    assert loss.item() == 0
    assert z.grad is not None
    assert not z.grad.any()


def test_diversity_loss_is_the_contrast_of_literal_loops_without_codewords_alone_in_their_group() -> None:
    e = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen, companions = torch.tensor([0, 3, 2, 0]), torch.tensor([1, 4, -1, 1])
    expected = 0.0
    for i, companion in [(0, 1), (3, 4), (0, 1)]:
        near = {j: math.exp(float(torch.cosine_similarity(e[i], e[j], dim=0)) / 0.2) for j in range(5) if j != i}
        expected -= math.log(near[companion] / sum(near.values())) / 3
    assert letter.diversity_loss(e, chosen, companions, 0.2).item() == pytest.approx(expected, rel=1e-12)


def test_companions_are_others_of_the_same_group_each_as_likely() -> None:
    groups = torch.tensor([0, 1, 0, 2, 0, 1])
    torch.manual_seed(0)
    drawn = letter.draw_companions(groups, torch.tensor([0, 3, 1] * 2_000)).view(-1, 3)
    assert set(drawn[:, 1].tolist()) == {-1}
    assert set(drawn[:, 2].tolist()) == {5}
    assert (drawn[:, 0] == 2).float().mean() == pytest.approx(0.5, abs=0.05)
    assert set(drawn[:, 0].tolist()) == {2, 4}


def test_groups_are_codewords_of_one_direction() -> None:
    codewords = torch.tensor([[1.0, 0.0], [5.0, 0.1], [0.0, 2.0], [0.1, 9.0], [-3.0, 0.0]])
    groups = letter.group_codewords(codewords, 3, 0)
    assert groups[0] == groups[1] != groups[2]
    assert groups[2] == groups[3] != groups[4]


def test_descending_the_diversity_loss_spreads_codewords_that_were_bunched() -> None:
    generator = torch.Generator().manual_seed(0)
    codewords = (1 + 0.2 * torch.randn(24, 8, generator=generator)).requires_grad_()

    def mean_cosine(e: Tensor) -> float:
        e = torch.nn.functional.normalize(e.detach(), dim=1)
        return float((e @ e.T).fill_diagonal_(0).sum() / (24 * 23))

    assert mean_cosine(codewords) > 0.9
    optimizer = torch.optim.Adam([codewords], lr=0.02)
    groups = letter.group_codewords(codewords, 6, 0)
    for _ in range(200):
        chosen = torch.randint(24, (64,), generator=generator)
        loss = letter.diversity_loss(codewords, chosen, letter.draw_companions(groups, chosen), 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert mean_cosine(codewords) < 0.6


def test_the_collaborative_loss_makes_codes_agree_with_behaviour_that_content_does_not_show() -> None:
    rng = np.random.default_rng(0)
    group = rng.integers(0, 4, 1_500)
    content = rng.standard_normal((1_500, 5)).astype(np.float32)
    content[:, 0] = 0.4 * (group - 1.5) + 0.05 * content[:, 0]  # there, but the least of the content's columns
    behaviour = np.eye(4, dtype=np.float32)[group]

    def purity(weight: float) -> float:
        config = RqVaeConfig(**SMALL, steps=120, lr=5e-3, letter=LetterConfig(collaborative=weight))
        codes, _ = rqvae.fit(config, [8], content, 0, lambda _: None, behaviour).encode(content)
        purest = [np.bincount(group[codes[:, 0] == code], minlength=4).max() for code in range(8)]
        return sum(purest) / len(group)

    assert purity(3.0) > purity(0.0) + 0.2


def test_diversity_with_codewords_that_learn_by_ema_is_an_error() -> None:
    with pytest.raises(ValidationError, match=r"letter\.diversity: 0\.1 .*'ema'; set codewords: loss"):
        RqVaeConfig(letter=LetterConfig(diversity=0.1))


def test_a_layer_without_width_is_an_error() -> None:
    with pytest.raises(ValidationError, match=r"hidden\.1"):
        RqVaeConfig(hidden=[64, 0])
