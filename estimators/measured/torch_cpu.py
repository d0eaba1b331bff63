"""The device `torch-cpu`: eager torch with compiled low-bit kernels, on one thread of this machine."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from types import MappingProxyType
from typing import Any, Protocol

import torch

from tightrope.estimators.measured.apart import T, apart
from tightrope.estimators.measured.base import Measured
from tightrope.estimators.measured.clock import Timed
from tightrope.estimators.measured.nodes import Form, Key
from tightrope.estimators.measured.patterns import Pattern, Told
from tightrope.spaces.errors import DeviceError
from tightrope.spaces.network import Layer, Network
from tightrope.spaces.policy import Policy

Call = Callable[[], object]
LOWERING = 6  # counts up when kernels, lowering or the fit change: what was timed before is not compared with what comes after
WIDTHS = range(2, 9)
_OTHERS = torch.zeros(1 << 17)  # 512 KB
UNIT_BYTES = 1 << 18  # about what a unit takes, of the memory that units which are timed side by side may take


class Operator(Protocol):
    """An operator that torch runs: its family and sizes, the forms of these, and the layer or node that it belongs to."""

    @property
    def key(self) -> Key: ...
    @property
    def forms(self) -> tuple[Form, ...]: ...
    @property
    def owner(self) -> str: ...


class Source(Protocol):
    """What only compressors can build, handed over by whoever has them: `call`s are ready to be made."""

    kernels: str  # what tells the compiled kernels from others

    def units(self, policy: Policy, batch: int) -> Sequence[Operator]:
        """The operators that torch runs for a policy."""
        ...

    def unit(self, key: Key, batch: int) -> Call:
        """One of them alone."""
        ...

    def ready(self, policy: Policy) -> None:
        """Work out what the module of a policy is made of, once for all times that it is built, those in forks among them."""
        ...

    def net(self, policy: Policy, batch: int) -> Call:
        """The whole module of a policy; its weights do not matter."""
        ...


class Runner:
    """A call in torch, ready to be timed.

    What counts is the second of two calls; between those of a unit something else passes through the cache, as the other units of
    its net do.
    """

    def __init__(self, call: Call, *, whole: bool) -> None:
        self._call, self._whole = call, whole
        with one_thread(), torch.inference_mode():
            call()  # the first call allocates

    def visit(self) -> int:
        """CPU nanoseconds of the call that counts."""
        call = self._call
        with one_thread(), torch.inference_mode():
            call()
            if not self._whole:
                _OTHERS.sum()
            start = time.thread_time_ns()
            call()
            return time.thread_time_ns() - start


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread."""
    before = torch.get_num_threads()
    if before != 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if before != 1:
            torch.set_num_threads(before)


class TorchRuntime:
    """Torch's operators, timed one by one, and whole modules."""

    block = 16

    def __init__(self, source: Source, batch: int) -> None:
        self.source, self.batch = source, batch

    def lowered(self, policy: Policy) -> list[tuple[Key, str]]:
        return [(unit.key, unit.owner) for unit in self.source.units(policy, self.batch)]

    def told(self, policy: Policy) -> tuple[list[tuple[Key, str]], Told]:
        units, found = self.source.units(policy, self.batch), dict[str, tuple[Pattern, ...]]()
        for unit in units:
            found[unit.owner] = (*found.get(unit.owner, ()), (unit.key[0], unit.forms))
        return [(unit.key, unit.owner) for unit in units], found

    def unit(self, key: Key) -> tuple[Timed, int]:
        return Runner(self.source.unit(key, self.batch), whole=False), UNIT_BYTES

    def apart(self, work: Callable[[], T]) -> T:
        """In this process nets that ran after all units of a table took a tenth longer than before them; why is not known.

        A fork has none of the threads that torch had, and would wait for them.
        """
        with one_thread():
            return apart(work)

    def net(self, policy: Policy) -> Timed:
        return Runner(self.source.net(policy, self.batch), whole=True)

    @contextmanager
    def keeping(self, policies: Collection[Policy]) -> Iterator[None]:
        """Arrays of nets are kept, and modules built anew in each process: how long one takes hangs by some percent on where it
        comes to lie in memory, which kept ones would have in all their times."""
        with one_thread():
            for policy in policies:
                self.source.ready(policy)
        yield

    def steady(self) -> Sequence[Timed]:
        image, weight = torch.rand(1, 32, 28, 28), torch.rand(32, 32, 3, 3)
        image = image.contiguous(memory_format=torch.channels_last)
        rows, matrix, row = torch.rand(64, 256), torch.rand(256, 256), torch.rand(1, 64)
        small = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(20)])  # what a call costs
        calls: list[Call] = [
            lambda: torch.conv2d(image, weight, None, 1, 1), lambda: torch.nn.functional.linear(rows, matrix),
            lambda: torch.relu(image), lambda: small(row), lambda: None,
        ]  # fmt: skip
        return [Runner(call, whole=True) for call in calls]


class TorchCpu(Measured):
    """Torch in eager mode, one thread, measured: floating point, and integers on the modules that `compressors/runtime` builds."""

    name = "torch-cpu"
    versions = MappingProxyType({"torch": torch.__version__, "tightrope": version("tightrope"), "lowering": LOWERING})

    @property
    def notes(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the space leaves out, and why."""
        narrow = (
            "2- to 7-bit weights of convolutions are dropped: they run as 8-bit integers and save only size, which is not budgeted",
        )
        return (
            "activations below 8 bits are dropped: they run as 8-bit integers and save nothing",
            *(() if self._sized() else narrow),
        )

    def _sized(self) -> bool:
        """Whether size is budgeted: only there do convolutions have narrow weights."""
        return "size_bytes" in self._budgeted

    def pairs(self, layer: Layer) -> Sequence[tuple[int, int]]:
        """Floating point; 2- to 8-bit weights of linear layers, 8-bit ones of convolutions, both with 8-bit activations."""
        if layer.kind not in ("conv", "depthwise", "linear"):
            raise DeviceError(f"layer {layer.name!r} is of kind {layer.kind!r}, which device {self.name!r} does not know")
        widths = WIDTHS if layer.kind == "linear" or self._sized() else (8,)
        return ((32, 32), *((bits, 8) for bits in widths))

    def depends(self, source: Source) -> Mapping[str, Any]:
        return {**self.versions, "kernels": source.kernels}

    def runtime(self, network: Network, source: Source) -> TorchRuntime:
        return TorchRuntime(source, self.batch)
