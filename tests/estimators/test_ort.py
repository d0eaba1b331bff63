"""The measured device keeps the contract, predicts what a clock says, and refuses what it was not prepared for.

The clock is told (`told.py`): nodes and nets are really built and run, and what they take depends on no machine.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from contract import DeviceContract
from handmade import Handmade, resnet8
from payloads import random_payload
from threadpoolctl import threadpool_info, threadpool_limits
from told import Told, net_ms, tell

from tightrope.compressors.export.onnx import write
from tightrope.estimators.measured import fitted, rapl
from tightrope.estimators.measured.base import fingerprint, left_out
from tightrope.estimators.measured.ort import OrtCpu, OrtRuntime
from tightrope.spaces import Network, Policy, Space
from tightrope.spaces.errors import DeviceError

NET = Handmade(resnet8)
QUICK = {"MET": 300, "PLAIN": 200, "ANCHORS": 12, "PASSES": 2, "TURNS": 1, "NODE_ROUNDS": 6, "NET_ROUNDS": 8}


class Source:
    """Graphs of a net with weights drawn at random; `threads` are those that BLAS had whenever a net was built."""

    def __init__(self) -> None:
        self.threads: set[int] = set()

    def skeleton(self, widths: Mapping[str, int], batch: int) -> onnx.ModelProto:
        return NET.at(widths, batch)

    def model(self, policy: Policy, batch: int) -> onnx.ModelProto:
        self.threads |= {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}
        return write(NET.at(policy.all_widths(NET.network), batch), NET.network, random_payload(NET.network, policy))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tables of this module, built with less effort than a user's."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUICK.items():
            patch.setattr(fitted, name, value)
        tell(patch, OrtRuntime)
        yield tmp_path_factory.mktemp("tables")


def prepared(cache: Path, batch: int = 1) -> OrtCpu:
    device = OrtCpu(batch=batch)
    device.prepare(NET.network, Space.build(NET.network, device.pairs), Source(), cache=cache)
    return device


@pytest.mark.slow
class TestOrtCpu(DeviceContract):
    networks = ("resnet8",)

    @pytest.fixture(autouse=True)
    def _cache(self, cache: Path) -> None:
        self.cache = cache

    def make(self, batch: int = 1) -> OrtCpu:
        device = prepared(self.cache, batch)
        device.budgeted({"peak_ram_bytes"})
        return device

    def test_peak_ram_of_many_is_told_where_it_is_budgeted(self, device: OrtCpu, network: Network, policies: list[Policy]) -> None:
        told = [c.peak_ram_bytes for c in device.estimate_many(network, policies)]
        device.budgeted({"latency_ms"})
        assert [c.peak_ram_bytes for c in device.estimate_many(network, policies)] == [None] * len(policies)
        assert [device.estimate(network, p).peak_ram_bytes for p in policies] == told

    def test_an_unknown_operator_is_an_error(self, device: OrtCpu, network: Network, policies: list[Policy]) -> None:  # type: ignore[override]
        """A measured device knows the operators that its runtime runs, and no network that it was not prepared for."""
        other = Network(network.layers, network.groups, network.ops[:-1], network.parameters)
        with pytest.raises(DeviceError, match="call prepare"):
            device.estimate_many(other, [Policy(other.fingerprint)])

    def test_predictions_agree_with_the_clock(self, device: OrtCpu, network: Network) -> None:
        space, rng = Space.build(network, device.pairs), np.random.default_rng(3)
        policies = [space.sample(rng) for _ in range(16)]
        known = device.known(network).fitted
        true = np.array([net_ms([key for key, _ in known.lowered(p)]) for p in [space.dense, *policies]])
        lowered = np.array([sum(known.shares(p)) for p in [space.dense, *policies]])
        found = np.array([c.latency_ms for c in device.estimate_many(network, [space.dense, *policies])])
        measured, floor = device.timed(network, policies)
        assert measured / known.table.dense_ms == pytest.approx(true[1:] / true[0], rel=0.01) and floor < 0.01
        assert lowered / lowered[0] == pytest.approx(true / true[0], rel=0.05)
        assert np.abs(lowered / lowered[0] / (true / true[0]) - 1).mean() < 0.01
        assert (np.abs(found / lowered - 1) < 1e-6).mean() > 0.75  # as patterns tell that saw a third of a user's policies
        assert known.spread < 0.03

    def test_what_slows_the_dense_net_alone_since_is_not_in_all_that_is_timed(
        self, device: OrtCpu, network: Network, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nets stand beside eight of the table: an eighth of what slows one of these is in them."""
        known = device.known(network).fitted
        ratios = {Policy.from_json(json.loads(name)): ratio for name, ratio in known.table.nets.items()}
        ms = {known.space.dense: 1.16 * known.table.dense_ms} | {p: r * known.table.dense_ms for p, r in ratios.items()}

        monkeypatch.setattr(known.runtime, "net", lambda policy: Told(ms[policy]))
        found, floor = known.timed([*ratios])
        assert found == pytest.approx([r * known.table.dense_ms for r in ratios.values()], rel=0.04)
        assert floor < 0.01

    def test_the_table_is_reused(self, network: Network) -> None:
        self.make()
        (table,) = [p for p in self.cache.glob("ort-cpu/*.jsonl") if '"batch":1' in p.read_text(encoding="utf-8").splitlines()[0]]
        before = table.read_bytes()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TIGHTROPE_CACHE", str(self.cache))
            told = dict(left_out("ort-cpu"))
        (errors,) = (e for what, e in told.items() if what == f"network {network.fingerprint}, batch 1")
        assert errors == [*self.make().known(network).fitted.errors]
        calls: list[tuple[int, int]] = []
        device = OrtCpu()
        space = Space.build(network, device.pairs)
        device.prepare(network, space, Source(), cache=self.cache, progress=lambda a, b: calls.append((a, b)))
        assert not calls
        assert table.read_bytes() == before

    def test_a_killed_preparation_goes_on(self, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {**QUICK, "MET": 10, "PLAIN": 10, "ANCHORS": 8, "NODE_ROUNDS": 2, "NET_ROUNDS": 2}.items():
            monkeypatch.setattr(fitted, name, value)
        device, source = OrtCpu(), Source()
        space = Space.build(network, device.pairs, least_width=0.9, rank_shares=())

        def kill(done: int, total: int) -> None:
            if done < total:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            device.prepare(network, space, Source(), cache=tmp_path, progress=kill)
        (table,) = tmp_path.glob("ort-cpu/*.jsonl")
        kept = table.read_bytes()
        table.write_bytes(kept + b'{"node":"0123')  # torn in the middle of a line
        with threadpool_limits(limits=2, user_api="blas"):
            device.prepare(network, space, source, cache=tmp_path)
            device.timed(network, [space.dense])
        assert source.threads == {1}
        assert table.read_bytes().startswith(kept)
        cost = device.estimate(network, space.dense)
        assert cost.latency_ms > 0
        assert ("RAPL" if rapl.counters() else "energy modelled") in cost.provenance
        device.known(network).fitted.watts = 3.0
        cost = device.estimate(network, space.dense)
        assert "3.0 W" in cost.provenance and cost.energy_mj == pytest.approx(3.0 * cost.latency_ms)
        lines = [line for line in table.read_text(encoding="utf-8").splitlines() if line.startswith('{"node"')]
        times = Counter(line.split(',"ms"')[0] for line in lines)
        assert max(times.values()) == fitted.PASSES  # nothing was timed in vain

    def test_a_table_whose_patterns_are_torn_tells_the_sum_of_each_policys_nodes(
        self, device: OrtCpu, network: Network, policies: list[Policy], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (table,) = [p for p in self.cache.glob("ort-cpu/*.jsonl") if '"batch":1' in p.read_text(encoding="utf-8").splitlines()[0]]
        lines = [x[:-9] if x.startswith('{"note":"patterns"') else x for x in table.read_text(encoding="utf-8").splitlines()]
        torn = tmp_path / "ort-cpu" / table.name
        torn.parent.mkdir()
        torn.write_text("\n".join(lines) + "\n", encoding="utf-8")
        other, before = OrtCpu(), torn.read_bytes()
        other.prepare(network, Space.build(network, other.pairs), Source(), cache=tmp_path)
        (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert "left out of the latency table" in warning and torn.name in warning
        other.known(network).fitted.weights[[fitted.MIXING, fitted.FETCHING]] = 0.5  # whatever they cost on this machine
        told = [c.latency_ms for c in other.estimate_many(network, policies)]
        assert told == pytest.approx([sum(other.known(network).fitted.shares(p)) for p in policies], rel=1e-6)
        assert torn.read_bytes() == before  # nothing was timed anew

    @pytest.mark.parametrize("lost", [0, 1])
    def test_errors_are_worked_out_anew_without_a_note_of_all_nets(
        self, device: OrtCpu, network: Network, tmp_path: Path, lost: int
    ) -> None:  # fmt: skip
        (table,) = [p for p in self.cache.glob("ort-cpu/*.jsonl") if '"batch":1' in p.read_text(encoding="utf-8").splitlines()[0]]
        lines, noted = table.read_text(encoding="utf-8").splitlines(), device.known(network).fitted.errors
        name = next(json.loads(x)["net"] for x in lines if x.startswith('{"net"'))
        torn = tmp_path / "ort-cpu" / table.name
        torn.parent.mkdir()
        kept = [x for x in lines if json.loads(x).get("net") != name] if lost else [x for x in lines if '{"note":"fit"' not in x]
        torn.write_text("\n".join(kept) + "\n", encoding="utf-8")
        other = OrtCpu()
        other.prepare(network, Space.build(network, other.pairs), Source(), cache=tmp_path)
        errors = other.known(network).fitted.errors
        assert len(errors) == len(noted) - lost
        assert errors != noted if lost else errors == pytest.approx(noted, abs=1e-9)

    def test_a_policy_outside_of_the_space_is_refused(self, device: OrtCpu, network: Network) -> None:
        narrow = Policy.make(network, dict.fromkeys(network.widths, 1))
        with pytest.raises(DeviceError, match="prepare the device with the space"):
            device.estimate(network, narrow)


def test_what_is_not_offered_is_said() -> None:
    device = OrtCpu()
    conv, linear = NET.network.layers[0], NET.network.layers[-1]
    assert set(device.pairs(conv)) == {(32, 32), (8, 8)}
    assert set(device.pairs(linear)) == {(32, 32), (8, 8), (4, 32)}
    assert all("dropped" in note for note in device.notes)


def test_an_unprepared_device_says_what_to_do() -> None:
    with pytest.raises(DeviceError, match="call prepare"):
        OrtCpu().estimate(NET.network, Policy.make(NET.network))
    with pytest.raises(DeviceError, match="at least 1"):
        OrtCpu(batch=0)


def test_the_fingerprint_tells_machines_batches_networks_and_spaces_apart() -> None:
    device = OrtCpu()
    space = Space.build(NET.network, device.pairs)
    one = fingerprint(NET.network, space, 1, device.versions)
    assert one == fingerprint(NET.network, Space.build(NET.network, device.pairs), 1, device.versions)
    assert one != fingerprint(NET.network, space, 2, device.versions)
    assert one != fingerprint(NET.network, Space.build(NET.network, device.pairs, ranks=False), 1, device.versions)
    assert {"processor", "onnxruntime", "threads"} <= set(one)
