"""A small real task for tests: scikit-learn's 8x8 digits and a residual net that learns them in seconds."""

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tightrope.search.task import Task


class Net(nn.Module):
    """Two 3x3 convolutions with batch norm, a residual add, pooling, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 24, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.body = nn.Conv2d(24, 24, 3, padding=1)
        self.wide = nn.Conv2d(24, 48, 3, 2, padding=1)
        self.head = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.body(x))
        out: torch.Tensor = self.head(F.relu(self.wide(x)).mean((2, 3)))
        return out


@cache
def data() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    images, targets = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(targets)


def splits() -> dict[str, Any]:
    """Four disjoint splits, but for calibration, which is a part of train."""
    x, y = data()
    spans = {"train": (0, 900), "calibration": (0, 200), "search": (900, 1300), "test": (1300, 1797)}
    return {name: list(zip(x[a:b].split(100), y[a:b].split(100), strict=True)) for name, (a, b) in spans.items()}


@cache
def build() -> nn.Module:
    """The trained net, the same in every process; about three CPU seconds."""
    x, y = data()
    torch.manual_seed(0)
    net, threads = Net(), torch.get_num_threads()
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    torch.set_num_threads(1)
    for _ in range(250):
        chosen = torch.randint(900, (64,))
        loss = F.cross_entropy(net(x[chosen]), y[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    torch.set_num_threads(threads)
    return net.eval()


def fresh() -> nn.Module:
    """The net before training, where nothing depends on what it knows."""
    torch.manual_seed(0)
    return Net().eval()


def task() -> Task:
    found = splits()
    return Task(build(), data()[0][:1], found["calibration"], found["search"], found["test"], found["train"])


def nan_metric(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A metric that is broken."""
    return outputs[:, 0] * float("nan")


def no_search() -> dict[str, Any]:
    """Splits of which one is empty."""
    return {**splits(), "search": []}


def mismatched() -> dict[str, Any]:
    """Splits whose targets are too few."""
    x, y = data()
    return {**splits(), "search": [(x[:100], y[:90])]}


class Untraceable(nn.Module):
    """Its control flow depends on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(x.flatten(1))
        return y if y.sum() > 0 else -y
