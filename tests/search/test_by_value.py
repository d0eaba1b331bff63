"""Models, metrics and data that only the user's own process knows reach the workers, whatever way they were made."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from tightrope.search import cli, distribute, journal

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(256, 10)

    def forward(self, x):
        return self.head(torch.relu(self.body(torch.relu(self.stem(x)))).flatten(1))


def closeness(outputs, target):
    return -torch.nn.functional.cross_entropy(outputs, target, reduction="none")


def build():
    torch.manual_seed(0)
    return Net()


def splits():
    rng = torch.Generator().manual_seed(0)
    batches = [(torch.randn(40, 1, 8, 8, generator=rng), torch.randint(10, (40,), generator=rng)) for _ in range(4)]
    return {"train": batches[:1], "calibration": batches[1:2], "search": batches[2:3], "test": batches[3:]}
"""
SEARCH = """
import tightrope as tr

found = splits()
task = tr.Task(
    build(), torch.zeros(1, 1, 8, 8), found["calibration"], found["search"], found["test"], found["train"], metric=closeness,
    augment=lambda inputs, generator: inputs.flip(-1),
)
study = tr.search(
    task, budget="latency<=0.8x", device="bitfusion", agent="random", trials=3, workers=WORKERS, out=OUT, controls=False,
    finetune={"epochs": EPOCHS, "candidates": 2},
)
"""


def settings(folder: Path, workers: int, epochs: int) -> str:
    return f"OUT, WORKERS, EPOCHS = {str(folder)!r}, {workers}, {epochs}\n"


def check(folder: Path, slots: int) -> None:
    record = journal.read(folder)
    assert record.header.workers == slots and record.header.metric == "closeness"
    assert [t.number for t in record.trials] == [0, 1, 2] and all(t.score and not t.failed for t in record.trials)
    assert (folder / "best" / "model.safetensors").exists()


def test_a_script_whose_net_is_its_own_searches_and_fine_tunes_on_two_workers(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(settings(tmp_path / "run", 2, 1) + NET + SEARCH)
    done = subprocess.run([sys.executable, "-W", "ignore", str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check(tmp_path / "run", 4)


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    distribute._start(1, None, 2**26)
    yield
    ray.shutdown()


def test_cells_of_a_notebook_search_on_a_worker(ray_here: None, tmp_path: Path) -> None:
    namespace = {"__name__": "a_notebook"}  # the classes of which no import finds
    for cell in (settings(tmp_path, 1, 0), NET, SEARCH):
        exec(compile(cell, "<cell>", "exec"), namespace)
    check(tmp_path, 1)


def test_a_module_of_the_working_folder_searches_on_a_worker(
    ray_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net_of_mine.py").write_text(NET)
    (tmp_path / "net.yaml").write_text(
        "model: net_of_mine:build\ndata: net_of_mine:splits\nmetric: net_of_mine:closeness\ndevice: bitfusion\n"
        "budget: latency<=0.8x\nagent: random\ntrials: 3\nworkers: 1\ncontrols: false\nfinetune: {epochs: 0}\nout: run\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", os.curdir)])
    monkeypatch.setattr(sys, "argv", ["tightrope", "search", "net.yaml"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    check(tmp_path / "run", 1)
