"""Modules that run on the kernels: equal to the fake-quantised ones, in torch's own tools, and back from a file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processor import exact_int8
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from small_nets import Attention, Dense, Flat, OneDimensional, Residual, Separable, Several, Tied, Twice, Upsampling, build
from torch import Tensor, nn

import tightrope as tr
from tightrope.compressors.compress import compress, payload_of
from tightrope.compressors.kernels.linear import QuantLinear
from tightrope.compressors.kernels.onednn import Int8Linear, QuantConv2d
from tightrope.compressors.prepare import Prepared, prepare
from tightrope.compressors.runtime import build as building
from tightrope.compressors.runtime.build import executable
from tightrope.compressors.runtime.graph import Graph
from tightrope.compressors.runtime.lower import Lowering
from tightrope.compressors.runtime.units import Units
from tightrope.spaces import Choice, Network, Policy, Space
from tightrope.spaces.errors import ExportError, FormatError
from tightrope.spaces.unit import size_bytes

Kind = Callable[[], nn.Module]
KINDS: list[Kind] = [Residual, Attention, Separable, Dense, Flat, OneDimensional, Several, Tied, Twice, Upsampling]
_PREPARED: dict[Kind, tuple[Prepared, Graph]] = {}


def images(count: int = 8, seed: int = 2) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def of(kind: Kind) -> tuple[Prepared, Graph]:
    if kind not in _PREPARED:
        prepared = prepare(build(kind), images(), [(images(seed=s), torch.zeros(8)) for s in (2, 3)])
        assert prepared.traced is not None
        _PREPARED[kind] = prepared, Graph.of(prepared.traced)
    return _PREPARED[kind]


def space(network: Network, form: str = "spatial") -> Space:
    return Space.build(network, lambda _: [(2, 8), (3, 8), (5, 8), (8, 8), (32, 32)], form=form, least_width=0.25)


def leaves(value: Any) -> Tensor:
    return torch.cat([t.flatten() for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)])


@exact_int8
@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_the_fake_quantised_module(kind: Kind) -> None:
    prepared, graph = of(kind)
    choices, rng = space(prepared.network, "tucker" if kind in (Residual, Twice) else "spatial"), np.random.default_rng(0)
    for policy in (choices.dense, choices.uniform(1.0, (8, 8)), *(choices.sample(rng) for _ in range(3))):
        small = compress(None, policy, prepared)
        module = executable(graph, payload_of(small))
        with torch.no_grad():
            wanted, found = leaves(small(images())), leaves(module(images()))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        for layer in prepared.network.layers:
            runs = [type(m) for n, m in module.named_modules() if n.split("_call")[0] in (layer.name, f"{layer.name}.0")]
            integer = policy.choice(layer.name).weight_bits <= 8
            assert not integer or set(runs) <= {QuantLinear, QuantConv2d, Int8Linear, nn.Module}
            assert integer or set(runs) <= {nn.Linear, nn.Conv2d, nn.Module}


@pytest.mark.parametrize("kind", [Separable, Attention])
def test_export_with_a_free_batch_and_compile_in_one_graph(kind: Kind) -> None:
    prepared, graph = of(kind)
    policy = space(prepared.network).uniform(1.0, (3, 8))
    module = executable(graph, payload_of(compress(None, policy, prepared)))
    with torch.no_grad():
        program = torch.export.export(module, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
        for count in (2, 11):
            assert torch.equal(program.module()(images(count)), module(images(count)))
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images()), module(images()))


def test_integers_are_the_same_on_any_number_of_threads() -> None:
    prepared, graph = of(Flat)
    module = executable(graph, payload_of(compress(None, space(prepared.network).uniform(1.0, (5, 8)), prepared)))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(module(images()))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("kind", [Residual, Attention, Several, Upsampling, Twice])
def test_files_load_without_the_model(kind: Kind, tmp_path: Path) -> None:
    prepared, graph = of(kind)
    policy = space(prepared.network).sample(np.random.default_rng(4))
    small = compress(None, policy, prepared)
    path = tr.export(small, tmp_path / "net.safetensors", device="torch-cpu")
    module = tr.load(path)
    with torch.no_grad():
        assert torch.equal(leaves(module(images())), leaves(executable(graph, payload_of(small))(images())))
    tensors = load_file(path)
    assert sum(t.nbytes for n, t in tensors.items() if not n.startswith("constant:")) == size_bytes(prepared.network, policy)


def test_graphs_are_plain_data() -> None:
    for kind in KINDS:
        _, graph = of(kind)
        again = Graph.from_json(json.dumps(graph.to_json()), graph.constants, "net")
        assert again.nodes == graph.nodes and again.network == graph.network


@pytest.fixture
def file(tmp_path: Path) -> Path:
    prepared, _ = of(Flat)
    small = compress(None, space(prepared.network).uniform(1.0, (3, 8)), prepared)
    return tr.export(small, tmp_path / "net.safetensors", device="torch-cpu")


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, str]], None]) -> Path:
    tensors = load_file(path)
    with safe_open(path, "np") as opened:
        metadata = dict(opened.metadata())
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(("change", "named"), [
    (lambda t, m: t.pop("mid.0.codes"), "mid.0.codes"),
    (lambda t, m: t.update({"mid.0.scales": np.ones(3, np.float32)}), "mid.0.scales"),
    (lambda t, m: m.pop("graph"), "torch-cpu"),
    (lambda t, m: m.update(graph=m["graph"].replace("aten.relu.default", "os.system")), "os.system"),
    (lambda t, m: m.update(graph=m["graph"][:-5]), "not JSON"),
    (lambda t, m: m.update(graph=m["graph"].replace('{"ref": "conv"}', '{"ref": "nowhere"}')), "nowhere"),
    (lambda t, m: m.update(ranges="{}"), "ranges"),
    (lambda t, m: m.update(ranges=m["ranges"].replace("[", "[1e999, ", 1)), "finite"),
    (lambda t, m: m.update(policy=m["policy"].replace(json.loads(m["policy"])["network"], "0" * 16)), "belongs to"),
])  # fmt: skip
def test_damaged_files_are_refused_by_name(file: Path, change: Any, named: str) -> None:
    with pytest.raises(tr.TightropeError, match=named):
        tr.load(rewritten(file, change))


def test_what_does_not_run_is_refused(tmp_path: Path) -> None:
    prepared, graph = of(Flat)
    for choice in (Choice(8, 4), Choice(4, 32)):
        policy = Policy.make(prepared.network, {}, {"mid": choice})
        with pytest.raises(ExportError, match="'mid' has"):
            Lowering(graph).lower(policy)
        with pytest.raises(ExportError, match="'mid' has"):
            tr.export(compress(None, policy, prepared), tmp_path / "net.safetensors", device="torch-cpu")
    (tmp_path / "text.safetensors").write_text("{}")
    with pytest.raises(FormatError, match="not a safetensors file"):
        tr.load(tmp_path / "text.safetensors")


@exact_int8
def test_many_rows_at_8_bits_go_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "MANY_MACS", 1000)
    prepared, graph = of(Flat)
    small = compress(None, space(prepared.network).uniform(1.0, (8, 8)), prepared)
    one, many = executable(graph, payload_of(small)), executable(graph, payload_of(small), batch=64)
    assert isinstance(one.mid, QuantLinear) and isinstance(many.mid, Int8Linear)
    with torch.no_grad():
        torch.testing.assert_close(many(images()), one(images()))


@pytest.mark.parametrize("kind", KINDS)
def test_every_unit_of_a_policy_runs_alone(kind: Kind) -> None:
    prepared, graph = of(kind)
    units, rng = Units(graph, graph.batch or 3), np.random.default_rng(1)
    choices = space(prepared.network)
    for policy in (choices.dense, choices.sample(rng)):
        operators = units.operators(policy)
        assert {op.owner for op in operators} >= {layer.name for layer in prepared.network.layers}
        for op in operators:
            family, sizes = op.key
            assert len(sizes) == len(op.forms) <= family.count("*")
            units.call(op.key)()
