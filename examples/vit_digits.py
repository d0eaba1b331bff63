"""A small vision transformer on the digits: `tightrope search examples/vit_digits.yaml`, from the repo's root.

Patches, a learnt position embedding, pre-norm blocks, the mean over tokens: after Dosovitskiy et al. 2021, "An image is
worth 16x16 words", and Beyer et al. 2022, "Better plain ViT baselines for ImageNet-1k".
"""

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tightrope.search import demo_task

SCHEDULE = demo_task.Schedule(epochs=30, lr=2e-3)


class Attention(nn.Module):
    """Every token looks at all tokens: [b, tokens, dim] -> [b, tokens, dim]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._split(linear(x)) for linear in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v)
        return cast(Tensor, self.out(y.transpose(1, 2).flatten(2)))

    def _split(self, x: Tensor) -> Tensor:
        """[b, tokens, dim] -> [b, heads, tokens, dim / heads]"""
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a norm and beside a shortcut."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + cast(Tensor, self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class VisionTransformer(nn.Module):
    """[b, in_channels, side, side] -> [b, classes] logits; `patch` divides `side`, both in pixels.

    `stem` has the widths of pairs of 3x3 convolutions, each halving the image before it is cut up (Xiao et al. 2021, "Early
    convolutions help transformers see better"); a patch counts pixels of the whole image all the same.
    """

    def __init__(
        self,
        *,
        side: int = 28,
        patch: int = 4,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        hidden: int = 128,
        stem: tuple[int, ...] = (),
        in_channels: int = 1,
        classes: int = 10,
    ) -> None:
        super().__init__()
        channels = (in_channels, *stem)
        self.stem = nn.Sequential(*(_halved(c_in, c_out) for c_in, c_out in pairwise(channels)))
        self.patches = nn.Conv2d(channels[-1], dim, patch >> len(stem), patch >> len(stem))
        self.position = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(self.stem(x)).flatten(2).transpose(1, 2) + self.position
        return cast(Tensor, self.head(self.norm(self.blocks(x)).mean(1)))


def _halved(c_in: int, c_out: int) -> nn.Sequential:
    """Two convolutions, the first at stride 2: [b, c_in, h, w] -> [b, c_out, h / 2, w / 2]."""
    layers: list[nn.Module] = []
    for channels, stride in ((c_in, 2), (c_out, 1)):
        convolution = nn.Conv2d(channels, c_out, 3, stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*layers)


def build(seed: int = 0) -> nn.Module:
    """The net trained on the digits: about 90 CPU seconds at first use, then read from the cache."""
    model = demo_task.initialised(VisionTransformer, seed)
    return demo_task.remember("vit-digits", model, lambda: demo_task.arrays("train"), SCHEDULE, seed=seed)


splits = demo_task.splits


if __name__ == "__main__":
    share, error = demo_task.accuracy(build(), splits()["search"])
    print(f"accuracy on the search split: {100 * share:.1f} ± {100 * error:.1f} %")
