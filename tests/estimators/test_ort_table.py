"""The latency table: which nodes are timed, how others are read from them, and a file that survives what happens to files."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from tightrope.estimators.measured import fitted
from tightrope.estimators.measured.fitted import (
    CACHE,
    FLOATS,
    INTEGERS,
    KINDS,
    MIB,
    MOVES,
    WIDE,
    WIDE_FLOATS,
    columns,
    nearest_sum,
    quiet,
    surely,
    traits,
)
from tightrope.estimators.measured.grid import Axis, Grid, counted, design, output_column
from tightrope.estimators.measured.nodes import bytes_of
from tightrope.estimators.measured.table import Table, Untimed, designs, pooled
from tightrope.spaces.errors import DeviceError

CONV = "com.microsoft:QLinearConv{group=1}(u:1,9,9,*;=f:;=u:;=s:*,*,3,3;=f:*)->u:1,9,9,*"
RELU = "Relu{}(f:1,*,9,9)->f:1,*,9,9"
MARK = {"processor": "test", "threads": 1}


def conv(inputs: int, outputs: int) -> tuple[int, ...]:
    return (inputs, outputs, inputs, outputs, outputs)


def filled(path: Path | None) -> Table:
    """A table of a Relu whose time is its width in microseconds."""
    table = Table(path, MARK)
    wanted = designs({RELU: {(w, w) for w in (8, 16, 32, 64)}}, 16)
    table.declare(wanted)
    keys = table.missing(wanted)
    samples = np.array([[sizes[0] / 1000 + 0.001 for _, sizes in keys]] * 4)
    table.add(keys, samples, 0.5, 0.001)
    return table


# --- the grid ---------------------------------------------------------------------------------------------------------


def test_the_column_of_output_channels_is_found_in_the_text() -> None:
    assert output_column(CONV) == 1
    assert output_column(RELU) is None
    assert output_column("Gemm{transB=1}(f:49,*;=f:10,*)->f:49,10") is None
    assert output_column("com.microsoft:MatMulNBits{K=*;N=*}(f:49,*;=u:*,*,16;=f:*,*)->f:49,*") == 3


def test_output_channels_count_in_steps_of_sixteen() -> None:
    sizes = (1, 8, 15, 16, 17, 20, 32, 33)
    assert [counted(n, "steps") for n in sizes] == [1, 8, 15, 16, 32, 32, 32, 48]
    assert [counted(n, "fours") for n in sizes] == [1, 8, 15, 16, 17, 32, 32, 33]
    assert [counted(n, "eights") for n in (8, 16, 20, 24, 28, 40)] == [8, 16, 20, 32, 28, 48]
    assert [counted(n, "") for n in sizes] == [*sizes]


def test_blocks_of_channels_count_each_and_those_of_eight_are_timed_at_the_ends_of_fours() -> None:
    family = "com.microsoft.nchwc:Conv{kernel_shape=[3,3]}(f:1,8,9,9;=f:*,8,3,3)->f:1,*,9,9"
    for met, timed in ((range(8, 73, 8), (8, 32, 40, 64, 72)), (range(24, 57, 8), (24, 32, 40, 56)), (range(16, 129, 16), None)):
        (axis,) = design(family, {(c, c) for c in met}).axes
        assert axis.rule == "blocks" and axis.values == (timed or tuple(met))
        assert [axis.at((c, c)) for c in met] == [*met] and axis.around(56) == axis.values


def test_integer_convolutions_take_what_4_does_not_divide_apart() -> None:
    met = {conv(i, o) for i in (16, 32) for o in (4, 8, 9, 12, 15, 16, 18, 21, 24, 32, 33, 48, 64)}
    (axis,) = (a for a in design(CONV, met).axes if a.rule == "fours")
    assert axis.values == (4, 8, 9, 12, 15, 16, 18, 21, 32, 33, 48, 64)
    assert axis.around(21) == (9, 21, 33) and axis.around(32) == (16, 32, 48, 64) and axis.around(8) == (4, 8, 12)


def test_integer_convolutions_with_avx2_take_what_8_does_not_divide_apart() -> None:
    (axis,) = (a for a in design(CONV, {conv(i, o) for i in (16, 32) for o in range(4, 65, 4)}, 8).axes if a.rule == "eights")
    assert axis.values == (4, 8, 16, 32, 36, 48, 60, 64)
    assert axis.around(44) == (4, 36, 60) and axis.around(axis.at((16, 40))) == (16, 32, 48, 64)


def test_integer_depthwise_convolutions_are_read_among_those_with_the_same_rest() -> None:
    family = "com.microsoft:QLinearConv{group=*}(u:1,9,9,*;=f:;=u:;=s:*,1,3,3;=f:*)->u:1,9,9,*"
    (axis,) = design(family, {(c,) * 5 for c in range(20, 200, 4)}).axes
    assert all(v % 16 == 4 for v in axis.around(36)) and len(axis.values) <= 4 * 6
    known = {(v,): v // 16 + 10.0 * (v % 16) for v in axis.values}
    assert Grid((axis,), known).at(np.array([[100, 0, 0, 0, 0]])) == pytest.approx([46.0])


def test_a_design_has_the_free_sizes_as_axes_and_keeps_the_ends() -> None:
    met = {conv(i, o) for i in range(8, 129, 8) for o in range(8, 129, 8)}
    found = design(CONV, met)
    assert [(a.column, a.rule) for a in found.axes] == [(0, ""), (1, "fours")]
    inputs, outputs = (a.values for a in found.axes)
    assert inputs[0] == 8
    assert inputs[-1] == 128
    assert outputs == (8, 16, 32, 48, 64, 80, 96, 112, 128)
    assert len(found.keys) == len(inputs) * len(outputs) < len(met)
    assert all(k[0] == k[2] and k[1] == k[3] == k[4] for k in found.keys)


def test_sizes_that_follow_each_other_are_one_axis() -> None:
    reorder = "com.microsoft.nchwc:ReorderInput{}(f:1,*,9,9)->f:1,*,9,9"
    found = design(reorder, {(c, -(-c // 16) * 16) for c in range(4, 65, 4)})
    assert [a.column for a in found.axes] == [0]
    assert all(padded == -(-c // 16) * 16 for c, padded in found.keys)


def test_a_product_grid_reads_bilinear_times_exactly() -> None:
    axes = (Axis(0, "", (16, 64, 128)), Axis(1, "steps", (16, 32, 128)))

    def time(a: int, b: int) -> float:
        return 1 + 2 * a + 3 * b + 0.5 * a * b

    known = {(a, b): time(a, b) for a in axes[0].values for b in axes[1].values}
    grid = Grid(axes, known)
    read = grid.at(np.array([(80, 96), (80, 90), (16, 128)]))
    assert read == pytest.approx([time(80, 96), time(80, 96), time(16, 128)])  # 90 counts as the next step, 96
    assert np.isnan(grid.at(np.array([(8, 32), (144, 32), (64, 144)]))).all()
    del known[64, 32]
    assert np.isnan(Grid(axes, known).at(np.array([(80, 16), (80, 128)]))).tolist() == [False, False]
    assert np.isnan(Grid(axes, known).at(np.array([(80, 20), (64, 128)]))).tolist() == [True, False]


def test_sizes_are_read_among_their_like() -> None:
    axis = (Axis(0, "", (16, 24, 32, 40, 48)),)
    known = {(16,): 1.0, (32,): 2.0, (48,): 3.0, (24,): 10.0, (40,): 20.0}
    assert Grid(axis, known).at(np.array([[32]])) == 2.0
    without = {k: v for k, v in known.items() if k != (32,)}
    assert Grid((Axis(0, "", (16, 24, 40, 48)),), without).at(np.array([[32]])) == 2.0


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_table_reads_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    table = filled(path)
    assert table.time((RELU, (32, 32))) == pytest.approx(0.032)
    assert table.time((RELU, (48, 48))) == pytest.approx(0.048)
    again = Table(path, MARK)
    assert not again.missing(designs({RELU: {(w, w) for w in (8, 16, 32, 64)}}, 16))
    for width in (8, 48, 64):
        assert again.time((RELU, (width, width))) == table.time((RELU, (width, width)))
    with pytest.raises(Untimed):
        again.time((RELU, (128, 128)))
    with pytest.raises(Untimed):
        again.time((CONV, conv(8, 8)))


def test_times_of_another_hour_are_scaled_by_the_reference() -> None:
    table = filled(None)
    table.declare(designs({CONV: {conv(16, 16)}}, 16))
    table.add([(CONV, conv(16, 16))], np.full((4, 1), 0.129), 1.0, 0.001)  # the machine was half as fast
    assert table.time((CONV, conv(16, 16))) == pytest.approx(0.064)


@pytest.mark.parametrize("counts", [(1,), (2,), (7, 7, 7), (3, 5)])
def test_the_low_quartile_of_passes_is_that_of_all_their_samples(counts: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    passes = [rng.uniform(1, 2, n).tolist() for n in counts]
    assert pooled(passes) == pytest.approx(np.percentile(np.concatenate(passes), 25), rel=1e-12)


def test_passes_are_pooled() -> None:
    table = filled(None)
    wanted = designs({RELU: {(w, w) for w in (8, 16, 32, 64)}}, 16)
    assert not table.missing(wanted) and len(table.missing(wanted, 2)) == 4
    table.add([(RELU, (64, 64))], np.full((4, 1), 0.129), 0.5, 0.001)  # a neighbour took the cache
    assert table.time((RELU, (64, 64))) == pytest.approx(0.064)
    table.add([(RELU, (32, 32))], np.full((4, 1), 0.017), 0.5, 0.001)  # it had it before
    assert table.time((RELU, (32, 32))) == pytest.approx(0.016)


def test_passes_of_a_slower_machine_do_not_count() -> None:
    """On the reference's scale what waits for memory looks too cheap then, and what computes too dear."""
    table = filled(None)
    for width, ms in ((32, 0.041), (64, 0.201)):  # at half the speed 0.02 and 0.1 instead of 0.032 and 0.064
        table.add([(RELU, (width, width))], np.full((4, 1), ms), 1.0, 0.001)
        assert table.time((RELU, (width, width))) == pytest.approx(0.001 * width)
    table.add([(RELU, (64, 64))], np.full((4, 1), 0.067), 0.55, 0.001)  # a tenth slower counts
    assert table.time((RELU, (64, 64))) == pytest.approx(0.06)
    for ms, reference in ((1.001, 0.5), (1.601, 1.0), (1.201, 0.6)):
        table.add_nets(['{"policy":1}'], np.full((4, 1), ms), reference, 0.001, 2.001 * reference / 0.5)
    assert table.nets['{"policy":1}'] == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize(
    "line",
    ['{"node":"x","sizes":[8', "", "[]", '{"node":"0","sizes":[8,8],"ms":[1],"reference_ms":1,"empty_ms":0}', "\x00\xff",
     '{"node":ID,"sizes":[8,8],"ms":[NaN],"reference_ms":1,"empty_ms":0}',
     '{"node":ID,"sizes":[8,8],"ms":[-1.0],"reference_ms":1,"empty_ms":0}',
     '{"node":ID,"sizes":[8,8],"ms":[],"reference_ms":1,"empty_ms":0}',
     '{"node":ID,"sizes":[8,8],"ms":["fast"],"reference_ms":1,"empty_ms":0}',
     '{"node":ID,"sizes":[8,8],"ms":[1.0],"reference_ms":0,"empty_ms":0}', '{"family":"Relu{}(f:*)->f:*","axes":[3]}',
     '{"family":"Relu{}(f:*)->f:*","axes":[[0,true,[8]]]}'],
)  # fmt: skip
def test_a_bad_line_is_left_out_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture, line: str) -> None:
    path = tmp_path / "table.jsonl"
    filled(path)
    node = next(json.loads(x) for x in path.read_text().splitlines() if x.startswith('{"node"'))
    with path.open("a") as file:
        file.write(line.replace("ID", json.dumps(node["node"])))
    with caplog.at_level(logging.WARNING):
        table = Table(path, MARK)
    assert table.time((RELU, (8, 8))) == pytest.approx(0.008)
    assert len(caplog.records) == (1 if line else 0)
    assert all("line" in record.getMessage() for record in caplog.records)
    table.add([(RELU, (16, 16))], np.full((4, 1), 0.014), 0.5, 0.001)  # begins a line of its own
    assert Table(path, MARK).time((RELU, (16, 16))) == pytest.approx(0.013)


def test_a_table_for_something_else_never_matches(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    filled(path)
    kept = path.read_bytes()
    with pytest.raises(DeviceError, match="another processor"):
        Table(path, {**MARK, "processor": "other"})
    assert path.read_bytes() == kept


@pytest.mark.parametrize("head", ["", "hello", '{"tightrope": "node table", "version": 99, "fingerprint": {}}', '{"version": 1}'])
def test_what_is_no_table_is_an_error(tmp_path: Path, head: str) -> None:
    path = tmp_path / "table.jsonl"
    path.write_text(head + "\n")
    with pytest.raises(DeviceError, match="move the file away"):
        Table(path, MARK)
    assert path.read_text() == head + "\n"


def test_whole_nets_and_completion_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    table = filled(path)
    for ms in (1.001, 1.801, 1.001):  # a neighbour falls on one pass
        table.add_nets(['{"policy":1}'], np.full((4, 1), ms), 0.5, 0.001, 2.001)
    table.add_nets(['{"policy":2}'], np.full((4, 1), 3.001), 1.0, 0.001, 4.001, held=True)
    table.finish()
    again = Table(path, MARK)
    assert again.complete
    assert again.nets == {'{"policy":1}': pytest.approx(0.5)} and again.held == {'{"policy":2}': pytest.approx(0.75)}
    assert again.dense_ms == pytest.approx(2.0)


class Shaky:
    """Calls that take twice as long in some rounds as in others."""

    def __init__(self, wrong: int) -> None:
        self.left = wrong

    def visit(self) -> int:
        self.left -= 1
        return 2_000_000 if self.left >= 0 and self.left % 2 else 1_000_000


def test_nothing_is_timed_on_a_machine_that_is_too_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitted, "MOST_NOISE", 0.1)
    assert quiet([Shaky(0)], np.random.default_rng(0)) == 0.0
    assert quiet([Shaky(40)], np.random.default_rng(0)) == 0.0  # quiet when it is looked at again
    with pytest.raises(DeviceError, match=r"at most 10 % .* 100, 100, 100 % .* stop what else runs"):
        quiet([Shaky(1000)], np.random.default_rng(0))


@pytest.mark.parametrize("count", [9, 40])
def test_the_interval_holds_one_more_error_in_nine_of_ten_cases(count: int) -> None:
    rng = np.random.default_rng(0)
    draws = rng.laplace(size=(20_000, count + 1))
    inside = [abs(row[-1]) <= surely(row[:-1]) for row in draws]
    assert np.mean(inside) == pytest.approx(0.9, abs=0.007)  # three standard deviations
    lighter = rng.normal(size=(20_000, count + 1))
    assert 0.9 < np.mean([abs(row[-1]) <= surely(row[:-1]) for row in lighter]) < 0.95


def test_single_nets_do_not_pull_the_fit() -> None:
    rng = np.random.default_rng(0)
    times, weights, made, nodes = rng.uniform(0.1, 1, (40, KINDS)), *rng.uniform(0, 2 * CACHE, (2, 40)), rng.integers(20, 60, 40)
    integers, floats = times[:, INTEGERS], times[:, FLOATS] + times[:, WIDE_FLOATS]
    again = weights * np.maximum(1 - CACHE / (weights + made), 0)
    truth = np.array([1.1, 1.3, 0.8, 1.0, 0.6, 0.9, 0.5, 0.2, 0.001])
    features = np.column_stack([times, weights, made, nodes])
    times = np.column_stack([times, integers * floats / (integers + floats), again / MIB, nodes]) @ truth
    times[3] *= 1.6
    assert nearest_sum(columns(features) / times[:, None]) == pytest.approx(truth, rel=0.1)


def test_a_kind_of_nodes_has_the_scale_of_the_others_where_no_net_tells() -> None:
    rng = np.random.default_rng(0)
    features = np.zeros((20, KINDS + 3))
    features[:, 0], features[:, -1] = rng.uniform(0.1, 1, 20), rng.integers(20, 60, 20)
    found = nearest_sum(columns(features) / (1.1 * features[:, 0] + 0.001 * features[:, -1])[:, None])
    assert found == pytest.approx([1.1] * KINDS + [0.0, 0.0, 0.001], rel=0.03)


def test_weights_are_fetched_anew_where_a_net_is_larger_than_the_cache() -> None:
    features = np.zeros((4, KINDS + 3))
    features[:, KINDS], features[:, KINDS + 1] = [0, CACHE / 4, CACHE, CACHE / 2], [4 * CACHE, CACHE / 4, CACHE, 1e9]
    assert columns(features)[:, KINDS + 1] == pytest.approx(np.array([0, 0, CACHE / 2, CACHE / 2]) / MIB, rel=0.01)


def test_what_a_node_holds_is_counted_in_bytes() -> None:
    conv_bytes = (4 + 1) + 8 * 16 * 9 + 4 * 16  # scale and zero of activations, weights, their scales
    assert bytes_of(CONV, np.array([conv(8, 16)])).tolist() == [[conv_bytes], [9 * 9 * 8], [9 * 9 * 16]]
    gemm = "Gemm{transB=1}(f:2,3;=f:4,3;=l:2=*,0)->f:2,4"
    assert bytes_of(gemm, np.array([[7]])).tolist() == [[4 * 12 + 16], [4 * 6], [4 * 8]]
    assert bytes_of(RELU, np.array([[8, 8], [16, 16]])).tolist() == [[0, 0], *2 * [[4 * 81 * 8, 4 * 81 * 16]]]
    large = np.array([[2000, 2000], [4000, 4000]])
    made = [4 * 81 * 2000, 4 * 81 * 4000]
    assert traits(RELU, large).tolist() == [[0, WIDE], [0, 0], made] and traits(RELU, large[:1]).tolist() == [[0], [0], made[:1]]
    reorder = "com.microsoft.nchwc:ReorderInput{channels_last=0}(f:1,*,9,9)->f:1,*,9,9"
    assert traits(reorder, large)[0].tolist() == [MOVES, WIDE]
    assert traits("Gemm{}(f:1,*,9,9)->f:1,*,9,9", large)[0].tolist() == [FLOATS, WIDE_FLOATS]


@pytest.mark.parametrize(
    ("kind", "operators"),
    [
        (MOVES, "Transpose QuantizeLinear com.microsoft.nchwc:ReorderOutput quantize channels_last"),
        (FLOATS, "Gemm Conv com.microsoft:FusedConv com.microsoft.nchwc:Conv Conv2d Linear"),
        (INTEGERS, "com.microsoft:QLinearConv com.microsoft:QGemm QLinearMatMul MatMulInteger QuantConv2d QuantLinear4"),
        (0, "com.microsoft:QLinearAdd com.microsoft:MatMulNBits Relu aten.add.Tensor"),
    ],
)
def test_operators_are_told_apart_by_what_they_do(kind: int, operators: str) -> None:
    for operator in operators.split():
        assert traits(f"{operator}{{}}(f:1,*)->f:1,*", np.array([[8, 8]]))[0].tolist() == [kind], operator
