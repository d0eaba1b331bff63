"""The harder task: no leak between its splits, the same canvases everywhere, and nets that take them."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmarks.tasks as tasks
from benchmarks.tasks.clutter import (
    SPLITS,
    Batches,
    Canvases,
    Difficulty,
    _affine,
    _colour,
    _stamp,
    _warped,
    canvases,
    draw,
)
from tightrope.search.demo_task import Schedule, digits

FEW = Difficulty(canvases=(1, 1, 2, 1))
STILL = Difficulty(rotate=0, scale=(1, 1), shear=0, shift=0, side=28)


@pytest.mark.parametrize(("split", "size"), [("train", 2000), ("search", 1000), ("test", 2000), ("second", 1000)])
def test_sizes_and_types(split: str, size: int) -> None:
    part = canvases(split, FEW)
    assert part.images.shape == (size, 3, 40, 40) and part.images.dtype == np.uint8
    assert part.targets.shape == part.sources.shape == (size,)
    assert np.bincount(part.targets).tolist() == [size // 10] * 10
    assert (digits()[1][part.sources] == part.targets).all()


def test_no_digit_and_no_piece_of_one_is_in_two_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    index = {image.tobytes(): i for i, image in enumerate(digits()[0])}
    used: dict[str, set[int]] = {}
    for split in SPLITS:
        seen = used.setdefault(split, set())

        def spy(own: np.ndarray, others: np.ndarray, difficulty: Difficulty, rng: np.random.Generator) -> np.ndarray:
            seen.update(index[image.tobytes()] for image in [*own, *others.reshape(-1, 28, 28)])  # noqa: B023
            return draw(own, others, difficulty, rng)

        monkeypatch.setattr("benchmarks.tasks.clutter.draw", spy)
        part = canvases.__wrapped__(split, Difficulty(canvases=(1, 1, 1, 1), side=28, pieces=2))
        assert seen >= set(part.sources.tolist())
    assert {split: len(seen) for split, seen in used.items()} == {"train": 2000, "search": 1000, "test": 1000, "second": 1000}
    assert len(set.union(*used.values())) == 5000


def test_the_canvases_of_one_digit_differ() -> None:
    part = canvases("test", FEW)
    first, second = part.images[part.sources == part.sources[0]]
    assert not np.array_equal(first, second)


def test_canvases_are_the_same_in_another_process() -> None:
    code = (
        "import hashlib; from benchmarks.tasks.clutter import Difficulty, canvases;"
        "part = canvases('search', Difficulty(canvases=(1, 1, 2, 1)));"
        "print(hashlib.sha256(part.images.tobytes() + part.targets.tobytes()).hexdigest())"
    )
    root = Path(tasks.__file__).parents[2]
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    part = canvases("search", FEW)
    assert ran.stdout.strip() == hashlib.sha256(part.images.tobytes() + part.targets.tobytes()).hexdigest()


def test_another_seed_draws_others() -> None:
    other = canvases("search", Difficulty(canvases=(1, 1, 2, 1), seed=1))
    assert not np.array_equal(other.images, canvases("search", FEW).images)


def test_a_warp_that_does_nothing_returns_the_digit() -> None:
    image = (digits()[0][:3] / 255).astype(np.float32)
    affine = _affine(3, STILL, np.random.default_rng(0))
    np.testing.assert_allclose(_warped(image, affine, 28), image, atol=1e-6)


def test_a_warp_agrees_with_scipy() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    image = (digits()[0][:4] / 255).astype(np.float32)
    affine = _affine(4, Difficulty(), np.random.default_rng(0))
    for picture, matrix, ink in zip(image, affine, _warped(image, affine, 40), strict=True):
        offset = matrix[:, 2] + 13.5 - matrix[:, :2] @ np.array([19.5, 19.5])
        wanted = ndimage.affine_transform(picture, matrix[:, :2], offset, (40, 40), order=1, mode="grid-constant")
        np.testing.assert_allclose(ink, wanted, atol=1e-4)


def test_a_digit_stays_in_view() -> None:
    rng = np.random.default_rng(0)
    image = (digits()[0][::50] / 255).astype(np.float32)
    ink = _warped(image, _affine(len(image), Difficulty(), rng), 40).sum((1, 2))
    whole = _warped(image, _affine(len(image), Difficulty(), rng), 120).sum((1, 2))
    assert np.median(ink / whole) > 0.6


def test_a_stamp_is_a_window_of_the_digit() -> None:
    canvas = np.zeros((5, 3, 40, 40), np.float32)
    others = np.ones((5, 28, 28), np.float32)
    _stamp(canvas, others, np.full((5, 3), 0.5, np.float32), 8, np.random.default_rng(0))
    assert ((canvas == 0.5).sum((1, 2, 3)) == 3 * 64).all()


def test_colours_keep_their_distance() -> None:
    ground = np.full((200, 3), 0.4, np.float32)
    distance = (_colour(ground, 0.3, np.random.default_rng(0)) - ground).mean(1)
    assert (distance >= 0.3).mean() > 0.95
    assert distance.min() > 0.2


def test_batches_are_a_sequence_that_can_be_read_twice() -> None:
    part = canvases("search", FEW)
    short = Canvases(part.images[:250], part.targets[:250], part.sources[:250])
    batches = Batches(short, 100)
    assert [len(targets) for _, targets in batches] == [len(targets) for _, targets in batches] == [100, 100, 50]
    inputs, targets = batches[-1]
    assert inputs.dtype == torch.float32 and inputs.shape == (50, 3, 40, 40)
    assert targets.dtype == torch.int64 and targets.tolist() == part.targets[200:250].tolist()
    assert [len(t) for _, t in batches[1:]] == [100, 50]
    with pytest.raises(IndexError):
        batches[3]
    scaled = torch.cat([x for x, _ in batches])
    assert abs(float(scaled.mean())) < 0.4
    assert 0.7 < float(scaled.std()) < 1.3


@pytest.mark.parametrize("net", tasks.NETS)
def test_nets_take_canvases(net: str) -> None:
    model = tasks.NETS[net].build().eval()
    assert model(torch.zeros(2, 3, 40, 40)).shape == (2, 10)


def test_a_net_trains_on_canvases_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIGHTROPE_CACHE", str(tmp_path))
    monkeypatch.setattr(tasks, "canvases", lambda split: canvases(split, FEW))
    losses: list[float] = []
    quick = Schedule(epochs=3, lr=2e-3, batch_size=32, smoothing=0)
    tasks.trained("transformer", 3, schedule=quick, images=320, progress=lambda *step: losses.append(step[2]))
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    tasks.trained("transformer", 3, schedule=quick, images=320, progress=lambda *step: losses.append(step[2]))
    assert len(losses) == 30
