"""What is to be compressed: a model, its data and how it is judged."""

import importlib
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tightrope.spaces.cost import Score
from tightrope.spaces.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)
Metric = Callable[[Any, Any], Any]
SPLITS = ("calibration", "search", "test", "train")


def top1(outputs: Any, target: Any) -> Any:
    """1 for each example whose largest logit is its class, 0 otherwise, in percent: `n`-dim tensor of 0 and 100."""
    return (outputs.argmax(-1) == target).float().mul(100).flatten()


@dataclass(frozen=True)
class Task:
    """A trained model, example inputs to trace it with, and its splits.

    Each split is an iterable of batches `(inputs, target)`; `inputs` is a tensor, a tuple or a dict, as the model takes them.
    `calibration` (a few hundred examples, from the training data) sets ranges and statistics; every trial is scored on
    `search`; `test` is used once, for the report; `train` only to fine-tune. `metric` is `top1` or a callable of a batch's
    outputs and targets that returns a score for each example (or one for the batch), higher is better. `augment` is
    applied to training inputs, with a generator.
    """

    model: "nn.Module"
    example_inputs: Any
    calibration: Iterable[Any]
    search: Iterable[Any]
    test: Iterable[Any] = ()
    train: Iterable[Any] = ()
    metric: str | Metric = "top1"
    augment: Callable[[Any, Any], Any] | None = None
    _splits: dict[str, list[Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.metric, str) and self.metric != "top1":
            raise ConfigError(f"metric must be 'top1' or a callable of (outputs, target), got {self.metric!r}")

    @property
    def metric_name(self) -> str:
        return self.metric if isinstance(self.metric, str) else getattr(self.metric, "__name__", "metric")

    @property
    def measure(self) -> Metric:
        return top1 if isinstance(self.metric, str) else self.metric

    def split(self, name: str) -> list[tuple[Any, Any]]:
        """The batches of a split; iterated once and kept.

        Raises:
            DataError: it is empty, a batch is no pair, or inputs and targets differ in length.
        """
        if name not in self._splits:
            try:
                batches = list(getattr(self, name))
            except TypeError:
                raise DataError(f"the {name} split must be an iterable of (inputs, target) batches") from None
            if not batches:
                raise DataError(f"the {name} split is empty; it must hold at least one batch of (inputs, target)")
            for number, batch in enumerate(batches):
                if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                    raise DataError(
                        f"batch {number} of the {name} split must be a pair (inputs, target), got {type(batch).__name__}"
                    )
                count, wanted = length(batch[0]), length(batch[1])
                if count < 1 or count != wanted:
                    raise DataError(f"batch {number} of the {name} split has {count} inputs and {wanted} targets")
            self._splits[name] = [(x, y) for x, y in batches]
        return self._splits[name]

    def has(self, name: str) -> bool:
        """Whether a split was given."""
        value = getattr(self, name)
        return not (isinstance(value, (tuple, list)) and len(value) == 0)

    def check(self) -> None:
        """See that the inputs of calibration, search and `example_inputs` have one shape, but for the batch, and all is on the CPU.

        Raises:
            DataError: it is not so.
        """
        first = self.split("search")[0][0]
        parts = (*self.model.parameters(), *self.model.buffers(), *tensors(self.example_inputs), *tensors(first))
        places = {str(getattr(t, "device", "cpu")) for t in parts}
        away = sorted(place for place in places if not place.startswith("cpu"))
        if away:
            raise DataError(
                f"the model and its data must be on the CPU, where they are calibrated and trials run, but some are on {away[0]}: "
                "call .cpu() on them"
            )
        for inputs, _ in self.split("calibration")[:1]:
            if [tuple(t.shape[1:]) for t in tensors(inputs)] != [tuple(t.shape[1:]) for t in tensors(first)]:
                raise DataError("inputs of the calibration and of the search split differ in shape")
        example = tensors(self.example_inputs)
        if [tuple(t.shape[1:]) for t in example] != [tuple(t.shape[1:]) for t in tensors(first)]:
            raise DataError(
                f"example_inputs have shapes {[tuple(t.shape) for t in example]}, but a batch of the search split "
                f"{[tuple(t.shape) for t in tensors(first)]}; all but the first size must agree"
            )


def tensors(value: Any) -> list[Any]:
    """The tensors among a model's inputs, in order."""
    if hasattr(value, "shape"):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return [t for item in items for t in tensors(item)]


def length(value: Any) -> int:
    """Examples in a batch of inputs or targets."""
    found = tensors(value)
    return int(found[0].shape[0]) if found and len(found[0].shape) else (len(value) if isinstance(value, Sequence) else 0)


def score_of(values: Sequence[Any]) -> Score:
    """The score of per-example values, batch by batch; a batch that gives one number counts as one example.

    Raises:
        DataError: a value is not a finite number.
    """
    flat: NDArray[np.float64] = np.concatenate([np.atleast_1d(np.asarray(v, np.float64)).ravel() for v in values])
    if not np.isfinite(flat).all():
        raise DataError(f"the metric must return finite numbers, got {flat[~np.isfinite(flat)][0]}")
    return Score(float(flat.mean()), float(flat.std(ddof=1) / np.sqrt(len(flat))) if len(flat) > 1 else 0.0, len(flat))


def resolve(reference: str, what: str) -> Any:
    """What `module:name` names, importing from the working folder too.

    Raises:
        ConfigError: it is not of that form, or cannot be imported.
    """
    module, colon, name = reference.partition(":")
    if not colon or not module or not name:
        raise ConfigError(f"{what} must be written as module:name, got {reference!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{what} {reference!r} cannot be imported: {error}") from error
    except Exception as error:
        raise ConfigError(f"{what} {reference!r} fails on import: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{what} {reference!r}: module {module!r} has no {part!r}")
        found = getattr(found, part)
    return found


def load(model: str, data: str, metric: str = "top1") -> Task:
    """The task of three references `module:function`, as configurations have them.

    `model` is called for the trained model, `data` for a dict of splits. A metric without a colon is one of ours.
    """
    from torch import nn

    built = _call(model, "model")
    if not isinstance(built, nn.Module):
        raise ConfigError(f"model {model!r} must return an nn.Module, got {type(built).__name__}")
    splits = _call(data, "data")
    if not isinstance(splits, Mapping) or not {"calibration", "search"} <= set(splits):
        found = sorted(splits) if isinstance(splits, Mapping) else type(splits).__name__
        raise ConfigError(f"data {data!r} must return a dict with calibration, search, test and train, got {found}")
    search = list(splits["search"])
    if not search:
        raise DataError(f"the search split of {data!r} is empty; it must hold at least one batch of (inputs, target)")
    measure = resolve(metric, "metric") if ":" in metric else metric
    return Task(
        built, one_example(search[0][0]), splits["calibration"], search, splits.get("test", ()), splits.get("train", ()), measure,
        splits.get("augment"),
    )  # fmt: skip


def one_example(inputs: Any) -> Any:
    """The first example of a batch of inputs, as a batch of one."""
    if isinstance(inputs, Mapping):
        return {key: one_example(value) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(map(one_example, inputs))
    return inputs[:1] if hasattr(inputs, "shape") and len(inputs.shape) else inputs


def _call(reference: str, what: str) -> Any:
    maker = resolve(reference, what)
    try:
        return maker() if isinstance(maker, type) or not hasattr(maker, "parameters") else maker
    except Exception as error:
        from tightrope.spaces.errors import TightropeError

        if isinstance(error, TightropeError):
            raise
        raise ConfigError(f"{what} {reference!r} fails: {type(error).__name__}: {error}") from error
