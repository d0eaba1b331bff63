"""Scoring a policy: on the very graph that it would be exported to, run by ONNX Runtime; or, where it cannot be, in torch."""

import logging
import pickle
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tightrope.search.task import Task, length, score_of, tensors
from tightrope.spaces.cost import Score
from tightrope.spaces.errors import DataError, ExportError
from tightrope.spaces.policy import Policy

if TYPE_CHECKING:
    import onnx

    from tightrope.compressors.export.skeleton import Skeleton
    from tightrope.compressors.payload import Payload
    from tightrope.compressors.prepare import Prepared

log = logging.getLogger(__name__)
MOST_BATCH = 256


class Source:
    """Graphs of policies, as devices time them and trials run them (`estimators/measured` says what it asks of a source)."""

    def __init__(self, prepared: "Prepared", skeleton: "Skeleton") -> None:
        self.prepared, self._skeleton = prepared, skeleton

    def skeleton(self, widths: Mapping[str, int], batch: int) -> "onnx.ModelProto":
        return self._skeleton.at(widths, batch)

    def model(self, policy: Policy, batch: int = 1) -> "onnx.ModelProto":
        """The file that the policy would be exported to, before any fine-tuning."""
        from tightrope.compressors.assemble import assemble

        return self.written(assemble(self.prepared, policy), batch)

    def written(self, payload: "Payload", batch: int = 1) -> "onnx.ModelProto":
        """The graph of a payload at a static batch size."""
        from tightrope.compressors.export.onnx import write

        network = self.prepared.network
        return write(self.skeleton(payload.policy.all_widths(network), batch), network, payload)


class OrtEvaluator:
    """Scores policies on one split in ONNX Runtime, one thread, at the loader's batch size (at most 256)."""

    def __init__(self, source: Source, task: Task, split: str = "search") -> None:
        self.source = source
        batches = task.split(split)
        self.metric = task.measure
        fixed = source.prepared.traced.skeleton.meta["batch"] if source.prepared.traced else None
        self.batch: int = fixed or min(MOST_BATCH, max(length(x) for x, _ in batches))
        self.inputs = [
            np.concatenate([np.asarray(t) for t in column]) for column in zip(*(tensors(x) for x, _ in batches), strict=True)
        ]
        self.targets = [np.asarray(y) for _, y in batches]
        source.skeleton(source.prepared.network.widths, self.batch)  # learnt here, so that workers need not

    def evaluate(self, policy: Policy) -> Score:
        """The score of a policy on the split."""
        return self.score(self.source.model(policy, self.batch))

    def score(self, model: "onnx.ModelProto") -> Score:
        """The score of a graph at this evaluator's batch size."""
        outputs = self.outputs(model)
        return self.judge(outputs)

    def outputs(self, model: "onnx.ModelProto") -> NDArray[np.float32]:
        """The first floating-point output for every example of the split."""
        session = open_session(model.SerializeToString())
        names = [i.name for i in session.get_inputs()]
        wanted = next(o.name for o in session.get_outputs() if o.type == "tensor(float)")
        found = []
        total = len(self.inputs[0])
        for start in range(0, total, self.batch):
            count = min(self.batch, total - start)
            rows = [x[start : start + count] for x in self.inputs]
            if count < self.batch:
                rows = [np.concatenate([r, np.repeat(r[-1:], self.batch - count, axis=0)]) for r in rows]
            found.append(session.run([wanted], dict(zip(names, rows, strict=False)))[0][:count])
        return np.concatenate(found)

    def judge(self, outputs: NDArray[np.float32]) -> Score:
        """The metric of outputs for the whole split, batch by batch as the loader had them."""
        import torch

        values, start = [], 0
        for target in self.targets:
            rows = torch.from_numpy(outputs[start : start + len(target)])
            values.append(self.metric(rows, torch.from_numpy(target.copy())))
            start += len(target)
        return score_of(values)


class TorchEvaluator:
    """Scores policies on one split by the compressed module itself: slower, for models that ONNX cannot hold."""

    def __init__(self, prepared: "Prepared", task: Task, split: str = "search") -> None:
        self.prepared, self.metric, self.batches = prepared, task.measure, task.split(split)

    def evaluate(self, policy: Policy) -> Score:
        """The score of a policy on the split."""
        from tightrope.compressors.compress import compress

        return score_module(compress(None, policy, self.prepared), self.batches, self.metric)


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


def evaluator_for(source: Source, task: Task, split: str = "search") -> "OrtEvaluator | TorchEvaluator":
    """The fastest evaluator that is faithful to what would be exported."""
    try:
        return OrtEvaluator(source, task, split)
    except ExportError as error:
        log.warning("trials are scored in torch, which is slower: %s", error)
        return TorchEvaluator(source.prepared, task, split)


def open_session(model: bytes) -> Any:
    """An ONNX Runtime session on one thread that waits without spinning."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


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
