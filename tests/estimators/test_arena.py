"""Peak RAM of `ort-cpu` against the arena of ONNX Runtime itself, and against cases small enough to follow by hand."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from handmade import Handmade, mobilenet, resnet8, vit
from payloads import random_payload

from tightrope.compressors.export.onnx import write
from tightrope.estimators.measured.actual import arena_taken, optimised
from tightrope.estimators.measured.arena import arena_bytes, block_bytes, executed, workspace_bytes, workspaces
from tightrope.estimators.measured.layouts import BLOCKS
from tightrope.estimators.measured.lowering import Lowering
from tightrope.estimators.measured.nodes import Node, Tensor, key, model
from tightrope.estimators.measured.ort import OrtCpu
from tightrope.estimators.measured.plan import make
from tightrope.spaces import Space

NETS = {net.__name__: Handmade(net) for net in (resnet8, mobilenet, vit)}
BLOCK = BLOCKS[OrtCpu().isa]
LOWERINGS = {
    (name, batch): Lowering(net.network, make(net.network, net.at, batch), BLOCK) for name, net in NETS.items() for batch in (1, 4)
}


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", NETS)
def test_peak_ram_is_that_of_the_real_arena(name: str, batch: int, record_property: Callable[[str, object], None]) -> None:
    net, lowering = NETS[name], LOWERINGS[name, batch]
    space, rng = Space.build(net.network, OrtCpu().pairs), np.random.default_rng(batch)
    policies = [space.dense, space.uniform(0.5, (8, 8)), *(space.sample(rng) for _ in range(12))]
    errors, ordered = [], []
    for policy in policies:
        built = write(net.at(policy.all_widths(net.network), batch), net.network, random_payload(net.network, policy))
        nodes = lowering.nodes(policy)
        errors.append(abs(arena_bytes(nodes, BLOCK) / arena_taken(built) - 1))
        ordered.append([node.kind.split(":")[-1] for node in executed(nodes)] == [n.op_type for n in optimised(built).graph.node])
    record_property("errors", errors)
    assert np.mean(np.array(errors) == 0) >= 0.9 and max(errors) <= 0.1
    assert np.mean(ordered) >= 0.9


@pytest.mark.parametrize("name", NETS)
def test_workspaces_are_those_of_the_real_kernels(name: str) -> None:
    space, rng = Space.build(NETS[name].network, OrtCpu().pairs), np.random.default_rng(0)
    nodes = {key(node): node for _ in range(3) for node in LOWERINGS[name, 4].nodes(space.sample(rng))}
    chosen = [(k, node) for k, node in nodes.items() if workspaces(node, BLOCK)][:12] + [*nodes.items()][:12]
    for (family, sizes), node in chosen:
        if "->f:" in family and "(u:" not in family:  # the file of one node takes and gives floating point
            assert workspace_bytes([node], BLOCK) == arena_taken(model(family, sizes)), family


def relu(source: Tensor) -> Node:
    return Node("Relu", [source], [Tensor(source.shape)], (), (None,))


def conv(source: Tensor, shape: tuple[int, ...]) -> Node:
    return Node("com.microsoft.nchwc:Conv", [source], [Tensor(shape)], (("group", 1),), (None,))


def ended(nodes: Sequence[Node]) -> list[Node]:
    nodes[-1].out.is_output = True
    return [*nodes]


def test_the_caller_holds_inputs_and_outputs() -> None:
    assert arena_bytes(ended([relu(Tensor((1, 64)))]), 16) == 0


def test_an_activation_works_in_place_unless_its_input_is_read_again() -> None:
    first = conv(Tensor((1, 16, 8, 8)), (1, 16, 8, 8))
    second = relu(first.out)
    assert block_bytes(ended([first, second, conv(second.out, (1, 16, 8, 8))])) == 4096
    first = conv(Tensor((1, 16, 8, 8)), (1, 16, 8, 8))
    second = relu(first.out)
    both = Node("Add", [first.out, second.out], [Tensor((1, 16, 8, 8))], (), (None, None))
    assert block_bytes(ended([first, second, both])) == 2 * 4096


def test_a_gap_is_filled_by_what_fits_it_best() -> None:
    """Sizes 4, 1, 2 are laid side by side; the 3 that comes when the 4 has gone takes its place."""
    source = Tensor((1, 64))
    big = Node("Gemm", [source], [Tensor((4, 64))], (), (None,))
    small = Node("Gemm", [big.out], [Tensor((1, 64))], (), (None,))
    middle = Node("Gemm", [small.out], [Tensor((2, 64))], (), (None,))
    last = Node("Gemm", [middle.out], [Tensor((3, 64))], (), (None,))
    end = Node("Sum", [small.out, middle.out, last.out], [Tensor((1, 64))], (), (None, None, None))
    order = executed(ended([end, last, middle, small, big]))
    assert order == [big, small, middle, last, end]
    assert block_bytes(order) == 256 * (4 + 1 + 2)


def test_the_youngest_maker_runs_first() -> None:
    root = relu(Tensor((1, 64)))
    old, young = relu(root.out), relu(root.out)
    end = Node("Add", [old.out, young.out], [Tensor((1, 64))], (), (None, None))
    assert executed(ended([root, old, young, end])) == [root, young, old, end]


def test_workspaces_take_the_least_piece_that_is_large_enough() -> None:
    def asking(rows: int) -> Node:
        return Node("com.microsoft:QGemm", [Tensor((rows, 8), True)], [Tensor((rows, 64), True)], (), (None,))

    assert workspace_bytes([asking(3), asking(2), asking(5), asking(4)], 16) == 256 * (3 + 5)
