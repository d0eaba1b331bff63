"""A depthwise CNN on the digits: `tightrope search examples/depthwise_digits.yaml`, from the repo's root.

The blocks are those of MobileNetV2 (Sandler et al. 2018), with ReLU in place of ReLU6.
"""

from typing import cast

from torch import Tensor, nn

from tightrope.search import demo_task

SCHEDULE = demo_task.Schedule()


class InvertedResidual(nn.Module):
    """1x1 up to `c_in * expand` channels, 3x3 depthwise, 1x1 down: [b, c_in, h, w] -> [b, c_out, h/stride, w/stride]."""

    def __init__(self, c_in: int, c_out: int, *, stride: int, expand: int) -> None:
        super().__init__()
        hidden = c_in * expand
        self.up = _conv(c_in, hidden, 1)
        self.depthwise = _conv(hidden, hidden, 3, stride=stride, groups=hidden)
        self.down = _conv(hidden, c_out, 1, activation=False)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y = cast(Tensor, self.down(self.depthwise(self.up(x))))
        return x + y if self.residual else y


class DepthwiseNet(nn.Module):
    """A stem, five inverted residuals, a 1x1 head: [b, in_channels, h, w] -> [b, classes] logits.

    `width` multiplies the number of channels everywhere.
    """

    def __init__(self, *, in_channels: int = 1, classes: int = 10, stem_stride: int = 1, width: float = 1) -> None:
        super().__init__()
        narrow, middle, wide, last = (round(width * channels) for channels in (24, 40, 80, 160))
        self.stem = _conv(in_channels, narrow, 3, stride=stem_stride)
        self.blocks = nn.Sequential(
            InvertedResidual(narrow, narrow, stride=1, expand=2),
            InvertedResidual(narrow, middle, stride=2, expand=4),
            InvertedResidual(middle, middle, stride=1, expand=4),
            InvertedResidual(middle, wide, stride=2, expand=4),
            InvertedResidual(wide, wide, stride=1, expand=4),
        )
        self.last = _conv(wide, last, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.blocks(self.stem(x)))
        return cast(Tensor, self.head(self.pool(x).flatten(1)))


def _conv(c_in: int, c_out: int, kernel: int, *, stride: int = 1, groups: int = 1, activation: bool = True) -> nn.Sequential:
    """Convolution, batch-norm and, unless told otherwise, ReLU."""
    convolution = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(c_out), *([nn.ReLU()] if activation else []))


def build(seed: int = 0) -> nn.Module:
    """The net trained on the digits: about 90 CPU seconds at first use, then read from the cache."""
    model = demo_task.initialised(DepthwiseNet, seed)
    return demo_task.remember("depthwise-digits", model, lambda: demo_task.arrays("train"), SCHEDULE, seed=seed)


splits = demo_task.splits


if __name__ == "__main__":
    share, error = demo_task.accuracy(build(), splits()["search"])
    print(f"accuracy on the search split: {100 * share:.1f} ± {100 * error:.1f} %")
