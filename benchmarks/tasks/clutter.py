"""Digits that do not saturate: warped, on larger coloured canvases, among pieces of other digits, under noise.

After the "cluttered translated MNIST" of Mnih et al. 2014, "Recurrent models of visual attention", with affine warps as
in Jaderberg et al. 2015, "Spatial transformer networks", and colours. The sources are the 5,000 digits of the demo; they
are split first, so that neither a digit nor a piece of one is seen in two splits. Everything follows from fixed seeds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch

from tightrope.search.demo_task import SIDE, Batch, digits, stratified

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

SPLITS = ("train", "search", "test", "second")
"""`second` is a second search split, for scoring what the first one chose."""

_PER_CLASS = {"train": 200, "search": 100, "test": 100, "second": 100}
_CHUNK = 1000

GENERATOR = 1
"""To be counted up whenever the code below draws other canvases from the same `Difficulty`: cached weights depend on it."""


@dataclass(frozen=True, slots=True)
class Difficulty:
    """What is done to a digit. Angles in degrees, lengths in pixels, colours and noise on a scale of 0 to 1."""

    side: int = 40
    rotate: float = 20.0
    scale: tuple[float, float] = (0.85, 1.25)
    shear: float = 0.25
    shift: float = 4.0
    pieces: int = 5
    piece: int = 7
    contrast: float = 0.3
    noise: float = 0.08
    canvases: tuple[int, int, int, int] = (6, 1, 2, 2)
    """Canvases drawn of each source digit, for each of `SPLITS`."""
    seed: int = 2_014

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Canvases:
    """One split: `images` uint8 [n, 3, side, side], `targets` int64 [n], `sources` int64 [n], an index into `digits()`."""

    images: npt.NDArray[np.uint8]
    targets: IntArray
    sources: IntArray


@cache
def canvases(split: str, difficulty: Difficulty | None = None) -> Canvases:
    """All canvases of a split, shuffled; the same in every process."""
    difficulty = difficulty or Difficulty()
    images, targets = digits()
    pool = stratified(targets, _PER_CLASS, seed=difficulty.seed)[split]
    rng = np.random.default_rng([difficulty.seed, SPLITS.index(split)])
    sources = rng.permutation(np.repeat(pool, difficulty.canvases[SPLITS.index(split)]))
    drawn = [
        draw(images[chunk], images[rng.choice(pool, (len(chunk), difficulty.pieces))], difficulty, rng)
        for chunk in np.array_split(sources, max(1, len(sources) // _CHUNK))
    ]
    return Canvases(np.concatenate(drawn), targets[sources], sources)


def draw(
    own: npt.NDArray[np.uint8], others: npt.NDArray[np.uint8], difficulty: Difficulty, rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """Canvases uint8 [n, 3, side, side] of digits `own` [n, 28, 28] among pieces of `others` [n, pieces, 28, 28]."""
    n, side = len(own), difficulty.side
    canvas = _gradient(n, side, rng)
    ground = canvas.mean((2, 3))
    for k in range(difficulty.pieces):
        _stamp(canvas, _unit(others[:, k]), _colour(ground, difficulty.contrast, rng), difficulty.piece, rng)
    ink = _warped(_unit(own), _affine(n, difficulty, rng), side)
    _paint(canvas, ink[:, None], _colour(ground, difficulty.contrast, rng)[..., None, None])
    canvas += difficulty.noise * rng.standard_normal(canvas.shape, dtype=np.float32)
    return (canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _unit(images: npt.NDArray[np.uint8]) -> FloatArray:
    return np.divide(images, 255, dtype=np.float32)


def _gradient(n: int, side: int, rng: np.random.Generator) -> FloatArray:
    """Backgrounds [n, 3, side, side]: each runs from one dark colour to another, in any direction."""
    start, stop = 0.4 * rng.random((2, n, 3), dtype=np.float32)
    angle = 2 * np.pi * rng.random((n, 1, 1), dtype=np.float32)
    place = np.linspace(-0.5, 0.5, side, dtype=np.float32)
    along = 0.5 + 0.7 * (np.cos(angle) * place + np.sin(angle) * place[:, None])
    plane: FloatArray = start[..., None, None] + along[:, None] * (stop - start)[..., None, None]
    return plane


def _colour(ground: FloatArray, contrast: float, rng: np.random.Generator) -> FloatArray:
    """Bright colours [n, 3], each by `contrast` or more brighter than its `ground` [n, 3] in the mean over channels.

    The brightest of 8 draws stands in where none is bright enough.
    """
    drawn = 0.4 + 0.6 * rng.random((len(ground), 8, 3), dtype=np.float32)
    distance = (drawn - ground[:, None]).mean(2)
    far = distance >= contrast
    chosen = np.where(far.any(1), far.argmax(1), distance.argmax(1))
    best: FloatArray = drawn[np.arange(len(ground)), chosen]
    return best


def _paint(canvas: FloatArray, ink: FloatArray, colour: FloatArray) -> None:
    """Lay `ink` of 0 to 1 in `colour` over `canvas`, in place; the three broadcast."""
    canvas += ink * (colour - canvas)


def _stamp(canvas: FloatArray, others: FloatArray, colour: FloatArray, size: int, rng: np.random.Generator) -> None:
    """On each of `canvas` [n, 3, side, side] put a window, `size` wide, of the middle of `others` [n, 28, 28], anywhere."""
    n, side = len(others), canvas.shape[2]
    span = np.arange(size)
    frm = rng.integers(4, SIDE - 4 - size + 1, (2, n, 1)) + span
    to = rng.integers(0, side - size + 1, (2, n, 1)) + span
    rows = np.arange(n)[:, None, None]
    ink = others[rows, frm[0][:, :, None], frm[1][:, None, :]]
    place = (rows[..., None], np.arange(3)[:, None, None], to[0][:, None, :, None], to[1][:, None, None, :])
    window = canvas[place]
    _paint(window, ink[:, None], colour[..., None, None])
    canvas[place] = window


def _affine(n: int, difficulty: Difficulty, rng: np.random.Generator) -> FloatArray:
    """Matrices [n, 2, 3] from a canvas pixel (row, column, 1), counted from its middle, to a digit's."""
    low, high = difficulty.scale
    angle = np.deg2rad(rng.uniform(-difficulty.rotate, difficulty.rotate, n))
    shear = rng.uniform(-difficulty.shear, difficulty.shear, n)
    rows, columns = np.exp(rng.uniform(np.log(low), np.log(high), (2, n)))
    cos, sin, one, zero = np.cos(angle), np.sin(angle), np.ones(n), np.zeros(n)
    turn = np.moveaxis(np.array([[cos, -sin], [sin, cos]]), 2, 0)
    slant = np.moveaxis(np.array([[one, zero], [shear, one]]), 2, 0)
    forward = turn @ slant * np.stack([rows, columns], 1)[:, None, :]
    inverse = np.linalg.inv(forward)
    middle = rng.uniform(-difficulty.shift, difficulty.shift, (n, 2, 1))
    return np.concatenate([inverse, -inverse @ middle], 2).astype(np.float32)


def _warped(images: FloatArray, affine: FloatArray, side: int) -> FloatArray:
    """Ink [n, side, side]: `images` [n, 28, 28] seen through `affine` [n, 2, 3], bilinear, nothing outside."""
    n = len(images)
    padded = np.pad(images, ((0, 0), (1, 2), (1, 2)))
    place = np.arange(side, dtype=np.float32) - (side - 1) / 2
    across = affine[:, :, 1, None, None] * place
    down = affine[:, :, 0, None, None] * place[:, None]
    at = across + down + affine[:, :, 2, None, None] + (SIDE - 1) / 2 + 1
    at = at.clip(0, SIDE + 1)
    corner = at.astype(np.int64)
    rest = at - corner
    flat = padded.reshape(n, -1)
    stride = padded.shape[2]
    index = corner[:, 0] * stride + corner[:, 1]

    def pixel(offset: int) -> FloatArray:
        return np.take_along_axis(flat, (index + offset).reshape(n, -1), 1).reshape(n, side, side)

    top = pixel(0) * (1 - rest[:, 1]) + pixel(1) * rest[:, 1]
    bottom = pixel(stride) * (1 - rest[:, 1]) + pixel(stride + 1) * rest[:, 1]
    ink: FloatArray = top * (1 - rest[:, 0]) + bottom * rest[:, 0]
    return ink


def normalised(images: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Images uint8 [n, 3, side, side] as float32 of about zero mean and unit spread."""
    return torch.from_numpy(images).float().sub_(80.0).div_(60.0)


class Batches(Sequence[Batch]):
    """(images float32 [b, 3, side, side], classes int64 [b]) in a fixed order; kept as bytes, normalised when asked for."""

    def __init__(self, part: Canvases, batch_size: int = 100) -> None:
        self.part, self.batch_size = part, batch_size

    def __len__(self) -> int:
        return -(-len(self.part.targets) // self.batch_size)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start = index % len(self) * self.batch_size
        rows = slice(start, start + self.batch_size)
        return normalised(self.part.images[rows]), torch.from_numpy(self.part.targets[rows])

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in range(len(self)))


def splits(batch_size: int = 100) -> dict[str, Batches]:
    """Splits train (12,000 images), calibration (the first 500 of train), search (1,000), test (2,000), second (2,000)."""
    parts = {name: canvases(name) for name in SPLITS}
    train = parts["train"]
    parts["calibration"] = Canvases(train.images[:500], train.targets[:500], train.sources[:500])
    return {name: Batches(part, batch_size) for name, part in parts.items()}
