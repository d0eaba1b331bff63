"""Scoring a policy: on the very graph that it would be exported to, run by ONNX Runtime; or, where it cannot be, in torch."""

import ctypes
import logging
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tightrope.search.stopping import Pairing, Rival, Scored
from tightrope.search.task import Task, score_of, tensors
from tightrope.spaces.cost import Score
from tightrope.spaces.errors import DataError, ExportError
from tightrope.spaces.policy import Choice, Policy

if TYPE_CHECKING:
    import onnx

    from tightrope.compressors.export.skeleton import Skeleton
    from tightrope.compressors.payload import Payload
    from tightrope.compressors.prepare import Prepared
    from tightrope.estimators.measured.clock import Timed
    from tightrope.search.distribute import Evaluator

log = logging.getLogger(__name__)
BATCHES = (8, 16, 32, 64, 128, 256)
"""Batch sizes tried for scoring: small ones keep a net's activations in the cache, large ones pay each call's fixed cost once."""
TIMED = 256  # examples on which they are timed
ORDER = 20_260  # seed of the order in which examples are scored


class Source:
    """Graphs of policies, as devices time them and trials run them (`estimators/measured` says what it asks of a source)."""

    def __init__(self, prepared: "Prepared", skeleton: "Skeleton") -> None:
        self.prepared, self._skeleton = prepared, skeleton

    def skeleton(self, widths: Mapping[str, int], batch: int) -> "onnx.ModelProto":
        return self._skeleton.at(widths, batch)

    @property
    def any_batch(self) -> bool:
        """Whether graphs of all batch sizes follow from one, so that another costs no export."""
        return self._skeleton.any_batch

    def model(self, policy: Policy, batch: int = 1) -> "onnx.ModelProto":
        """The file that the policy would be exported to, before any fine-tuning."""
        from tightrope.compressors.assemble import assemble

        return self.written(assemble(self.prepared, policy), batch)

    def written(self, payload: "Payload", batch: int = 1) -> "onnx.ModelProto":
        """The graph of a payload at a static batch size."""
        from tightrope.compressors.export.onnx import write

        network = self.prepared.network
        return write(self.skeleton(payload.policy.all_widths(network), batch), network, payload)

    def timed(self, payload: "Payload", batch: int = 1) -> "Timed":
        """The graph of a payload, asserted to run as its policy says, ready to be timed beside others."""
        from tightrope.compressors.export.onnx import check
        from tightrope.estimators.measured.clock import Runner

        model = self.written(payload, batch)
        check(model, self.prepared.network, payload.policy)
        return Runner(model, optimise=True)

    def evaluator(self, task: Task, split: str) -> "OrtEvaluator | TorchEvaluator":
        """An evaluator that is faithful to what would be exported."""
        try:
            return OrtEvaluator(self, task, split)
        except ExportError as error:
            log.warning("trials are scored in torch, which is slower: %s", error)
            return TorchEvaluator(self.prepared, task, split)


class Examples:
    """One split as arrays, and the metric that judges outputs for it.

    Under `top1` the examples stand in one random order, the same for all policies, so that a first part of them is a fair
    sample. Another metric may look at a whole batch, so the loader's order and batches are kept for it.
    """

    def __init__(self, task: Task, split: str) -> None:
        batches = task.split(split)
        self.metric = task.measure
        self.inputs = [
            np.concatenate([np.asarray(t) for t in column]) for column in zip(*(tensors(x) for x, _ in batches), strict=True)
        ]
        self.targets = [np.asarray(y) for _, y in batches]
        self.most = max(len(y) for y in self.targets)  # in a batch of the loader
        self.paired = isinstance(task.metric, str) and all(y.ndim == 1 for y in self.targets)
        if self.paired:
            order = np.random.default_rng(ORDER).permutation(len(self))
            self.inputs = [x[order] for x in self.inputs]
            self.targets = [np.concatenate(self.targets)[order]]

    def __len__(self) -> int:
        return len(self.inputs[0])

    def rows(self, start: int, count: int) -> list[NDArray[Any]]:
        """`count` examples from `start` on; the last one is repeated where the split ends."""
        found = [x[start : start + count] for x in self.inputs]
        missing = count - len(found[0])
        return [np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]) for x in found] if missing else found

    def judge(self, outputs: NDArray[np.float32]) -> Score:
        """The metric of outputs for the whole split, batch by batch as the loader had them."""
        import torch

        values, start = [], 0
        for target in self.targets:
            rows = torch.from_numpy(outputs[start : start + len(target)])
            values.append(self.metric(rows, torch.from_numpy(target.copy())))
            start += len(target)
        return score_of(values)

    def right(self, outputs: NDArray[np.float32], start: int) -> NDArray[np.bool_]:
        """Which of the examples from `start` on are classified as they should be, under `top1`."""
        found: NDArray[np.bool_] = outputs.argmax(-1) == self.targets[0][start : start + len(outputs)]
        return found.reshape(-1)


Run = Callable[[list[NDArray[Any]]], NDArray[np.float32]]


class OrtEvaluator:
    """Scores policies on one split in ONNX Runtime, one thread.

    The batch is the loader's (at most 256) until `choose_batch` has timed others.
    """

    def __init__(self, source: Source, task: Task, split: str = "search") -> None:
        self.source, self.examples = source, Examples(task, split)
        traced = source.prepared.traced
        fixed = traced.skeleton.meta["batch"] if traced else None
        self.batch: int = fixed or min(BATCHES[-1], self.examples.most)
        source.skeleton(source.prepared.network.widths, self.batch)  # learnt here, so that workers need not

    def evaluate(self, policy: Policy) -> Score:
        """The score of a policy on the split."""
        return self.compare(policy, None)[0]

    def compare(self, policy: Policy, rival: Rival | None) -> Scored:
        """The score of a policy, and which examples it has right; it ends early if it falls behind its rival for good."""
        return self._scored(self.source.model(policy, self.batch), rival)

    def score(self, model: "onnx.ModelProto") -> Score:
        """The score of a graph at this evaluator's batch size."""
        return self._scored(model, None)[0]

    def score_tuned(self, module: Any) -> Score:
        """The score of the graph that a fine-tuned module exports to."""
        from tightrope.compressors.compress import payload_of

        return self.score(self.source.written(payload_of(module), self.batch))

    def _scored(self, model: "onnx.ModelProto", rival: Rival | None) -> Scored:
        found = scored(self.examples, runner(model), self.batch, rival)
        _trim()(0)
        return found

    def outputs(self, model: "onnx.ModelProto") -> NDArray[np.float32]:
        """The first floating-point output for every example of the split."""
        return np.concatenate([found for _, found in stream(self.examples, runner(model), self.batch)])

    def choose_batch(self) -> float:
        """Take the batch size that is fastest on the mean of two policies; the CPU seconds of one example at it.

        The policies keep half of all channels, one in floating point and one in 8-bit integers. Batch sizes do not change what
        is computed for an example. Where the graph holds for one batch size only, that one stays.
        """
        network, examples = self.source.prepared.network, self.examples
        half = {g: max(1, w // 2) for g, w in network.widths.items()}
        policies = [
            Policy.make(network, half, {layer.name: Choice(*pair) for layer in network.layers}) for pair in ((32, 32), (8, 8))
        ]
        able = BATCHES if self.source.any_batch else (self.batch,)
        sizes = [b for b in able if b <= max(len(examples), BATCHES[0])]
        runs = {(b, p): runner(self.source.model(p, b)) for b in sizes for p in policies}
        count = min(TIMED, len(examples))
        seconds = dict.fromkeys(sizes, np.inf)
        for _ in range(3):
            for b in sizes:
                seconds[b] = min(seconds[b], sum(timed(runs[b, p], examples, b, count) for p in policies))
        self.batch = min(sizes, key=lambda b: seconds[b])
        return float(seconds[self.batch]) / count / len(policies)


class TorchEvaluator:
    """Scores policies on one split by the compressed module itself: slower, for models that ONNX cannot hold."""

    def __init__(self, prepared: "Prepared", task: Task, split: str = "search") -> None:
        self.prepared, self.metric, self.batches = prepared, task.measure, task.split(split)
        self._traced = prepared.traced  # which `prepared` leaves behind when it travels to a worker

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "batches": held(self.batches)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.batches = let_go(self.batches)
        self.prepared.traced = self._traced

    def evaluate(self, policy: Policy) -> Score:
        """The score of a policy on the split."""
        from tightrope.compressors.compress import compress

        return self.score_tuned(compress(None, policy, self.prepared))

    def score_tuned(self, module: Any) -> Score:
        """The score of a module, fine-tuned or not."""
        return score_module(module, self.batches, self.metric)


def runner(model: "onnx.ModelProto") -> Run:
    """Runs a graph: arrays of one batch to its first floating-point output."""
    session = open_session(model.SerializeToString())
    names = [i.name for i in session.get_inputs()]
    wanted = next(o.name for o in session.get_outputs() if o.type == "tensor(float)")

    def run(rows: list[NDArray[Any]]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = session.run([wanted], dict(zip(names, rows, strict=False)))[0]
        return found

    return run


def stream(examples: Examples, run: Run, batch: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Outputs batch by batch, each with the index of its first example."""
    for start in range(0, len(examples), batch):
        yield start, run(examples.rows(start, batch))[: len(examples) - start]


def scored(examples: Examples, run: Run, batch: int, rival: Rival | None) -> Scored:
    """The score of what `run` computes; under `top1` also which examples are right, and an early end where a rival is given."""
    if not examples.paired:
        return examples.judge(np.concatenate([found for _, found in stream(examples, run, batch)])), None
    test = None if rival is None else Pairing(rival, len(examples))
    right: list[NDArray[np.bool_]] = []
    for start, found in stream(examples, run, batch):
        right.append(examples.right(found, start))
        if test is not None and test.hopeless(right[-1]) and start + batch < len(examples):
            return test.score(), None
    every = np.concatenate(right)
    return score_of([100.0 * every]), np.packbits(every).tobytes()


def timed(run: Run, examples: Examples, batch: int, count: int) -> float:
    """CPU seconds that `count` examples take, in whole batches."""
    start = time.thread_time()
    for at in range(0, count, batch):
        run(examples.rows(at, batch))
    return (time.thread_time() - start) * count / (-(-count // batch) * batch)


def score_module(module: Any, batches: Sequence[Any], metric: Any) -> Score:
    """The score of any module on batches `(inputs, target)`."""
    import torch

    from tightrope.compressors.calibrate import first_tensor
    from tightrope.compressors.capture import arguments

    values = []
    with torch.inference_mode():
        for inputs, target in batches:
            args, kwargs = arguments(inputs)
            try:
                outputs = first_tensor(module(*args, **kwargs))
            except (RuntimeError, TypeError, ValueError) as error:
                raise DataError(f"a batch does not fit the model: {str(error).splitlines()[0]}") from error
            values.append(metric(outputs, target))
    return score_of(values)


def evaluator_for(source: Source, task: Task, split: str = "search") -> "Evaluator":
    """The fastest evaluator that is faithful to what would be exported."""
    found = source.evaluator(task, split)
    if isinstance(found, OrtEvaluator):
        found.choose_batch()
    return found


def open_session(model: bytes) -> Any:
    """An ONNX Runtime session on one thread that waits without spinning."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@cache
def _trim() -> Callable[[int], int]:
    """Hands to the system what a session has freed; glibc's malloc would keep it, more with every new shape. Elsewhere nothing."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return lambda _: 0
    return trim


@dataclass(frozen=True)
class _Held:
    """A tensor on its way to a worker."""

    array: NDArray[Any]


def held(batches: Any) -> Any:
    """Batches with each tensor as an array, which `pack` shares: a slice of a tensor, pickled, takes the whole tensor along."""
    import torch
    from torch.utils._pytree import tree_map_only

    def hold(tensor: Any) -> Any:
        return tensor.clone() if tensor.dtype is torch.bfloat16 else _Held(np.ascontiguousarray(tensor.numpy(force=True)))

    return tree_map_only(torch.Tensor, hold, batches)


def let_go(batches: Any) -> Any:
    """The batches of `held`, as tensors of one's own."""
    import torch
    from torch.utils._pytree import tree_map_only

    return tree_map_only(_Held, lambda found: torch.from_numpy(found.array.copy()), batches)


def pack(evaluator: Any) -> dict[str, NDArray[Any]]:
    """An evaluator as arrays for Ray's store: its arrays are shared, never copied; the rest is a message between processes."""
    import cloudpickle

    buffers: list[pickle.PickleBuffer] = []
    message = cloudpickle.dumps(evaluator, protocol=5, buffer_callback=buffers.append)
    arrays = {f"buffer{i}": np.frombuffer(b.raw(), np.uint8) for i, b in enumerate(buffers)}
    return {"message": np.frombuffer(message, np.uint8), **arrays}


def unpack(arrays: Mapping[str, NDArray[Any]]) -> Any:
    """The evaluator of `pack`, on the same memory."""
    buffers = [arrays[f"buffer{i}"] for i in range(len(arrays) - 1)]
    return pickle.loads(arrays["message"].tobytes(), buffers=buffers)
