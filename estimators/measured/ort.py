"""The device `ort-cpu`: ONNX Runtime on one thread of this machine, costed from a table of the nodes that it runs."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import MappingProxyType
from typing import Protocol

import numpy as np
import onnx
import onnxruntime

from tightrope.estimators.measured import nodes as one_node
from tightrope.estimators.measured.actual import optimised
from tightrope.estimators.measured.apart import T
from tightrope.estimators.measured.arena import arena_bytes
from tightrope.estimators.measured.base import Measured
from tightrope.estimators.measured.clock import Runner, Timed
from tightrope.estimators.measured.fitted import REMEMBERED
from tightrope.estimators.measured.layouts import BLOCKS
from tightrope.estimators.measured.lowering import Lowering
from tightrope.estimators.measured.nodes import Key, Node, key
from tightrope.estimators.measured.patterns import Told, told
from tightrope.estimators.measured.plan import make
from tightrope.estimators.measured.sampling import steady_nodes
from tightrope.estimators.measured.weights import Weights
from tightrope.spaces.errors import DeviceError
from tightrope.spaces.network import Layer, Network
from tightrope.spaces.policy import Policy

KEPT_BYTES = 128 << 20  # of models that are timed again
LOWERING = 9
"""Counts up when the exporter, the lowering, what is timed, or how times are read changes: older tables are left alone."""


class Source(Protocol):
    """What only an exporter can build, handed over by whoever has one."""

    def skeleton(self, widths: Mapping[str, int], batch: int) -> onnx.ModelProto:
        """The graph without layer weights (`compressors/export/skeleton.py`) at the widths of all groups."""
        ...

    def model(self, policy: Policy, batch: int) -> onnx.ModelProto | bytes:
        """The file that would be exported for a policy; its weights do not matter."""
        ...


class OrtRuntime:
    """ONNX Runtime's nodes, predicted and timed one by one, and its whole graphs; `isa` is one of `layouts.BLOCKS`."""

    def __init__(self, network: Network, source: Source, batch: int, isa: str) -> None:
        self.source, self.batch = source, batch
        self.lowering = Lowering(network, make(network, source.skeleton, batch), BLOCKS[isa])
        self.block = BLOCKS[isa] or max(BLOCKS.values())
        self._files: dict[Key | Policy, bytes] | None = None

    def lowered(self, policy: Policy) -> list[tuple[Key, str]]:
        return [(key(node), node.layer) for node in self.lowering.nodes(policy)]

    def told(self, policy: Policy) -> tuple[list[tuple[Key, str]], Told]:
        return told(self.lowering.nodes(policy))

    def unit(self, key: Key) -> tuple[Timed, int]:
        runner = Runner(self._kept(key, lambda: one_node.model(*key)), optimise=False)
        return runner, runner.size_bytes

    def apart(self, work: Callable[[], T]) -> T:
        return work()

    def net(self, policy: Policy) -> Timed:
        return Runner(self._kept(policy, lambda: self.source.model(policy, self.batch)), optimise=True)

    @contextmanager
    def keeping(self, policies: Collection[Policy]) -> Iterator[None]:
        """Files are kept as they are first asked for, those of nodes too."""
        self._files = {}
        try:
            yield
        finally:
            self._files = None

    def _kept(self, what: Key | Policy, build: Callable[[], onnx.ModelProto | bytes]) -> bytes:
        """The file of a model."""
        known = {} if self._files is None else self._files
        if what in known:
            return known[what]
        made = build()
        file = made if isinstance(made, bytes) else made.SerializeToString()
        if sum(map(len, known.values())) + len(file) <= KEPT_BYTES:
            known[what] = file
        return file

    def steady(self) -> Sequence[Timed]:
        return steady_nodes()


@cache
def isa() -> str:
    """The instruction set of this machine, as far as it decides how ONNX Runtime runs a graph.

    Raises:
        DeviceError: it is none of those that nodes can be predicted for.
    """
    family = "Conv{kernel_shape=[1,1]}(f:1,1,1,1;=f:1,1,1,1)->f:1,1,1,1"
    wide = optimised(one_node.model(family, ())).graph.initializer[0].dims[0]
    found = [name for name, block in BLOCKS.items() if max(block, 1) == wide]
    if not found:
        raise DeviceError(f"onnxruntime must run convolutions in blocks of {sorted(BLOCKS.values())} channels, here it has {wide}")
    return found[0]


@cache
def saturates() -> bool:
    """Whether ONNX Runtime loses the largest sums of 8-bit products on this machine: x86 without VNNI adds pairs in 16 bits."""
    weights = onnx.numpy_helper.from_array(np.full((64, 8), 127, np.int8), "weights")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMulInteger", ["codes", "weights"], ["sums"])], "sums",
        [onnx.helper.make_tensor_value_info("codes", onnx.TensorProto.UINT8, [4, 64])],
        [onnx.helper.make_tensor_value_info("sums", onnx.TensorProto.INT32, [4, 8])], [weights],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"codes": np.full((4, 64), 255, np.uint8)})
    return bool((sums != 64 * 255 * 127).any())


class OrtCpu(Measured):
    """ONNX Runtime's CPU provider, one thread, measured.

    `prepare` has to be called for a network before its policies can be costed. Latency is the CPU time of one thread for
    the second of two calls back to back, low quartile over rounds. Peak RAM is worked out from the nodes, not measured.
    """

    name = "ort-cpu"
    metrics = Measured.metrics | {"peak_ram_bytes"}
    versions = MappingProxyType({"onnxruntime": onnxruntime.__version__, "lowering": LOWERING})
    notes: tuple[str, ...] = (
        "2-, 3-, 5-, 6- and 7-bit weights are dropped: ONNX Runtime runs 8-bit integers, or 4-bit weights of linear layers",
        "activations below 8 bits are dropped: they run as 8-bit integers and save nothing",
        "4-bit weights of convolutions are dropped: there is no operator for them",
    )

    def __init__(self, batch: int = 1) -> None:
        super().__init__(batch)
        self._peaks: dict[Policy, int] = {}

    @property
    def isa(self) -> str:
        """The instruction set that graphs are run with."""
        return isa()

    def pairs(self, layer: Layer) -> Sequence[tuple[int, int]]:
        """Floating point, 8-bit integers, and for linear layers 4-bit weights with floating-point activations."""
        if layer.kind not in ("conv", "depthwise", "linear"):
            raise DeviceError(f"layer {layer.name!r} is of kind {layer.kind!r}, which device {self.name!r} does not know")
        return ((32, 32), (8, 8), (4, 32)) if layer.kind == "linear" else ((32, 32), (8, 8))

    def weigh(self, network: Network) -> Weights:
        return Weights(network, self.batch, onnx=True)

    def runtime(self, network: Network, source: Source) -> OrtRuntime:
        return OrtRuntime(network, source, self.batch, self.isa)

    def peak_ram_bytes(self, network: Network, policy: Policy) -> int:
        """What ONNX Runtime's arena holds at most in a call, from the second on (`arena.arena_bytes`), for one batch."""
        if policy not in self._peaks:
            if len(self._peaks) >= REMEMBERED:
                self._peaks.clear()
            self._peaks[policy] = arena_bytes(self.nodes(network, policy), BLOCKS[self.isa])
        return self._peaks[policy]

    def nodes(self, network: Network, policy: Policy) -> list[Node]:
        """The nodes that ONNX Runtime is predicted to run for a policy."""
        policy.check(network)
        runtime = self.known(network).fitted.runtime
        assert isinstance(runtime, OrtRuntime)
        return runtime.lowering.nodes(policy)
