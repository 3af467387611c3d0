"""From a candidate's features to one logit a task: an MLP with a shared trunk, or MMoE."""

import torch
from torch import Tensor, nn


def dense_layers(inputs: int, hidden: list[int], dropout: float) -> nn.Sequential:
    """Linear → ReLU → dropout for each width; the identity if `hidden` is empty."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
        inputs = width
    return nn.Sequential(*layers)


class MLP(nn.Module):
    """Shared trunk, one linear output a task: `[N, inputs]` to `[N, tasks]`."""

    def __init__(self, inputs: int, hidden: list[int], tasks: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.trunk = dense_layers(inputs, hidden, dropout)
        self.heads = nn.Linear(hidden[-1] if hidden else inputs, tasks)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, tasks]`."""
        return self.heads(self.trunk(x))


class MMoE(nn.Module):
    """Multi-gate mixture of experts (Ma et al. 2018): every task mixes the same experts by a gate of its own."""

    def __init__(
        self, inputs: int, hidden: list[int], tasks: int, dropout: float = 0.0, experts: int = 4, head: int = 32
    ) -> None:
        super().__init__()
        width = hidden[-1]
        self.experts = nn.ModuleList([dense_layers(inputs, hidden, dropout) for _ in range(experts)])
        self.gates = nn.ModuleList([nn.Linear(inputs, experts) for _ in range(tasks)])
        self.heads = nn.ModuleList(
            [nn.Sequential(dense_layers(width, [head], dropout), nn.Linear(head, 1)) for _ in range(tasks)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, tasks]`."""
        mixed = torch.stack([expert(x) for expert in self.experts], 1)  # [N, experts, width]
        logits: list[Tensor] = []
        for gate, head in zip(self.gates, self.heads):  # noqa: B905  TorchScript knows no `strict`
            weight = torch.softmax(gate(x), -1)
            logits.append(head(torch.einsum("ne,new->nw", weight, mixed)))
        return torch.cat(logits, 1)
