"""The demo: a residual net on real digits, searched under a quarter of its latency, then on a simulated accelerator."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

from tightrope.search import config as configs
from tightrope.search.progress import Quiet, default
from tightrope.search.session import run
from tightrope.search.study import Study
from tightrope.search.task import Task
from tightrope.spaces.policy import write_atomically

BITFUSION_TRIALS = 40


def task(seed: int = 0, progress: Quiet | None = None) -> Task:
    """The demo's net, trained at first use (about a minute), and its splits."""
    from tightrope.search import demo_task

    def tell(step: int, steps: int, loss: float) -> None:
        if progress is not None:
            progress.step(step, steps, f"loss {loss:.3f}")

    splits = demo_task.splits()
    if progress is not None:
        progress.phase("train the demo's net")
    model = demo_task.build(seed, tell)
    return Task(model, splits["search"][0][0][:1], splits["calibration"], splits["search"], splits["test"], splits["train"])


def demo(out: Path, *, trials: int = 120, workers: int = 2, seed: int = 0) -> Iterator[tuple[Study, Path]]:
    """Run both searches; yields each with its folder: `demo` and `demo-bitfusion`, with the time where that is taken."""
    progress = default(lines=True)
    built = task(seed, progress)
    progress.close()
    plans = [
        ("demo", {"device": "ort-cpu", "budget": ["latency<=0.25x"], "trials": trials, "finetune": {"epochs": 3, "candidates": 2}}),
        (
            "demo-bitfusion",
            {
                "device": "bitfusion",
                "budget": ["latency<=0.6x"],
                "trials": min(trials, BITFUSION_TRIALS),
                "finetune": {"epochs": 1, "candidates": 1},
            },
        ),
    ]
    for name, settings in plans:
        folder = out / name
        if (folder / "trials.jsonl").exists():
            folder = out / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "demo.json", json.dumps({"seed": seed}) + "\n")
        config = configs.make({**settings, "workers": workers, "seed": seed, "out": str(folder), "agent": "auto"})
        yield run(built, config, default(lines=True)), folder
