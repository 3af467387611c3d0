"""Queries, keys and values of multi-head attention of candidates to whatever a block keeps of a history.

Queries and keys start as the same semi-orthogonal map and are normalised by head (Dehghani et al. 2023): a candidate
attends to what is like it from the first step on, and sharply enough to single out a few events of thousands. Maps
drawn apart, on small embeddings, make logits so even that it takes epochs to grow them: on generated data with 5,000
events a user, target attention's validation AUC after two epochs rose from .764 to .806.
"""

from torch import Tensor, nn


class Heads(nn.Module):
    """Three projections to `heads` × `head_dim`.

    Args:
        dim: width of candidates, and of what they attend to.
        heads, head_dim: attention width is their product; a head of one dimension has no direction to compare.

    Raises:
        ValueError: `head_dim` is below 2.
    """

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        if head_dim < 2:
            raise ValueError(f"head_dim: {head_dim}; must be at least 2")
        self.shape = [heads, head_dim]
        self.query = nn.Linear(dim, heads * head_dim, bias=False)
        self.key = nn.Linear(dim, heads * head_dim, bias=False)
        self.value = nn.Linear(dim, heads * head_dim, bias=False)
        self.query_norm = nn.LayerNorm(head_dim)
        self.key_norm = nn.LayerNorm(head_dim, bias=False)  # one would shift all logits of a query alike
        nn.init.orthogonal_(self.query.weight)
        self.key.load_state_dict(self.query.state_dict())

    def queries(self, candidates: Tensor) -> Tensor:
        """`[N, dim]` to `[N, heads, head_dim]`."""
        return self.query_norm(self.query(candidates).unflatten(1, self.shape))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[n, dim]` to `[n, heads, head_dim]` each."""
        return self.key_norm(self.key(x).unflatten(1, self.shape)), self.value(x).unflatten(1, self.shape)
