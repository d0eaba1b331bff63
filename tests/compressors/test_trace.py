"""Tracing: the groups of small models against what a person finds in them, and cutting against masking."""

import copy
import importlib.util
import itertools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_nets import GROUPS, NORMALISED, OTHERS, Attention, Recurrent, Residual, Separable, Several, Upsampling, build, image
from torch import Tensor, fx, nn

from tightrope.compressors.capture import checksum
from tightrope.compressors.ties import Kept
from tightrope.compressors.trace import Traced, cut, run, trace, traced
from tightrope.spaces import Extent, Network, Policy
from tightrope.spaces.errors import TraceError
from tightrope.spaces.unit import macs, size_bytes

torch.set_num_threads(1)
KINDS = [*GROUPS, *OTHERS]
_TRACED: dict[Any, Traced] = {}


def of(kind: Callable[[], nn.Module]) -> Traced:
    """Each model is traced once."""
    if kind not in _TRACED:
        _TRACED[kind] = traced(build(kind), image())
    return _TRACED[kind]


def leaves(value: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]


def close(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    pairs = list(zip(leaves(found), leaves(wanted), strict=True))
    assert pairs
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("kind", KINDS)
def test_the_skeleton_computes_what_the_model_computes(kind: Callable[[], nn.Module]) -> None:
    model, batch = build(kind), image(5)
    with torch.no_grad():
        close(of(kind).skeleton(batch), model(batch), 2e-5)


@pytest.mark.parametrize("kind", GROUPS)
def test_groups_are_those_that_a_person_finds(kind: Callable[[], nn.Module]) -> None:
    network = of(kind).network

    def wiring(of_layer: Callable[[Any], Extent], group: str) -> dict[str, int]:
        return {x.name: dict(of_layer(x).terms)[group] for x in network.layers if group in of_layer(x).groups}

    found = [(g.width, wiring(lambda x: x.outputs, g.name), wiring(lambda x: x.inputs, g.name)) for g in network.groups]
    assert sorted(found, key=repr) == sorted(GROUPS[kind], key=repr)


def masked(tracing: Traced, kept: Kept, *, readers: bool) -> fx.GraphModule:
    """The dense skeleton with zeros where a cut takes away: what writes a channel and, with `readers`, what reads it."""
    module = copy.deepcopy(tracing.skeleton)
    with torch.no_grad():
        for name in tracing.ties.outputs:
            layer: Any = module.get_submodule(name)
            out = np.setdiff1d(np.arange(layer.weight.shape[0]), tracing.ties.axes[name, 0].keep(kept))
            layer.weight[out] = 0
            if layer.bias is not None:
                layer.bias[out] = 0
            if readers:
                layer.weight[:, np.setdiff1d(np.arange(layer.weight.shape[1]), tracing.ties.axes[name, 1].keep(kept))] = 0
        for name in tracing.ties.parameters:
            for (owner, dim), axis in tracing.ties.axes.items():
                if owner == name and name not in tracing.ties.outputs:
                    value = module.get_parameter(name) if name in dict(module.named_parameters()) else module.get_buffer(name)
                    gone = np.setdiff1d(np.arange(value.shape[dim]), axis.keep(kept))
                    value.index_fill_(dim, torch.from_numpy(gone), 0)
    return module


def some(tracing: Traced, rng: np.random.Generator) -> Kept:
    """Random channels of every group, at least one of each."""
    flags = {}
    for group in tracing.network.groups:
        flags[group.name] = rng.random(group.width) < rng.uniform(0.2, 0.9)
        flags[group.name][rng.integers(group.width)] = True
    return flags


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in NORMALISED])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=8, deadline=None)
def test_cutting_equals_masking(kind: Callable[[], nn.Module], seed: int) -> None:
    tracing = of(kind)
    kept = some(tracing, np.random.default_rng(seed))
    with torch.no_grad():
        close(cut(tracing.skeleton, tracing.ties, kept)(image(3)), masked(tracing, kept, readers=True)(image(3)))


@pytest.mark.parametrize(
    "kind", [k for k in KINDS if k.__name__ in ("Residual", "Separable", "Grouped", "Flat", "Shuffled", "Twice")]
)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=8, deadline=None)
def test_cutting_equals_masking_what_writes_where_zero_stays_zero(kind: Callable[[], nn.Module], seed: int) -> None:
    """Behind ReLU alone a channel of zeros adds nothing, so that readers need no mask: they lose no more than they must."""
    tracing = of(kind)
    kept = some(tracing, np.random.default_rng(seed))
    with torch.no_grad():
        close(cut(tracing.skeleton, tracing.ties, kept)(image(3)), masked(tracing, kept, readers=False)(image(3)))


@pytest.mark.parametrize("kind", KINDS)
def test_any_widths_run_and_have_the_shapes_the_network_says(kind: Callable[[], nn.Module]) -> None:
    tracing = of(kind)
    for kept in (some(tracing, np.random.default_rng(s)) for s in range(3)):
        widths = {g: int(flags.sum()) for g, flags in kept.items()}
        small = cut(tracing.skeleton, tracing.ties, kept)
        shapes: dict[str, tuple[int, ...]] = {}

        class Seen(fx.Interpreter):
            def run_node(self, n: fx.Node, shapes: dict[str, tuple[int, ...]] = shapes) -> Any:
                value = super().run_node(n)
                if isinstance(value, Tensor):
                    shapes["input" if n.op == "placeholder" else n.name] = tuple(value.shape)
                return value

        with torch.no_grad():
            Seen(small).run(image(1), enable_io_processing=False)
        for op in tracing.network.ops:
            assert shapes[op.name] == tuple(e.at(widths) for e in op.shape), op.name


def count(module: nn.Module, example: Tensor) -> tuple[int, int]:
    """Multiply-accumulates of one example by hooks on layers, and the bytes of all tensors."""
    total = 0

    def hook(layer: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal total
        fan = layer.weight[0].numel()
        total += output.numel() * fan

    handles = [m.register_forward_hook(hook) for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        run(module, (example,))
    for handle in handles:
        handle.remove()
    unique = {t.data_ptr(): t.numel() * 4 for t in [*module.parameters(), *module.buffers()]}
    return total // len(example), sum(unique.values())


@pytest.mark.parametrize("kind", KINDS)
def test_macs_and_bytes_are_those_of_torch(kind: Callable[[], nn.Module]) -> None:
    tracing = of(kind)
    for kept in (tracing.everything(), some(tracing, np.random.default_rng(0))):
        policy = Policy.make(tracing.network, {g: int(flags.sum()) for g, flags in kept.items()})
        found = count(cut(tracing.skeleton, tracing.ties, kept), image(2))
        assert macs(tracing.network, policy) == found[0]
        assert size_bytes(tracing.network, policy) == pytest.approx(found[1], rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_networks_come_back_from_json_and_do_not_depend_on_weights(kind: Callable[[], nn.Module]) -> None:
    network = of(kind).network
    assert Network.from_json(network.to_json()) == network
    assert trace(build(kind, seed=5), image(3)).fingerprint == network.fingerprint


def test_the_model_is_left_as_it_was() -> None:
    model = build(Residual).train()
    before, mode = checksum(model), [m.training for m in model.modules()]
    values = {k: v.clone() for k, v in model.state_dict().items()}
    traced(model, image())
    assert checksum(model) == before and [m.training for m in model.modules()] == mode
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_checksums_see_every_tensor() -> None:
    model = build(Residual)
    seen = {checksum(model)}
    for value in model.state_dict().values():
        value.view(-1)[0] += 1
        seen.add(checksum(model))
    assert len(seen) == 1 + len(model.state_dict())


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_batch_is_free(batch: int) -> None:
    tracing = traced(build(Attention), image(batch))
    assert tracing.skeleton.meta["batch"] is None
    model = build(Attention)
    with torch.no_grad():
        for size in (1, 4):
            close(tracing.skeleton(image(size)), model(image(size)))
    assert tracing.network == of(Attention).network


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(192, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.b(F.relu(self.a(x.reshape(3, 192))))
        return made


def test_a_fixed_batch_is_said_and_kept(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tracing = traced(build(Fixed), image(3))
    assert tracing.skeleton.meta["batch"] == 3 and "traced at 3" in caplog.text
    with torch.no_grad():
        close(tracing.skeleton(image(3)), build(Fixed)(image(3)))


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x.flatten(1))
        if y.sum() > 0:  # the line that stops the tracer
            return y
        return -y


def test_control_flow_over_values_is_an_error_with_its_line() -> None:
    line = next(n for n, text in enumerate(open(__file__), 1) if "the line that stops" in text)  # noqa: PTH123, SIM115
    with pytest.raises(TraceError, match=rf"test_trace.py:{line}.*control flow"):
        trace(build(Branch), image())


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu().mean((2, 3))


def test_a_model_without_layers_is_an_error() -> None:
    with pytest.raises(TraceError, match="no convolution or linear layer"):
        trace(Plain(), image())


@pytest.mark.parametrize("inputs", [None, "x", 3])
def test_inputs_that_are_none_are_an_error(inputs: Any) -> None:
    with pytest.raises(TraceError, match="example_inputs must be a tensor"):
        trace(build(Residual), inputs)


def test_inputs_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(TraceError, match="cannot be traced"):
        trace(build(Residual), torch.zeros(2, 5, 8, 8))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, first: Tensor, second: Tensor, scale: float = 1.0) -> Tensor:
        made: Tensor = self.head(F.relu(self.a(first) + scale * self.b(second)))
        return made


@pytest.mark.parametrize("swapped", [False, True])
def test_inputs_by_name_in_any_order(swapped: bool) -> None:
    model, x, y = build(TwoInputs), torch.randn(2, 4), torch.randn(2, 3)
    given_ = {"second": y, "first": x} if swapped else {"first": x, "second": y}
    for example in ((x, y), given_):
        tracing = traced(model, example)
        assert [(g.width, len(tracing.network.writers(g.name))) for g in tracing.network.groups] == [(6, 2)]
        with torch.no_grad():
            close(run(tracing.skeleton, tracing.example), model(x, y))


def test_what_is_left_out_is_named_with_a_reason() -> None:
    frozen = {x.name: x.frozen for x in of(Recurrent).network.layers if x.frozen}
    assert frozen == {"a": "operator lstm is not understood", "head": "the model returns it"}
    frozen = {x.name: x.frozen for x in of(Upsampling).network.layers if x.frozen}
    assert "b" in frozen and "conv_transpose" in frozen["b"] and frozen["e"] == "the model returns it"
    assert {x.name for x in of(Several).network.layers if x.frozen} == {"left", "right", "mid"}


class Sorted(nn.Module):
    """Channels are chosen by their values: only the reader of what is sorted can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(192, 8), nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.c(F.relu(self.b(self.a(x.flatten(1)).sort(1).values)))
        return made


class Indexed(nn.Module):
    """One channel is taken by its number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(192, 8), nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x.flatten(1))
        made: Tensor = self.c(F.relu(self.b(y))) * y[:, 3:4]
        return made


class Normed(nn.Module):
    """A softmax and a norm over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(192, 8), nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.c(F.normalize(self.b(self.a(x.flatten(1)).softmax(1)), dim=1))
        return made


class Constant(nn.Module):
    """Channels meet a large constant that has no labels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(192, 8), nn.Linear(8, 5)
        self.register_buffer("mask", torch.rand(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.b(self.a(x.flatten(1)) * torch.cat([self.mask[:, :4], torch.ones(1, 4)], 1))  # type: ignore[index]
        return made


@pytest.mark.parametrize("kind", [Sorted, Indexed, Normed, Constant])
def test_unsafe_groups_are_left_out_and_the_rest_is_cut(kind: Callable[[], nn.Module]) -> None:
    tracing = of(kind)
    assert all(x.frozen for x in tracing.network.layers if not x.outputs.terms)
    for kept in (some(tracing, np.random.default_rng(s)) for s in range(4)):
        with torch.no_grad():
            small = cut(tracing.skeleton, tracing.ties, kept)(image(3))
            if kind is not Normed:
                close(small, masked(tracing, kept, readers=True)(image(3)))


def test_attention_heads_of_torch_go_as_heads() -> None:
    network = of(OTHERS[0]).network
    assert {x.name for x in network.layers} >= {"inner", "head"}


@pytest.mark.skipif(importlib.util.find_spec("torch_pruning") is None, reason="pip install --no-deps torch-pruning==1.6.0")
@pytest.mark.parametrize("kind", [Residual, Separable])
def test_groups_equal_those_of_torch_pruning(kind: Callable[[], nn.Module]) -> None:
    import torch_pruning as tp

    model = build(kind)
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=image())
    head = model.get_submodule("head")
    theirs = set()
    for group in graph.get_all_groups(ignored_layers=[head], root_module_types=[nn.Conv2d, nn.Linear]):
        writers = {
            graph._module2name[d.target.module]
            for d, _ in group
            if isinstance(d.target.module, (nn.Conv2d, nn.Linear))
            and d.handler in (tp.prune_conv_out_channels, tp.prune_linear_out_channels, tp.prune_depthwise_conv_out_channels)
        }
        theirs.add((len(group[0].idxs), frozenset(writers)))
    network = of(kind).network
    assert {(g.width, frozenset(x.name for x in network.writers(g.name))) for g in network.groups} == theirs


def test_batch_norms_fold_into_one_layer_each() -> None:
    tracing = of(Residual)
    assert not [n for n in tracing.skeleton.graph.nodes if "batch_norm" in str(n.target)]
    assert all(x.bias for x in tracing.network.layers)
    assert tracing.network.parameters == ()
    model: Any = build(Residual)
    scale = (model.n1.running_var.double() + model.n1.eps).rsqrt() * model.n1.weight
    layer: Any = tracing.layer("a1")
    torch.testing.assert_close(layer.weight.double(), model.a1.weight.double() * scale[:, None, None, None], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(layer.bias.double(), model.n1.bias - model.n1.running_mean * scale, rtol=1e-6, atol=1e-6)


def test_a_layer_between_two_groups_keeps_the_order_of_its_channels() -> None:
    """Each single channel of each group, cut alone: equals masking it."""
    tracing = of(Separable)
    for group in tracing.network.groups:
        for channel in range(0, group.width, 3):
            kept = dict(tracing.everything())
            kept[group.name] = np.arange(group.width) != channel
            with torch.no_grad():
                close(cut(tracing.skeleton, tracing.ties, kept)(image()), masked(tracing, kept, readers=True)(image()))


def test_all_layers_are_in_the_order_of_the_forward_pass() -> None:
    names = [x.name for x in of(Residual).network.layers]
    assert names == ["stem", "a1", "a2", "short", "b1", "b2", "head"]
    assert list(itertools.chain.from_iterable(op.inputs for op in of(Residual).network.ops[:2])) == ["input"]
