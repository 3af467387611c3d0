"""RQ-VAE: an autoencoder with residual quantisation in between (Lee et al. 2022; for items: Rajput et al. 2023).

    z = encoder(x);   q = Σ_l c_{l,k_l}, residual coding of z;   x̂ = decoder(q)
    loss = ‖x − x̂‖² + β Σ_l ‖r_{l−1} − sg[c_{l,k_l}]‖²   where codewords learn by EMA,
         + Σ_l ‖sg[r_{l−1}] − c_{l,k_l}‖²                where they learn by loss

sg stops gradients; EMA: codewords follow the means of the latent vectors they stand for. Gradients go straight
through every level, so that z gets those of q M times; where codewords learn by loss, commitment moves them too, at β.
Both are vector-quantize-pytorch's, as are EMA and the revival of dead codes; the start of the codewords is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vector_quantize_pytorch import ResidualVQ

from features.progress import Progress
from features.semantic_ids.config import RqVaeConfig
from features.semantic_ids.quantizers import letter, residual
from features.semantic_ids.quantizers.autoencoder import Autoencoder
from features.semantic_ids.quantizers.protocol import Codes, Floats, Log, State
from features.semantic_ids.quantizers.reproducible import reproducibly
from features.semantic_ids.quantizers.residual_kmeans import cluster_levels, codewords_key

_DECAY = 0.95  # of the running means of codewords and of their use: about 20 batches
_WARM_UP = 0.1  # share of the steps in which the autoencoder learns alone, before codewords start
_START_ITERATIONS = 10  # of the K-means that the codewords start from
_START_SAMPLE = 64  # latent vectors a code in that K-means, at most
_REGROUP_EVERY = 100  # steps; LETTER's groups of codewords
_LOG_EVERY = 500  # steps


@dataclass(frozen=True)
class RqVae:
    """A trained autoencoder and its codewords, `codebooks[l]` `[K_l, dz]`."""

    network: Autoencoder
    codebooks: list[Floats]

    def encode(self, vectors: Floats) -> tuple[Codes, Floats]:
        """See :class:`protocol.Quantizer`: the codewords' space is the latent one."""
        latent = self.network.encode(vectors)
        return residual.encode(latent, self.codebooks)[0], latent

    def codewords(self) -> list[Floats]:
        """`[K_l, dz]` of each level."""
        return self.codebooks

    def decode(self, summed: Floats) -> Floats:
        """The decoder's output `[n, d]`."""
        return self.network.decode(summed)

    def state(self) -> State:
        """The network's parameters and the codewords."""
        state: State = {codewords_key(level): codewords for level, codewords in enumerate(self.codebooks)}
        return state | {f"network.{name}": value.numpy() for name, value in self.network.state_dict().items()}

    @classmethod
    def of_state(cls, config: RqVaeConfig, levels: list[int], dim: int, state: State) -> RqVae:
        """The inverse of :meth:`state`."""
        network = Autoencoder(dim, config.hidden, config.latent)
        network.load_state_dict({name: torch.tensor(state[f"network.{name}"]) for name in network.state_dict()})
        return cls(network, [state[codewords_key(level)] for level in range(len(levels))])


def fit(
    config: RqVaeConfig,
    levels: list[int],
    vectors: Floats,
    seed: int,
    log: Log,
    collaborative: Floats | None = None,
) -> RqVae:
    """Train on a sample of content vectors `[n, d]`; `collaborative` `[n, dc]` are their behaviour vectors, 0 for none.

    On one thread whatever the machine has, as sums in another order would make other codes.
    """
    with reproducibly(seed), residual.faiss_threads(1), Progress("RQ-VAE", config.steps) as progress:
        training = _Training(config, levels, vectors, seed, collaborative)
        warm_up = int(config.steps * _WARM_UP)
        for _ in range(warm_up):
            training.step_alone()
            progress.advance()
        training.start_codewords()
        for step in range(warm_up, config.steps):
            if config.letter.diversity > 0 and (step - warm_up) % _REGROUP_EVERY == 0:
                training.regroup()
            training.step()
            progress.advance()
            if (step + 1) % _LOG_EVERY == 0 or step + 1 == config.steps:
                log(f"step {step + 1:,} of {config.steps:,}: {training.progress()}")
        codebooks = [codewords.detach().numpy().copy() for codewords in training.codewords()]
    return RqVae(training.network.eval(), codebooks)


class _Training:
    """The parts that learn, and one step of their learning."""

    def __init__(
        self, config: RqVaeConfig, levels: list[int], vectors: Floats, seed: int, collaborative: Floats | None
    ) -> None:
        self.config, self.levels, self.seed = config, levels, seed
        content = torch.tensor(vectors, dtype=torch.float32)
        self.network = Autoencoder(vectors.shape[1], config.hidden, config.latent)
        self.network.standardize_by(content)
        self.content = self.network.standardized(content)
        self.quantizer = _residual_vq(config, levels)
        learning: list[nn.Module] = [self.network, self.quantizer]
        self.collaborative: Tensor | None = None
        if config.letter.collaborative > 0:
            assert collaborative is not None, "letter.collaborative needs behaviour vectors"
            self.collaborative = torch.tensor(collaborative, dtype=torch.float32)
            self.projection = nn.Linear(config.latent, collaborative.shape[1], bias=False)
            learning.append(self.projection)
        self.optimizer = torch.optim.Adam([p for part in learning for p in part.parameters()], lr=config.lr, fused=True)
        self.groups: list[Tensor] = []
        self.terms: dict[str, Tensor] = {}

    def step_alone(self) -> None:
        """Of the autoencoder without codewords in between."""
        x = self.content[self._batch()]
        self._descend({"reconstruction": F.mse_loss(self.network.decoder(self.network.encoder(x)), x)})

    def step(self) -> None:
        """Of everything."""
        rows = self._batch()
        x = self.content[rows]
        z = self.network.encoder(x)
        q, codes, commitment, chosen = self.quantizer(z, return_all_codes=True)  # chosen: codewords `[M, B, dz]`
        terms = {"reconstruction": F.mse_loss(self.network.decoder(q), x), "commitment": commitment.sum()}
        if self.config.codewords == "loss":
            before = z.detach() - (chosen.cumsum(0) - chosen).detach()  # r_{l−1}
            terms["codewords"] = (before - chosen).square().mean((1, 2)).sum()
        weights, temperature = self.config.letter, self.config.letter.temperature
        if self.collaborative is not None:
            contrast = letter.collaborative_loss(self.projection(q), self.collaborative[rows], temperature)
            terms["collaborative"] = weights.collaborative * contrast
        if weights.diversity > 0:
            spread = [
                letter.diversity_loss(
                    codewords, codes[:, level], letter.draw_companions(groups, codes[:, level]), temperature
                )
                for level, (codewords, groups) in enumerate(zip(self.codewords(), self.groups, strict=True))
            ]
            terms["diversity"] = weights.diversity * torch.stack(spread).sum()
        self._descend(terms)

    def _batch(self) -> Tensor:
        return torch.randint(len(self.content), (self.config.batch,))

    def _descend(self, terms: dict[str, Tensor]) -> None:
        self.optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        self.optimizer.step()
        self.terms = terms

    def start_codewords(self) -> None:
        """From K-means of latent vectors, level by level."""
        rows = torch.randperm(len(self.content))[: _START_SAMPLE * max(self.levels)]
        with torch.no_grad():
            latent = self.network.encoder(self.content[rows]).numpy()
        start, _ = cluster_levels(self.levels, latent, _START_ITERATIONS, 1, self.seed, lambda _: None)
        for codebook, codewords in zip(_codebooks(self.quantizer), start, strict=True):
            even = self.config.batch / len(codewords)
            codebook.embed.data.copy_(torch.from_numpy(codewords))
            codebook.cluster_size.fill_(even)
            codebook.embed_avg.copy_(codebook.embed.data * even)
            codebook.initted.fill_(True)

    def regroup(self) -> None:
        """Group the codewords of each level anew."""
        clusters = self.config.letter.clusters
        self.groups = [letter.group_codewords(codewords, clusters, self.seed) for codewords in self.codewords()]

    def codewords(self) -> list[Tensor]:
        """`[K_l, dz]` of each level as they are now, with gradients where they learn by loss."""
        return [codebook.embed[0] for codebook in _codebooks(self.quantizer)]

    def progress(self) -> str:
        """The loss and its terms in the last batch, and the share of codes used lately."""
        terms = ", ".join(f"{name} {float(term.detach()):.4f}" for name, term in self.terms.items())
        used = [
            float((c.cluster_size > 0.01 * self.config.batch / c.codebook_size).float().mean())
            for c in _codebooks(self.quantizer)
        ]
        return f"{terms}; codes in use by level: {', '.join(f'{share:.0%}' for share in used)}"


def _residual_vq(config: RqVaeConfig, levels: list[int]) -> ResidualVQ:
    """The library's residual quantiser. Its dead-code revival counts uses a batch, ours shares of an even use, so that
    one setting fits levels of any size."""
    quantizer = ResidualVQ(
        dim=config.latent,
        codebook_size=tuple(levels),
        kmeans_init=True,
        decay=_DECAY,
        commitment_weight=config.commitment,
        ema_update=config.codewords == "ema",
        learnable_codebook=config.codewords == "loss",
        rotation_trick=False,
        threshold_ema_dead_code=config.dead_below,
    )
    for codebook in _codebooks(quantizer):
        even = config.batch / codebook.codebook_size
        codebook.threshold_ema_dead_code = config.dead_below * even
        codebook.reset_cluster_size = even  # a code that starts anew has time to find items
    return quantizer


def _codebooks(quantizer: ResidualVQ) -> list[Any]:
    """The library's codebook of each level."""
    return [layer.get_submodule("_codebook") for layer in quantizer.layers]
