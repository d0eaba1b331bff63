"""Fine-tuning several compressed modules: those that fall behind stop, and a kill loses at most the epoch in progress.

The rule is asynchronous successive halving (Li et al. 2020, A System for Massively Parallel Hyperparameter Tuning, algorithm 2,
in the form that stops instead of pausing): after 1, 2, 4, ... epochs a module goes on only if it scores no worse than the
median of those that came to that rung before it. With workers Ray Tune runs it, and who comes to a rung before whom depends on
how fast they are; without, the modules take turns in this process. What is gone on with after a kill are our own files
(`compressors/keeper.py`), which are on the driver's machine wherever the workers are; Ray Tune's are thrown away.
"""

import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tightrope.search.distribute import quiet
from tightrope.search.evaluate import held, let_go, pack, score_module, unpack
from tightrope.search.task import Task
from tightrope.spaces.errors import RunError
from tightrope.spaces.policy import write_atomically

if TYPE_CHECKING:
    from torch import fx

    from tightrope.compressors.finetune import Tuning

log = logging.getLogger(__name__)
OnStep = Callable[[int, int, str], None]
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
    modules: Mapping[str, "fx.GraphModule"], task: Task, tuning: "Tuning", folder: Path, *, halve: Collection[str] = (),
    workers: int = 0, on_step: OnStep | None = None,
) -> dict[str, int]:  # fmt: skip
    """Fine-tune modules in place, as `compressors.finetune` does; how many epochs each was trained.

    Args:
        modules: by name, the most promising first.
        folder: of the files that hold their state after each epoch; where one is there, its module goes on behind it.
        halve: names of those that stop when they fall behind among themselves; what they are then is kept all the same.
        workers: trained at once on Ray, which must run; with 0 one after another in this process.
        on_step: called with `(step, steps, note)`: steps of one module, or with workers epochs of all.

    Raises:
        DataError: the train split is empty or the loss not finite.
        RunError: training failed on Ray.
    """
    jobs = {
        name: _Job(folder / f"{_digest(module, tuning)}.safetensors", _digest(module, tuning)) for name, module in modules.items()
    }
    spread = workers > 0 and len(modules) > 1
    if spread:
        _on_ray(modules, jobs, task, tuning, halve, workers, on_step)
    rule = Halving(tuning.epochs)
    epochs = {}
    for name, module in modules.items():
        go_on = rule.go_on if name in halve else (lambda done, score: done < tuning.epochs)
        if spread:
            go_on = _as_before(jobs[name])
        keeper = jobs[name].keeper(task.split("search"), task.measure, go_on)
        _train(module, task.model, task.split("train"), tuning, task.augment, keeper, _noted(name, on_step))
        epochs[name] = len(keeper.scores)
        log.info("%s: %d of %d epochs, scores %s", name, len(keeper.scores), tuning.epochs, keeper.scores)
    return epochs


def _noted(name: str, on_step: OnStep | None) -> Callable[[int, int, float], None] | None:
    """What `finetune` calls after a step of this module."""
    return None if on_step is None else (lambda step, steps, loss: on_step(step, steps, f"{name}, loss {loss:.3f}"))


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

    last = epochs_of(job.path)
    return lambda done, score: done < last


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
    modules: Mapping[str, "fx.GraphModule"], jobs: Mapping[str, _Job], task: Task, tuning: "Tuning", halve: Collection[str],
    workers: int, on_step: OnStep | None,
) -> None:  # fmt: skip
    """Train on Ray Tune; what comes of it is in the jobs' files."""
    import cloudpickle
    import ray

    os.environ |= {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupt stops the run, not only this part of it
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    }
    from ray import tune as ray_tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # The modules are trained, so each worker unpacks its own; the examples are shared. A graph's notes do not travel.
    notes = {name: module.meta.get("normed", ()) for name, module in modules.items()}
    own = ray.put(cloudpickle.dumps((dict(modules), notes, task.model, task.augment, task.measure, tuning, dict(jobs), set(halve))))
    shared = ray.put(pack(held((task.split("train"), task.split("search")))))
    path = [str(Path(p).absolute()) for p in sys.path]
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    shelf = ray.remote(_Shelf).options(num_cpus=0, scheduling_strategy=here).remote()
    given = {"own": [own], "shared": [shared], "path": path, "shelf": shelf}
    with tempfile.TemporaryDirectory() as folder, quiet():
        found = ray_tune.Tuner(
            ray_tune.with_resources(ray_tune.with_parameters(_one, **given), {"cpu": 1}),
            param_space={"job": ray_tune.grid_search([*modules])},
            tune_config=ray_tune.TuneConfig(
                metric="score", mode="max", max_concurrent_trials=workers,
                scheduler=ASHAScheduler(time_attr="rung", max_t=tuning.epochs, grace_period=1, reduction_factor=FACTOR),
            ),
            run_config=ray_tune.RunConfig(
                storage_path=folder, verbose=0, failure_config=ray_tune.FailureConfig(max_failures=RETRIES),
                callbacks=[] if on_step is None else [_teller([*modules], tuning.epochs, on_step)],
            ),
        ).fit()  # fmt: skip
    ray.kill(shelf)
    if found.errors:
        raise RunError(f"fine-tuning failed on Ray: {str(found.errors[0]).strip().splitlines()[-1]}")


class _Shelf:
    """The files of fine-tuning, on the driver's machine: an actor through which workers on any machine read and write them."""

    def read(self, path: Path) -> bytes | None:
        return path.read_bytes() if path.exists() else None

    def write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)


def _teller(names: Sequence[str], epochs: int, on_step: OnStep) -> Any:
    """What Ray Tune calls: tells the epochs done of all modules; those that a module which has stopped was spared count as done."""
    from ray.tune import Callback

    done = dict.fromkeys(names, 0)

    class Teller(Callback):  # type: ignore[misc]
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            name = trial.config["job"]
            done[name] = result["epochs"]
            on_step(sum(done.values()), len(done) * epochs, f"{name}, {result['score']:.2f} after epoch {result['epochs']}")

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            done[trial.config["job"]] = epochs

        def __reduce__(self) -> Any:  # Ray Tune writes its callbacks down, to go on with; which we do not
            return Callback, ()

    return Teller()


def _one(given: dict[str, Any], own: list[Any], shared: list[Any], path: list[str], shelf: Any) -> None:
    """What a Ray Tune trial does: train one module, and report after each epoch, also after those of its file."""
    import cloudpickle
    import ray
    from ray import tune as ray_tune

    from tightrope.compressors.keeper import epochs_of

    sys.path += [p for p in path if p not in sys.path]
    name = given["job"]
    modules, notes, dense, augment, measure, tuning, jobs, halve = cloudpickle.loads(ray.get(own[0]))
    train, search = let_go(unpack(ray.get(shared[0])))
    module = modules[name]
    module.meta["normed"] = notes[name]
    with tempfile.TemporaryDirectory() as folder:
        job = replace(jobs[name], path=Path(folder) / jobs[name].path.name)
        kept = ray.get(shelf.read.remote(jobs[name].path))
        if kept is not None:
            job.path.write_bytes(kept)
        before = epochs_of(job.path)

        def report(done: int, score: float) -> bool:
            if done > before:
                ray.get(shelf.write.remote(jobs[name].path, job.path.read_bytes()))
            rung = {"rung": done} if name in halve else {}  # by which alone ASHA stops a module
            ray_tune.report({"score": score, "epochs": done, **rung})
            return done < int(tuning.epochs)

        _train(module, dense, train, tuning, augment, job.keeper(search, measure, report))
