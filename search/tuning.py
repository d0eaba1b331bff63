"""Fine-tuning several compressed modules: those that fall behind stop, and a kill loses at most the epoch in progress.

The rule is asynchronous successive halving (Li et al. 2020, A System for Massively Parallel Hyperparameter Tuning, algorithm 2,
in the form that stops instead of pausing): after 1, 2, 4, ... epochs a module goes on only if it scores no worse than the
median of those that came to that rung before it. With workers Ray Tune runs it; without, the modules take turns in this
process. What is gone on with after a kill are our own files (`compressors/keeper.py`); Ray Tune's are thrown away.
"""

import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tightrope.search.distribute import quiet
from tightrope.search.evaluate import pack, score_module, unpack
from tightrope.search.task import Task
from tightrope.spaces.errors import RunError

if TYPE_CHECKING:
    from torch import fx

    from tightrope.compressors.finetune import Tuning

log = logging.getLogger(__name__)
FACTOR = 2  # between rungs, and of the modules that go on
RETRIES = 3  # of a module whose worker dies


@dataclass
class Halving:
    """The scores of each rung so far, and who goes on."""

    epochs: int
    scores: dict[int, list[float]] = field(default_factory=dict)

    def go_on(self, done: int, score: float) -> bool:
        """Whether a module with this score after `done` epochs is trained further."""
        if done >= self.epochs or done & (done - 1):
            return done < self.epochs
        before = self.scores.setdefault(done, [])
        fits = not before or score >= float(np.percentile(before, 100 * (1 - 1 / FACTOR)))
        before.append(score)
        return fits


def tune(
    modules: Mapping[str, "fx.GraphModule"], task: Task, tuning: "Tuning", folder: Path, *, halve: bool, workers: int = 0,
    on_step: Callable[[str, int, int, float], None] | None = None,
) -> dict[str, int]:  # fmt: skip
    """Fine-tune modules in place, as `compressors.finetune` does; how many epochs each was trained.

    Args:
        modules: by name, the most promising first.
        folder: of the files that hold their state after each epoch; where one is there, its module goes on behind it.
        halve: whether those that fall behind stop; what they are after their last epoch is kept all the same.
        workers: trained at once on Ray, which must run; with 0 one after another in this process.
        on_step: called with the module's name, `(name, step, steps, loss)`.

    Raises:
        DataError: the train split is empty or the loss not finite.
        RunError: training failed on Ray.
    """
    jobs = {
        name: _Job(folder / f"{_digest(module, tuning)}.safetensors", _digest(module, tuning)) for name, module in modules.items()
    }
    if workers and len(modules) > 1:
        _on_ray(modules, jobs, task, tuning, halve, workers)
    rule = Halving(tuning.epochs)
    epochs = {}
    for name, module in modules.items():
        go_on = rule.go_on if halve else (lambda done, score: done < tuning.epochs)
        if workers and len(modules) > 1:
            go_on = _as_before(jobs[name])
        keeper = jobs[name].keeper(task.split("search"), task.measure, go_on)
        tell = None if on_step is None else partial(on_step, name)
        _train(module, task.model, task.split("train"), tuning, task.augment, keeper, tell)
        epochs[name] = len(keeper.scores)
        log.info("%s: %d of %d epochs, scores %s", name, len(keeper.scores), tuning.epochs, keeper.scores)
    return epochs


@dataclass(frozen=True)
class _Job:
    """Where a module's state is kept, and what it depends on."""

    path: Path
    mark: str

    def keeper(self, batches: Sequence[Any], measure: Any, go_on: Callable[[int, float], bool]) -> Any:
        from tightrope.compressors.keeper import Keeper

        return Keeper(self.path, self.mark, lambda module: score_module(module, batches, measure).value, go_on)


def _as_before(job: _Job) -> Callable[[int, float], bool]:
    """Goes on as far as the file has come."""
    from tightrope.compressors.keeper import epochs_of

    held = epochs_of(job.path)
    return lambda done, score: done < held


def _digest(module: "fx.GraphModule", tuning: "Tuning") -> str:
    """What a fine-tuned module depends on, but for the data."""
    from tightrope.compressors.capture import checksum
    from tightrope.compressors.compress import origin

    text = json.dumps([origin(module).policy.to_json(), repr(tuning), checksum(module)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _train(
    module: "fx.GraphModule", dense: Any, train: Sequence[Any], tuning: "Tuning", augment: Any, keeper: Any, on_step: Any = None
) -> None:
    import torch

    from tightrope.compressors.finetune import finetune

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small nets gain little from more, and lose much where cores are shared
    try:
        finetune(module, dense, train, tuning, augment=augment, on_step=on_step, keeper=keeper)
    finally:
        torch.set_num_threads(threads)


def _on_ray(
    modules: Mapping[str, "fx.GraphModule"], jobs: Mapping[str, _Job], task: Task, tuning: "Tuning", halve: bool, workers: int
) -> None:
    """Train on Ray Tune; what comes of it is in the jobs' files."""
    import cloudpickle
    import ray

    os.environ |= {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    }
    from ray import tune as ray_tune
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    # The modules are trained, so each worker unpacks its own; the examples are shared, read-only. A graph's notes do not travel.
    notes = {name: module.meta.get("normed", ()) for name, module in modules.items()}
    own = ray.put(cloudpickle.dumps((dict(modules), notes, task.model, task.augment, task.measure, tuning, dict(jobs))))
    shared = ray.put(pack((task.split("train"), task.split("search"))))
    path = [str(Path(p).absolute()) for p in sys.path]
    asha = {"time_attr": "training_iteration", "max_t": tuning.epochs, "grace_period": 1, "reduction_factor": FACTOR}
    with tempfile.TemporaryDirectory() as folder, quiet():
        found = ray_tune.Tuner(
            ray_tune.with_resources(ray_tune.with_parameters(_one, own=[own], shared=[shared], path=path), {"cpu": 1}),
            param_space={"job": ray_tune.grid_search([*modules])},
            tune_config=ray_tune.TuneConfig(
                metric="score", mode="max", max_concurrent_trials=workers,
                scheduler=ASHAScheduler(**asha) if halve else FIFOScheduler(),
            ),
            run_config=ray_tune.RunConfig(
                storage_path=folder, verbose=0, failure_config=ray_tune.FailureConfig(max_failures=RETRIES)
            ),
        ).fit()  # fmt: skip
    if found.errors:
        raise RunError(f"fine-tuning failed on Ray: {str(found.errors[0]).strip().splitlines()[-1]}")


def _one(given: dict[str, Any], own: list[Any], shared: list[Any], path: list[str]) -> None:
    """What a Ray Tune trial does: train one module, and report after each epoch, also after those of its file."""
    import cloudpickle
    import ray
    from ray import tune as ray_tune

    sys.path += [p for p in path if p not in sys.path]
    modules, notes, dense, augment, measure, tuning, jobs = cloudpickle.loads(ray.get(own[0]))
    train, search = unpack(ray.get(shared[0]))

    def report(done: int, score: float) -> bool:
        ray_tune.report({"score": score, "epochs": done})
        return done < int(tuning.epochs)

    module = modules[given["job"]]
    module.meta["normed"] = notes[given["job"]]
    keeper = jobs[given["job"]].keeper(search, measure, report)
    _train(module, dense, train, tuning, augment, keeper)
