"""The device `torch-cpu` keeps the contract on a net whose modules really run, and refuses what it was not prepared for."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from contract import DeviceContract
from told import net_ms, tell

from tests import digits
from tightrope.compressors.export.skeleton import skeleton_of
from tightrope.compressors.prepare import prepare
from tightrope.estimators.measured import fitted
from tightrope.estimators.measured.torch_cpu import TorchCpu, TorchRuntime
from tightrope.search.kernels import KernelSource
from tightrope.spaces import Network, Policy, Space
from tightrope.spaces.errors import DeviceError

QUICK = {"MET": 200, "ANCHORS": 10, "PASSES": 1, "TURNS": 1, "NODE_ROUNDS": 6, "NET_ROUNDS": 12}


@pytest.fixture(scope="module")
def source() -> KernelSource:
    prepared = prepare(digits.fresh(), digits.data()[0][:1], digits.splits()["calibration"])
    return KernelSource(prepared, skeleton_of(prepared))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tables of this module, built with less effort than a user's."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUICK.items():
            patch.setattr(fitted, name, value)
        tell(patch, TorchRuntime)
        yield tmp_path_factory.mktemp("tables")


@pytest.mark.slow
class TestTorchCpu(DeviceContract):
    @pytest.fixture(autouse=True)
    def _shared(self, cache: Path, source: KernelSource) -> None:
        self.cache, self.source = cache, source

    @pytest.fixture
    def network(self, source: KernelSource) -> Network:
        return source.prepared.network

    def make(self, batch: int = 1) -> TorchCpu:
        device, network = TorchCpu(batch=batch), self.source.prepared.network
        device.prepare(network, Space.build(network, device.pairs), self.source, cache=self.cache)
        return device

    def test_an_unknown_operator_is_an_error(self, device: TorchCpu, network: Network, policies: list[Policy]) -> None:  # type: ignore[override]
        """A measured device knows the operators that its runtime runs, and no network that it was not prepared for."""
        other = Network(network.layers, network.groups, network.ops[:-1], network.parameters)
        with pytest.raises(DeviceError, match="call prepare"):
            device.estimate_many(other, [Policy(other.fingerprint)])

    def test_predictions_follow_the_clock(self, device: TorchCpu, network: Network) -> None:
        space, rng = Space.build(network, device.pairs), np.random.default_rng(3)
        policies = [space.dense, *(space.sample(rng) for _ in range(12))]
        known = device.known(network).fitted
        true = np.array([net_ms([key for key, _ in known.lowered(p)]) for p in policies])
        found = np.array([c.latency_ms for c in device.estimate_many(network, policies)])
        measured, _ = device.timed(network, policies)
        assert measured / known.table.dense_ms == pytest.approx(true / true[0], rel=0.01)
        assert found / found[0] == pytest.approx(true / true[0], rel=0.05)

    def test_the_table_is_reused_and_names_the_kernels(self, network: Network) -> None:
        self.make()
        tables = {p: p.read_bytes() for p in self.cache.glob("torch-cpu/*.jsonl")}
        assert tables and all(b'"kernels":"' in text.splitlines()[0] for text in tables.values())
        calls: list[tuple[int, int]] = []
        device = TorchCpu()
        space = Space.build(network, device.pairs)
        device.prepare(network, space, self.source, cache=self.cache, progress=lambda a, b: calls.append((a, b)))
        assert not calls and tables == {p: p.read_bytes() for p in tables}


def test_what_is_offered_and_what_is_not() -> None:
    device, network = TorchCpu(), digits_network()
    linear = next(x for x in network.layers if x.kind == "linear")
    conv = next(x for x in network.layers if x.kind == "conv")
    assert set(device.pairs(linear)) == {(32, 32), *((bits, 8) for bits in range(2, 9))}
    assert set(device.pairs(conv)) == {(32, 32), (8, 8)}
    assert all("dropped" in note for note in device.notes) and len(device.notes) == 2
    device.budgeted({"size_bytes"})
    assert set(device.pairs(conv)) == set(device.pairs(linear)) and len(device.notes) == 1


def digits_network() -> Network:
    from contract import NETS

    return NETS["resnet8"]


def test_a_fixed_batch_is_named(source: KernelSource) -> None:
    from dataclasses import replace

    fixed = KernelSource(source.prepared, skeleton_of(source.prepared))
    fixed.graph = replace(fixed.graph, batch=4)
    with pytest.raises(DeviceError, match="batches of 4, got 1"):
        fixed.units(Space.build(source.prepared.network, TorchCpu().pairs).dense, 1)
