"""Small models of every make, each with the groups that a person finds in it.

`GROUPS` lists for each model its groups as `(width, {writer: channels of it per channel of the group}, {reader: ...})`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Wiring = tuple[int, dict[str, int], dict[str, int]]


class Residual(nn.Module):
    """Two blocks, the second with stride and a 1x1 shortcut; batch norms everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a1, self.n1 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.a2, self.n2 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b1, self.n3 = nn.Conv2d(8, 10, 3, 2, 1, bias=False), nn.BatchNorm2d(10)
        self.b2, self.n4 = nn.Conv2d(10, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.short, self.n5 = nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.n0(self.stem(x)))
        x = F.relu(x + self.n2(self.a2(F.relu(self.n1(self.a1(x))))))
        x = F.relu(self.n5(self.short(x)) + self.n4(self.b2(F.relu(self.n3(self.b1(x))))))
        made: Tensor = self.head(x.mean((2, 3)))
        return made


class Dense(nn.Module):
    """Concats: every layer reads all before it, behind a batch norm that cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6 + 4 * i) for i in range(3)])
        self.convs = nn.ModuleList([nn.Conv2d(6 + 4 * i, 4, 3, padding=1) for i in range(2)])
        self.head = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=False):
            found.append(conv(F.relu(norm(torch.cat(found, 1)))))
        made: Tensor = self.head(F.relu(self.norms[2](torch.cat(found, 1))).mean((2, 3)))
        return made


class Separable(nn.Module):
    """Depthwise and 1x1 convolutions, relu6, an inverted residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 18, 1)
        self.deep, self.down = nn.Conv2d(18, 18, 3, padding=1, groups=18), nn.Conv2d(18, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        x = x + self.down(F.relu6(self.deep(F.relu6(self.up(x)))))
        made: Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return made


class Squeeze(nn.Module):
    """Squeeze and excite by 1x1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.less, self.more = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.last, self.head = nn.Conv2d(8, 6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        x = x * torch.sigmoid(self.more(F.silu(self.less(x.mean((2, 3), keepdim=True)))))
        made: Tensor = self.head(F.relu(self.last(x)).amax((2, 3)))
        return made


class Grouped(nn.Module):
    """A grouped convolution between plain ones: the same channels of each conv group go together, on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1, groups=2), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c(F.relu(self.b(F.relu(self.a(x))))))
        made: Tensor = self.head(x.mean((2, 3)))
        return made


class Flat(nn.Module):
    """A map of 4x4 flattened into a linear layer; max pooling in between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mid, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6 * 16, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        made: Tensor = self.head(F.relu(self.mid(x.view(x.size(0), -1))))
        return made


class Attention(nn.Module):
    """Tokens of an image, one fused q, k, v layer, three heads of four; no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.qkv, self.out = nn.Conv2d(3, 12, 4, 4), nn.Linear(12, 36), nn.Linear(12, 12)
        self.position = nn.Parameter(torch.randn(1, 4, 12) * 0.1)
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 3, c // 3).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))
        x = x + self.down(F.gelu(self.up(x)))
        made: Tensor = self.head(x.mean(1))
        return made


class MultiHead(nn.Module):
    """torch's own attention module and its transformer layer's norms."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x.flatten(2).transpose(1, 2).repeat(1, 1, 2))
        y = self.norm(x)
        made: Tensor = self.head((x + self.attention(y, y, y, need_weights=False)[0]).mean(1))
        return made


class Gated(nn.Module):
    """A gated unit: the two halves of one layer's outputs meet."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(10, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x.flatten(1)[:, :12]).chunk(2, -1)
        made: Tensor = self.head(F.relu(self.down(a * torch.sigmoid(b))))
        return made


class Glu(nn.Module):
    """The same by `F.glu`, on maps."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(6, 4, 1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(F.relu(self.down(F.glu(self.up(x), 1))).mean((2, 3)))
        return made


class Shuffled(nn.Module):
    """Grouped convolutions with a channel shuffle between them, and a split of the channels in two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1, groups=2)
        self.c, self.d, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        left, right = x.chunk(2, 1)
        x = F.relu(self.d(torch.cat([left, F.relu(self.c(right))], 1)))
        made: Tensor = self.head(x.mean((2, 3)))
        return made


class GroupNorms(nn.Module):
    """Group norm: the same channels of every norm group go together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.head = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(F.relu(self.b(F.relu(self.norm(self.a(x))))).mean((2, 3)))
        return made


class Twice(nn.Module):
    """One layer called twice in a row: what it writes it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.loop, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.loop(F.relu(self.loop(x))))
        made: Tensor = self.head(x.mean((2, 3)))
        return made


class Tied(nn.Module):
    """An embedding whose matrix is the last layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid, self.back = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed((x.flatten(1)[:, :6] * 5).long().clamp(0, 10))
        return F.linear(y + self.back(F.relu(self.mid(y))), self.embed.weight)


class Several(nn.Module):
    """Returns a dict of a tensor and a tuple: two heads of which one is a feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 7, 3)
        self.left, self.right = nn.Linear(7, 5), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = F.relu(self.mid(F.relu(self.stem(x))))
        y = x.mean((2, 3))
        return {"left": self.left(y), "rest": (self.right(y), x)}


class OneDimensional(nn.Module):
    """Convolutions over time, with dilation and a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 8, 5, stride=2, padding=2), nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.norm, self.c, self.head = nn.BatchNorm1d(8), nn.Conv1d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.b(F.relu(self.a(x.flatten(2))))))
        made: Tensor = self.head(F.max_pool1d(F.relu(self.c(x)), 2).mean(2))
        return made


class InPlace(nn.Module):
    """Operators that write in place, and a batch norm called as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.register_buffer("mean", torch.rand(8))
        self.register_buffer("var", torch.rand(8) + 0.5)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.a(x))
        y = F.batch_norm(self.b(x), self.mean, self.var, eps=1e-3)  # type: ignore[arg-type]
        y += x
        y.relu_()
        made: Tensor = self.head(self.c(y).clamp_(min=0).mean((2, 3)))
        return made


class Upsampling(nn.Module):
    """A small U-net: transposed convolution, nearest upsampling, skips by concat."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, 2, 1)
        self.up, self.c = nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(12, 6, 3, padding=1)
        self.d, self.e = nn.Conv2d(6, 4, 3, 2, 1), nn.Conv2d(10, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        c = F.relu(self.c(torch.cat([a, self.up(F.relu(self.b(a)))], 1)))
        d = F.interpolate(F.relu(self.d(c)), scale_factor=2)
        made: Tensor = self.e(torch.cat([c, d], 1))
        return made


class Recurrent(nn.Module):
    """An LSTM, which is no operator that can be cut, between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.lstm, self.b, self.head = nn.Linear(6, 8), nn.LSTM(8, 7, batch_first=True), nn.Linear(7, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x.flatten(2).transpose(1, 2).repeat(1, 1, 2))
        made: Tensor = self.head(F.relu(self.b(self.lstm(x)[0][:, -1])))
        return made


class Quiet(nn.Module):
    """A region without gradients and one without autocast, which the exporter makes graphs of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        with torch.no_grad():
            y = self.b(x)
            with torch.autocast("cpu", enabled=False):
                z, w = y.relu(), y.sigmoid()
        made: Tensor = self.head((x * z + w).mean((2, 3)))
        return made


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))


GROUPS: dict[Callable[[], nn.Module], list[Wiring]] = {
    Residual: [
        (8, {"stem": 1, "a2": 1}, {"a1": 1, "b1": 1, "short": 1}),
        (6, {"a1": 1}, {"a2": 1}),
        (10, {"b1": 1}, {"b2": 1}),
        (12, {"b2": 1, "short": 1}, {"head": 1}),
    ],
    Dense: [
        (6, {"stem": 1}, {"convs.0": 1, "convs.1": 1, "head": 1}),
        (4, {"convs.0": 1}, {"convs.1": 1, "head": 1}),
        (4, {"convs.1": 1}, {"head": 1}),
    ],
    Separable: [
        (6, {"stem": 1, "down": 1}, {"up": 1, "head": 1}),
        (18, {"up": 1, "deep": 1}, {"deep": 1, "down": 1}),
    ],
    Squeeze: [
        (8, {"stem": 1, "more": 1}, {"less": 1, "last": 1}),
        (4, {"less": 1}, {"more": 1}),
        (6, {"last": 1}, {"head": 1}),
    ],
    Grouped: [(6, {"a": 2}, {"b": 2}), (4, {"b": 2}, {"c": 2}), (6, {"c": 1}, {"head": 1})],
    Flat: [(6, {"conv": 1}, {"mid": 16}), (9, {"mid": 1}, {"head": 1})],
    Attention: [
        (12, {"patch": 1, "out": 1, "down": 1}, {"qkv": 1, "up": 1, "head": 1}),
        (3, {"qkv": 12}, {"out": 4}),
        (20, {"up": 1}, {"down": 1}),
    ],
    Gated: [(10, {"up": 2}, {"down": 1}), (7, {"down": 1}, {"head": 1})],
    Glu: [(6, {"up": 2}, {"down": 1}), (4, {"down": 1}, {"head": 1})],
    GroupNorms: [(4, {"a": 2}, {"b": 2}), (6, {"b": 1}, {"head": 1})],
    Twice: [(6, {"stem": 1, "loop": 1}, {"loop": 1, "head": 1})],
    Tied: [(8, {"back": 1}, {"mid": 1}), (12, {"mid": 1}, {"back": 1})],
    Several: [(6, {"stem": 1}, {"mid": 1})],
    OneDimensional: [(8, {"a": 1, "b": 1}, {"b": 1, "c": 1}), (6, {"c": 1}, {"head": 1})],
    Quiet: [(6, {"a": 1, "b": 1}, {"b": 1, "head": 1})],
    InPlace: [(8, {"a": 1, "b": 1}, {"b": 1, "c": 1}), (6, {"c": 1}, {"head": 1})],
}
"""What is tied in each model, found by reading it."""

OTHERS: list[Callable[[], nn.Module]] = [MultiHead, Shuffled, Upsampling, Recurrent]
"""Models whose groups are only checked by cutting them."""

NORMALISED = {GroupNorms, MultiHead}
"""Models with norms over channels, for which cutting is not masking."""


def build(kind: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model in evaluation mode; batch norms have statistics of their own."""
    torch.manual_seed(seed)
    model = kind()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
            module.running_mean = torch.randn_like(module.weight) * 0.3
            module.running_var = torch.rand_like(module.weight) + 0.5
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return model.eval()
