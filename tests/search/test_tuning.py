"""Fine-tuning that is killed, gone on with, halved, and spread over Ray."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import fx

import tightrope as tr
from tests import digits
from tightrope.compressors.finetune import Tuning, finetune
from tightrope.compressors.keeper import epochs_of
from tightrope.compressors.prepare import Prepared
from tightrope.compressors.recalibrate import recalibrate
from tightrope.search import distribute
from tightrope.search.tuning import Halving, tune
from tightrope.spaces import Policy
from tightrope.spaces.errors import DataError
from tightrope.spaces.policy import Choice

TUNING = Tuning(epochs=4, lr=1e-3, batch=100)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As `tune` has it: with AVX2, two threads add up in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def ready() -> Prepared:
    task = digits.task()
    return tr.prepare(task.model, task.example_inputs, task.split("calibration"))


def modules(*shares: float) -> dict[str, fx.GraphModule]:
    """Compressed modules that keep these shares of all channels, in 8-bit integers."""
    task, prepared, found = digits.task(), ready(), {}
    network = prepared.network
    for share in shares:
        widths = {g: max(1, int(w * share)) for g, w in network.widths.items()}
        policy = Policy.make(network, widths, {x.name: Choice(8, 8) for x in network.layers})
        found[f"{share}"] = recalibrate(tr.compress_prepared(None, policy, prepared), task.split("calibration"))
    return found


def weights(module: fx.GraphModule) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def plain() -> dict[str, torch.Tensor]:
    """The weights after fine-tuning without interruption or files."""
    task, [module] = digits.task(), modules(0.5).values()
    return weights(finetune(module, task.model, task.split("train"), TUNING))


class Killed(Exception):
    pass


def test_gone_on_with_is_as_if_it_had_never_stopped(tmp_path: Path, plain: dict[str, torch.Tensor]) -> None:
    task, steps = digits.task(), []

    def kill(step: int, count: int, note: str) -> None:
        steps.append(step)
        if step == count // 2 + 2:  # in the middle of the third epoch
            raise Killed

    with pytest.raises(Killed):
        tune(modules(0.5), task, TUNING, tmp_path, on_step=kill)
    again = modules(0.5)
    seen: list[int] = []
    assert tune(again, task, TUNING, tmp_path, on_step=lambda step, count, note: seen.append(step)) == {"0.5": 4}
    assert seen[0] == 19 and seen[-1] == 36  # nine batches an epoch: two epochs were kept
    assert same(weights(again["0.5"]), plain)


DRIVER = """
import sys
from pathlib import Path
from tests.search.test_tuning import *
torch.set_num_threads(1)
tune(modules(0.5), digits.task(), TUNING, Path(sys.argv[1]), on_step=lambda *_: time.sleep(0.02))
"""


def test_a_kill_loses_the_epoch_in_progress_alone(tmp_path: Path, plain: dict[str, torch.Tensor]) -> None:
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", DRIVER, str(tmp_path)], cwd=Path(__file__).parents[2]) as driver:
        while driver.poll() is None and not list(tmp_path.glob("*.safetensors")):
            time.sleep(0.01)
        time.sleep(0.1)
        driver.send_signal(signal.SIGKILL)
    [file] = tmp_path.glob("*.safetensors")
    with safe_open(file, "pt") as held:  # type: ignore[no-untyped-call]
        kept = held.metadata()["scores"].count(",") + 1
    again, seen = modules(0.5), []
    tune(again, digits.task(), TUNING, tmp_path, on_step=lambda step, count, note: seen.append(step))
    assert 1 <= kept < 4 and seen[0] == 9 * kept + 1
    assert same(weights(again["0.5"]), plain)


def test_another_rate_begins_anew_and_a_damaged_file_is_said(tmp_path: Path) -> None:
    task = digits.task()
    tune(modules(0.5), task, Tuning(epochs=1), tmp_path)
    assert tune(modules(0.5), task, Tuning(epochs=1, lr=1e-4), tmp_path) == {"0.5": 1}
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=r"cannot be read .* remove it to fine-tune anew"):
        tune(modules(0.5), task, Tuning(epochs=1), tmp_path)


def test_who_falls_behind_stops(tmp_path: Path) -> None:
    found = tune(modules(1.0, 0.75, 0.1), digits.task(), TUNING, tmp_path, halve=["1.0", "0.75", "0.1"])
    assert found["1.0"] == 4 and found["0.1"] == 1


def test_halving_is_the_published_rule() -> None:
    rule = Halving(epochs=4)
    assert [rule.go_on(1, s) for s in (5.0, 4.0, 4.5, 6.0)] == [True, False, True, True]  # medians of those before: -, 5, 4.5, 4.5
    assert [rule.go_on(2, 5.0), rule.go_on(3, 0.0), rule.go_on(4, 9.0)] == [True, True, False]


@pytest.fixture(scope="module")
def ray_here() -> Any:
    import ray

    distribute._start(2, None, 2**26)
    yield ray
    ray.shutdown()


def test_ray_tune_trains_the_same_and_stops_who_falls_behind(ray_here: Any, tmp_path: Path, plain: dict[str, torch.Tensor]) -> None:
    found, told = modules(0.5, 0.1, 0.2), []
    epochs = tune(
        found, digits.task(), TUNING, tmp_path, halve=["0.5", "0.1"], workers=1, on_step=lambda *given: told.append(given)
    )  # fmt: skip
    assert epochs == {"0.5": 4, "0.1": 1, "0.2": 4}  # the last is no better than the second, but none of those that are halved
    assert same(weights(found["0.5"]), plain)
    assert not [p for p in tmp_path.rglob("*") if p.suffix != ".safetensors"]
    assert [done for done, total, _ in told if total == 12] == [1, 2, 3, 4, 5, 9, 10, 11, 12]
    assert told[4][2].startswith("0.1, ") and told[4][2].endswith(" after epoch 1")


@dataclass(frozen=True)
class Counted:
    """Leaves training inputs as they are, and writes down which process saw some."""

    log: Path
    sleep: float = 0.0

    def __call__(self, inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        time.sleep(self.sleep)
        with self.log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return inputs


RAY_DRIVER = """
import sys
from tests.search.test_tuning import *
torch.set_num_threads(1)
folder = Path(sys.argv[1])
distribute._start(2, sys.argv[2], 0)
tune(modules(0.5, 0.75), replace(digits.task(), augment=Counted(folder / "seen", 0.1)), TUNING, folder, workers=2)
"""


def test_a_kill_while_ray_tune_runs_loses_the_epochs_in_progress_alone(ray_here: Any, tmp_path: Path) -> None:
    task, whole = replace(digits.task(), augment=Counted(tmp_path / "seen")), modules(0.5, 0.75)
    command = [sys.executable, "-W", "ignore", "-c", RAY_DRIVER, str(tmp_path), ray_here.get_runtime_context().gcs_address]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as driver:
        while driver.poll() is None and not list(tmp_path.glob("*.safetensors")):
            time.sleep(0.01)
        driver.send_signal(signal.SIGKILL)
    while any(Path(f"/proc/{pid}").exists() for pid in (tmp_path / "seen").read_text().split()):  # Ray ends its workers
        time.sleep(0.1)
    kept = sum(epochs_of(path) for path in tmp_path.glob("*.safetensors"))
    (tmp_path / "seen").write_text("")
    again = modules(0.5, 0.75)
    assert tune(again, task, TUNING, tmp_path, workers=2) == {"0.5": 4, "0.75": 4}
    assert 1 <= kept < 8 and len((tmp_path / "seen").read_text().split()) == 9 * (8 - kept)
    tune(whole, task, TUNING, tmp_path / "whole")
    assert all(same(weights(again[name]), weights(whole[name])) for name in whole)
