"""Timing of ONNX models side by side, so that drift and neighbours fall on all of them alike.

Models are visited in a fresh random order each round. A visit makes two calls back to back and times the second, by the CPU
time of the one thread that runs it, which a busy machine disturbs least; a model's figure is the low quartile over rounds.
"""

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from tightrope.estimators.measured.nodes import OVER
from tightrope.spaces.errors import DeviceError

QUARTILE = 25.0
CHUNK = 256  # sessions alive at once; one takes about 0.4 MB
Float = NDArray[np.float64]
_KINDS: dict[str, Any] = {
    "tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(int8)": np.int8, "tensor(int64)": np.int64,
    "tensor(int32)": np.int32, "tensor(bool)": np.bool_,
}  # fmt: skip


class Timed(Protocol):
    """Something to be timed, ready to be called."""

    def visit(self) -> int:
        """CPU nanoseconds of a call, in the state that a visit of its kind is timed in."""
        ...


class Runner:
    """A model loaded into ONNX Runtime on one thread, with inputs and outputs bound, ready to be called.

    `optimise=False` runs the graph as it is. Inputs are ones, but those that an output takes the memory of (`nodes.OVER`).

    Raises:
        DeviceError: ONNX Runtime cannot load the model.
    """

    def __init__(self, model: onnx.ModelProto | bytes, *, optimise: bool) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        level = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
        data = model if isinstance(model, bytes) else model.SerializeToString()
        try:
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors share no base class of their own
            raise DeviceError(f"ONNX Runtime cannot load a model to time: {error}") from error
        self.binding = self._session.io_binding()
        self.size_bytes = len(data)  # of the model, and the tensors that it reads and makes
        self._tensors = {}
        for given in self._session.get_inputs():
            array = np.ones(given.shape, _KINDS[given.type])
            self.size_bytes += array.nbytes
            self._tensors[given.name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            self.binding.bind_ortvalue_input(given.name, self._tensors[given.name])
        for made in self._session.get_outputs():
            self.size_bytes += 4 * prod(size for size in made.shape if isinstance(size, int))
            if made.name.startswith(OVER):
                self.binding.bind_ortvalue_output(made.name, self._tensors[made.name.removeprefix(OVER)])
            else:
                self.binding.bind_output(made.name, "cpu")
        self._call = self._session.run_with_iobinding
        self._call(self.binding)  # the first call allocates

    def visit(self) -> int:
        """CPU nanoseconds of the second of two calls."""
        call, binding = self._call, self.binding
        call(binding)
        start = time.thread_time_ns()
        call(binding)
        return time.thread_time_ns() - start


def time_rounds(runners: Sequence[Timed], rounds: int, rng: np.random.Generator) -> Float:
    """Milliseconds, `rounds x models`, each round in an order of its own."""
    found = np.empty((rounds, len(runners)))
    with uncollected():
        for row in found:
            for index in rng.permutation(len(runners)).tolist():
                row[index] = runners[index].visit() / 1e6
    return found


@contextmanager
def uncollected() -> Iterator[None]:
    """Python's collector of cycles is off: it looks through all that a process holds, a tenth of a second beside torch."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def low_quartile(samples: Float) -> Float:
    """The low quartile over rounds, of `rounds x models`."""
    found: Float = np.percentile(samples, QUARTILE, axis=0)
    return found


def noise_floor(samples: Float) -> float:
    """Mean relative difference of the models' figures between even and odd rounds, of `rounds x models`."""
    even, odd = low_quartile(samples[::2]), low_quartile(samples[1::2])
    return float(np.mean(np.abs(even / odd - 1)))


def measure(
    models: Mapping[str, onnx.ModelProto | bytes], reference: str, *, rounds: int = 60, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """Latency ratios of whole models to the one named `reference`, each timed with it in interleaved rounds.

    Returns:
        For each model the ratio and the ends of its 90 % interval, by bootstrap over rounds.
    """
    return ratios({name: Runner(m, optimise=True) for name, m in models.items()}, reference, rounds=rounds, seed=seed)


def ratios(
    models: Mapping[str, Timed], reference: str, *, rounds: int = 60, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """`measure` for whatever runs: ratios of latency to the one named `reference`, with the ends of their 90 % intervals.

    Each model takes its turns with the reference alone: among ten others a large net is slowed more than a small one (a ratio of
    0.165 came out as 0.159), and a model that is used has the machine's caches to itself.
    """
    if reference not in models:
        raise DeviceError(f"the reference {reference!r} must be one of the models, which are {sorted(models)}")
    rng, found = np.random.default_rng(seed), {reference: (1.0, 1.0, 1.0)}
    for name, model in models.items():
        if name == reference:
            continue
        samples = time_rounds([models[reference], model], rounds, rng)
        base, own = np.percentile(samples[rng.integers(0, rounds, (200, rounds))], QUARTILE, axis=1).T
        low, high = np.percentile(own / base, [5, 95])
        whole, part = low_quartile(samples)
        ratio = float(part / whole)
        found[name] = (ratio, min(float(low), ratio), max(float(high), ratio))
    return {name: found[name] for name in models}
