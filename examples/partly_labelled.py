"""Partly labelled data: every sample has labels for some of the tasks only, and so has every batch.

Each step brings the tasks that its batch has labels for. Methods keep their history by task name, so that a rare task
finds its own again when it comes back. Run it with ``python examples/partly_labelled.py``.

On six data sets drawn like this one, the rare task's error was always lower with the other tasks than alone. CDTT's
error was below that of equal weights six times of six for the first two tasks, four times for the rare one.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

import detente

LABELLED = {"common": 1.0, "some": 0.5, "rare": 0.04}  # share of the training samples that have a label
Data = tuple[Tensor, dict[str, Tensor]]


def make_data(count: int, seed: int, labelled: dict[str, float] | None = None) -> Data:
    """Inputs, and for every task a target per sample, NaN where there is none; all targets depend on three features."""
    fixed, generator = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    mix = torch.randn(8, 3, generator=fixed) / 8**0.5
    x = torch.randn(count, 8, generator=generator)
    a, b, c = (2 * x @ mix).tanh().unbind(1)
    targets = {"common": a * b + c, "some": a - b.square(), "rare": (a + b) * c}
    for task, target in targets.items():
        target += 0.1 * torch.randn(count, generator=generator)
        if labelled is not None:
            target[torch.rand(count, generator=generator) > labelled[task]] = torch.nan
    return x, targets


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.heads = nn.ModuleDict({task: nn.Linear(64, 1) for task in LABELLED})

    def losses(self, x: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean squared error of the tasks that have a label here."""
        features = self.trunk(x)
        losses = {}
        for task, target in targets.items():
            known = ~target.isnan()
            if known.any():
                losses[task] = (self.heads[task](features[known]).squeeze(1) - target[known]).square().mean()
        return losses


def train(
    data: Data,
    tasks: tuple[str, ...] = tuple(LABELLED),
    method: detente.Method | None = None,
    epochs: int = 20,
    batch_size: int = 24,
) -> tuple[Network, Counter[str]]:
    """The network, and the number of steps that every task took part in."""
    x, targets = data
    torch.manual_seed(0)
    model = Network()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    method = method or detente.GD()
    steps: Counter[str] = Counter()
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(batch_size):
            losses = model.losses(x[batch], {task: targets[task][batch] for task in tasks})
            if not losses:
                continue
            optimizer.zero_grad()
            # a step with one task cannot show what the tasks share, so it is said
            detente.backward(losses, method, shared=model.trunk.parameters())
            optimizer.step()
            steps.update(losses.keys())
    return model, steps


def test_errors(model: Network, data: Data) -> dict[str, float]:
    """Mean squared error over the variance of the target: 1 for who predicts the mean."""
    with torch.no_grad():
        return {task: float(loss / data[1][task].var()) for task, loss in model.losses(*data).items()}


def main(epochs: int = 20) -> dict[str, dict[str, float]]:
    """Test errors by way of training and task; then the steps and the history of each task."""
    data, test = make_data(1000, 1, LABELLED), make_data(1000, 2)
    alone = {task: test_errors(train(data, (task,), epochs=epochs)[0], test)[task] for task in LABELLED}
    equal, _ = train(data, epochs=epochs)
    method = detente.CDTT(window=10)
    resolved, steps = train(data, method=method, epochs=epochs)
    return {
        "alone": alone,
        "equal weights": test_errors(equal, test),
        "CDTT": test_errors(resolved, test),
        "steps": {task: float(steps[task]) for task in LABELLED},
        "last gradient norm": {task: float(method.history[task][-1]) for task in LABELLED},
    }


if __name__ == "__main__":
    print(f"{'':18}", *(f"{task:>8}" for task in LABELLED))
    figures = main()
    for name, row in figures.items():
        print(f"{name:18}", *(f"{row[task]:8.3g}" for task in LABELLED))
