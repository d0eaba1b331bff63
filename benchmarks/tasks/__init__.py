"""The harder real task and three nets trained on it: ``model, splits = load("residual", seed=0)``.

In YAML: ``model: benchmarks.tasks:residual``, ``data: benchmarks.tasks:splits``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.tasks.clutter import GENERATOR, Batches, Difficulty, canvases, normalised, splits
from examples.depthwise_digits import DepthwiseNet
from examples.vit_digits import VisionTransformer
from tightrope.search.demo_task import Batch, Progress, ResNet, Schedule, initialised, remember

__all__ = ["NETS", "Net", "depthwise", "load", "residual", "splits", "trained", "transformer"]


@dataclass(frozen=True, slots=True)
class Net:
    """How one net of the task is built, from [b, 3, 40, 40] to [b, 10] logits, and trained."""

    build: Callable[[], nn.Module]
    schedule: Schedule


def _transformer() -> nn.Module:
    """Four blocks on 5 x 5 tokens behind six convolutions, as LeViT has it (Graham et al. 2021).

    A stem is needed here: behind a shorter one it learnt next to nothing in 800 steps.
    """
    return VisionTransformer(side=Difficulty().side, patch=8, dim=96, hidden=192, stem=(24, 48, 96), in_channels=3)


NETS: Mapping[str, Net] = {
    "residual": Net(lambda: ResNet(blocks=(1, 1, 1), in_channels=3), Schedule(epochs=5)),
    "depthwise": Net(lambda: DepthwiseNet(in_channels=3, stem_stride=2, width=1.5), Schedule(epochs=8)),
    "transformer": Net(_transformer, Schedule(epochs=16, lr=2e-3)),
}


def load(net: str, seed: int = 0) -> tuple[nn.Module, dict[str, Batches]]:
    """The trained net, in `eval` mode, and the task's splits; trained at first use, some CPU minutes, then cached."""
    return trained(net, seed), splits()


def trained(
    net: str,
    seed: int = 0,
    *,
    schedule: Schedule | None = None,
    images: int | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """The net trained from `seed`; `schedule` and the number of training `images` stand in for the task's own."""

    def data() -> Batch:
        part = canvases("train")
        return normalised(part.images[:images]), torch.from_numpy(part.targets[:images])

    return remember(
        f"clutter-{net}",
        initialised(NETS[net].build, seed),
        data,
        schedule or NETS[net].schedule,
        seed=seed,
        task={"generator": GENERATOR, "images": images, **Difficulty().as_dict()},
        progress=progress,
    )


def residual() -> nn.Module:
    """A ResNet-8 of widths 32-64-128, seed 0."""
    return trained("residual")


def depthwise() -> nn.Module:
    """The depthwise CNN of the examples, its stem at stride 2, half as wide again, seed 0."""
    return trained("depthwise")


def transformer() -> nn.Module:
    """The vision transformer of the examples behind a stem of six convolutions, seed 0."""
    return trained("transformer")
