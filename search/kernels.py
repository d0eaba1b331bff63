"""What `torch-cpu` asks of a source: the operators of policies, their modules, and trials scored on those very modules."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tightrope.search.evaluate import Examples, Source, scored
from tightrope.search.stopping import Rival, Scored
from tightrope.search.task import Task
from tightrope.spaces.cost import Score
from tightrope.spaces.errors import CompressError, DeviceError
from tightrope.spaces.policy import Policy

if TYPE_CHECKING:
    from torch import fx

    from tightrope.compressors.export.skeleton import Skeleton
    from tightrope.compressors.payload import Payload
    from tightrope.compressors.prepare import Prepared
    from tightrope.compressors.runtime.lower import Lowering
    from tightrope.compressors.runtime.units import Key, Operator, Units
    from tightrope.estimators.measured.clock import Timed

BATCH = 64  # examples that are scored at once: few keep a net's activations in the cache


class KernelSource(Source):
    """Modules of policies that run on the compiled kernels, whole and operator by operator."""

    def __init__(self, prepared: "Prepared", skeleton: "Skeleton") -> None:
        from tightrope.compressors.runtime.graph import Graph

        super().__init__(prepared, skeleton)
        if prepared.traced is None:
            raise CompressError("these prepared arrays carry no graph; prepare the model again to run it")
        self.graph = Graph.of(prepared.traced)
        self._units: dict[int, Units] = {}

    @cached_property
    def kernels(self) -> str:
        """The instruction set and a checksum of the compiled kernels."""
        from tightrope.compressors import _kernels
        from tightrope.compressors.kernels import isa

        digest = hashlib.sha256(Path(str(_kernels.__file__)).read_bytes()).hexdigest()[:12]
        return f"{isa()} {digest}"

    def units(self, policy: Policy, batch: int) -> "list[Operator]":
        """The operators that torch runs for a policy."""
        return self._of(batch).operators(policy)

    def unit(self, key: "Key", batch: int) -> Callable[[], object]:
        """One of them alone, ready to be called."""
        return self._of(batch).call(key)

    def _of(self, batch: int) -> "Units":
        from tightrope.compressors.runtime.units import Units

        if self.graph.batch not in (None, batch):
            raise DeviceError(f"the model fixes its batch size: the device must run batches of {self.graph.batch}, got {batch}")

        if batch not in self._units:
            self._units[batch] = Units(self.graph, batch)
        return self._units[batch]

    def ready(self, policy: Policy) -> None:
        """Assemble the arrays of a policy's module, which are remembered."""
        from tightrope.compressors.assemble import assemble

        assemble(self.prepared, policy)

    def net(self, policy: Policy, batch: int) -> Callable[[], object]:
        """The module of a policy on inputs of its own, ready to be called."""
        from tightrope.compressors.assemble import assemble

        return self.running(assemble(self.prepared, policy), batch)

    def running(self, payload: "Payload", batch: int) -> Callable[[], object]:
        """The module of a payload on inputs of its own, ready to be called."""
        module, inputs = self.module(payload, batch), self._inputs(batch)
        return lambda: module(*inputs)

    def module(self, payload: "Payload", batch: int = 1) -> "fx.GraphModule":
        """The module of a payload."""
        from tightrope.compressors.runtime.build import executable

        return executable(self.graph, payload, batch=batch)

    def _inputs(self, batch: int) -> tuple[Any, ...]:
        from tightrope.compressors.runtime.graph import at_batch

        assert self.prepared.traced is not None
        return tuple(at_batch(value, batch) for value in self.prepared.traced.example)

    def timed(self, payload: "Payload", batch: int = 1) -> "Timed":
        """The module of a payload, ready to be timed beside others."""
        from tightrope.estimators.measured.torch_cpu import Runner

        return Runner(self.running(payload, batch), whole=True)

    def evaluator(self, task: Task, split: str) -> "KernelEvaluator":  # type: ignore[override]
        """Scores policies on a split."""
        return KernelEvaluator(self, task, split)


class KernelEvaluator:
    """Scores policies on one split by the modules that they would be exported to, on one thread."""

    def __init__(self, source: KernelSource, task: Task, split: str) -> None:
        self.prepared = replace(source.prepared, traced=None, skeleton=None)  # which do not travel to workers, and are not needed
        self.graph, self.examples = source.graph, Examples(task, split)
        self.batch = source.graph.batch or min(BATCH, self.examples.most)

    @cached_property
    def _lowering(self) -> "Lowering":
        from tightrope.compressors.runtime.lower import Lowering

        return Lowering(self.graph)

    def evaluate(self, policy: Policy) -> Score:
        """The score of a policy on the split."""
        return self.compare(policy, None)[0]

    def compare(self, policy: Policy, rival: Rival | None) -> Scored:
        """The score of a policy, and which examples it has right; it ends early if it falls behind its rival for good."""
        from tightrope.compressors.assemble import assemble

        return self._scored(assemble(self.prepared, policy), rival)

    def score_tuned(self, module: "fx.GraphModule") -> Score:
        """The score of what a fine-tuned module exports to."""
        from tightrope.compressors.compress import payload_of

        return self._scored(payload_of(module), None)[0]

    def _scored(self, payload: "Payload", rival: Rival | None) -> Scored:
        import torch

        from tightrope.compressors.calibrate import first_tensor
        from tightrope.compressors.runtime.build import executable
        from tightrope.estimators.measured.torch_cpu import one_thread

        module = executable(self.graph, payload, batch=self.batch, lowering=self._lowering)

        def run(rows: list[NDArray[Any]]) -> NDArray[np.float32]:
            with torch.inference_mode():
                found: NDArray[np.float32] = first_tensor(module(*map(torch.from_numpy, rows))).numpy()
            return found

        with one_thread():
            return scored(self.examples, run, self.batch, rival)
