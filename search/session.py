"""A whole run: prepare, search, fine-tune the front, export, measure, report."""

import json
import logging
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightrope.estimators.threads import one_blas_thread
from tightrope.search import config as configs
from tightrope.search.config import Config
from tightrope.search.distribute import Executor, pool
from tightrope.search.edge import tightened
from tightrope.search.progress import Quiet, default
from tightrope.search.study import Study
from tightrope.search.task import Task, load
from tightrope.spaces.budget import Budget
from tightrope.spaces.errors import RunError
from tightrope.spaces.policy import Policy, write_atomically
from tightrope.spaces.space import Space

if TYPE_CHECKING:
    from torch import fx

    from tightrope.compressors.prepare import Prepared
    from tightrope.estimators.device import Device
    from tightrope.search.evaluate import Source

log = logging.getLogger(__name__)
TUNING = "tuning"
"""Of a run folder: the states of fine-tuning, for as long as it lasts."""


@dataclass
class Setting:
    """What a run works with, once its model is prepared and its device ready."""

    config: Config
    task: Task
    prepared: "Prepared"
    source: "Source"
    device: "Device"
    space: Space
    progress: Quiet

    @property
    def measured(self) -> bool:
        """Whether the device is a runtime of this machine, and not a model of another."""
        from tightrope.estimators.measured.base import Measured

        return isinstance(self.device, Measured)


@one_blas_thread()
def set_up(task: Task, config: Config, progress: Quiet | None = None, *, tables: bool = True) -> Setting:
    """Trace and calibrate the model, make the device ready (its latency table is built at first use) and lay out the space.

    Args:
        tables: False leaves the device without its latency table, so that it costs nothing yet.
    """
    from tightrope.compressors.export.skeleton import skeleton_of
    from tightrope.compressors.sensitivity import losses
    from tightrope.estimators.measured.ort import saturates
    from tightrope.estimators.registry import make
    from tightrope.search.evaluate import Source
    from tightrope.search.kernels import KernelSource

    progress = progress or Quiet()
    task.check()
    progress.phase("prepare the model")
    prepared = _prepare(task, config)
    device = make(config.device, batch=config.batch)
    tell: Any = getattr(device, "budgeted", None)
    if tell is not None:
        tell({limit.metric for limit in Budget.parse(config.budget).limits})
    asked = config.space
    space = Space.build(
        prepared.network, device.pairs if asked.bits else (lambda layer: [max(device.pairs(layer))]), least_width=asked.least_width,
        width_step=asked.width_step, rank_shares=asked.rank_shares, form=asked.form, dropped=device.notes,
        channels=asked.channels, ranks=asked.ranks,
    )  # fmt: skip
    space = replace(space, losses=losses(prepared, space))
    for note in space.dropped:
        log.info("%s: %s", device.name, note)
    source = (KernelSource if device.name == "torch-cpu" else Source)(prepared, skeleton_of(prepared))
    ready: Any = getattr(device, "prepare", None)
    if ready is not None and tables:
        progress.phase(f"latency table of {device.name}")
        ready(prepared.network, space, source, progress=progress.step)
    if device.name not in ("ort-cpu", "torch-cpu") and saturates():
        log.warning(
            "on this processor 8-bit products of ONNX Runtime saturate where two large ones meet, and those of %s do not: trials "
            "are scored too low; search on a processor with VNNI", device.name,
        )  # fmt: skip
    return Setting(config, task, prepared, source, device, space, progress)


def executor(setting: Setting) -> Executor:
    """Workers that score on the search split; what is prepared is shared between them, read-only."""
    from tightrope.search.evaluate import evaluator_for, pack, unpack

    scorer = evaluator_for(setting.source, setting.task)
    if setting.config.workers == 0:
        return pool(lambda arrays: scorer, workers=0)
    config = setting.config
    return pool(unpack, pack(scorer), workers=config.workers, address=config.address, patience_seconds=config.patience_seconds)


def search(
    task: Task, *, progress: Quiet | None = None, on_study: Callable[[Study, Setting], None] | None = None, **settings: Any
) -> Study:
    """Search a task for the best policy within a budget, and finish it: fine-tuned, exported, measured, reported.

    Args:
        progress: where to report; by default a bar on a terminal, else the log.
        on_study: called once, when the search begins.
        settings: the fields of `Config`: `budget`, `device`, `agent`, `trials`, `workers`, `seed`, `out`, `space`, ...

    Returns:
        The study; its run folder `out` holds `best/model.onnx`, `best/policy.json`, `best/report.md` and the journal.

    Raises:
        TightropeError: see `spaces.errors`; nothing is written over in a folder that holds another search.
    """
    return run(task, configs.make(settings), progress or default(), on_study)


def run(task: Task, config: Config, progress: Quiet, on_study: Callable[[Study, Setting], None] | None = None) -> Study:
    """`search` with a checked configuration."""
    folder = Path(config.out)
    if (folder / "trials.jsonl").exists() and (folder / "trials.jsonl").stat().st_size:
        raise RunError(f"{folder} already holds a search; go on with `tightrope resume {folder}`, or choose another `out`")
    try:
        setting = set_up(task, config, progress)
        progress.phase("start the workers")
        workers = executor(setting)
        try:
            study = Study.start(
                setting.space, setting.device, Budget.parse(config.budget), workers, folder=folder, name=folder.name,
                agent=config.agent, settings=config.agent_settings, trials=config.trials, seed=config.seed, metric=task.metric_name,
                stopping=config.stopping,
                hold=lambda problem: tightened(problem, setting),
            )  # fmt: skip
            config.save(folder / "config.yaml")
            write_network(setting, folder)
            return _go(study, setting, workers, folder, on_study)
        finally:
            workers.close()
    finally:
        progress.close()


def resume(
    folder: str | Path, task: Task | None = None, progress: Quiet | None = None, trials: int | None = None,
    address: str | None = None,
) -> Study:  # fmt: skip
    """Go on with the search of a run folder, wherever it stopped, and finish it.

    Args:
        task: the same task again; without it, it is loaded as `model` and `data` of the run's configuration say.
        trials: how many in all, if more than were planned.
        address: of another Ray cluster than the one that it began on; `local` starts Ray here.
    """
    folder, progress = Path(folder), progress or default()
    config = configs.load(folder / "config.yaml", address=address)
    if task is None:
        if not config.model:
            raise RunError(f"{folder} was begun from Python: pass its task to resume()")
        task = load(config.model, config.data, config.metric)
    try:
        setting = set_up(task, config, progress)
        progress.phase("start the workers")
        workers = executor(setting)
        try:
            return _go(Study.resume(folder, setting.space, setting.device), setting, workers, folder, None, trials)
        finally:
            workers.close()
    finally:
        progress.close()


def _go(
    study: Study, setting: Setting, workers: Executor, folder: Path,
    on_study: Callable[[Study, Setting], None] | None, trials: int | None = None,
) -> Study:  # fmt: skip
    from tightrope.search.finish import finish
    from tightrope.search.report.scalars import Board

    with study, Board(folder) as board:
        if on_study is not None:
            on_study(study, setting)
        setting.progress.phase(f"search with {study.header.agent}", study.header.trials)
        before = setting.prepared.checksum()
        study.run(workers, trials, on_trial=[board, setting.progress.trial])
        report = finish(study, setting, workers, folder)
        if setting.prepared.checksum() != before:
            raise RunError("the base weights have changed during the search; the scores of this run cannot be trusted")
        board.finish(study, report.markdown())
    return study


def write_network(setting: Setting, folder: Path) -> None:
    """Write `network.json` of a run."""
    write_atomically(folder / "network.json", json.dumps(setting.prepared.network.to_json(), indent=1) + "\n")


def compress(task: Task, policy: Policy, *, config: Config | None = None) -> "fx.GraphModule":
    """The task's model under a policy: a plain, smaller `nn.Module`, not fine-tuned."""
    from tightrope.compressors.compress import compress as apply

    return apply(task.model, policy, _prepare(task, config or Config()))


def _prepare(task: Task, config: Config) -> "Prepared":
    from tightrope.compressors.prepare import Settings, prepare

    settings = Settings(**config.compress.model_dump())
    return prepare(task.model, task.example_inputs, task.split("calibration"), settings, config.seed)


def tuned(
    modules: "Mapping[str, fx.GraphModule]", task: Task, config: Config, progress: Quiet, folder: Path, *,
    halve: Collection[str] = (), workers: int = 0,
) -> None:  # fmt: skip
    """Recalibrate compressed modules in place and, where there is a train split, fine-tune them as the configuration says.

    Args:
        modules: by the names under which progress is told, the most promising first.
        folder: of their states after each epoch, behind which fine-tuning goes on that was killed.
        halve, workers: as in `tuning.tune`: who stops early that falls behind, and how many are trained at once on Ray.
    """
    from tightrope.compressors.finetune import Tuning
    from tightrope.compressors.recalibrate import recalibrate
    from tightrope.search.tuning import tune

    for module in modules.values():
        recalibrate(module, task.split("calibration"))
    if config.finetune.epochs == 0 or not task.has("train"):
        return
    tuning = Tuning(**config.finetune.model_dump(exclude={"candidates"}), seed=config.seed)
    tune(modules, task, tuning, folder, halve=halve, workers=workers, on_step=progress.step)


def _again(run_folder: Path) -> tuple[Task, Config]:
    """The task and configuration of a run folder, or of a YAML file."""
    config = configs.load(run_folder if run_folder.is_file() else run_folder / "config.yaml")
    if (run_folder / "demo.json").exists():
        from tightrope.search.demo import task

        return task(config.seed), config
    if not config.model:
        raise RunError(f"{run_folder} was begun from Python, where its model lives; use tightrope.export() there")
    return load(config.model, config.data, config.metric), config


def _policy(run_folder: Path, trial: int | None) -> Policy:
    """The policy of a trial of a run; of its best if None."""
    from tightrope.search import journal

    if trial is None:
        path = run_folder / "best" / "policy.json"
        if not path.exists():
            raise RunError(f"{run_folder} has no best policy yet; name one with --trial, or finish it with `tightrope resume`")
        return Policy.load(path)
    found = {t.number: t.policy for t in journal.read(run_folder).trials}
    if trial not in found:
        raise RunError(f"{run_folder} has no trial {trial}; its trials are 0 to {max(found, default=-1)}")
    return found[trial]


def export_run(run_folder: Path, trial: int | None, form: str, output: Path | None, finetune: bool = True) -> Path:
    """Write a policy of a run as `onnx`, `packed` or `policy`; the best as it was fine-tuned, a trial's made anew."""
    from tightrope.compressors.compress import compress as apply
    from tightrope.compressors.export import export
    from tightrope.spaces.errors import ExportError

    suffixes = {"onnx": ".onnx", "packed": ".safetensors", "policy": ".json"}
    if form not in suffixes:
        raise ExportError(f"format must be one of {', '.join(suffixes)}, got {form!r}")
    policy = _policy(run_folder, trial)
    name = {"onnx": "model", "packed": "model", "policy": "policy"}[form] if trial is None else f"trial-{trial}"
    target = output or run_folder / ("best" if trial is None else ".") / (name + suffixes[form])
    kept = run_folder / "best" / {"onnx": "model.onnx", "packed": "model.safetensors", "policy": "policy.json"}[form]
    if form == "policy":
        policy.save(target)
        return target
    if trial is None:
        if not kept.exists():
            raise ExportError(f"{run_folder} is a search on a device that runs no ONNX file; use --format packed")
        if target != kept:
            write_atomically(target, kept.read_bytes())
        return target
    task, config = _again(run_folder)
    progress = default()
    module = apply(task.model, policy, _prepare(task, config))
    if finetune:
        progress.phase("fine-tune")
        tuned({f"trial {trial}": module}, task, config, progress, run_folder / TUNING)
        shutil.rmtree(run_folder / TUNING, ignore_errors=True)
    progress.close()
    return export(module, target, device=config.device, batch=config.batch)


def probe_job(config: Config, isa: str | None = None) -> str:
    """The probe job that covers the space of a search: `estimators.measured.job` says what it holds.

    Args:
        isa: instruction set of the device, one of `estimators.measured.layouts.BLOCKS`; this machine's unless given.
    """
    from tightrope.estimators.measured import job
    from tightrope.estimators.measured.base import mark_of
    from tightrope.estimators.measured.ort import OrtCpu

    device = OrtCpu(config.batch)
    config = config.model_copy(update={"device": device.name})
    with closing(default()) as progress:
        setting = set_up(load(config.model, config.data, config.metric), config, progress, tables=False)
        network = setting.prepared.network
        mark = mark_of(network, setting.space, config.batch, {**device.versions, "isa": isa or device.isa})
        progress.phase("models of the probe job")
        encode = device.encoder(network)
        return "".join(job.write(network, setting.space, setting.source, encode, mark, progress.step, seed=config.seed))


def estimate_run(run_folder: Path, policy: Path | None, trial: int | None, device: str | None) -> tuple[Any, Any, Any]:
    """Network, cost of a policy and cost of the dense model, on the device of a run or another."""
    task, config = _again(run_folder)
    if device is not None:
        config = config.model_copy(update={"device": device})
    setting = set_up(task, config, default())
    setting.progress.close()
    network = setting.prepared.network
    if policy is not None:
        chosen = Policy.load(policy, network)
    elif trial is not None:
        chosen = _policy(run_folder, trial).normal(network)
    else:
        chosen = setting.space.dense
    return network, setting.device.estimate(network, chosen), setting.device.estimate(network, setting.space.dense)
