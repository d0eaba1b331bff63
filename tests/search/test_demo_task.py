"""The demo's data and net: splits that hold, shapes, and a training loop that learns."""

import builtins
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tightrope.search import demo_task
from tightrope.search.demo_task import BasicBlock, ResNet, Schedule, accuracy, arrays, fit, initialised, remember
from tightrope.spaces.errors import MissingExtra

SIZES = {"train": 3000, "calibration": 400, "search": 1000, "test": 1000}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a shared machine two threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_sizes_shapes_and_types() -> None:
    splits = demo_task.splits()
    assert {name: sum(len(targets) for _, targets in batches) for name, batches in splits.items()} == SIZES
    for batches in splits.values():
        for inputs, targets in batches:
            assert inputs.dtype == torch.float32 and inputs.shape == (len(targets), 1, 28, 28)
            assert targets.dtype == torch.int64 and targets.shape == (len(targets),)


def test_train_search_and_test_share_no_image() -> None:
    images, _ = demo_task.digits()
    seen = {name: {images[i].tobytes() for i in demo_task.split_indices()[name]} for name in SIZES}
    assert not seen["train"] & seen["search"]
    assert not seen["train"] & seen["test"]
    assert not seen["search"] & seen["test"]
    assert seen["calibration"] < seen["train"]


@pytest.mark.parametrize("name", SIZES)
def test_every_class_is_equally_frequent(name: str) -> None:
    _, targets = demo_task.digits()
    assert np.bincount(targets[demo_task.split_indices()[name]]).tolist() == [SIZES[name] // 10] * 10


def test_images_are_normalised() -> None:
    inputs, _ = arrays("train")
    assert abs(float(inputs.mean())) < 0.02
    assert abs(float(inputs.std()) - 1) < 0.02
    raw = inputs * 0.3081 + 0.1307
    torch.testing.assert_close((raw.min(), raw.max()), (torch.tensor(0.0), torch.tensor(1.0)), atol=1e-6, rtol=0)


def _digest() -> str:
    return hashlib.sha256(b"".join(x.numpy().tobytes() for batch in demo_task.splits()["search"] for x in batch)).hexdigest()


def test_splits_are_the_same_in_another_process() -> None:
    code = (
        "import hashlib; from tightrope.search import demo_task;"
        "print(hashlib.sha256(b''.join(x.numpy().tobytes() for b in demo_task.splits()['search'] for x in b)).hexdigest())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == _digest()


def test_a_missing_mlxtend_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: object, **more: object) -> object:
        if name.startswith("mlxtend"):
            raise ModuleNotFoundError(name)
        return real(name, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtra, match="pip install"):
        demo_task.digits.__wrapped__()


def test_stratified_refuses_more_than_there_is() -> None:
    with pytest.raises(ValueError, match="too few"):
        demo_task.stratified(np.array([0, 0, 1]), {"a": 1, "b": 1}, seed=0)


@pytest.mark.parametrize(("blocks", "convolutions"), [((1, 1, 1), 9), ((1, 1, 2), 11)])
def test_resnet_shapes(blocks: tuple[int, int, int], convolutions: int) -> None:
    model = ResNet(blocks=blocks, in_channels=3, classes=7).eval()
    assert model(torch.zeros(2, 3, 41, 40)).shape == (2, 7)
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == convolutions


def test_a_block_adds_its_shortcut() -> None:
    block = BasicBlock(4, 4, 1).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(block(x), x.relu())


def test_warp_with_nothing_to_do_changes_nothing() -> None:
    images = torch.randn(3, 2, 9, 12)
    still = Schedule(shift=0, rotate=0, scale=0)
    torch.testing.assert_close(demo_task.warp(images, still, torch.Generator()), images, atol=1e-4, rtol=0)


def test_warp_shifts_by_pixels() -> None:
    images = torch.zeros(64, 1, 21, 21)
    images[:, :, 10, 10] = 1
    moved = demo_task.warp(images, Schedule(shift=3, rotate=0, scale=0), torch.Generator().manual_seed(0))
    places = torch.arange(21.0) - 10
    across, down = moved.sum(2)[:, 0] @ places, moved.sum(3)[:, 0] @ places
    for offset in (across, down):
        assert 2.5 < float(offset.abs().max()) <= 3 + 1e-3


def test_one_cycle_rises_and_falls() -> None:
    assert [round(demo_task._one_cycle(x), 3) for x in (0, 0.125, 0.25, 0.625, 1)] == [0.02, 0.5, 1, 0.5, 0.02]


def _tiny() -> nn.Module:
    return ResNet((4, 8, 8), blocks=(1, 1, 1))


def _few() -> tuple[Tensor, Tensor]:
    inputs, targets = arrays("train")
    return inputs[:128], targets[:128]


def test_one_epoch_learns() -> None:
    model = initialised(lambda: ResNet((8, 16, 32), blocks=(1, 1, 1)), seed=0)
    steps: list[tuple[int, int, float]] = []
    fit(model, *arrays("train"), Schedule(epochs=1, batch_size=32, lr=1e-2), seed=0, progress=lambda *step: steps.append(step))
    assert [done for done, _, _ in steps] == list(range(1, 95))
    assert {total for _, total, _ in steps} == {94}
    assert not model.training
    share, error = accuracy(model, demo_task.splits()["search"])
    assert share > 0.5
    assert error == pytest.approx((share * (1 - share) / 1000) ** 0.5)


def test_the_seed_decides_the_weights_and_nothing_global_does() -> None:
    def weights(seed: int) -> Tensor:
        torch.rand(1)
        model = initialised(_tiny, seed)
        fit(model, *_few(), Schedule(epochs=1), seed=seed)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    before = torch.get_rng_state()
    first = weights(0)
    torch.set_rng_state(before)
    torch.rand(5)
    torch.testing.assert_close(weights(0), first, atol=0, rtol=0)
    assert not torch.equal(weights(1), first)


def test_weights_are_trained_once_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIGHTROPE_CACHE", str(tmp_path))
    asked: list[int] = []

    def data() -> tuple[Tensor, Tensor]:
        asked.append(1)
        return _few()

    def net(schedule: Schedule, **task: object) -> nn.Module:
        return remember("tiny", initialised(_tiny, 0), data, schedule, seed=0, task=task)

    quick = Schedule(epochs=1)
    first, again = net(quick).state_dict(), net(quick).state_dict()
    assert len(asked) == 1
    assert all(torch.equal(first[name], again[name]) for name in first)
    net(Schedule(epochs=2))
    net(quick, data="other")
    assert len(asked) == 3
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3


def test_a_torn_cache_is_trained_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIGHTROPE_CACHE", str(tmp_path))
    remember("tiny", initialised(_tiny, 0), _few, Schedule(epochs=1), seed=0)
    (path,) = tmp_path.rglob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    remember("tiny", initialised(_tiny, 0), _few, Schedule(epochs=1), seed=0)
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TIGHTROPE_CACHE", str(tmp_path / "file"))
    remember("tiny", initialised(_tiny, 0), _few, Schedule(epochs=1), seed=0)
