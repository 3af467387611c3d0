"""Next-item prediction: the loss over a batch's own items, and how well a ranking of many items finds the next one."""

import torch
from torch import Tensor


def in_batch_softmax(predicted: Tensor, following: Tensor, event: Tensor, times: Tensor) -> Tensor:
    """Mean cross-entropy of finding one's own next item among those of the whole batch; 0 for none.

    A batch in which a prediction stands `times` over: as it costs and as often as its event is another's negative, but
    computed once. The same event twice is not its own negative; another event of the same item is one, and popular
    items, which are negatives more often, are not corrected for.

    Args:
        predicted: `[P, d]`; following: `[E, d]`; their inner products over √d are the logits.
        event: `[P]` int64, which of `following` comes next.
        times: `[P]` int64, at least 1.
    """
    if predicted.size(0) == 0:
        return predicted.sum() + following.sum()  # 0, and the parameters behind it get a gradient in every step
    scaled = predicted / predicted.size(1) ** 0.5
    many = torch.zeros_like(following[:, 0], dtype=torch.float64).index_add(0, event, times.double())
    many = many.log().to(following.dtype)
    logits = torch.addmm(many, scaled, following.t())
    logits = logits.scatter_add(1, event.unsqueeze(1), -many[event].unsqueeze(1).to(logits.dtype))
    own = logits.gather(1, event.unsqueeze(1)).squeeze(1)
    weight = times.float()  # half precision cannot count them
    return ((logits.logsumexp(1) - own) * weight).sum() / weight.sum()


def _ranks(scores: Tensor, target: Tensor) -> Tensor:
    """Items scored at least as high as the target `[Q]`, the target not counted: ties count against it."""
    return (scores >= scores.gather(1, target.unsqueeze(1))).sum(1) - 1


def hit_rate_at_k(scores: Tensor, target: Tensor, k: int) -> Tensor:
    """Share of queries whose next item is among the k highest scores.

    Args:
        scores: `[Q, I]`; target: `[Q]` int64, the index of the next item.

    >>> hit_rate_at_k(torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]]), torch.tensor([2, 2]), 2)
    tensor(0.5000)
    """
    return (_ranks(scores, target) < k).float().mean()


def ndcg_at_k(scores: Tensor, target: Tensor, k: int) -> Tensor:
    """Mean of 1 / log2(rank + 2) of the next item, ranks from 0, and 0 beyond the k highest scores.

    >>> ndcg_at_k(torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]]), torch.tensor([1, 2]), 2)
    tensor(0.5000)
    """
    rank = _ranks(scores, target)
    return torch.where(rank < k, 1.0 / torch.log2(rank + 2.0), 0.0).mean()
