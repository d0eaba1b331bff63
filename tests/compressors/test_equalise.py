"""Cross-layer equalisation: the function stays, the ranges meet, and only homogeneous operators may lie between."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_nets import Attention, Dense, Flat, InPlace, Residual, Separable, Several, Tied, build
from torch import Tensor, nn

from tightrope.compressors.quantize.equalise import equalised
from tightrope.compressors.trace import run, traced

torch.set_num_threads(1)


class Chain(nn.Module):
    """Three convolutions, the middle one depthwise, with an activation between the first two."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.depthwise = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.down, self.head = nn.Conv2d(6, 4, 1), nn.Linear(4 * 16, 5)
        self.activation = activation
        with torch.no_grad():
            for layer in (self.up, self.depthwise, self.down):
                layer.weight *= torch.logspace(-1, 1, len(layer.weight)).reshape(-1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depthwise(self.activation(self.up(x))))
        made: Tensor = self.head(F.max_pool2d(F.relu(self.down(x)), 2).flatten(1))
        return made


def of(model: nn.Module) -> tuple[Any, Any, float]:
    """The skeleton, the equalised one, and how far their outputs differ, as a share of the largest."""
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    tracing = traced(model, x)
    made = equalised(tracing)
    with torch.no_grad():
        outputs = [torch.utils._pytree.tree_leaves(run(skeleton, (x,)))[0] for skeleton in (tracing.skeleton, made.skeleton)]
    return tracing.skeleton, made.skeleton, float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max())


@pytest.mark.parametrize("kind", [Residual, Separable, Attention, Dense, Flat, InPlace, Tied, Several])
def test_the_function_stays(kind: Callable[[], nn.Module]) -> None:
    assert of(build(kind))[2] < 1e-5


@pytest.mark.parametrize("activation", [F.relu, nn.Identity(), lambda x: F.leaky_relu(x, 0.1)])
def test_ranges_meet_where_the_activation_is_homogeneous(activation: Callable[[Tensor], Tensor]) -> None:
    """Equation 11 of the paper: both ranges of a channel are the same in the end."""
    before, after, change = of(Chain(activation).eval())
    assert change < 1e-5

    def ranges(skeleton: Any) -> np.ndarray:
        up, depthwise = (skeleton.get_submodule(n).weight.detach().abs().flatten(1).amax(1) for n in ("up", "depthwise"))
        down = skeleton.get_submodule("down").weight.detach().abs().amax((0, 2, 3))
        made: np.ndarray = torch.stack([up / depthwise, depthwise / down]).log().abs().numpy()
        return made

    assert ranges(after).max() < 0.1 < 1 < ranges(before).max()


@pytest.mark.parametrize("activation", [F.relu6, F.gelu, torch.sigmoid, lambda x: x + 1, lambda x: F.hardtanh(x, -2, 2)])
def test_layers_around_anything_else_are_left(activation: Callable[[Tensor], Tensor]) -> None:
    before, after, change = of(Chain(activation).eval())
    assert change < 1e-5
    assert torch.equal(before.get_submodule("up").weight, after.get_submodule("up").weight)
    assert not torch.equal(before.get_submodule("down").weight, after.get_submodule("down").weight)


def test_channels_of_zeros_stay() -> None:
    model = Chain(F.relu).eval()
    with torch.no_grad():
        model.up.weight[2] = 0
        model.down.weight[:, 4] = 0
    _, after, change = of(model)
    assert change < 1e-5
    assert all(bool(torch.isfinite(p).all()) for p in after.parameters())
