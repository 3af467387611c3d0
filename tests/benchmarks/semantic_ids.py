"""Our quantisers beside faiss's ResidualQuantizer: time, peak memory and error of coding many vectors.

    python -m tests.benchmarks.semantic_ids [--items 1000000] [--dim 64] [--levels 512 512] [--sample 200000]
                                            [--threads 2] [--quantizer residual_kmeans rqvae kmeans_fsq] [--beam 5]

All see the same Gaussian mixture, made from a seed, are fitted to the same sample and code all vectors. Each runs in a
process of its own: its peak memory is its own. Error is the squared distance from vectors to what their codes stand
for (for RQ-VAE: to the decoder's output), over the variance. faiss's quantiser, the named alternative, searches with a
beam at fitting and at coding, so that codes of a level depend on later levels; with a beam of 1 it codes greedily as
ours do. Its levels must be powers of two.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import torch

from features.semantic_ids.config import KMeansFsqConfig, QuantizerConfig, ResidualKMeansConfig, RqVaeConfig
from features.semantic_ids.quantizers import fit
from features.semantic_ids.quantizers.protocol import Codes, Floats
from tests.benchmarks.machine import machine

OURS: dict[str, type[QuantizerConfig]] = {
    "residual_kmeans": ResidualKMeansConfig,
    "rqvae": RqVaeConfig,
    "kmeans_fsq": KMeansFsqConfig,
}
FAISS = "faiss"
Coder = tuple[Callable[[Floats], Any], Callable[[Any], Floats]]
CENTRES = 5_000
CHUNK = 65_536  # vectors coded at a time, by all


def mixture(items: int, dim: int, seed: int = 0) -> Floats:
    """`[items, dim]` of unit length around centres of unequal weight, of falling variance along the axes."""
    rng = np.random.default_rng(seed)
    fall = np.exp(-np.arange(dim) / (dim / 3)).astype(np.float32)
    centres = rng.standard_normal((CENTRES, dim), dtype=np.float32) * fall
    weights = 1 / np.arange(1, CENTRES + 1) ** 0.7
    centre = rng.choice(CENTRES, items, p=weights / weights.sum())
    vectors = np.empty((items, dim), np.float32)
    for begin in range(0, items, CHUNK):
        rows = slice(begin, begin + CHUNK)
        noise = rng.standard_normal(vectors[rows].shape, dtype=np.float32)
        vectors[rows] = centres[centre[rows]] + 0.5 * fall * noise
        vectors[rows] /= np.linalg.norm(vectors[rows], axis=1, keepdims=True)
    return vectors


def peak_mib() -> float:
    """Highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fit_ours(name: str, options: argparse.Namespace, sample: Floats) -> Coder:
    """Fit one of ours: its coding and its reconstruction from codes."""
    quantizer = fit(OURS[name](), options.levels, sample, 0, options.threads, lambda _: None)
    books = quantizer.codewords()

    def decode(codes: Codes) -> Floats:
        return quantizer.decode(np.sum([book[codes[:, level]] for level, book in enumerate(books)], axis=0))

    return lambda vectors: quantizer.encode(vectors)[0], decode


def fit_faiss(beam: int, options: argparse.Namespace, sample: Floats) -> Coder:
    """Fit faiss's: its coding and its reconstruction from codes."""
    bits = [levels.bit_length() - 1 for levels in options.levels]
    assert [1 << count for count in bits] == options.levels, "faiss's levels are powers of two"
    sizes: Any = faiss.UInt64Vector()
    for count in bits:
        sizes.push_back(count)
    quantizer: Any = faiss.ResidualQuantizer(options.dim, sizes)
    quantizer.max_beam_size = beam
    quantizer.train(sample)
    return quantizer.compute_codes, quantizer.decode


def run(contender: str, options: argparse.Namespace) -> dict[str, float]:
    """Fit, code everything, and reconstruct; in this process."""
    faiss.omp_set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    vectors = mixture(options.items, options.dim)
    sample = vectors[np.random.default_rng(1).permutation(len(vectors))[: options.sample]]
    before_mib = peak_mib()
    begin = time.perf_counter()
    name, _, beam = contender.partition(" beam ")
    code, decode = fit_faiss(int(beam), options, sample) if name == FAISS else fit_ours(name, options, sample)
    fitted = time.perf_counter()
    chunks = [slice(start, start + CHUNK) for start in range(0, len(vectors), CHUNK)]
    codes = [code(vectors[chunk]) for chunk in chunks]
    coded = time.perf_counter()
    after_mib = peak_mib()
    mean = vectors.mean(0)
    variance = sum(float(np.square(vectors[chunk] - mean).sum(dtype=np.float64)) for chunk in chunks)
    error = sum(
        float(np.square(vectors[chunk] - decode(part)).sum(dtype=np.float64))
        for chunk, part in zip(chunks, codes, strict=True)
    )
    return {
        "fit_s": fitted - begin,
        "code_s": coded - fitted,
        "peak_mib": after_mib,
        "more_mib": after_mib - before_mib,
        "error": error / variance,
    }


def main() -> None:
    """Print machine, sizes, and each contender's figures with their ratios to faiss's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--levels", type=int, nargs="+", default=[512, 512])
    parser.add_argument("--sample", type=int, default=200_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quantizer", nargs="+", choices=list(OURS), default=["residual_kmeans"])
    parser.add_argument("--beam", type=int, nargs="+", default=[5], help="faiss's beams; the ratios are to the first")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(run(options.contender, options)))
        return
    print(f"machine   {machine('faiss-cpu', 'torch', 'numpy', threads=options.threads)}")
    levels = " × ".join(map(str, options.levels))
    print(f"sizes     {options.items:,} × {options.dim}, fitted to {options.sample:,}, {levels} codes", flush=True)
    contenders = [*(f"{FAISS} beam {beam}" for beam in options.beam), *options.quantizer]
    reference: dict[str, float] = {}
    for contender in contenders:
        command = [sys.executable, "-m", "tests.benchmarks.semantic_ids", *sys.argv[1:], "--contender", contender]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        took: dict[str, float] = json.loads(output.splitlines()[-1])
        reference = reference or took
        ratios = {key: took[key] / reference[key] for key in took}
        print(
            f"{contender:16} fit {took['fit_s']:6.1f} s (×{ratios['fit_s']:.2f}), code {took['code_s']:6.1f} s "
            f"(×{ratios['code_s']:.2f}), peak {took['peak_mib']:6.0f} MiB, {took['more_mib']:.0f} above the data's "
            f"(×{ratios['more_mib']:.2f}), error {took['error']:.4f} (×{ratios['error']:.3f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
