"""MLP and MMoE against a loop over rows, layers and experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ranker.towers import MLP, MMoE
from tests.ranker.histories import assert_same, randomise


def through(layers: nn.Sequential, x: Tensor) -> Tensor:
    """One row through Linear → ReLU layers; dropout does nothing."""
    for layer in layers:
        if isinstance(layer, nn.Linear):
            x = layer.weight @ x + layer.bias
        elif isinstance(layer, nn.ReLU):
            x = x.clamp(min=0)
        elif isinstance(layer, nn.Sequential):
            x = through(layer, x)
    return x


def reference(tower: MLP | MMoE, x: Tensor, tasks: int) -> Tensor:
    """Row by row, task by task."""
    rows: list[Tensor] = []
    for row in x:
        logits: list[Tensor] = []
        for task in range(tasks):
            if isinstance(tower, MLP):
                logits.append(tower.heads.weight[task] @ through(tower.trunk, row) + tower.heads.bias[task])
                continue
            gate, head = tower.gates[task], tower.heads[task]
            assert isinstance(gate, nn.Linear)
            assert isinstance(head, nn.Sequential)
            scores = (gate.weight @ row + gate.bias).exp()
            mixed = torch.zeros(1, dtype=x.dtype)
            for e, expert in enumerate(tower.experts):
                assert isinstance(expert, nn.Sequential)
                mixed = mixed + scores[e] / scores.sum() * through(expert, row)
            logits.append(through(head, mixed).squeeze())
        rows.append(torch.stack(logits))
    return torch.stack(rows) if rows else x.new_zeros(0, tasks)


TOWERS = {
    "mlp": lambda tasks: MLP(5, [7, 4], tasks, dropout=0.3),
    "mlp, one layer": lambda tasks: MLP(5, [3], tasks),
    "mlp, linear": lambda tasks: MLP(5, [], tasks),
    "mmoe": lambda tasks: MMoE(5, [7, 4], tasks, dropout=0.3, experts=3, head=6),
    "mmoe, one layer": lambda tasks: MMoE(5, [4], tasks, experts=2),
}


@pytest.mark.parametrize("rows", [0, 1, 9])
@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("name", TOWERS)
def test_equals_the_loop(name: str, tasks: int, rows: int):
    """Outputs, and gradients in the input and all weights."""
    tower = TOWERS[name](tasks).eval()
    randomise(tower)
    x = torch.randn(rows, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = tower(x)
    assert found.shape == (rows, tasks)
    assert_same(found, reference(tower, x, tasks), [x, *tower.parameters()])


@pytest.mark.parametrize("name", ["mlp", "mmoe"])
def test_dropout_works_in_training_only(name: str):
    """Two passes differ in training and agree in evaluation."""
    torch.manual_seed(0)
    tower, x = TOWERS[name](2), torch.randn(8, 5)
    assert not torch.equal(tower(x), tower(x))
    tower.eval()
    assert torch.equal(tower(x), tower(x))


def test_every_task_has_its_own_gate():
    """A task whose gate points at an expert sees that expert only."""
    tower = MMoE(5, [4], 2, experts=3, head=6)
    randomise(tower)
    first, second = tower.gates
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    with torch.no_grad():
        first.bias.copy_(torch.tensor([1e3, 0.0, 0.0]))
        second.bias.copy_(torch.tensor([0.0, 0.0, 1e3]))
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = tower(x)
    with torch.no_grad():
        for parameter in tower.experts[0].parameters():
            parameter.add_(1.0)
    after = tower(x)
    assert not torch.allclose(after[:, 0], before[:, 0])
    torch.testing.assert_close(after[:, 1], before[:, 1])


@pytest.mark.parametrize("name", TOWERS)
def test_scripted_is_the_same_on_other_sizes(name: str):
    """TorchScript gives the same numbers whatever sizes came before."""
    tower = TOWERS[name](2).eval()
    scripted = torch.jit.script(tower)
    for rows in (3, 1, 0, 20, 20):
        x = torch.randn(rows, 5)
        torch.testing.assert_close(scripted(x), tower(x))
