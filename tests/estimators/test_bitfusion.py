"""BitFusion equals the rows of its public simulator, and a plain search written as loops."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Row, rows, unit

from tightrope.estimators.analytic import load_profile
from tightrope.estimators.analytic.bitfusion import BitFusion
from tightrope.estimators.analytic.block import Block
from tightrope.spaces.errors import DeviceError
from tightrope.spaces.unit import Unit

MODEL = load_profile("bitfusion").model
assert isinstance(MODEL, BitFusion)


def name(row: Row) -> str:
    return f"{row['layer']}-a{row['act_bits']}w{row['wgt_bits']}"


@pytest.mark.parametrize("row", rows("bitfusion"), ids=name)
def test_equals_the_public_simulator(row: Row) -> None:
    found = MODEL.search(Block.of(unit(row)), int(row["batch"]))
    assert found.cycles[0] == int(row["total_cycles"])
    assert found.stall_cycles[0] + found.edge_cycles[0] == int(row["mem_stall_cycles"])
    assert found.dram_read_bits[0] == pytest.approx(int(row["dram_read_bits"]), rel=0.01)
    assert found.dram_write_bits[0] == pytest.approx(int(row["dram_write_bits"]), rel=0.01)
    assert found.energy_pj[0] == pytest.approx(1e3 * float(row["energy_nJ_dram15pJ"]), rel=0.01)


def plain(model: BitFusion, u: Unit, batch: int) -> tuple[float, float]:
    """Cycles and picojoules of the best mapping, by trying all of them one after another; `u` is square, with one group."""
    k, s, o, a, w = u.kernel[0], u.stride[0], u.out_size[0], u.act_bits, u.weight_bits
    speed = {1: 4, 2: 4, 3: 2, 4: 2}
    rows_, columns = model.rows * speed.get(a, 1) * speed.get(w, 1), model.columns

    def powers(most: int, step: int = 1) -> list[int]:
        return sorted({min(step << i, most) for i in range(12)})

    best = (math.inf, math.inf)
    options = itertools.product(powers(batch), powers(o), powers(u.in_channels), powers(u.out_channels, columns))
    for b, t, ic, oc in options:
        weights = -(-k * k * ic // rows_) * rows_ * oc * w
        inputs = t * t * k * k * ic * b * a if u.first else (k + (t - 1) * s) ** 2 * ic * b * a
        outputs = t * t * -(-oc // columns) * columns * b * 32
        limits = [4 * model.weight_buffer_bytes, 4 * model.input_buffer_bytes, 4 * model.output_buffer_bytes]
        if any(x > limit for x, limit in zip((weights, inputs, outputs), limits, strict=True)):
            continue
        trips = {"b": -(-batch // b), "h": -(-o // t), "w": -(-o // t), "i": -(-u.in_channels // ic), "o": -(-u.out_channels // oc)}
        tiles = math.prod(trips.values())
        steps = -(-ic * k * k // rows_) if u.first else k * k * -(-ic // rows_)
        compute = tiles * b * t * t * -(-oc // columns) * steps
        for order in itertools.permutations("bhwio"):
            moved, held = [], []
            for size, needs, limit in zip((weights, inputs, outputs), ("io", "bhwi", "bhwo"), limits, strict=True):
                total = most = size
                for loop in order:
                    outgrown = total > limit
                    if loop in needs or outgrown:
                        total *= trips[loop]
                    most = max(most, total) if total <= limit else most
                moved.append(total)
                held.append(most)
            fill, drain = sum(held), held[2]
            behind = -(-(sum(moved) + moved[2] - fill - drain) // model.interface_bits) - compute
            cycles = compute + max(0, behind) + -(-fill // model.interface_bits) + -(-drain // model.interface_bits)
            products = tiles * b * t * t * ic * oc * k * k
            energy = (
                model.core_pj_per_cycle * compute
                + products * (w * model.weight_read_pj_per_bit + a * model.input_read_pj_per_bit)
                + moved[0] * model.weight_write_pj_per_bit + moved[1] * model.input_write_pj_per_bit
                + (moved[2] + 32 * tiles * b * t * t * oc) * (model.output_read_pj_per_bit + model.output_write_pj_per_bit)
                + (sum(moved) + moved[2]) * model.dram_pj_per_bit
            )  # fmt: skip
            best = min(best, (cycles, energy))
    return best


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([1, 3, 5]), st.sampled_from([1, 2]), st.sampled_from([1, 4, 7, 12]), st.integers(1, 200), st.integers(1, 200),
    st.integers(1, 3), st.integers(1, 8), st.integers(1, 8), st.booleans(), st.sampled_from([64, 192]),
)  # fmt: skip
def test_equals_a_plain_search(
    k: int, s: int, o: int, ic: int, oc: int, batch: int, w: int, a: int, first: bool, interface: int
) -> None:
    reach = ((o - 1) * s + k,) * 2
    u = Unit("x", "conv", ic, oc, (k, k), (s, s), (0, 0), (1, 1), 1, reach, (o, o), w, a, first=first)
    model = replace(MODEL, interface_bits=interface)
    found = model.search(Block.of(u), batch)
    cycles, energy = plain(model, u, batch)
    assert found.cycles[0] == cycles
    assert found.energy_pj[0] == pytest.approx(energy)


@settings(deadline=None)
@given(st.integers(1, 512), st.integers(1, 512), st.sampled_from([1, 3]), st.integers(2, 8))
def test_five_to_seven_bits_compute_as_eight_and_three_as_four(ic: int, oc: int, k: int, other: int) -> None:
    model = replace(MODEL, interface_bits=10**9, weight_buffer_bytes=10**9, input_buffer_bytes=10**9, output_buffer_bytes=10**9)
    unit_ = Unit("x", "conv", ic, oc, (k, k), (1, 1), (0, 0), (1, 1), 1, (k + 6, k + 6), (7, 7), 8, 8)
    bits = np.array([8, 7, 6, 5, 4, 3])
    for weights, acts in ((bits, np.full(6, other)), (np.full(6, other), bits)):
        cycles = model.search(Block(unit_, np.full(6, ic), np.full(6, oc), weights, acts), 1).compute_cycles.tolist()
        assert cycles[0] == cycles[1] == cycles[2] == cycles[3] >= cycles[4] == cycles[5]


def test_narrower_weights_may_cost_more() -> None:
    """The fully connected layer at 2-bit activations: rows are padded to 16 x 4, so that 8-bit weights move more."""
    row = next(r for r in rows("bitfusion") if r["layer"] == "r18_fc" and r["act_bits"] == r["wgt_bits"] == "8")
    wide, narrow = unit(row), replace(unit(row), act_bits=2)
    assert MODEL.search(Block.of(narrow), 1).cycles[0] > MODEL.search(Block.of(wide), 1).cycles[0]


def test_tokens_count_as_a_batch() -> None:
    tokens = Unit("x", "linear", 64, 96, (1, 1), (1, 1), (0, 0), (1, 1), 1, (1, 49), (1, 49), 8, 8)
    single = replace(tokens, in_size=(1, 1), out_size=(1, 1))
    assert MODEL.search(Block.of(tokens), 2).cycles[0] == MODEL.search(Block.of(single), 98).cycles[0]


def test_operands_above_eight_bits_are_an_error() -> None:
    row = rows("bitfusion")[0]
    with pytest.raises(DeviceError, match="8 bits"):
        MODEL.search(Block.of(replace(unit(row), weight_bits=32)), 1)


def test_a_layer_that_no_tile_fits_is_an_error() -> None:
    row = rows("bitfusion")[1]
    with pytest.raises(DeviceError, match="r18_l3_3x3"):
        replace(MODEL, input_buffer_bytes=2).search(Block.of(unit(row)), 1)
